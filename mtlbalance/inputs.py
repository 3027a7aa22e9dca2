"""Reading what the caller gives: shapes, losses, masks, Jacobians, hyperparameters; and saying what is wrong.

A method's file uses :func:`check`, its cases :func:`check_nonnegative`, :func:`check_positive` and
:func:`check_fraction`, :func:`check_int`, :func:`per_task`, :func:`preference`, :func:`check_key`, :func:`new_key`
and :func:`key_impl`; the rest serves ``base`` and the wrappers.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import chex
import jax
import jax.numpy as jnp
import numpy as np


class Counted(NamedTuple):
    """A loss summed over ``count`` labels: its value is ``sum / count``, and count 0 means absent.

    It may stand wherever a loss may. Missing labels, accumulation over micro-batches and averaging over
    devices are one problem, and adding up the sums and the counts separately solves all three.

    Attributes:
      sum: the loss summed over its labels, floating point, any shape.
      count: how many labels that was, the same shape, not negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = scalarization.mean()
      >>> seen, unseen = mtl.Counted(jnp.array(6.0), jnp.array(4)), mtl.Counted(jnp.array(0.0), jnp.array(0))
      >>> losses = {"seen": seen, "unseen": unseen}
      >>> scalar, state = method.apply(method.init(losses), losses)
      >>> print(scalar)
      1.5
    """

    sum: chex.Array
    count: chex.Array


class Call(NamedTuple):
    """The losses and the mask of one call, as a method's plain functions get them.

    Attributes:
      values: the losses in the state's dtype, those of absent tasks 1; ``None`` where none were given.
      mask: booleans of the same shape: which tasks are present.
      all_present: known while tracing: neither a mask nor counts were given.
    """

    values: chex.Array | None
    mask: chex.Array
    all_present: bool


def reject(argument: str, expected: str, found: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raises ``error`` in the one form that all of the library's errors have."""
    raise error(f"{argument}: expected {expected}, found {found}")


# Hyperparameters.


def check(name: str, value: Any, bound: str, holds: Callable[[np.ndarray], Any]) -> None:
    """Raises ``ValueError`` unless a hyperparameter is a scalar within its bound; a traced one's value is not known."""
    if not _is_number(value):
        reject(name, bound, type(value).__name__, TypeError)
    if jnp.ndim(value):
        reject(name, "a scalar", f"shape {jnp.shape(value)}")
    if np.iscomplexobj(value):
        reject(name, bound, f"dtype {jnp.result_type(value)}", TypeError)
    if isinstance(value, jax.core.Tracer):
        return
    # In NumPy, with what JAX would make of the number: a method may be built before a device is there.
    with np.errstate(over="ignore"):
        number = np.asarray(value, jnp.result_type(value))
    if not holds(number):
        reject(name, bound, f"{value}")


def check_nonnegative(name: str, value: Any) -> None:
    """:func:`check` for a finite number of at least 0."""
    check(name, value, "a finite number of at least 0", lambda x: (x >= 0) & np.isfinite(x))


def check_positive(name: str, value: Any) -> None:
    """:func:`check` for a finite number above 0."""
    check(name, value, "a finite number above 0", lambda x: (x > 0) & np.isfinite(x))


def check_fraction(name: str, value: Any) -> None:
    """:func:`check` for a number from 0 to 1."""
    check(name, value, "a number from 0 to 1", lambda x: (x >= 0) & (x <= 1))


def check_int(name: str, value: Any, minimum: int) -> None:
    """Raises unless ``value`` is an int of at least ``minimum``: it shapes the program, so it cannot be traced."""
    if not _is_int(value):
        static = "an int (optax.inject_hyperparams: name it in static_args)"
        reject(name, static, type(value).__name__, TypeError)
    if value < minimum:
        reject(name, f"an int of at least {minimum}", f"{value}")


def flatten(name: str, tree: chex.ArrayTree) -> chex.Array:
    """A single array as it is; any other tree as one vector, in the order of :func:`jax.tree.leaves`."""
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        reject(name, "at least one number", f"{tree!r}")
    if jax.tree_util.treedef_is_leaf(treedef):
        return jnp.asarray(leaves[0])
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


