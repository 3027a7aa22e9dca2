"""The losses' names: what is given per task goes by them, and never by the sorted position that JAX flattens to.

A method's plain functions see one array of losses without names. The names are those of the outermost method called:
a wrapper hands its losses to the method inside as an array, and that method still knows them.
"""

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance.hyperparameters import (
    Bound,
    flatten,
    is_asking_for_shapes,
    is_int,
    is_number,
    kind_of,
    per_task,
    reject,
)
from mtlbalance.losses import check_losses, sums

NO_NAMES = "an array: the losses have no names"


class Names(NamedTuple):
    """The names of the losses, as far as they have any.

    Attributes:
      entries: one for each number, such as ``"depth"`` or ``"pose.0"``; none where the losses are positional.
      n_leaves: how many losses have them: an array under one name has its own order.
    """

    entries: tuple[str, ...] = ()
    n_leaves: int = 0


# Of the outermost call: ``None`` where its losses are not known, ``...`` where there is no call.
_outermost: ContextVar[Any] = ContextVar("names of the losses", default=...)


def names_of(losses: chex.ArrayTree) -> Names:
    """The names of losses, or of what is given for each."""
    leaves, treedef = jax.tree.flatten(sums(losses))
    return Names() if jax.tree_util.treedef_is_leaf(treedef) else _names(treedef, tuple(map(np.shape, leaves)))


def compile_with_names(
    function: Callable[..., Any],
    per_task: Mapping[str, Any] | None = None,
    losses_at: int | None = None,
    check: Callable[[Any], None] = lambda state: None,
) -> Callable[..., Any]:
    """A compiled function of ``(state, *args, values=..., mask=...)`` in which the losses' names are known.

    They are a part of what the program is compiled for. Before it the names of ``per_task`` are checked.

    Args:
      function: the plain one.
      per_task: hyperparameters by their arguments, each with one number per task.
      losses_at: the position at which it takes ``values``; ``None`` if that is a keyword.
      check: raises for what is no state of the method, before the losses are looked at: they may be swapped.
    """

    def losses_of(args, kwargs):
        return args[losses_at] if losses_at is not None and len(args) > losses_at else kwargs.get("values")

    def traced(names, *args, **kwargs):
        with with_names(names):
            check(args[0] if args else kwargs.get("state"))
            check_losses("values", losses_of(args, kwargs))
            check_names(per_task, is_call=True)
            return function(*args, **kwargs)

    compiled = jax.jit(traced, static_argnums=0)
    signature = inspect.signature(function)

    @wraps(function)
    def public(*args, **kwargs):
        losses = losses_of(args, kwargs)
        names = _names_inside(kwargs.get("mask") if losses is None else losses, known=losses is not None)
        try:
            return compiled(names, *args, **kwargs)
        except TypeError:
            slip = _slip_of(function, signature, args, kwargs)
            if slip is None:
                raise
        return reject(*slip, TypeError)

    return public


@contextlib.contextmanager
def with_names(names: Names | None) -> Iterator[None]:
    """While it is entered methods are called for losses of these names, if they have any; ``None``: they may have."""
    token = _outermost.set(names)
    try:
        yield
    finally:
        _outermost.reset(token)


def with_names_for_init(losses: Any) -> contextlib.AbstractContextManager[None]:
    """As :func:`with_names`, of what ``init`` is given; in a wrapper's they are known already."""
    return with_names(_names_inside(losses, known=False))


def _names_inside(losses, *, known):
    """The names of these losses: their own, or else those of the outermost call, if it has as many.

    Without an outermost call losses without names have none if they are ``known``; a shape or a mask says nothing.
    """
    outer = _outermost.get()
    own = Names() if losses is None or is_int(losses) else names_of(losses)
    if own.entries:
        return own
    if outer is ...:
        return own if known else None
    size = losses if is_int(losses) else sum(map(np.size, jax.tree.leaves(sums(losses))))
    is_another = outer is not None and outer.entries and losses is not None and size != len(outer.entries)
    return None if is_another else outer


