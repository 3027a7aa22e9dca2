"""MoDo: weights on the simplex that follow a double-sampled gradient of the min-norm problem.

Chen et al., "Three-Way Trade-Off in Multi-Objective Learning", NeurIPS 2023, https://arxiv.org/abs/2305.20057
"""

from collections.abc import Hashable
from typing import NamedTuple

import chex
import jax.numpy as jnp

from mtlbalance import base, inputs, numerics


class MoDoState(NamedTuple):
    """State of :func:`modo`.

    Attributes:
      weights: one per task.
    """

    weights: chex.Array


def modo(gamma: chex.Numeric = 0.1, rho: chex.Numeric = 0.1, *, axis_name: Hashable | None = None) -> base.Aggregator:
    r"""Weights that take one projected gradient step at every call.

    .. math:: \lambda \leftarrow \Pi_\Delta \big( \lambda - \gamma (A \lambda + \rho \lambda) \big)

    where :math:`A = J_1 J_2^\top` should be made of two independent batches: give it to ``gramian_weighting``, and
    the weights to the loss of a third one. ``apply`` uses the Gramian of its one Jacobian. The weights start equal
    and sum to 1. The step depends on the scale of the gradients.

    Args:
      gamma: step size :math:`\gamma > 0`. May be traced.
      rho: :math:`\rho \ge 0`, draws the weights together. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which every parameter is split.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`MoDoState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``gamma`` or ``rho`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.modo(gamma=0.1, rho=0.0)
      >>> products = jnp.array([[4.0, 1.0], [1.0, 2.0]])  # of the gradients of two batches
      >>> weights, state = method.gramian_weighting.apply(method.gramian_weighting.init(2), products)
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.4500', '0.5500']

    References:
      Chen et al., `Three-Way Trade-Off in Multi-Objective Learning <https://arxiv.org/abs/2305.20057>`_, NeurIPS
      2023, algorithm 1.
    """
    inputs.check_positive("gamma", gamma)
    inputs.check_nonnegative("rho", rho)

    def init(m, params, dtype):
        del params
        return MoDoState(jnp.full(m, 1 / m, dtype))

    def weigh(state, gramian, values, mask):
        del values
        weights = numerics.normalize(state.weights, mask)
        step = jnp.dot(gramian, weights, precision="highest") + rho * weights
        weights = numerics.project_simplex(weights - gamma * step, mask)
        return weights, MoDoState(jnp.where(mask, weights, state.weights))

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name)
