"""Balanced residual decay rates (BRDR): points weigh more whose residuals fall more slowly.

Chen, Howard and Stinis, "Self-adaptive weights based on balanced residual decay rate for physics-informed neural
networks and deep operator networks", 2024, https://arxiv.org/abs/2407.01613
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FRACTION, check
from mtlbalance.states import count_seen, unbiased_rate, zero_counts


class BRDRState(NamedTuple):
    """State of :func:`brdr`; all have one entry per point.

    Attributes:
      weights: those of the last call.
      averages: the root of the running mean of the squared losses.
      seen: int32, the calls in which the point was present.
    """

    weights: jax.Array
    averages: jax.Array
    seen: jax.Array


@base.memoized
def brdr(beta_c: Number = 0.999, beta_w: Number = 0.999) -> base.Scalarizer[BRDRState]:
    r"""Weights that follow each point's loss over the average that it has had.

    .. math:: \frac{1}{n} \sum_i w_i r_i^2, \qquad w_i \leftarrow \beta_w w_i + (1 - \beta_w) \frac{n c_i}{\sum_j c_j},
              \qquad c_i = \frac{r_i^2}{\sqrt{\overline{r_i^4}}}

    where the mean :math:`\overline{r_i^4}` is a running one with decay :math:`\beta_c`, without its bias towards the
    start, and c is the inverse residual decay rate: 1 where a residual stays as it is.

    The values are pointwise losses, squared residuals :math:`r_i^2`, in an array of any shape: a call updates the
    weights and then weighs. The weights are constants of differentiation; they are 1 on the first call, and their mean
    stays 1 while all points are present. A point whose losses were all zero has c = 1. A negative loss makes the scalar
    NaN.

    A point has its weight from all calls, so the points must be a fixed pool: for a mini-batch give the losses of
    the whole pool, those outside it absent. They keep their weights, averages and counts.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The paper takes c and its mean over the points of all equations and conditions together, and adds up the mean of
      each: for that give this method all of them, each multiplied by the number of all points over its own, which
      changes no c. The paper also scales the whole loss by the gradient's length; here that is left to the optimizer.
      In mini-batches its official code lets a point's average and weight decay also for the steps in which it was not
      drawn. Where every point is drawn once in b steps, ``beta_c**b`` and ``beta_w**b`` do that.

    Args:
      beta_c: decay of the average, from 0 to 1; at 1 it is the mean of all calls. May be traced.
      beta_w: how much of the last weights is kept, from 0 to 1. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`BRDRState`.

    Raises:
      ValueError: if ``beta_c`` or ``beta_w`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.brdr(beta_c=0.9, beta_w=0.5)
      >>> state = method.init(2)
      >>> for residuals in [1.0, 1.0], [1.0, 0.1]:  # the second one falls
      ...     scalar, state = method.apply(state, jnp.array(residuals) ** 2)
      >>> print([f"{weight:.4f}" for weight in state.weights])
      ['1.4857', '0.5143']

    References:
      Chen, Howard and Stinis, `Self-adaptive weights based on balanced residual decay rate
      <https://arxiv.org/abs/2407.01613>`_, 2024.
    """
    check("beta_c", beta_c, FRACTION)
    check("beta_w", beta_w, FRACTION)

    def init(shape, dtype):
        return BRDRState(jnp.ones(shape, dtype), jnp.zeros(shape, dtype), zero_counts(shape))

    def apply(state, values, mask):
        losses = jnp.maximum(jax.lax.stop_gradient(values), 0)
        rate = unbiased_rate(beta_c, state.seen, losses.dtype)
        averages = numerics.root_mean(state.averages, losses, rate)
        balanced = numerics.normalize(numerics.ratio(losses, averages), mask, jnp.sum(mask))
        weights = beta_w * state.weights + (1 - beta_w) * balanced
        state = state._replace(
            weights=jnp.where(mask, weights, state.weights), averages=jnp.where(mask, averages, state.averages)
        )
        return numerics.weighted_mean(weights, values, mask), count_seen(state, mask)

    return base.scalarizer(init, apply)
