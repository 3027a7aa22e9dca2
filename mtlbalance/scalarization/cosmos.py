"""COSMOS: a linear scalarization that rewards losses in the direction of the preference.

Ruchte and Grabocka, "Scalable Pareto Front Approximation for Deep Multi-Objective Learning", ICDM 2021,
https://arxiv.org/abs/2103.13392
"""

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONNEGATIVE, check, per_task
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def cosmos(lambda_: Number, weights: PerTask) -> base.Scalarizer[SeenState]:
    r"""The preferred sum of the losses, less a multiple of the cosine of their angle to the preference.

    .. math:: \sum_i r_i L_i - \lambda \frac{\sum_i r_i L_i}{\lVert r \rVert \, \lVert L \rVert}

    Losses should be at least zero, as the preference is. The weights, the gradient, have no fixed total: :math:`\sum
    r_i` for :math:`\lambda = 0`. Where all losses are zero the cosine counts as zero.

    The whole method also draws :math:`r` anew for every batch, from a Dirichlet distribution, and gives it to the
    model as an input: build the method inside the training step, with the drawn preference.

    Note:
      TorchJD and the official code take norms below 1e-8 for 1e-8. Here the cosine is the same at any scale.

    Args:
      lambda_: :math:`\lambda \ge 0`. May be traced. The paper's range from 0.01 to 8.
      weights: preference :math:`r`, one real number per task: an array of the losses' shape, or a tree of the same
        names. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Raises:
      ValueError: if ``lambda_`` is out of bounds; at ``init``, if ``weights`` has another shape than the losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.cosmos(lambda_=2.0, weights=jnp.array([0.5, 0.5]))
      >>> scalar, state = method.apply(method.init(2), jnp.array([3.0, 3.0]))
      >>> print(f"{scalar:.4f}")
      1.0000

    References:
      Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective Learning
      <https://arxiv.org/abs/2103.13392>`_, ICDM 2021; https://github.com/ruchtem/cosmos.
    """
    check("lambda_", lambda_, NONNEGATIVE)

    def preferences(mask, dtype):
        return jnp.where(mask, per_task("weights", weights, mask.shape, dtype, scalar=False), 0)

    def apply(state, values, mask):
        preferred, values = preferences(mask, values.dtype), jnp.where(mask, values, 0)
        cosine = jnp.sum(numerics.unit(preferred) * numerics.unit(values))
        return jnp.sum(preferred * values) - lambda_ * cosine, count_seen(state, mask)

    return base.scalarizer(init_seen_after(preferences), apply, per_task={"weights": weights})