def per_task(
    name: str,
    value: chex.ArrayTree,
    shape: tuple[int, ...],
    dtype: chex.ArrayDType,
    *,
    scalar: bool = True,
    bound: str = "",
    holds: Callable[[chex.Array], chex.Array] | None = None,
) -> chex.Array:
    """A hyperparameter with one number per task (an array, or a tree like the losses), or one ``scalar`` for all.

    As in :func:`check`, ``holds`` says whether the numbers are within their ``bound``.
    """
    for leaf in filter(lambda leaf: not _is_number(leaf), jax.tree.leaves(value)):
        reject(name, "numbers", type(leaf).__name__, TypeError)
    array = flatten(name, value)
    if jnp.iscomplexobj(array):
        reject(name, "real numbers", f"dtype {array.dtype}", TypeError)
    if array.shape != shape and not (scalar and array.ndim == 0):
        one_for_all = "a scalar or " if scalar else ""
        reject(name, f"{one_for_all}one number per task, shape {shape}", f"shape {array.shape}")
    if holds is not None and not isinstance(array, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            if not holds(array):
                reject(name, bound, f"{array}")
    return jnp.broadcast_to(array, shape).astype(dtype)


def preference(value: chex.ArrayTree | None, mask: chex.Array, dtype: chex.ArrayDType) -> chex.Array:
    """An aggregator's ``pref_vector``: one number per task, equal ones of total 1 by default; 0 for absent tasks."""
    if value is None:
        return mask / jnp.maximum(jnp.sum(mask), 1).astype(dtype)
    return jnp.where(mask, per_task("pref_vector", value, mask.shape, dtype, scalar=False), 0)


def check_key(key: int | chex.Array) -> None:
    """Raises unless a factory's ``key`` is an int, which may be traced, or a key."""
    if not _is_int(key) and not hasattr(key, "dtype"):
        reject("key", "an int or a key", type(key).__name__, TypeError)


def new_key(key: int | chex.Array) -> chex.PRNGKey:
    """The typed key that a factory's ``key`` stands for: for ``init``, as making one takes a device."""
    if _is_typed(key):
        return key
    return jax.random.wrap_key_data(jnp.asarray(key)) if getattr(key, "ndim", 0) else jax.random.key(key)


def key_impl(key: int | chex.Array) -> Any:
    """How :func:`new_key` generates random numbers; ``None`` is JAX's default."""
    return jax.random.key_impl(key) if _is_typed(key) else None


# What `init` is given.


def read_shape(shape: Any) -> tuple[tuple[int, ...], chex.ArrayDType]:
    """The shape of the losses, and the dtype of their state, from any form that ``Scalarizer.init`` takes."""
    dims = (shape,) if _is_int(shape) else shape
    if isinstance(dims, tuple) and all(map(_is_int, dims)):
        dtype = jnp.result_type(float)
    else:
        leaves, treedef = jax.tree.flatten(sums(shape))
        for leaf in leaves:
            _check_floating("shape", leaf)
        single = leaves and jax.tree_util.treedef_is_leaf(treedef)
        dims = _shape(leaves[0]) if single else (sum(math.prod(_shape(leaf)) for leaf in leaves),)
        dtype = jnp.result_type(jnp.float32, *map(_dtype, leaves))
    if any(dim < 1 for dim in dims):
        reject("shape", "at least one task", f"{shape!r}")
    return tuple(int(dim) for dim in dims), dtype


def read_pair(tasks: Any, *, needs_params: bool) -> tuple[int, chex.ArrayTree, chex.ArrayDType]:
    """The number of tasks, the parameters and the state's dtype, from what ``Aggregator.init`` takes."""
    if _is_int(tasks) and not needs_params:
        tasks = (tasks, ())
    if not (isinstance(tasks, tuple | list) and len(tasks) == 2 and _is_int(tasks[0])):
        found = f"({', '.join(type(x).__name__ for x in tasks)})" if isinstance(tasks, tuple) else type(tasks).__name__
        reject("init", "a pair (number of tasks: int, params), as in init((3, params))", found, TypeError)
    m, params = tasks
    check_int("number of tasks", m, 1)
    if _is_int(params):
        check_int("number of parameters", params, 0)
        params = jax.ShapeDtypeStruct((int(params),), jnp.result_type(float))
    leaves = jax.tree.leaves(params)
    for leaf in filter(_is_int, leaves):
        reject("params", "arrays (or one int: the columns of a matrix)", f"the int {leaf} in a tree", TypeError)
    floating = [_dtype(leaf) for leaf in leaves if jnp.issubdtype(_dtype(leaf), jnp.floating)]
    return int(m), params, jnp.result_type(*([jnp.float32, *floating] if leaves else [float]))


# What `apply` is given.


def read_call(
    state: chex.ArrayTree, values: chex.ArrayTree | None, mask: chex.ArrayTree | None, *, required: bool = False
) -> Call:
    """Checks one call's losses, which may be ``required``, and mask against the state, and casts them."""
    if required and values is None:
        reject("values", "the losses", "None", TypeError)
    shape = jnp.shape(jax.tree.leaves(state)[0])
    present = jnp.ones(shape, bool)
    if mask is not None:
        present = read_mask(mask, values, shape)
    if values is None:
        return Call(None, present, mask is None)

    array = read_losses("values", values, state_dtype(state, values))
    if array.shape != shape:
        reject("values", f"shape {shape}, as given to init", f"shape {array.shape}")
    labelled = read_labelled(values)
    if labelled is not None:
        present &= labelled
    return Call(jnp.where(present, array, 1), present, mask is None and labelled is None)


def read_losses(name: str, losses: chex.ArrayTree, dtype: chex.ArrayDType | None = None) -> chex.Array:
    """The losses as one array, :class:`Counted` ones divided by their counts; in float32 or wider by default."""
    for leaf in jax.tree.leaves(sums(losses)):
        _check_floating(name, leaf)
    dtype = dtype or jnp.result_type(jnp.float32, *jax.tree.leaves(sums(losses)))
    return flatten(name, jax.tree.map(lambda x: _value(x, dtype), losses, is_leaf=is_counted))


def read_labelled(losses: chex.ArrayTree) -> chex.Array | None:
    """Which losses have a count above zero, as one array; ``None`` where none is :class:`Counted`."""
    if not any(map(is_counted, jax.tree.leaves(losses, is_leaf=is_counted))):
        return None
    return flatten("losses", jax.tree.map(is_there, losses, is_leaf=is_counted))


def like_losses(array: chex.Array, losses: chex.ArrayTree) -> chex.ArrayTree:
    """One number per task in the structure of the losses: what :func:`flatten` undoes."""
    leaves, treedef = jax.tree.flatten(sums(losses))
    if jax.tree_util.treedef_is_leaf(treedef):
        return jnp.reshape(array, jnp.shape(leaves[0]))
    ends = [sum(jnp.size(leaf) for leaf in leaves[: i + 1]) for i in range(len(leaves))]
    parts = jnp.split(array, ends[:-1])
    return treedef.unflatten([jnp.reshape(part, jnp.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)])


def read_jacobian(call: Call, jacobian: chex.ArrayTree) -> chex.ArrayTree:
    """Checks that every leaf has one row per task; an absent task's row becomes zero."""
    m = call.mask.shape[0]

    def leaf(path, x):
        name = f"jacobian{jax.tree_util.keystr(path)}"
        _check_floating(name, x)
        if jnp.shape(x)[:1] != (m,):
            hint = (
                " (a gradient of the summed loss has no such axis, nor has jacrev of a dict of losses; optax's "
                "MultiSteps and flatten take it away: they go after the aggregator)"
            )
            reject(name, f"a leading axis of {m}, one row per task{hint}", f"shape {jnp.shape(x)}")
        return jnp.asarray(x)

    jacobian = jax.tree_util.tree_map_with_path(leaf, jacobian)
    return jacobian if call.all_present else present_rows(jacobian, call.mask)


def read_gramian(call: Call, gramian: chex.Array) -> chex.Array:
    """Checks a Gramian's shape and casts it to float32 or wider; an absent task's row and column become zero."""
    if not hasattr(gramian, "shape"):
        reject("gramian", "an array", type(gramian).__name__, TypeError)
    _check_floating("gramian", gramian)
    (m,) = call.mask.shape
    if jnp.shape(gramian) != (m, m):
        reject("gramian", f"shape {(m, m)}", f"shape {jnp.shape(gramian)}")
    return jnp.where(call.mask & call.mask[:, None], gramian, 0).astype(jnp.result_type(jnp.float32, gramian))


def read_statistics(call: Call, statistics: chex.ArrayTree) -> chex.ArrayTree:
    """Checks that the visits' statistics are stacked, one per task."""
    for leaf in jax.tree.leaves(statistics):
        if jnp.shape(leaf)[:1] != call.mask.shape:
            reject("statistics", f"a leading axis of {call.mask.shape[0]}, one per task", f"shape {jnp.shape(leaf)}")
    return statistics


def read_row(present: chex.Array, row: chex.ArrayTree) -> chex.ArrayTree:
    """Checks one task's gradient; an absent task's becomes zero."""
    for leaf in jax.tree.leaves(row):
        _check_floating("row", leaf)
    return jax.tree.map(lambda x: jnp.where(present, x, 0), row)


def check_params_like(name: str, tree: chex.ArrayTree, params: chex.ArrayTree, skip: int = 0) -> None:
    """Raises unless two trees have one structure, and one shape a leaf (after ``skip`` axes of ``params``)."""
    found, expected = jax.tree.structure(tree), jax.tree.structure(params)
    if found != expected:
        hint = " (of a part of them: was init given mtl.subset(params, mask)?)" if "MaskedNode" in f"{found}" else ""
        reject(name, f"the params' tree {expected}", f"{found}{hint}")
    for (path, leaf), param in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf) != jnp.shape(param)[skip:]:
            where = f"{name}{jax.tree_util.keystr(path)}"
            reject(where, f"shape {jnp.shape(param)[skip:]}", f"shape {jnp.shape(leaf)}")


