"""A batch cut in micro-batches, of which sums, counts and gradients are added up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtlbalance.autodiff.loops import scan
from mtlbalance.autodiff.point import Evaluated, Point
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import as_counted, is_counted, read_labelled, wide
from mtlbalance.mapped_axes import varying_as


def of_microbatches(point_of: Callable[..., Point], args: Any, n: int, axis: int) -> Point:
    """For a batch cut in ``n``: sums and counts are added up, and what is made of the pull-backs.

    Args:
      point_of: ``(args, totals) -> Point`` for one micro-batch.
      args: trees of arrays that all have the batch on this ``axis``.
      n: number of micro-batches.
      axis: the batch's.
    """
    if not jax.tree.leaves(args):
        reject("microbatches", "the batch as positional arguments after the state", "none")
    parts = jax.tree_util.tree_map_with_path(lambda path, x: _cut(jax.tree_util.keystr(path), x, n, axis), tuple(args))
    first = jax.tree.map(lambda x: x[0], parts)

    def outputs_of(part, totals=None, read=lambda pullback: ()):
        evaluated, result = point_of(part, totals).evaluate_and_pull(read)
        return (as_counted(evaluated.losses), evaluated.values, result), evaluated.aux

    def add_up(part_of, parts):
        """Sums over the micro-batches, in float32 or wider, and the stacked auxiliary outputs."""
        dtypes, _ = jax.eval_shape(part_of, first)
        # With its sharding, which on an Explicit mesh is part of the carry's type.
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype), device=x.sharding), dtypes)
        start = jax.tree.map(varying_as, start, dtypes)

        def step(total, part):
            new, aux = part_of(part)
            return jax.tree.map(lambda x, y: x + y, total, new), aux

        total, aux = scan(step, start, parts)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), total, dtypes), aux

    # The counts alone: where they depend on labels only, XLA removes the model from this pass.
    template = jax.eval_shape(lambda part: point_of(part, None).evaluated.losses, first)
    (counted, *_), _ = add_up(outputs_of, parts)
    totals = jax.tree.map(lambda x: x.count, counted, is_leaf=is_counted)

    def evaluate(read):
        (counted, values, result), aux = add_up(lambda part: outputs_of(part, totals, read), parts)
        restore = lambda like, x: x if is_counted(like) else x.sum / n
        losses = jax.tree.map(restore, template, counted, is_leaf=is_counted)
        return Evaluated(losses, aux, values, read_labelled(losses)), result

    return Point(evaluate(lambda pullback: ())[0], evaluate)


def _cut(where, x, n, axis):
    size = jnp.shape(x)[axis] if jnp.ndim(x) > axis else None
    if size is None or size % n:
        of_all = f"on axis {axis} of every positional argument (keyword arguments are given whole)"
        expected = f"a batch {of_all}, divisible by {n}"
        reject("microbatches", expected, f"shape {jnp.shape(x)} of args{where}")
    # Every n-th example, so that a batch that is split over devices needs no transfer.
    try:
        x = jnp.reshape(x, (*x.shape[:axis], size // n, n, *x.shape[axis + 1 :]))
    except Exception as error:  # on an Explicit mesh
        expected = "at most as many as each device has examples"
        raise ValueError(f"microbatches: expected {expected}, found {n} of {jax.typeof(x)}") from error
    return jnp.moveaxis(x, axis + 1, 0)
