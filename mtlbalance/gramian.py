"""Contractions of Jacobian trees: the Gramian, the weighted sum of the rows, and plain sums.

A Jacobian is a tree shaped like the parameters in which every leaf has one more axis in front, the
task: ``[m, *param.shape]``. A matrix ``[m, n]`` is the tree of one leaf. Every sum over parameters that
feeds a weight is made here, leaf by leaf: raveling the tree into one vector would gather sharded leaves.
"""

import math
from collections.abc import Hashable
from functools import partial

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtlbalance.annotations import ArrayTree
from mtlbalance.complex_parts import join_like, split
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import present_rows
from mtlbalance.mapped_axes import add_up, split_over, varying_as
from mtlbalance.meshes import explicit_mesh, with_whole_tasks
from mtlbalance.numerics import wide
from mtlbalance.parameters import check_params_like

# Columns in one dot on a CPU: of many more, and few rows, jax 0.8 would make one long sum in float32.
_COLUMNS = 4096
# Numbers in the dots that are made together: few enough for one core's cache, and for XLA to bring them into order in
# one thread, as handing half to another takes longer; many enough to be worth a call.
_CHUNK = 2**16
# Rows that are added up in one pass over the sum, at most.
_ROWS_AT_A_TIME = 8


def gramian(jacobian: ArrayTree, other: ArrayTree | None = None, *, axis_name: Hashable | None = None) -> jax.Array:
    r"""Inner products of the tasks' gradients, :math:`G = J J^\top`, or with others, :math:`J_1 J_2^\top`.

    Complex gradients count as pairs of reals: the real part of :math:`J \bar J^\top`.

    Args:
      jacobian: tree with leaves ``[m, *param.shape]``, one row per task.
      other: a tree of the same structure and shapes: the Jacobian of another batch, for
        :func:`~mtlbalance.aggregation.modo` and :func:`~mtlbalance.aggregation.sdmgrad`.
      axis_name: under :func:`jax.shard_map`, the axis or axes over which parameters are split, if any: what each
        device has of the Gramian is summed over it. A leaf that is whole on every device counts once, as its type
        tells; with ``check_vma=False`` types do not tell, and that is an error.

    Returns:
      The Gramian, shape ``[m, m]``, in ``result_type(float32, leaves)`` whatever the leaves' dtype.

    Raises:
      ValueError: if the tree has no leaves, if they have no row or disagree on the number of tasks, if ``other`` has
        not the same structure or shapes, or if it cannot be told what is split over ``axis_name``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.gramian import gramian
      >>> print(gramian({"w": jnp.array([[3.0, 4.0], [0.0, 1.0]]), "b": jnp.array([1.0, 1.0])}))
      [[26.  5.]
       [ 5.  2.]]
    """
    jacobian = jax.tree.map(_rows_of_leaf, split(jacobian))
    leaves = jax.tree.leaves(jacobian)
    if len({leaf.shape[:1] for leaf in leaves}) != 1 or leaves[0].ndim == 0 or leaves[0].shape[0] == 0:
        shapes = [leaf.shape for leaf in leaves]
        reject("jacobian", "leaves that share a leading task axis, of one task at least", f"shapes {shapes}")
    if other is None:
        other = jacobian
    else:
        other = jax.tree.map(_rows_of_leaf, split(other))
        check_params_like("other", other, jacobian)
    return add_up(jax.tree.map(_of_leaf, jacobian, other), axis_name)


def gramian_of_tasks(
    jacobian: ArrayTree, m: int, axis_name: Hashable | None = None, mask: chex.Array | None = None
) -> jax.Array:
    """:func:`gramian` of m tasks' gradients, those not in ``mask`` as if zero; zeros where there are no parameters."""
    if not jax.tree.leaves(jacobian):
        return jnp.zeros((m, m))
    if mask is None:
        return gramian(jacobian, axis_name=axis_name)
    of_leaf = lambda leaf: _of_leaf(leaf, leaf, mask)
    return add_up(jax.tree.map(of_leaf, jax.tree.map(_rows_of_leaf, split(jacobian))), axis_name)


