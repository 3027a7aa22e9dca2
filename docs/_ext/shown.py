"""Which public names the site's pages show, and which they do not."""

import importlib
import inspect
import pathlib
import re
import types

import method_pages

import mtlbalance as mtl

DOCS = pathlib.Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^\.\. auto(function|class|module):: (\S+)$", re.MULTILINE)


def public_names(module=mtl):
    """What a user may import, by its full name: what a module lists, or else the functions and classes it defines."""
    for name in getattr(module, "__all__", None) or defined_in(module):
        found = getattr(module, name)
        if isinstance(found, types.ModuleType):
            yield from public_names(found)
        else:
            yield f"{module.__name__}.{name}"


def defined_in(module):
    """As ``automodule`` shows them: with a docstring, and none of those that begin with an underscore."""
    for name, found in vars(module).items():
        is_own = (inspect.isfunction(found) or inspect.isclass(found)) and found.__module__ == module.__name__
        if is_own and not name.startswith("_") and found.__doc__:
            yield name


def shown_in(text):
    for kind, name in DIRECTIVE.findall(text):
        if kind == "module":
            yield from (f"{name}.{member}" for member in defined_in(importlib.import_module(name)))
        else:
            yield name


def named(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def without_page():
    """A name is shown if what it stands for is shown under any of its names."""
    texts = [path.read_text() for path in (DOCS / "api").glob("*.md")]
    texts += [method_pages.reference(name) for name in method_pages.rows()]
    shown = {id(named(name)) for text in texts for name in shown_in(text)}
    return sorted(name for name in public_names() if id(named(name)) not in shown)
