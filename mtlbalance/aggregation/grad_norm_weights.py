"""Gradient-norm weights: each loss weighted by how short its gradient is, smoothed over the calls.

Wang et al., "An Expert's Guide to Training Physics-informed Neural Networks", 2023, https://arxiv.org/abs/2308.08468
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FRACTION, check
from mtlbalance.states import count_seen, zero_counts


class GradNormWeightsState(NamedTuple):
    """State of :func:`grad_norm_weights`.

    Attributes:
      weights: the smoothed weights, one per task.
      seen: int32, one per task: the calls in which it was present.
    """

    weights: jax.Array
    seen: jax.Array


@base.memoized
def grad_norm_weights(
    momentum: Number = 0.9, *, axis_name: Hashable | None = None
) -> base.Aggregator[GradNormWeightsState]:
    r"""Weighs every gradient so that all are about as long as the mean of their lengths.

    .. math:: w_i \leftarrow \mu w_i + (1 - \mu) \frac{\frac{1}{m} \sum_j \lVert g_j \rVert}{\lVert g_i \rVert}, \qquad
              g = \sum_i w_i g_i

    Not :func:`~mtlbalance.aggregation.gradnorm`, which learns its weights. These start at 1 and have no fixed total. A
    task without gradient keeps its weight. Where the weights need not be new at every step, :func:`mtlbalance.amortize`
    saves the gradients of the single tasks in between: those who train physics-informed networks take new ones every
    1000 steps.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The paper has the sum of the lengths in place of the mean, m times as much; jaxpi, its official code, the mean.

    Args:
      momentum: :math:`\mu`, from 0 to 1. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`GradNormWeightsState`, ``weighting``, ``gramian_weighting``
      and ``rowwise``.

    Raises:
      ValueError: if ``momentum`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.grad_norm_weights(momentum=0.5)
      >>> rows = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print([f"{weight:.4f}" for weight in state.weights])
      ['0.8333', '1.5000']

    References:
      Wang et al., `An Expert's Guide to Training Physics-informed Neural Networks
      <https://arxiv.org/abs/2308.08468>`_, 2023, algorithm 1; https://github.com/PredictiveIntelligenceLab/jaxpi.
    """
    check("momentum", momentum, FRACTION)

    def init(m, params, dtype):
        del params
        return GradNormWeightsState(jnp.ones(m, dtype), zero_counts(m))

    def weigh(state, squares, values, mask):
        del values
        norms = jnp.sqrt(squares)
        nonzero = mask & (norms != 0)
        mean = jnp.sum(norms, where=mask) / jnp.maximum(jnp.sum(mask), 1)
        weights = momentum * state.weights + (1 - momentum) * numerics.ratio(mean, norms)
        weights = jnp.where(nonzero, weights, state.weights)
        return weights, count_seen(state._replace(weights=weights), mask)

    return base.norms_aggregator(init, weigh, axis_name=axis_name)