def combine(weights: chex.Array, jacobian: ArrayTree, mask: chex.Array | None = None) -> ArrayTree:
    r"""Weighted sum of the tasks' gradients, :math:`g = w^\top J`.

    Args:
      weights: one weight per task, shape ``[m]``.
      jacobian: tree with leaves ``[m, *param.shape]``.
      mask: which tasks are present, booleans of shape ``[m]``; all by default. The rows of the others may be anything,
        NaN too, and count as zero.

    Returns:
      A tree with leaves of shape ``param.shape``, each in its Jacobian leaf's dtype, which may be complex; the sum
      itself is made in ``result_type(float32, weights, leaf)``.

    Raises:
      ValueError: if a leaf does not have one row per weight.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.gramian import combine
      >>> print(combine(jnp.array([0.5, 2.0]), jnp.array([[2.0, 0.0], [1.0, 1.0]])))
      [3. 2.]
    """
    weights = with_whole_tasks(jnp.asarray(weights))
    mask = mask if mask is None else with_whole_tasks(jnp.asarray(mask))

    def leaf_sum(leaf):
        leaf = _rows_of_leaf(leaf)
        if weights.ndim != 1 or leaf.shape[:1] != weights.shape:
            expected = f"leaves with a leading axis of {weights.shape}, one row per weight"
            reject("jacobian", expected, f"shape {leaf.shape}")
        dtype = jnp.result_type(jnp.float32, weights, leaf)
        if mask is not None and _is_wide(leaf):
            return _sum_of_present(weights.astype(dtype), leaf, mask).astype(leaf.dtype)
        leaf = leaf if mask is None else present_rows(leaf, mask)
        row_axis = (((0,), (0,)), ((), ()))
        operands = weights.astype(dtype), leaf.astype(dtype)
        return jax.lax.dot_general(*operands, row_axis, precision="highest").astype(leaf.dtype)

    return join_like(jax.tree.map(leaf_sum, split(jacobian)), jacobian)


def combine_groups(inside: chex.Array, jacobian: ArrayTree, mask: chex.Array | None = None) -> ArrayTree:
    """A row for each group of tasks, in float32 or wider: the tasks' rows with its weights, ``inside[group]``.

    Not in the leaves' dtype, to which the sums would be rounded: weights of small losses are beyond float16's range.
    """
    jacobian = wide(jacobian)
    return jax.vmap(lambda weights: combine(weights, jacobian, mask))(inside)


def weights_of_groups(weights: chex.Array, inside: chex.Array, present: chex.Array) -> jax.Array:
    """One weight for each task, from those of its groups; groups that are absent have none."""
    return jnp.matmul(jnp.where(present, weights, 0), inside, precision="highest")


def total(tree: ArrayTree, axis_name: Hashable | None = None) -> jax.Array | float:
    r"""Sum of all entries of a tree shaped like the parameters.

    Args:
      tree: arrays of any shapes.
      axis_name: as in :func:`gramian`.

    Returns:
      A scalar in ``result_type(float32, leaves)``; 0 for a tree without leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.gramian import total
      >>> print(total({"w": jnp.array([[3.0, 4.0]]), "b": jnp.array(2.0)}))
      9.0
    """
    # A dot with ones: XLA's CPU backend adds up a leaf's last axis in one thread, one number at a time.
    return add_up(jax.tree.map(lambda leaf: _contract(leaf, jnp.ones_like(leaf), free=0), tree), axis_name)


def n_entries(tree: ArrayTree, axis_name: Hashable | None = None) -> int:
    """How many entries a tree shaped like the parameters has, on all devices; arguments as of :func:`total`."""
    on_each = lambda path, leaf: leaf.size * math.prod(map(jax.lax.axis_size, split_over(leaf, axis_name, path)))
    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(on_each, tree)))


