"""Self-adaptive loss weights: free multipliers that climb while the model descends.

McClenny and Braga-Neto, "Self-Adaptive Physics-Informed Neural Networks", Journal of Computational Physics 474, 2023,
https://arxiv.org/abs/2009.04544
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONZERO, POSITIVE, check, per_task


class SelfAdaptiveState(NamedTuple):
    """State of :func:`self_adaptive`.

    Attributes:
      multipliers: the square roots of the weights, one per task. Learned, upwards.
    """

    multipliers: jax.Array


@base.memoized
def self_adaptive(
    initial_multipliers: PerTask | float = 1.0, max_weight: Number = 1e12
) -> base.Scalarizer[SelfAdaptiveState]:
    r"""Weights that a gradient ascent raises for as long as their losses are not zero.

    .. math:: \min_\theta \max_\lambda \sum_i \lambda_i^2 L_i(\theta)

    The total of the weights is free, m at the start, and grows until each is ``max_weight``. Losses must be at least
    zero: the weight of a negative one falls.

    The gradient with respect to the multipliers :math:`\lambda` has its sign reversed, so that whatever optimizer
    descends on it climbs: give it an optimizer of its own by ``mtlbalance.learn(self_adaptive(), optax.adam(5e-3))``,
    or differentiate with respect to the state too and let one optimizer train both. A bare ``apply`` returns them as
    they were.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The paper weighs every collocation point, and its code starts with random multipliers. Here there is one for
      each loss: for a weight per point, of a fixed pool of points, give their squared residuals as the values, an array
      of any shape, and ``initial_multipliers`` of that shape, such as :func:`jax.random.uniform`'s.

    Args:
      initial_multipliers: start of :math:`\lambda`, not zero: one real number, or one per task (an array or a tree of
        the same names). May be traced.
      max_weight: the largest weight that a loss may have, above 0 and finite. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SelfAdaptiveState` and ``learned=("multipliers",)``.

    Raises:
      ValueError: if ``max_weight`` is out of bounds; at ``init``, if ``initial_multipliers`` is zero or has another
        shape than the losses.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.learn(scalarization.self_adaptive(), optax.sgd(0.1))
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, 5.0]))
      >>> print(scalar, state.inner.multipliers)
      6.0 [1.2 2. ]

    References:
      McClenny and Braga-Neto, `Self-Adaptive Physics-Informed Neural Networks <https://arxiv.org/abs/2009.04544>`_,
      2023, with the mask :math:`m(\lambda) = \lambda^2`; https://github.com/levimcclenny/SA-PINNs.
    """
    check("max_weight", max_weight, POSITIVE)

    def init(shape, dtype):
        start = per_task("initial_multipliers", initial_multipliers, shape, dtype, bound=NONZERO)
        return SelfAdaptiveState(jax.lax.stop_gradient(start))  # or it would come back with its sign reversed

    def apply(state, values, mask):
        multipliers = numerics.magnitude(numerics.reverse_gradient(state.multipliers))
        bound = lambda multipliers: jnp.minimum(multipliers, jnp.sqrt(jnp.asarray(max_weight, values.dtype)))
        _, bounded = numerics.held(multipliers, bound, returns=values < 0)
        return jnp.sum(jnp.square(bounded) * values, where=mask), state

    return base.scalarizer(init, apply, learned=("multipliers",), per_task={"initial_multipliers": initial_multipliers})
