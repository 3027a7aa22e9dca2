"""The losses and gradients that a call is given: counted, masked, named; and what is refused, in the user's words.

A method's own file sees one array of losses, or one Jacobian, and one boolean mask. What it was made of is read here.
"""

import math
from typing import Any, NamedTuple, NoReturn

import chex
import jax
import jax.numpy as jnp

from mtlbalance.complex_parts import split, split_params
from mtlbalance.hyperparameters import check_int, flatten, is_int, is_number, kind_of, reject
from mtlbalance.meshes import with_whole_tasks
from mtlbalance.parameters import check_trainable, is_network


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

    __array_ufunc__ = None  # NumPy's numbers leave arithmetic to the functions below

    def _no_arithmetic(self, other):
        """Of tuples it would make more losses, without an error."""
        del other
        due = "arithmetic on its parts, as in mtl.Counted(0.1 * loss.sum, loss.count)"
        reject("Counted", due, "an operator between a counted loss and something else", TypeError)

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = _no_arithmetic  # type: ignore


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


# What `init` is given.


def read_shape(shape: Any, *others: Any) -> tuple[tuple[int, ...], chex.ArrayDType]:
    """The shape of the losses, and the dtype of their state, from any form that ``Scalarizer.init`` takes."""
    number = "the number of tasks, as in init(2), or the losses"
    if others or (isinstance(shape, tuple) and len(shape) == 2 and is_int(shape[0]) and not is_number(shape[1])):
        reject("init", f"{number}: a scalarizer's state needs no parameters", "two things", TypeError)
    dims = (shape,) if is_int(shape) else shape
    if isinstance(dims, tuple) and all(map(is_int, dims)):
        dtype = jnp.result_type(float)
    else:
        leaves, treedef = jax.tree.flatten(sums(shape))
        shapes = [_shape(leaf) for leaf in leaves if is_number(leaf)]
        if is_network(shapes):
            grids = "losses with several axes each: raveled"
            found = f"what looks like parameters, shapes {shapes}"
            reject("shape", f"{number} (a scalarizer's state needs no parameters; {grids})", found)
        check_losses("shape", shape)
        single = leaves and jax.tree_util.treedef_is_leaf(treedef)
        dims = _shape(leaves[0]) if single else (sum(math.prod(_shape(leaf)) for leaf in leaves),)
        dtype = _widest(map(_dtype, leaves))
    if any(dim < 1 for dim in dims):
        reject("shape", "at least one task", f"{shape!r}")
    return tuple(int(dim) for dim in dims), dtype


def read_pair(tasks: Any, *others: Any, needs_params: bool) -> tuple[int, chex.ArrayTree, chex.ArrayDType]:
    """The number of tasks, the parameters and the state's dtype, from what ``Aggregator.init`` takes."""
    if others:
        found = f"{1 + len(others)} arguments"
        reject("init", "one pair (number of tasks: int, params), as in init((3, params))", found, TypeError)
    if is_int(tasks) and not needs_params:
        tasks = (tasks, ())
    if not (isinstance(tasks, tuple | list) and len(tasks) == 2 and is_int(tasks[0])):
        found = f"({', '.join(type(x).__name__ for x in tasks)})" if isinstance(tasks, tuple) else type(tasks).__name__
        reject(
            "init",
            "a pair (number of tasks: int, params), as in init((3, params)); in an optax chain mtl.aggregate makes it",
            found,
            TypeError,
        )
    m, params = tasks
    check_int("number of tasks", m, 1)
    if is_int(params):
        check_int("number of parameters", params, 0)
        params = jax.ShapeDtypeStruct((int(params),), jnp.result_type(float))
    check_trainable("params", params)
    for leaf in filter(is_int, jax.tree.leaves(params)):
        reject("params", "arrays (or one int: the columns of a matrix)", f"the int {leaf} in a tree", TypeError)
    params = split_params(params)
    leaves = jax.tree.leaves(params)
    floating = [_dtype(leaf) for leaf in leaves if jnp.issubdtype(_dtype(leaf), jnp.floating)]
    return int(m), params, _widest(floating) if leaves else jnp.result_type(float)