def present_rows(jacobian: chex.ArrayTree, mask: chex.Array) -> chex.ArrayTree:
    """The Jacobian with zero rows for absent tasks: there they may be anything."""
    return jax.tree.map(lambda x: jnp.where(rows(mask, x), x, 0), jacobian)


def rows(mask: chex.Array, leaf: chex.Array) -> chex.Array:
    """``mask`` with trailing axes, so that it selects rows of ``leaf``."""
    return jnp.reshape(mask, mask.shape + (1,) * (jnp.ndim(leaf) - mask.ndim))


def sums(values: chex.ArrayTree) -> chex.ArrayTree:
    """The losses without their counts."""
    return jax.tree.map(lambda x: x.sum if is_counted(x) else x, values, is_leaf=is_counted)


def state_dtype(state: chex.ArrayTree, incoming: chex.ArrayTree) -> chex.ArrayDType:
    """The dtype that a call computes in: the state's, or for a state without floats float32 or wider."""
    floating = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return floating[0] if floating else jnp.result_type(jnp.float32, *jax.tree.leaves(sums(incoming)))


def read_mask(mask: chex.ArrayTree, values: chex.ArrayTree | None, shape: tuple[int, ...]) -> chex.Array:
    """Checks a mask against the losses and their shape; it may be one array or a tree like the losses."""
    for leaf in jax.tree.leaves(mask):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.bool_):
            reject("mask", "booleans", f"dtype {jnp.result_type(leaf)}", TypeError)
    names, losses = jax.tree.structure(mask), sums(values)
    if not jax.tree_util.treedef_is_leaf(names) and not jax.tree_util.treedef_is_leaf(jax.tree.structure(losses)):
        expected, found = jax.tree.map(_shape, losses), jax.tree.map(_shape, mask)
        if values is not None and expected != found:
            reject("mask", f"one array, or the shapes of values {expected}", f"{found}")
    array = flatten("mask", mask)
    if array.shape != shape:
        reject("mask", f"shape {shape}, as given to init", f"shape {array.shape}")
    return array