def known_names() -> Names | None:
    """The names of the losses of the outermost call, none for positional ones; ``None`` where they are not known."""
    names = _outermost.get()
    return None if names is ... else names


def check_names(per_task: Mapping[str, Any] | None, *, is_call: bool = False) -> None:
    """Raises unless hyperparameters with one number per task have the losses' names, as far as these are known.

    In a call they must be, or names are refused: nobody could say which row is whose.
    """
    names = _outermost.get()
    for argument, value in (per_task or {}).items():
        if value is None or is_asking_for_shapes():
            continue
        found = list(names_of(value).entries)
        if is_call and names is None and len(found) > 1:
            reject(argument, "values= with the losses' names, or an array", f"{found} and no names")
        if names in (None, ...):
            continue
        expected = list(names.entries)
        if not found and names.n_leaves > 1 and sum(map(np.size, jax.tree.leaves(value))) > 1:
            by_name = "{" + ", ".join(f"{name!r}: ..." for name in expected) + "}"
            order = "numbers without names, whose order would be the sorted one"
            reject(argument, f"a number for each of the losses' names, {by_name}", order)
        if found and found != expected:
            order = ", in this order" if sorted(found) == sorted(expected) else ""
            names_due = f"the losses' names {expected}{order}" if expected else NO_NAMES
            reject(argument, names_due, f"{found}")


def check_task(argument: str, task: int | str, n_tasks: float = math.inf) -> None:
    """Raises unless a task is given by its name, or by an index below the number of tasks.

    In ``init``, where that number is given, it must be one of the losses' names as far as these are known.
    """
    if not isinstance(task, str) and not is_int(task):
        reject(argument, "the name or the index of a task", type(task).__name__, TypeError)
    if is_asking_for_shapes():
        return
    if not isinstance(task, str) and not 0 <= task < n_tasks:
        bound = "" if n_tasks == math.inf else f" below the number of tasks {n_tasks}"
        reject(argument, f"a name, or an int of at least 0{bound}", f"{task}")
    if n_tasks != math.inf and _outermost.get() not in (None, ...):
        index_of(argument, task)


def index_of(argument: str, task: int | str) -> int:
    """The position of a task: it must be given by name where losses have names, and by index where they have none."""
    names = _outermost.get()
    if names in (None, ...):
        if isinstance(task, str):
            reject(argument, "values= with the losses' names, or an index", f"{task!r} and no names")
        return task
    entries = list(names.entries)
    if isinstance(task, str) and task in entries:
        return entries.index(task)
    if isinstance(task, str) or names.n_leaves > 1:
        found = repr(task) if isinstance(task, str) else f"the index {task}, which is a sorted position"
        reject(argument, f"one of the losses' names {entries}" if entries else "an index", found)
    return task


def positions_of(argument: str, task: int | str) -> list[int]:
    """The positions of a task, as :func:`index_of`, or of all tasks of a group, by the group's name."""
    names = _outermost.get()
    group = [] if names in (None, ...) else [i for i, name in enumerate(names.entries) if _is_in(name, task)]
    return group or [index_of(argument, task)]


def by_group(argument: str, value: chex.ArrayTree) -> chex.ArrayTree:
    """What is given for each task, or by a tree of names for each group of tasks: then as one array, in their order."""
    names, found = _outermost.get(), names_of(value).entries
    if not found or names in (None, ...):
        check_names({argument: value}, is_call=True)
        return value
    given = dict(zip(found, flatten(argument, value), strict=True))
    matches = [[name for name in found if _is_in(entry, name)] for entry in names.entries]
    if any(len(match) != 1 for match in matches) or set(found) - {name for match in matches for name in match}:
        reject(argument, f"the losses' names {list(names.entries)}, or groups of them", f"{list(found)}")
    return jnp.stack([given[name] for (name,) in matches])


