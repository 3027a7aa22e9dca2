"""UW-SO: soft optimal uncertainty weighting, a softmax over the inverse losses.

Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning", GCPR 2024,
https://arxiv.org/abs/2408.07985
"""

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import POSITIVE_OR_INFINITE, check
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def uw_so(temperature: Number = 1.0) -> base.Scalarizer[SeenState]:
    r"""Weights each loss by a softmax over the inverse losses (UW-SO).

    .. math:: \sum_i w_i L_i, \quad w = \mathrm{softmax}\Big( \frac{1}{T L} \Big)

    The small losses have the weight. The weights are constants of differentiation and sum to 1. Losses must be
    positive: a negative one counts as larger than all positive ones. Losses of zero share all the weight, and
    training stops there: :func:`mtlbalance.skip_zero` goes on without those tasks. See also
    :func:`~mtlbalance.scalarization.uw_o`, the weights without the softmax.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      There is no official code. The paper tunes the temperature for each data set.

    Args:
      temperature: :math:`T > 0`; large values make the weights equal. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Raises:
      ValueError: if ``temperature`` is out of bounds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.uw_so(temperature=1.0)
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(method.init(3), jnp.array([4.0, 1.0, 0.5]))
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.1127', '0.2386', '0.6487']

    References:
      Kirchdorfer et al., `Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning
      <https://arxiv.org/abs/2408.07985>`_, GCPR 2024, section 3.
    """
    check("temperature", temperature, POSITIVE_OR_INFINITE)

    def apply(state, values, mask):
        inverse = jnp.where(values == 0, jnp.inf, 1 / values)
        weights = numerics.softmax(inverse / temperature, mask)
        return numerics.weighted_sum(weights, values, mask), count_seen(state, mask)

    return base.scalarizer(init_seen, apply)