def _value(leaf, dtype):
    if not is_counted(leaf):
        return jnp.asarray(leaf).astype(dtype)
    if jnp.shape(leaf.sum) != jnp.shape(leaf.count):
        reject("values", f"a count of the sum's shape {jnp.shape(leaf.sum)}", f"shape {jnp.shape(leaf.count)}")
    there = is_there(leaf)
    # Both parts are replaced before the division, so that neither the value nor its gradient is 0/0.
    return jnp.where(there, leaf.sum, 0).astype(dtype) / jnp.where(there, leaf.count, 1).astype(dtype)


def is_there(leaf: Any) -> chex.Array:
    """Whether a loss, counted or not, has labels."""
    # A count that is NaN is present, and shows in the value.
    return ~(jnp.asarray(leaf.count) <= 0) if is_counted(leaf) else jnp.ones(jnp.shape(leaf), bool)


def is_counted(x: Any) -> bool:
    """Whether a loss is :class:`Counted`."""
    return isinstance(x, Counted)


def _is_typed(key):
    return hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _is_int(x):
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def _is_number(x):
    return isinstance(x, numbers.Number) or hasattr(x, "dtype")


def _check_floating(name, leaf):
    if _is_int(leaf) or not jnp.issubdtype(_dtype(leaf), jnp.floating):
        reject(name, "floating point numbers", f"dtype {_dtype(leaf)}", TypeError)


def _dtype(leaf):
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _shape(leaf):
    return leaf.shape if hasattr(leaf, "shape") else jnp.shape(leaf)
