"""CoV-Weighting: weights from the coefficient of variation of each loss.

Groenendijk et al., "Multi-Loss Weighting with Coefficient of Variations", WACV 2021,
https://arxiv.org/abs/2009.01717
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FRACTION, check
from mtlbalance.states import count_seen, select, zero_counts

_LONGEST = 2**20  # calls that a mean is over: float32 would round off what a call adds to one over many more


class CoVWeightingState(NamedTuple):
    """State of :func:`cov_weighting`; every field has one entry per task.

    Attributes:
      mean_loss: running mean of the loss.
      mean_ratio: running mean of the loss over the mean before it.
      deviation: root of the mean of squared deviations of that ratio.
      seen: int32, the calls in which the task was present.
    """

    mean_loss: jax.Array
    mean_ratio: jax.Array
    deviation: jax.Array
    seen: jax.Array


@base.memoized
def cov_weighting(decay: Number | None = None) -> base.Scalarizer[CoVWeightingState]:
    r"""Weights each loss by how much it varies, relative to its running mean.

    .. math:: \sum_i w_i L_i, \quad w_i \propto \frac{\sigma_i}{\mu_i}, \quad
              \ell_i(t) = \frac{L_i(t)}{\bar L_i(t - 1)}

    where :math:`\mu_i` and :math:`\sigma_i` are the mean and the standard deviation of the ratios :math:`\ell_i` of
    the calls before this one, and :math:`\bar L_i` the mean of the losses. A loss that has settled loses weight. The
    weights are constants of differentiation and sum to 1; a task has an equal share on its first two calls. Losses
    should keep their sign: where one changes it, :math:`\mu_i` counts by its size. A mean of zero gives ratio 1. After
    :math:`2^{20}` calls each plain mean is a running average over about as many.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The variance is that of the official code: squared deviations over the number of calls, plus 1e-8. Its default
      decay is 1, with which the means never move; the deviations do not decay.

    Args:
      decay: ``None`` for plain running means, or how much of a mean is kept at each call, from 0 to 1. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`CoVWeightingState`.

    Raises:
      ValueError: if ``decay`` is out of bounds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.cov_weighting()
      >>> state = method.init(3)
      >>> for losses in [4.0, 1.0, 0.5], [3.0, 0.9, 0.6]:
      ...     scalar, state = method.apply(state, jnp.array(losses))
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(state, jnp.array([2.5, 0.7, 0.55]))
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.4988', '0.1838', '0.3174']

    References:
      Groenendijk et al., `Multi-Loss Weighting with Coefficient of Variations <https://arxiv.org/abs/2009.01717>`_,
      WACV 2021; https://github.com/rickgroen/cov-weighting.
    """
    if decay is not None:
        check("decay", decay, FRACTION)

    def init(shape, dtype):
        zeros = jnp.zeros(shape, dtype)
        return CoVWeightingState(zeros, zeros, zeros, zero_counts(shape))

    def apply(state, values, mask):
        seen = state.seen
        n_calls = jnp.minimum(seen, _LONGEST).astype(values.dtype)
        sigma = jnp.hypot(state.deviation, 1e-4)
        weights = numerics.shares(numerics.ratio(sigma, jnp.abs(state.mean_ratio)), seen >= 2, mask)

        losses = jax.lax.stop_gradient(values)
        loss_ratio = numerics.ratio(losses, state.mean_loss)
        new = 1 / (n_calls + 1)
        kept = jnp.where(seen == 0, 0, n_calls / (n_calls + 1) if decay is None else decay)
        mean_loss = kept * state.mean_loss + (1 - kept) * losses
        mean_ratio = kept * state.mean_ratio + (1 - kept) * loss_ratio
        # Welford takes the product of the differences to the old mean and to the new one, `kept` times the former.
        difference = jnp.sqrt(kept) * jnp.abs(loss_ratio - state.mean_ratio)
        deviation = numerics.root_mean(state.deviation, difference, new)
        new_state = select(mask, CoVWeightingState(mean_loss, mean_ratio, deviation, seen), state)
        return numerics.weighted_sum(weights, values, mask), count_seen(new_state, mask)

    return base.scalarizer(init, apply)