# What `apply` is given.


def read_call(
    state: chex.ArrayTree,
    values: chex.ArrayTree | None,
    mask: chex.ArrayTree | None,
    *,
    required: bool = False,
    names: tuple[str, ...] = (),
) -> Call:
    """Checks one call's losses, which may be ``required``, and mask against the state, and casts them.

    An error for another number of tasks shows the ``names`` that were found.
    """
    if required and values is None:
        reject("values", "the losses, as in values=losses", "None", TypeError)
    shape = shape_of(state)
    present = jnp.ones(shape, bool)
    if mask is not None:
        present = read_mask(mask, values, shape, names)
    if values is None:
        return Call(None, present, mask is None)

    array = read_losses("values", values, state_dtype(state, values))
    if array.shape != shape:
        reject_number("values", shape, array.shape, names)
    labelled = read_labelled(values)
    if labelled is not None:
        present &= labelled
    return Call(jnp.where(present, array, 1), present, mask is None and labelled is None)


def shape_of(state: chex.ArrayTree) -> tuple[int, ...]:
    """The shape of the losses that a state is for, which its first leaf has."""
    leaves = jax.tree.leaves(state)
    if not leaves:
        reject("state", "what the method's init returned", f"{state!r}", TypeError)
    return jnp.shape(leaves[0])


def read_losses(name: str, losses: chex.ArrayTree, dtype: chex.ArrayDType | None = None) -> jax.Array:
    """The losses as one array, :class:`Counted` ones divided by their counts; in float32 or wider by default."""
    check_losses(name, losses)
    dtype = dtype or jnp.result_type(jnp.float32, *jax.tree.leaves(sums(losses)))
    return flatten(name, jax.tree.map(lambda x: _value(x, dtype), losses, is_leaf=is_counted))


def check_losses(name: str, losses: chex.ArrayTree) -> None:
    """Raises unless every loss is made of floating point numbers, and names the one that is not."""
    is_leaf = lambda x: x is None or is_counted(x)
    for path, leaf in jax.tree.leaves_with_path(losses, is_leaf=is_leaf):
        for part in leaf if is_counted(leaf) else (leaf,):
            if (path and part is None) or (part is not None and not is_number(part)):
                _reject_loss(name, path, losses, kind_of(part))
        loss = leaf.sum if is_counted(leaf) else leaf
        if is_int(loss) or not (loss is None or jnp.issubdtype(_dtype(loss), jnp.floating)):
            _reject_loss(name, path, losses, f"the int {loss}" if is_int(loss) else f"dtype {_dtype(loss)}")


def _reject_loss(name, path, losses, found):
    hint = " (a task that is absent: mask=, or mtl.Counted(sum, 0))" if path else ""
    if name == "losses_fn" and type(losses) is tuple and len(losses) == 2 and path[0].idx == 1:
        hint = " (or has_aux=True, for a pair (losses, aux))"
    reject(f"{name}{jax.tree_util.keystr(path)}", f"floating point numbers{hint}", found, TypeError)


def read_labelled(losses: chex.ArrayTree) -> jax.Array | None:
    """Which losses have a count above zero, as one array; ``None`` where none is :class:`Counted`."""
    if not any(map(is_counted, jax.tree.leaves(losses, is_leaf=is_counted))):
        return None
    return flatten("losses", jax.tree.map(has_labels, losses, is_leaf=is_counted))


def like_losses(array: chex.Array, losses: chex.ArrayTree) -> chex.ArrayTree:
    """One number per task in the structure of the losses: what :func:`flatten` undoes."""
    leaves, treedef = jax.tree.flatten(sums(losses))
    if jax.tree_util.treedef_is_leaf(treedef):
        return jnp.reshape(array, jnp.shape(leaves[0]))
    ends = [sum(jnp.size(leaf) for leaf in leaves[: i + 1]) for i in range(len(leaves))]
    parts = jnp.split(array, ends[:-1])
    return treedef.unflatten([jnp.reshape(part, jnp.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)])


