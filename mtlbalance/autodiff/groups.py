"""A method over groups of losses, at a point whose losses are the groups' scalars: a row for each group alone."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance.autodiff.decide import Decision
from mtlbalance.autodiff.point import Evaluated, Point, map_each
from mtlbalance.contract import Aggregator, Scalarizer
from mtlbalance.gramian import combine_groups, weights_of_groups


class Deciding(NamedTuple):
    """The method that decides, its state, the losses that it sees evaluated, and which of them are present."""

    method: Scalarizer | Aggregator
    state: Any
    point: Point
    present: jax.Array | None


def over_groups(
    method: Scalarizer | Aggregator, state: Any, point: Point, present: jax.Array | None, *, keeps_rows: bool
) -> tuple[Deciding, Callable[[Decision], Decision]]:
    """What decides in a step: the method or, of a nested one, that over the groups; each with what is its own.

    Args:
      method: the whole.
      state: its state.
      point: the losses evaluated.
      present: which losses are present, as :class:`Evaluated` has it.
      keeps_rows: whether the rows of all losses are there, or cost no more than those of the groups.

    Returns:
      That, and a function from its decision to the whole method's.
    """
    if method.nesting is None:
        return Deciding(method, state, point, present), lambda decision: decision
    scalars, inside, present_groups, new_state = method.nesting.groups(state, point.evaluated.named, mask=present)
    evaluated = Evaluated(scalars, None, jnp.stack([*scalars.values()]), None)
    within = partial(_in_groups, inside, present_groups, present, keeps_rows)

    def evaluate_and_pull(read):
        _, result = point.evaluate_and_pull(lambda pullback: read(within(pullback)))
        return evaluated, result

    def of_losses(decision):
        weights = weights_of_groups(decision.weights, inside, present_groups)
        return Decision(point.evaluated, new_state._replace(outer=decision.state), weights, decision.gradient)

    of_groups = Point(evaluated, evaluate_and_pull)
    return Deciding(method.nesting.outer, state.outer, of_groups, present_groups), of_losses


def _in_groups(inside, present_groups, present, keeps_rows, pullback):
    """The pull-back of the groups' scalars, from that of the losses."""

    def weighted(weights, _=None):
        return pullback.weighted(weights_of_groups(weights, inside, present_groups), present)

    def row(i):
        return pullback.weighted(inside[i], present)

    def added_up(jacobian):
        rows = combine_groups(inside, jacobian, None if present is None else jnp.ravel(present))
        return jax.tree.map(lambda x, like: x.astype(like.dtype), rows, jacobian)

    def rows(restrict, n):
        if keeps_rows:
            return added_up(pullback.rows(restrict, n))
        return map_each(lambda i: restrict(row(i)), jnp.arange(len(inside)), n, inside[:, 0])

    features = pullback.features and (added_up(pullback.features[0]), pullback.features[1])
    return pullback._replace(weighted=weighted, row=row, rows=rows, features=features)
