"""MoDo: weights on the simplex that follow a double-sampled gradient of the min-norm problem.

Chen et al., "Three-Way Trade-Off in Multi-Objective Learning", NeurIPS 2023, https://arxiv.org/abs/2305.20057
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import NONNEGATIVE, POSITIVE, check


class MoDoState(NamedTuple):
    """State of :func:`modo`.

    Attributes:
      weights: one per task.
    """

    weights: jax.Array


@base.memoized
def modo(lr: Number = 0.1, rho: Number = 0.1, *, axis_name: Hashable | None = None) -> base.Aggregator[MoDoState]:
    r"""Weights that take one projected gradient step at every call.

    .. math:: \lambda \leftarrow \Pi_\Delta \big( \lambda - \gamma (A \lambda + \rho \lambda) \big)

    where :math:`A = J_1 J_2^\top` should be made of the Jacobians of two independent batches and given to
    ``gramian_weighting``. The weights are then used for the losses of a third batch, as in the example. ``apply`` has
    one Jacobian, :math:`J_1 = J_2`. The weights start equal and sum to 1. The step depends on the scale of the
    gradients.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      LibMTL has :math:`\gamma` = 1e-3.

    Args:
      lr: step size :math:`\gamma > 0`. May be traced.
      rho: :math:`\rho \ge 0`, draws the weights together. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`MoDoState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``lr`` or ``rho`` is out of bounds.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> from mtlbalance.gramian import gramian
      >>> method = aggregation.modo(lr=0.1, rho=0.0)
      >>> def losses(params, batch):
      ...     return jnp.stack([jnp.mean((params - batch) ** 2), jnp.mean((params + batch) ** 2)])
      >>> params, batch_1, batch_2, batch_3 = jnp.array([[0.5, 1.0], [2.0, 1.0], [3.0, 1.0], [1.0, 2.0]])
      >>> jacobian_1, jacobian_2 = (jax.jacrev(losses)(params, batch) for batch in (batch_1, batch_2))
      >>> inner_products = gramian(jacobian_1, jacobian_2)
      >>> weights, state = method.gramian_weighting.apply(method.gramian_weighting.init(2), inner_products)
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.7000', '0.3000']
      >>> gradient = jax.grad(lambda params: weights @ losses(params, batch_3))(params)

    References:
      Chen et al., `Three-Way Trade-Off in Multi-Objective Learning <https://arxiv.org/abs/2305.20057>`_, NeurIPS
      2023, algorithm 1; https://github.com/heshandevaka/Trade-Off-MOL.
    """
    check("lr", lr, POSITIVE)
    check("rho", rho, NONNEGATIVE)

    def init(m, params, dtype):
        del params
        return MoDoState(jnp.full(m, 1 / m, dtype))

    def weigh(state, gramian, values, mask):
        del values
        weights = numerics.normalize(state.weights, mask)
        step = jnp.dot(gramian, weights, precision="highest") + rho * weights
        weights = numerics.simplex_step(weights, lr * step, mask)
        return weights, MoDoState(jnp.where(mask, weights, state.weights))

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name)
