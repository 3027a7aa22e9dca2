"""CR-MOGM: the weights of another method, smoothed over the calls.

Zhou et al., "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond", NeurIPS 2022,
https://openreview.net/forum?id=ScwfQ7hdwyP
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import Number, PerTask
from mtlbalance.contract import check_is_method
from mtlbalance.hyperparameters import FRACTION, check, per_task
from mtlbalance.states import count_seen, running_average, zero_counts
from mtlbalance.wrappers.plumbing import check_method, reweighted


class CRMOGMState(NamedTuple):
    """State of :func:`cr_mogm`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      weights: the smoothed weights, one per task.
      inner: the state of the wrapped method.
      not_taken: int32 scalar: the calls whose weights, or losses, were not finite, and so not averaged.
    """

    seen: jax.Array
    weights: jax.Array
    inner: Any
    not_taken: jax.Array


@base.memoized
def cr_mogm(
    method: base.Aggregator, alpha: Number = 0.9, initial_weights: PerTask | None = None
) -> base.Aggregator[CRMOGMState]:
    r"""Follows the weights of a method by a running average, which takes the noise of small batches out of them.

    .. math:: \lambda \leftarrow \alpha \lambda + (1 - \alpha) \hat\lambda

    where :math:`\hat\lambda` are the method's own weights. The average starts at a task's first weight unless it is
    given. It has the method's total while that and the tasks present stay the same; after a change it moves there.

    Weights that are not finite, or come with losses that are not, are the call's output, but not in the average.
    Around :func:`mtlbalance.amortize` the average moves at refreshes only, and its last weights serve in between.

    The gradient to its hyperparameters is zero: they act through constants of differentiation. So it is to those of the
    method inside, the weights of :func:`~mtlbalance.aggregation.constant` too.

    Args:
      method: an aggregator that has weights.
      alpha: :math:`\alpha`, from 0 to 1. May be traced; for a schedule, build the method inside the training step.
      initial_weights: start of the average, one real number per task: an array or a tree of names.

    Returns:
      An :class:`~mtlbalance.Aggregator` with the same paths and state :class:`CRMOGMState`.

    Raises:
      ValueError: if ``method`` has no weights or ``alpha`` is out of bounds; at ``init``, if there is not one initial
        weight per task.
      TypeError: if ``method`` is not an aggregator.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.cr_mogm(aggregation.mean(), alpha=0.75, initial_weights=jnp.array([1.0, 0.0]))
      >>> weights, state = method.gramian_weighting.apply(method.gramian_weighting.init(2), jnp.eye(2))
      >>> print(weights)
      [0.875 0.125]

    References:
      Zhou et al., `On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond
      <https://openreview.net/forum?id=ScwfQ7hdwyP>`_, NeurIPS 2022, algorithm 1.
    """
    check_is_method("method", method, "an Aggregator", base.Aggregator)
    check_method(method, "cr_mogm(learn(method, optimizer))", makes_weights=True)
    check("alpha", alpha, FRACTION)

    def start(shape, dtype, inner):
        if initial_weights is not None:
            weights = per_task("initial_weights", initial_weights, shape, dtype, scalar=False)
        else:  # what a step without a refresh takes before there was one; the average starts at the first weights
            weights = method.last_weights(inner) if method.last_weights else jnp.zeros(shape, dtype)
        return CRMOGMState(zero_counts(shape), weights, inner, zero_counts(()))

    def smooth(state, weights, mask):
        seen = state.seen if initial_weights is None else 1  # what is given is an average already
        weights = running_average(state.weights, weights, alpha, seen)
        return weights, count_seen(state._replace(weights=jnp.where(mask, weights, state.weights)), mask)

    # Only where the method inside keeps its weights can a step go without a refresh.
    last_weights = method.last_weights and (lambda state: state.weights)
    per_task_given = {"initial_weights": initial_weights}
    return reweighted(method, start, smooth, last_weights=last_weights, per_task=per_task_given)
