"""Variational residual-based attention (vRBA): points weigh by the exponential of their residuals.

Toscano, Chen, Oommen, Darbon and Karniadakis, "A variational framework for residual-based adaptivity in neural PDE
solvers and operator learning", 2025, https://arxiv.org/abs/2509.14198
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import DECAY, FRACTION, NONNEGATIVE, POSITIVE, check, per_task
from mtlbalance.states import increment


class VRBAState(NamedTuple):
    r"""State of :func:`vrba`.

    Attributes:
      multipliers: :math:`\lambda`, the square roots of the weights, one per point.
      calls: int32, the calls so far.
    """

    multipliers: jax.Array
    calls: jax.Array


@base.memoized
def vrba(
    decay: Number = 0.999,
    lr: Number = 0.01,
    c_log: Number = 1.0,
    phi: Number = 1.0,
    initial_multipliers: PerTask | float = 0.1,
) -> base.Scalarizer[VRBAState]:
    r"""Weights that add up, and forget, the exponentials of the residuals, which sharpen from call to call.

    .. math:: \frac{1}{n} \sum_i (\lambda_i r_i)^2, \qquad
              \lambda_i \leftarrow \gamma \lambda_i + \eta \Big( \varphi \frac{q_i}{\max_j q_j} + 1 - \varphi \Big),
              \qquad q_i = e^{|r_i| / \epsilon}, \quad \epsilon = \frac{c \max_j |r_j|}{\log(t + 2)}

    in call t = 1, 2, ... The derivative q of the convex potential says which norm of the residuals is minimised: that
    of the exponential is the largest residual, and :math:`q_i = |r_i|`, for the mean of squares, is
    :func:`residual_attention`.

    The values are pointwise losses, squared residuals :math:`r_i^2`, in an array of any shape: a call updates the
    multipliers and then weighs. The weights :math:`\lambda_i^2` are constants of differentiation, and their total is
    free: they grow up to :math:`(\eta / (1 - \gamma))^2`. If all residuals are zero, all q are equal. A negative loss
    makes the scalar NaN.

    A point has its multiplier from all calls, so the points must be a fixed pool: for a mini-batch give the losses of
    the whole pool, those outside it absent. They keep their multipliers, and the largest residual is that of the batch.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code also has the potentials cosh, superexp, logarithmic and lp, and draws its mini-batches with
      probabilities proportional to the multipliers: ``state.multipliers`` serves for that.

    Args:
      decay: :math:`\gamma`, at least 0 and below 1. May be traced.
      lr: :math:`\eta`, at least 0. May be traced.
      c_log: c, above 0: the smaller, the more the largest residual counts. May be traced.
      phi: :math:`\varphi`, from 0, equal weights, to 1. May be traced.
      initial_multipliers: start of :math:`\lambda`, at least 0: one number, or one per point (an array or a tree of the
        same names). May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`VRBAState`.

    Raises:
      ValueError: if a number is out of bounds; at ``init``, if ``initial_multipliers`` is, or has another shape than
        the losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.vrba(decay=0.9, lr=0.1)
      >>> residuals, state = jnp.array([0.5, -2.0]), method.init(2)
      >>> for _ in range(2):
      ...     scalar, state = method.apply(state, residuals**2)
      >>> print([f"{multiplier:.4f}" for multiplier in state.multipliers])
      ['0.1558', '0.2710']

    References:
      Toscano et al., `A variational framework for residual-based adaptivity in neural PDE solvers and operator learning
      <https://arxiv.org/abs/2509.14198>`_, 2025;
      https://github.com/jdtoscano94/vRBA_variational_residual_based_attention_PINNs_Operator_learning.
    """
    check("decay", decay, DECAY)
    check("lr", lr, NONNEGATIVE)
    check("c_log", c_log, POSITIVE)
    check("phi", phi, FRACTION)

    def init(shape, dtype):
        start = per_task("initial_multipliers", initial_multipliers, shape, dtype, bound=NONNEGATIVE)
        return VRBAState(start, jnp.zeros((), jnp.int32))

    def apply(state, values, mask):
        calls = increment(state.calls, jnp.any(mask))
        sharpness = numerics.finite(jnp.log(calls.astype(values.dtype) + 2) / c_log)
        relative = numerics.relative_roots(values, mask)
        parts = jnp.exp(sharpness * (relative - jnp.max(relative, where=mask, initial=0)))
        multipliers = decay * state.multipliers + lr * (phi * parts + (1 - phi))
        state = VRBAState(jnp.where(mask, multipliers, state.multipliers), calls)
        return numerics.weighted_mean(jnp.square(multipliers), values, mask), state

    return base.scalarizer(init, apply, per_task={"initial_multipliers": initial_multipliers})
