"""Scale-invariant linear scalarization: the sum of the losses' logarithms.

Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, https://arxiv.org/abs/2202.01017
"""

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import PerTask
from mtlbalance.hyperparameters import per_task
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def scale_invariant(weights: PerTask | float = 1.0) -> base.Scalarizer[SeenState]:
    r"""The sum of the losses' logarithms (the baseline SI, also log-sum).

    .. math:: \sum_i w_i \log L_i

    The gradient weighs a loss by :math:`w_i / L_i`, so that a loss's scale does not matter. Losses must be positive.
    One below the smallest normal number counts as that number, with weight zero, so that its logarithm stays finite.
    Where one is negative the scalar and its weight are NaN.

    Note:
      The official code of Nash-MTL has no guard at zero.

    Args:
      weights: one real number for all, or one per task (an array or a tree of the same names). May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Raises:
      ValueError: at ``init``, if ``weights`` has another shape than the losses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.scale_invariant()
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(method.init(2), jnp.array([0.5, 4.0]))
      >>> print(weights)
      [2.   0.25]

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_, ICML 2022, section
      5 (baseline "SI").
    """

    def fixed_weights(mask, dtype):
        return per_task("weights", weights, mask.shape, dtype)

    def apply(state, values, mask):
        fixed = fixed_weights(mask, values.dtype)
        tiny = jnp.finfo(values.dtype).tiny
        logs = jnp.log(numerics.nonnegative(jnp.where(jnp.abs(values) < tiny, tiny, values)))
        return jnp.sum(fixed * logs, where=mask), count_seen(state, mask)

    return base.scalarizer(init_seen_after(fixed_weights), apply, per_task={"weights": weights})
