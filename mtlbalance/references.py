"""The papers from which methods are: their BibTeX, in ``references.bib``."""

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from mtlbalance.calls import Call, call_of
from mtlbalance.contract import Aggregator, Scalarizer, check_is_method

_ENTRY = re.compile(r"^% (?P<methods>[\w, ]+)\n(?P<bibtex>@\w+\{\w+,\n.*?^\})$", re.MULTILINE | re.DOTALL)


def cite(method: Scalarizer | Aggregator) -> str:
    """The BibTeX of the papers from which a method is, and those of the methods that it wraps.

    Args:
      method: of either family, made by the factories of this library, or by a memoized one of yours.

    Returns:
      The entries, one after the other, each once; an empty text for a method without a paper, as the mean.

    Raises:
      TypeError: if it is of neither family.

    Example:
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation, scalarization
      >>> method = mtl.skip_nonfinite(mtl.chain(scalarization.geometric_mean(), aggregation.upgrad()))
      >>> print(mtl.cite(method))  # doctest: +ELLIPSIS
      @inproceedings{chennupati2019multinet,
        title = {{MultiNet++}: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task Learning},
      ...
      <BLANKLINE>
      @article{quinton2024jacobian,
      ...
    """
    check_is_method("method", method, "a Scalarizer or an Aggregator", Scalarizer, Aggregator)
    return "\n\n".join(dict.fromkeys(entry for name in _names_in(method) for entry in entries_of(name)))


def entries_of(name: str) -> list[str]:
    """The BibTeX entries that stand for the method of this name, as ``"upgrad"``, in the file's order."""
    return [bibtex for names, bibtex in _entries() if name in names]


@cache
def _entries() -> tuple[tuple[tuple[str, ...], str], ...]:
    """Names of methods and the entry that they cite."""
    text = resources.files("mtlbalance").joinpath("references.bib").read_text("utf-8")
    return tuple((tuple(found["methods"].split(", ")), found["bibtex"]) for found in _ENTRY.finditer(text))


def _names_in(given: Any) -> Iterator[str]:
    """The names of this library's methods in a method, or in what a factory is given, the outermost first."""
    if isinstance(given, Scalarizer | Aggregator):
        yield from _names_in(call_of(given))
    elif isinstance(given, Call):
        if given.factory.__module__.partition(".")[0] == "mtlbalance":
            yield given.factory.__name__
        yield from _names_in(given.before)
        yield from _names_in(given.arguments.arguments)
    elif isinstance(given, dict):
        for each in given.values():
            yield from _names_in(each)
    elif isinstance(given, tuple | list):
        for each in given:
            yield from _names_in(each)