def squared_norm(tree: ArrayTree, axis_name: Hashable | None = None) -> jax.Array:
    """The squared norm of one task's gradient in float32 or wider, summed over the axis that splits it, if any."""
    # No dot, for which XLA would write the squares out first.
    square = lambda leaf: jnp.sum(jnp.square(leaf))
    return jnp.asarray(add_up(jax.tree.map(square, wide(split(tree))), axis_name))


def _rows_of_leaf(leaf):
    return with_whole_tasks(jnp.asarray(leaf), 1)


def _is_wide(leaf):
    """Whether it takes long to write a leaf out once more."""
    return leaf.size >= 2 * len(leaf) * _COLUMNS


def _sum_of_present(weights, rows, mask):
    """The weighted sum of the rows in ``mask``, which a dot would have to be given in a copy, the others zero."""

    def add(added, one):
        weight, present, row = one
        return added + weight * jnp.where(present, row, 0), None

    start = varying_as(jnp.zeros_like(rows[0], weights.dtype), weights, rows, mask)
    # A divisor, or the scan would copy all rows but the last few.
    unroll = max(n for n in range(1, _ROWS_AT_A_TIME + 1) if len(mask) % n == 0)
    return jax.lax.scan(add, start, (weights, mask, rows), unroll=unroll)[0]


def _of_leaf(x, y, mask=None):
    """The part of one leaf, or of a leaf of either tree, in the Gramian."""
    # Chunking a leaf split over devices would gather it, so only whole leaves are chunked. A mesh given by
    # `in_shardings` alone is not visible here.
    may_be_split = any(kind != AxisType.Manual for kind in jax.typeof(x).sharding.mesh.axis_types)
    if may_be_split or not _is_wide(x):
        return _of_rows(x, y, mask)
    return _of_wide_leaf(x, y, mask)


@partial(jax.jit, inline=True)  # compiled once for all bare calls
def _of_wide_leaf(x, y, mask):
    return jax.lax.platform_dependent(x, y, mask, cpu=_of_leaf_by_chunks, default=_of_rows)


def _of_rows(x, y, mask):
    return _contract(*(x if mask is None else present_rows(x, mask) for x in (x, y)), free=1)


def _of_leaf_by_chunks(x, y, mask):
    # For wide matrices XLA's CPU backend first copies both factors into another order: up to four times slower. Several
    # chunks side by side push each other out of the cache, and only from nine on get a second thread. Half the products
    # (the Gramian is symmetric), and sums of products in fused loops, were no faster either.
    x, y = (jnp.reshape(leaf, (len(leaf), -1)) for leaf in (x, y))
    n_dots = max(1, _CHUNK // (len(x) * _COLUMNS))
    n_chunks = -(-x.shape[1] // (n_dots * _COLUMNS))
    columns = x.shape[1] // (n_chunks * n_dots) // 16 * 16  # whole cache lines
    size = n_dots * columns
    in_dots = lambda chunk: jnp.moveaxis(jnp.reshape(chunk, (len(chunk), n_dots, columns)), 1, 0)

    def add(i, added):
        chunks = (in_dots(jax.lax.dynamic_slice_in_dim(leaf, i * size, size, axis=1)) for leaf in (x, y))
        return added + jnp.sum(jax.vmap(partial(_of_rows, mask=mask))(*chunks), axis=0)

    rest = (leaf[:, n_chunks * size :] for leaf in (x, y))
    return jax.lax.fori_loop(0, n_chunks, add, _of_rows(*rest, mask))


def _contract(x, y, free):
    """Contracts all axes but the first ``free`` ones."""
    axes = tuple(range(free, x.ndim))
    # Contracting a sharded axis is ambiguous on an Explicit mesh: say that the small result is replicated.
    mesh = explicit_mesh(x)
    return jax.lax.dot_general(
        x,
        y,
        ((axes, axes), ((), ())),
        # The default on GPU and TPU is TF32 or bfloat16, and float16 products overflow.
        precision="highest",
        preferred_element_type=jnp.result_type(jnp.float32, x.dtype, y.dtype),
        out_sharding=NamedSharding(mesh, PartitionSpec(*[None] * 2 * free)) if mesh else None,
    )
