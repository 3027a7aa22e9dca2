"""What the diagnostics are given, checked; and their answers in the losses' structure."""

from typing import Any

import jax
import jax.numpy as jnp

from mtlbalance import numerics
from mtlbalance.annotations import ArrayTree
from mtlbalance.complex_parts import is_complex, split
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import (
    Call,
    check_task_axis,
    like_losses,
    read_gramian,
    read_jacobian,
    read_labelled,
    read_mask,
    sums,
)
from mtlbalance.parameters import check_params_like


def read_gramian_of(gramian: Any, losses: ArrayTree | None, mask: ArrayTree | None) -> tuple[jax.Array, jax.Array]:
    """Which tasks are present, and the Gramian with zeros for the others."""
    if not hasattr(gramian, "shape"):
        reject("gramian", "an array (of a Jacobian: mtl.gramian.gramian(jacobian))", type(gramian).__name__, TypeError)
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
        hint = " (of a Jacobian: mtl.gramian.gramian(jacobian))"
        reject("gramian", f"a square matrix, a row and a column per task{hint}", f"shape {gramian.shape}")
    call = _read_call(len(gramian), losses, mask)
    return call.mask, read_gramian(call, gramian)


def read_rows(
    jacobian: ArrayTree, updates: ArrayTree, losses: ArrayTree | None, mask: ArrayTree | None
) -> tuple[jax.Array, ArrayTree, ArrayTree]:
    """Which tasks are present, the Jacobian with zeros for the others, and the updates, both of reals."""
    leaves = jax.tree.leaves(jacobian)
    if not leaves or not jnp.shape(leaves[0]):
        reject("jacobian", "leaves with a leading axis, one row per task", f"{jax.tree.map(jnp.shape, jacobian)}")
    call = _read_call(len(leaves[0]), losses, mask)
    check_params_like("updates", updates, check_task_axis(jacobian, len(leaves[0])), skip=1)
    # Products of one dtype: an update rounded to the Jacobian's bfloat16 or float16 could underflow.
    dtypes = jax.tree.map(jnp.result_type, jacobian, updates)
    cast = lambda tree: jax.tree.map(lambda x, dtype: jnp.asarray(x, dtype), tree, dtypes)
    # The gradient is the conjugate of the steepest ascent: with it an update has the products of its conjugate.
    conjugate = jax.tree.map(lambda x: jnp.conj(x) if is_complex(x) else x, cast(updates))
    return call.mask, read_jacobian(call, cast(jacobian)), split(conjugate)


def _read_call(m, losses, mask):
    present, all_present = read_present(m, losses, mask)
    return Call(None, present, all_present)


def read_present(m: int, losses: ArrayTree | None, mask: ArrayTree | None) -> tuple[jax.Array, bool]:
    """Which of the m tasks are present, as one vector; and whether that is all of them, known while tracing."""
    labelled = None if losses is None else read_labelled(losses)
    present, shape = jnp.ones(m, bool) if labelled is None else jnp.ravel(labelled), (m,)
    if losses is not None:
        leaves, treedef = jax.tree.flatten(sums(losses))
        n = sum(map(jnp.size, leaves))
        if n != m:
            reject("losses", f"{m} numbers, one per task of the gradients", f"{n}")
        shape = jnp.shape(leaves[0]) if jax.tree_util.treedef_is_leaf(treedef) else shape
    if mask is not None:
        present &= jnp.ravel(read_mask(mask, losses, shape))
    return present, mask is None and labelled is None


def clip_cosines(cosines: jax.Array, overflown: jax.Array) -> jax.Array:
    """Cosines in their bounds; NaN where a norm has overflown."""
    # Over an infinite norm finite products would be 0, and look orthogonal; rounding leads beyond 1.
    return jnp.clip(numerics.nan_unless(~overflown, cosines), -1, 1)


def by_task(vector: ArrayTree, losses: ArrayTree | None) -> ArrayTree:
    """One number per task by the losses' names: what a state has for each task stands in their sorted order.

    Args:
      vector: an array with one entry per task, such as ``state.nonfinite`` of :func:`~mtlbalance.skip_nonfinite`.
      losses: the losses, or anything of their structure and shapes; ``None`` leaves the array as it is.

    Returns:
      A tree like the losses.

    Raises:
      ValueError: if there are more or fewer losses than entries.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> print(mtl.diagnostics.by_task(jnp.array([2, 0]), {"lift": 0.5, "drag": 2.0})["drag"])
      2
    """
    n = jnp.size(vector) if losses is None else sum(map(jnp.size, jax.tree.leaves(sums(losses))))
    if n != jnp.size(vector):
        reject("losses", f"{jnp.size(vector)} numbers, one for each task", f"{n}")
    return vector if losses is None else like_losses(vector, losses)


def by_pair(matrix: ArrayTree, losses: ArrayTree | None) -> ArrayTree:
    """One number per pair of tasks as a tree of trees like the losses, if there are losses."""
    if losses is None:
        return matrix
    by_column = jax.vmap(lambda row: like_losses(row, losses))(matrix)
    rows = like_losses(jnp.arange(len(matrix)), losses)
    return jax.tree.map(lambda i: jax.tree.map(lambda leaf: leaf[i], by_column), rows)
