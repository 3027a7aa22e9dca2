"""UW-O: uncertainty weighting at its optimum, one over each loss.

Kirchdorfer et al., "Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning", GCPR 2024,
https://arxiv.org/abs/2408.07985
"""

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def uw_o() -> base.Scalarizer[SeenState]:
    r"""Weights each loss by its inverse, the optimum of uncertainty weighting (UW-O).

    .. math:: \sum_i w_i L_i, \quad w_i = 1 / L_i

    The weights are constants of differentiation: the scalar is the number of losses that are not zero, and its
    gradient that of :func:`~mtlbalance.scalarization.scale_invariant`, twice that of
    :func:`~mtlbalance.scalarization.uw` at its optimum. Losses must be positive: a loss of zero has weight zero, and
    where one is negative the scalar and its weight are NaN.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.uw_o()
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(method.init(2), jnp.array([0.5, 4.0]))
      >>> print(weights)
      [2.   0.25]

    References:
      Kirchdorfer et al., `Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning
      <https://arxiv.org/abs/2408.07985>`_, GCPR 2024, section 3.
    """

    def apply(state, values, mask):
        weights = jnp.where(values == 0, 0, numerics.finite(1 / values))
        weights = numerics.nonnegative(weights)
        return numerics.weighted_sum(weights, values, mask), count_seen(state, mask)

    return base.scalarizer(init_seen, apply)
