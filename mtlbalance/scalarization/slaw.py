"""SLAW: scaled loss approximate weighting, each loss over its standard deviation in the recent calls.

Crawshaw and Košecká, "SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task Learning", 2021,
https://arxiv.org/abs/2109.08218
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FRACTION, NONNEGATIVE, check
from mtlbalance.states import count_seen, mean_rate, select, zero_counts


class SLAWState(NamedTuple):
    """State of :func:`slaw`; every field has one entry per task.

    Attributes:
      mean: running mean of the loss.
      deviation: root of the running mean of squares less the mean's square.
      seen: int32, the calls in which the task was present.
    """

    mean: jax.Array
    deviation: jax.Array
    seen: jax.Array


@base.memoized
def slaw(decay: Number = 0.99, eps: Number = 1e-5) -> base.Scalarizer[SLAWState]:
    r"""Weights each loss by the inverse of its standard deviation, which estimates the length of its gradient.

    .. math:: \sum_i w_i L_i, \quad w_i = m \frac{1 / s_i}{\sum_j 1 / s_j}, \quad s_i = \sqrt{a_i - b_i^2}, \quad
              a_i \leftarrow \beta_k a_i + (1 - \beta_k) L_i^2, \quad b_i \leftarrow \beta_k b_i + (1 - \beta_k) L_i

    at the task's call number k, with :math:`\beta_k = \min(\beta, 1 - 1/k)`: plain means at first, running averages
    later. So gradients of about one length come from a single backward pass. A call's losses count in its weights,
    which are constants of differentiation and sum to the number of tasks. A task has an equal share on its first call
    and while all of its losses were zero. Any real losses will do. One that does not move gets nearly all of the
    weight.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The means are those of the official code. It bounds :math:`s_i` from below by 1e-5 whatever the unit of the loss,
      here by ``eps`` times the mean loss.

    Args:
      decay: :math:`\beta`, from 0 to 1; with 1 all calls count alike. May be traced.
      eps: at least 0; the least standard deviation that counts is this part of the mean loss's size. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SLAWState`.

    Raises:
      ValueError: if ``decay`` or ``eps`` is out of bounds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.slaw()
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, 40.0]))
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(state, jnp.array([0.5, 38.5]))
      >>> print([f"{weight:.2f}" for weight in weights])  # the second loss moves by three times as much
      ['1.50', '0.50']

    References:
      Crawshaw and Košecká, `SLAW <https://arxiv.org/abs/2109.08218>`_, 2021; https://github.com/mtcrawshaw/meta,
      branch slaw.
    """
    check("decay", decay, FRACTION)
    check("eps", eps, NONNEGATIVE)

    def init(shape, dtype):
        zeros = jnp.zeros(shape, dtype)
        return SLAWState(zeros, zeros, zero_counts(shape))

    def apply(state, values, mask):
        state = select(mask, follow(state, jax.lax.stop_gradient(values)), state)
        deviation = jnp.maximum(state.deviation, eps * jnp.abs(state.mean))
        moves = (state.seen > 0) & (deviation != 0)
        least = jnp.min(deviation, where=mask & moves, initial=jnp.inf)
        scores = jnp.where(moves, least / jnp.where(moves, deviation, 1), 0)  # at most 1, whatever the unit
        weights = jnp.sum(mask) * numerics.shares(scores, moves, mask)
        return numerics.weighted_sum(weights, values, mask), count_seen(state, mask)

    def follow(state, values):
        rate = mean_rate(state.seen, values.dtype, 1 - decay)
        mean = rate * values + (1 - rate) * state.mean
        # With d the difference to the old mean, the variance v becomes (1 - rate) (v + rate d ** 2).
        difference = jnp.sqrt(1 - rate) * jnp.abs(values - state.mean)
        return SLAWState(mean, numerics.root_mean(state.deviation, difference, rate), state.seen)

    return base.scalarizer(init, apply)
