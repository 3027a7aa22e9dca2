"""What a method says of itself: the call that made it.

A method is a named tuple of functions, so it cannot hold its name but in a field, which every tree of its functions and
every comparison would see. Its ``init`` has it, as an attribute: that function is made for this method alone.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_FAMILIES = "scalarization", "aggregation"
_N_SHOWN = 8  # numbers of an array, entries of a list or dict


class Call(NamedTuple):
    """The call that made a method.

    Attributes:
      factory: the function that was called.
      arguments: what it was given, with its defaults.
      before: the call whose method it has returned, if that is not its own.
    """

    factory: Callable[..., Any]
    arguments: inspect.BoundArguments
    before: Any = None

    def __repr__(self) -> str:
        """The call as one writes it: arguments without a default by position, others by name unless at their default.

        A method's name has its family, as in ``scalarization.mean()``: there is another ``aggregation.mean()``.
        """
        *_, folder, _ = ("", "", *self.factory.__module__.split("."))
        family = f"{folder}." if folder in _FAMILIES else ""
        return f"{family}{self.factory.__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        for name, parameter in self.arguments.signature.parameters.items():
            value = self.arguments.arguments[name]
            if parameter.kind is parameter.VAR_POSITIONAL:
                yield from map(_shown, value)
            elif parameter.kind is parameter.VAR_KEYWORD:
                yield from (f"{key}={_shown(given)}" for key, given in value.items())
            elif parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY:
                yield _shown(value)
            elif not _is_same(value, parameter.default):
                yield f"{name}={_shown(value)}"


def factory_of(functions: Iterable[Any]) -> str | None:
    """The name of the public function in which one of these was made, as ``pcgrad.<locals>.weigh`` in ``pcgrad``."""
    for function in functions:
        outer = getattr(function, "__qualname__", "").split(".<locals>")[:-1]
        if outer and function.__module__ not in ("mtlbalance.base", "mtlbalance.states"):
            return outer[-1].split(".")[-1]
    return None


def made_in(functions: Iterable[Any], method: Any) -> Any:
    """The method, which says in which function these were made, of which a builder made it."""
    method.init.made_by = factory_of(functions) or ""
    return method


def named(method: Any, made_by: Call) -> Any:
    """The method, which says that it was made by this call."""
    init, before = method.init, call_of(method)
    if not isinstance(getattr(init, "made_by", None), str):  # not made by a builder, or another call has returned it
        method = method._replace(init=wraps(init)(lambda *args, **kwargs: init(*args, **kwargs)))
    kept = {name: _kept(value) for name, value in made_by.arguments.arguments.items()}
    method.init.made_by = Call(made_by.factory, inspect.BoundArguments(made_by.arguments.signature, kept), before)
    return method


def _kept(value: Any) -> Any:
    """An argument for as long as the method lives: as it is now, and without numbers that are not shown."""
    if hasattr(value, "dtype") and np.size(value) > _N_SHOWN:
        return jax.ShapeDtypeStruct(np.shape(value), value.dtype)
    if isinstance(value, Mapping):
        return {key: _kept(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_kept, value))
    if isinstance(value, tuple) and not hasattr(value, "needs"):  # a state
        return SimpleNamespace(__name__=f"{type(value).__name__}(...)")
    return value


def call_of(method: Any) -> Call | None:
    """The call that made a method; ``None`` if that was none of a memoized factory."""
    made_by = getattr(method.init, "made_by", None)
    return made_by if isinstance(made_by, Call) else None


def shown(method: Any) -> str:
    """The call that made a method, as far as it is known."""
    made_by = getattr(method.init, "made_by", "")
    return repr(made_by) if isinstance(made_by, Call) else f"{made_by or type(method).__name__}(...)"


def _shown(value: Any) -> str:
    """An argument in a few words: numbers and names as they are, of all else what it is."""
    if isinstance(value, jax.core.Tracer):
        return f"Traced<{value.aval.str_short()}>"
    if hasattr(value, "dtype"):
        return _array(value)
    if isinstance(value, Mapping | list) and len(value) > _N_SHOWN:
        return f"{type(value).__name__}[{len(value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if type(value) is tuple:
        return f"({', '.join(map(_shown, value))}{',' if len(value) == 1 else ''})"
    if hasattr(value, "init") and hasattr(value, "needs"):
        return repr(value)
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    name = getattr(value, "__name__", None)
    return name or f"{type(value).__name__}(...)"


def _array(x: Any) -> str:
    """Few numbers as they are; the dtype and the shape of more, and of what is not here to be read."""
    is_here = not isinstance(x, jax.Array) or (x.is_fully_addressable and not x.is_deleted())
    if is_here and np.ndim(x) <= 1 and np.size(x) <= _N_SHOWN and not jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return np.array2string(np.asarray(x), separator=", ", max_line_width=1000)
    return f"{x.dtype}[{','.join(map(str, np.shape(x)))}]"


def _is_same(value: Any, default: Any) -> bool:
    if value is default:
        return True
    is_plain = isinstance(default, str | int | float | tuple) and type(value) is type(default)
    return is_plain and repr(value) == repr(default)
