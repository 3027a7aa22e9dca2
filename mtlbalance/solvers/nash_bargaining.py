"""The Nash bargaining solution (Navon et al. 2022, https://arxiv.org/abs/2202.01017), on device."""

import chex

from mtlbalance.solvers.alpha_fair import alpha_fair


def nash_bargaining(gramian: chex.Array, mask: chex.Array | None = None) -> chex.Array:
    r"""Weights at which every task gains the same: :math:`w_i (G w)_i = 1` with :math:`w > 0`.

    The direction :math:`\sum_i w_i g_i` maximizes the product of the tasks' gains among directions of its length,
    whatever the gradients' norms. The equations are those of :func:`alpha_fair` for :math:`\alpha = 1`, and solved as
    exactly, also for norms that differ by 1e6. They have no solution where a positive combination of gradients
    vanishes; finite weights come back there.

    Note:
      The sequence of convex problems in the official code can stop at another point.

    Args:
      gramian: inner products of the tasks' gradients, shape ``[m, m]``, of any scale.
      mask: tasks present, shape ``[m]``.

    Returns:
      Weights, shape ``[m]``; 0 for absent tasks and for zero gradients, whose equation has no solution.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.solvers import nash_bargaining
      >>> print(nash_bargaining(jnp.array([[4.0, 0.0], [0.0, 1.0]])).round(3))
      [0.5 1. ]
    """
    return alpha_fair(gramian, 1, mask)