def read_jacobian(call: Call, jacobian: chex.ArrayTree) -> chex.ArrayTree:
    """Checks that every leaf has one row per task; an absent task's row becomes zero. Complex leaves are split."""
    jacobian = split(check_task_axis(jacobian, call.mask.shape[0]))
    return jacobian if call.all_present else present_rows(jacobian, call.mask)


def check_task_axis(jacobian: chex.ArrayTree, m: int) -> chex.ArrayTree:
    """The Jacobian's leaves as arrays, if each has one row per task."""

    def leaf(path, x):
        name = f"jacobian{jax.tree_util.keystr(path)}"
        _check_floating(name, x, jnp.inexact)
        if jnp.shape(x)[:1] != (m,):
            hint = (
                " (a gradient of the summed loss has no such axis, nor have named losses or jacrev of them; optax's "
                "MultiSteps and flatten take it away: they go after the aggregator)"
            )
            reject(name, f"a leading axis of {m}, one row per task{hint}", f"shape {jnp.shape(x)}")
        return with_whole_tasks(jnp.asarray(x), 1)

    return jax.tree_util.tree_map_with_path(leaf, jacobian)


def read_gramian(call: Call, gramian: chex.Array) -> jax.Array:
    """Checks a Gramian's shape and casts it to float32 or wider; an absent task's row and column become zero."""
    if not hasattr(gramian, "shape"):
        reject("gramian", "an array (of a Jacobian: mtl.gramian.gramian(jacobian))", type(gramian).__name__, TypeError)
    _check_floating("gramian", gramian)
    (m,) = call.mask.shape
    if jnp.shape(gramian) != (m, m):
        reject("gramian", f"shape {(m, m)}", f"shape {jnp.shape(gramian)}")
    gramian = with_whole_tasks(jnp.asarray(gramian))
    return jnp.where(call.mask[:, None] & call.mask[None, :], gramian, 0).astype(jnp.result_type(jnp.float32, gramian))


def read_row(present: chex.Array, row: chex.ArrayTree) -> chex.ArrayTree:
    """Checks one task's gradient; an absent task's becomes zero. Complex leaves are split."""
    for leaf in jax.tree.leaves(row):
        _check_floating("row", leaf, jnp.inexact)
    return jax.tree.map(lambda x: jnp.where(present, x, 0), split(row))


def present_rows(jacobian: chex.ArrayTree, mask: chex.Array) -> chex.ArrayTree:
    """The Jacobian with zero rows for absent tasks: there they may be anything."""
    return jax.tree.map(lambda x: jnp.where(broadcast_to_rows(mask, x), x, 0), jacobian)


def broadcast_to_rows(mask: chex.Array, leaf: chex.Array) -> jax.Array:
    """``mask`` with trailing axes, so that it selects rows of ``leaf``."""
    return jnp.reshape(mask, mask.shape + (1,) * (jnp.ndim(leaf) - mask.ndim))


def sums(values: chex.ArrayTree) -> chex.ArrayTree:
    """The losses without their counts."""
    return jax.tree.map(lambda x: x.sum if is_counted(x) else x, values, is_leaf=is_counted)


