"""A method over groups of losses, at a point whose losses are the groups' scalars: a row for each group alone."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mtlbalance import numerics
from mtlbalance.autodiff.decide import Decision
from mtlbalance.autodiff.point import Evaluated, Point, map_each
from mtlbalance.contract import Aggregator, Scalarizer
from mtlbalance.gramian import combine

Method = Scalarizer | Aggregator


def over_groups(
    method: Method, state: Any, point: Point, present: jax.Array | None, *, keeps_rows: bool
) -> tuple[Method, Any, Point, jax.Array | None, Callable[[Decision], Decision]]:
    """What decides in a step: the method or, of a nested one, that over the groups; each with what is its own.

    Args:
      method: the whole.
      state: its state.
      point: the losses evaluated.
      present: which losses are present, as :class:`Evaluated` has it.
      keeps_rows: whether the rows of all losses are there, or cost no more than those of the groups.

    Returns:
      The method that decides, its state, the point, and which of the losses there are present; and a function from its
      decision to the whole method's.
    """
    if method.nesting is None:
        return method, state, point, present, lambda decision: decision
    groups, inside, present_groups, new_state = method.nesting.groups(state, point.evaluated.named, mask=present)
    evaluated = Evaluated(groups, None, jnp.stack([*groups.values()]), None)
    within = partial(_in_groups, inside, present_groups, present, keeps_rows)

    def evaluate_and_pull(read):
        _, result = point.evaluate_and_pull(lambda pullback: read(within(pullback)))
        return evaluated, result

    def of_losses(decision):
        weights = _of_losses(inside, present_groups, decision.weights)
        return Decision(point.evaluated, new_state._replace(outer=decision.state), weights, decision.gradient)

    return method.nesting.outer, state.outer, Point(evaluated, evaluate_and_pull), present_groups, of_losses


def _of_losses(inside, present_groups, weights):
    """One weight for each loss, from those of the groups."""
    return jnp.matmul(jnp.where(present_groups, weights, 0), inside, precision="highest")


def _in_groups(inside, present_groups, present, keeps_rows, pullback):
    """The pull-back of the groups' scalars, from that of the losses."""

    def weighted(weights, _=None):
        return pullback.weighted(_of_losses(inside, present_groups, weights), present)

    def row(i):
        return pullback.weighted(inside[i], present)

    def added_up(jacobian):
        # Wide, or the sums are rounded to the leaves' dtype: weights of small losses are beyond float16's range.
        mask = None if present is None else jnp.ravel(present)
        wide = jax.vmap(lambda weights: combine(weights, numerics.wide(jacobian), mask))(inside)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), wide, jacobian)

    def rows(restrict, n):
        if keeps_rows:
            return added_up(pullback.rows(restrict, n))
        return map_each(lambda i: restrict(row(i)), jnp.arange(len(inside)), n, inside[:, 0])

    features = pullback.features and (added_up(pullback.features[0]), pullback.features[1])
    return pullback._replace(weighted=weighted, row=row, rows=rows, features=features)
