"""Residual-based attention (RBA): points weigh by the residuals that they have had.

Anagnostopoulos, Toscano, Stergiopulos and Karniadakis, "Residual-based attention in physics-informed neural networks",
Computer Methods in Applied Mechanics and Engineering 421, 2024, https://arxiv.org/abs/2307.00379
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import DECAY, NONNEGATIVE, check, per_task


class ResidualAttentionState(NamedTuple):
    r"""State of :func:`residual_attention`.

    Attributes:
      multipliers: :math:`\lambda`, the square roots of the weights, one per point.
    """

    multipliers: jax.Array


@base.memoized
def residual_attention(
    decay: Number = 0.999,
    lr: Number = 0.001,
    initial_multipliers: PerTask | float = 0.0,
) -> base.Scalarizer[ResidualAttentionState]:
    r"""Weights that add up, and forget, each point's part of the largest residual.

    .. math:: \frac{1}{n} \sum_i (\lambda_i r_i)^2, \qquad
              \lambda_i \leftarrow \gamma \lambda_i + \eta \frac{|r_i|}{\max_j |r_j|}

    The values are pointwise losses, squared residuals :math:`r_i^2`, in an array of any shape: a call updates the
    multipliers and then weighs. The weights :math:`\lambda_i^2` are constants of differentiation, and their total is
    free: from nearly 0 they grow up to :math:`(\eta / (1 - \gamma))^2`, which matters to whatever stands over this
    method or beside it. If all residuals are zero the multipliers shrink. A negative loss makes the scalar NaN.

    A point has its multiplier from all calls, so the points must be a fixed pool: for a mini-batch give the losses of
    the whole pool, those outside it absent. They keep their multipliers, and the largest residual is that of the batch.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code can make its first step with :math:`\eta = 1`; that is ``initial_multipliers`` of
      :math:`(1 - \eta) |r_i| / (\gamma \max_j |r_j|)`.

    Args:
      decay: :math:`\gamma`, at least 0 and below 1. May be traced.
      lr: :math:`\eta`, at least 0. May be traced.
      initial_multipliers: start of :math:`\lambda`, at least 0: one number, or one per point (an array or a tree of the
        same names). May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`ResidualAttentionState`.

    Raises:
      ValueError: if ``decay`` or ``lr`` is out of bounds; at ``init``, if ``initial_multipliers`` is, or has another
        shape than the losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.residual_attention(decay=0.9, lr=0.1)
      >>> residuals, state = jnp.array([0.5, -2.0]), method.init(2)
      >>> for _ in range(2):
      ...     scalar, state = method.apply(state, residuals**2)
      >>> print([f"{multiplier:.4f}" for multiplier in state.multipliers])
      ['0.0475', '0.1900']

    References:
      Anagnostopoulos et al., `Residual-based attention in physics-informed neural networks
      <https://arxiv.org/abs/2307.00379>`_, 2023; https://github.com/soanagno/rba-pinns.
    """
    check("decay", decay, DECAY)
    check("lr", lr, NONNEGATIVE)

    def init(shape, dtype):
        return ResidualAttentionState(
            per_task("initial_multipliers", initial_multipliers, shape, dtype, bound=NONNEGATIVE)
        )

    def apply(state, values, mask):
        multipliers = decay * state.multipliers + lr * numerics.relative_roots(values, mask)
        state = ResidualAttentionState(jnp.where(mask, multipliers, state.multipliers))
        return numerics.weighted_mean(jnp.square(multipliers), values, mask), state

    return base.scalarizer(init, apply, per_task={"initial_multipliers": initial_multipliers})