def per_task_with_default(
    argument: str,
    value: chex.ArrayTree,
    shape: tuple[int, ...],
    dtype: chex.ArrayDType,
    default: float,
    bound: Bound,
    *,
    is_call: bool = True,
) -> jax.Array:
    """A hyperparameter with one number per task, or by the names of some of them; ``None`` is as good as left out.

    Args:
      argument: the hyperparameter's, for the error.
      value: one number for all tasks, one for each, or a tree of some of the losses' names.
      shape: of the losses.
      dtype: of what is returned.
      default: the number of the tasks that are not named.
      bound: of the numbers.
      is_call: whether the losses' names must be known by now; in ``init`` they may not be: then nothing is checked.

    Raises:
      ValueError: if a name is none of the losses', or a number is out of bounds.
      TypeError: if something is not a real number.
    """
    value = jax.tree.map(lambda x: default if x is None else x, value, is_leaf=lambda x: x is None)
    found, names = list(names_of(value).entries), known_names()
    if not found or is_asking_for_shapes():
        check_names({argument: value}, is_call=is_call)
        return per_task(argument, value, shape, dtype, bound=bound)
    given = per_task(argument, value, (len(found),), dtype, bound=bound)
    entries = () if names is None else names.entries
    if names is None and is_call:
        reject(argument, "values= with the losses' names, or an array", f"{found} and no names")
    numbers = jnp.full(shape, default, dtype)
    for name, number in zip(found, given, strict=True):
        here = np.array([_is_in(entry, name) for entry in entries], bool)
        if here.any():
            numbers = jnp.where(here.reshape(shape), number, numbers)
        elif names is not None:
            reject(argument, f"the losses' names {list(entries)}" if entries else NO_NAMES, f"{found}")
    return numbers


def groups_of(argument: str, given: tuple[str, ...]) -> dict[str, tuple[list[int], Names]]:
    """The positions of each group of losses, by its name, and their names inside of it: none in an array's.

    Args:
      argument: for the error.
      given: the groups' names, which must be the losses' first names.
    """
    names = _outermost.get()
    entries = () if names in (None, ...) else names.entries
    found = {}
    for i, entry in enumerate(entries):
        group, _, inside = entry.partition(".")
        positions, names_inside = found.setdefault(group, ([], []))
        positions.append(i)
        names_inside.append(inside)
    if not entries:
        due = f"losses with names, the first of which are {list(given)}"
        if names is None:
            due += " (a state of them: grad_fn.init(params, batch) of mtl.value_and_grad, or init(losses))"
        reject("losses" if names is None else "values", due, "losses without names")
    if set(found) != set(given):
        reject(argument, f"the names of the groups of losses, {list(found)}", f"{list(given)}")
    return {group: (positions, _names_in_group(inside)) for group, (positions, inside) in found.items()}


def _names_in_group(names):
    return Names() if all(not name or name.isdigit() for name in names) else Names(tuple(names), len(names))


def _is_in(name, group):
    return name == group or name.startswith(f"{group}.")


def _slip_of(function, signature, args, kwargs):
    """The argument, what was expected and what was found, if a call that failed is one of other things than arrays."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        return function.__name__.removeprefix("public_"), f"the arguments {signature}", f"{error}".removeprefix("got ")
    for path, leaf in jax.tree.leaves_with_path(given):
        if not is_number(leaf):
            argument, *where = path
            expected = {"state": "what the method's init returned", "mask": "booleans, one per task"}
            expected = expected.get(argument.key, "an array or a tree of arrays")
            return f"{argument.key}{jax.tree_util.keystr(tuple(where))}", expected, kind_of(leaf)
    return None


@lru_cache(maxsize=1024)
def _names(treedef, shapes):
    paths = [path for path, _ in jax.tree.leaves_with_path(treedef.unflatten(range(len(shapes))))]
    positional = jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey
    if all(isinstance(key, positional) for path in paths for key in path):
        return Names()
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path in paths]
    parts = [_parts(name, shape) for name, shape in zip(names, shapes, strict=True)]
    return Names(tuple(itertools.chain(*parts)), len(names))


def _parts(name, shape):
    return [name] if shape == () else [f"{name}.{i}" for i in range(math.prod(shape))]