def state_dtype(state: chex.ArrayTree, incoming: chex.ArrayTree) -> chex.ArrayDType:
    """The dtype that a call computes in: the state's, or for a state without floats float32 or wider."""
    floating = [x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return floating[0] if floating else jnp.result_type(jnp.float32, *jax.tree.leaves(sums(incoming)))


def read_mask(
    mask: chex.ArrayTree, values: chex.ArrayTree | None, shape: tuple[int, ...], names: tuple[str, ...] = ()
) -> jax.Array:
    """Checks a mask against the losses and their shape; it may be one array or a tree like the losses."""
    for leaf in jax.tree.leaves(mask):
        if not is_number(leaf):
            reject("mask", "booleans, one per task", kind_of(leaf), TypeError)
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.bool_):
            reject("mask", "booleans", f"dtype {jnp.result_type(leaf)}", TypeError)
    structure, losses = jax.tree.structure(mask), sums(values)
    if not jax.tree_util.treedef_is_leaf(structure) and not jax.tree_util.treedef_is_leaf(jax.tree.structure(losses)):
        expected, found = jax.tree.map(_shape, losses), jax.tree.map(_shape, mask)
        if values is not None and expected != found:
            reject("mask", f"one array, or the shapes of values {expected}", f"{found}")
    array = flatten("mask", mask)
    if array.shape != shape:
        reject_number("mask", shape, array.shape, names)
    return array


def reject_number(argument: str, shape: tuple[int, ...], found: tuple[int, ...], names: tuple[str, ...]) -> NoReturn:
    """Raises because the state is for another number of tasks; it shows the names of those that were found."""
    shown = list(names) if len(names) <= 8 else [*names[:4], "..."]
    are_names = (len(names),) == found and len(shape) == 1
    hint = f" of {shown} (mtl.carry_over makes a state for other tasks)" if are_names else ""
    reject(argument, f"shape {shape}, as given to init", f"shape {found}{hint}")


def _value(leaf, dtype):
    if not is_counted(leaf):
        return jnp.asarray(leaf).astype(dtype)
    if jnp.shape(leaf.sum) != jnp.shape(leaf.count):
        reject("values", f"a count of the sum's shape {jnp.shape(leaf.sum)}", f"shape {jnp.shape(leaf.count)}")
    leaf = Counted(*map(with_whole_tasks, map(jnp.asarray, leaf)))
    labelled = has_labels(leaf)
    # Both parts are replaced before the division, so that neither the value nor its gradient is 0/0.
    return jnp.where(labelled, leaf.sum, 0).astype(dtype) / jnp.where(labelled, leaf.count, 1).astype(dtype)


def has_labels(leaf: Any) -> jax.Array:
    """Whether a loss, counted or not, has labels."""
    # A count that is NaN is present, and shows in the value.
    return ~(jnp.asarray(leaf.count) <= 0) if is_counted(leaf) else jnp.ones(jnp.shape(leaf), bool)


def is_counted(x: Any) -> bool:
    """Whether a loss is :class:`Counted`."""
    return isinstance(x, Counted)


def as_counted(losses: chex.ArrayTree) -> chex.ArrayTree:
    """Every loss with its count: one for each that has none."""

    def leaf(x):
        if is_counted(x):
            count = jnp.asarray(x.count)  # in a dtype in which the counts of all micro-batches can be added up
            return Counted(jnp.where(has_labels(x), x.sum, 0), count.astype(wide(count.dtype)))
        return Counted(jnp.asarray(x), jnp.ones(jnp.shape(x), jnp.int32))

    return jax.tree.map(leaf, losses, is_leaf=is_counted)


def wide(dtype: chex.ArrayDType) -> chex.ArrayDType:
    """A dtype in which many of these can be added up: float32 or int32 at least."""
    return jnp.result_type(jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32, dtype)


def _check_floating(name, leaf, kind=jnp.floating):
    if is_int(leaf) or not jnp.issubdtype(_dtype(leaf), kind):
        reject(name, "floating point numbers", f"dtype {_dtype(leaf)}", TypeError)


def _widest(dtypes):
    """Float32 or wider. NumPy's float64 is what JAX makes of such an array: float32, unless 64 bits are enabled."""
    return jnp.result_type(jnp.float32, *map(jax.dtypes.canonicalize_dtype, dtypes))


_dtype = lambda leaf: leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
_shape = lambda leaf: leaf.shape if hasattr(leaf, "shape") else jnp.shape(leaf)
