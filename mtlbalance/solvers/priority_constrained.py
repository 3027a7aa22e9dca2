"""Priority-constrained descent's projection (https://arxiv.org/abs/2606.29521), on device."""

import chex
import jax.numpy as jnp

from mtlbalance import numerics
from mtlbalance.solvers.interior_point import nonnegative_qp
from mtlbalance.solvers.simplex_qp import simplex_qp


def priority_constrained(gramian: chex.Array, tau: chex.Numeric, mask: chex.Array | None = None) -> chex.Array:
    r"""The step nearest to the first gradient that gives every other task its share of progress.

    .. math:: \min_d \tfrac12 \|d - g_1\|^2 \quad\text{where}\quad g_j^\top d \ge \tau_j \|g_j\|^2 \quad (j \ge 2)

    The solution is :math:`d = g_1 + \sum_j \mu_j g_j` with the multipliers :math:`\mu \ge 0` of the constraints,
    which minimise :math:`\mu^\top G \mu / 2 - \sum_j \mu_j (\tau_j G_{jj} - G_{j1})`. Constraints that contradict each
    other by more than rounding are dropped, all of them, as TorchJD does: there a convex combination of their unit
    gradients vanishes, or the multipliers', which is tested to the square root of ten rounding errors, or progress is
    lacking after all. Exact to rounding times the multipliers' size, in units of the first norm and of
    :math:`\tau_j \|g_j\|`. The first gradient is that of the first task present.

    Args:
      gramian: inner products of the tasks' gradients, shape ``[m, m]``, of any scale, the primary task first.
      tau: share of the progress along the task's own gradient, at least 0: one, or one per other task, ``[m - 1]``.
      mask: tasks present, shape ``[m]``.

    Returns:
      Weights :math:`(1, \mu)`, shape ``[m]``; 0 for absent tasks and zero gradients of others.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.solvers import priority_constrained
      >>> print(priority_constrained(jnp.array([[1.0, -1.0], [-1.0, 4.0]]), 0.0).round(3))
      [1.   0.25]
    """
    mask = jnp.ones(len(gramian), bool) if mask is None else mask
    primary = jnp.argmax(mask)
    others, norms, cosines = numerics.cosines(gramian, mask & (jnp.arange(len(mask)) > primary))
    tau = jnp.broadcast_to(jnp.asarray(tau, gramian.dtype), (len(mask) - 1,))
    tau = jnp.concatenate([jnp.zeros(1, gramian.dtype), tau])
    # In mu_j |g_j| over the largest lack of progress along a unit gradient.
    lacking = jnp.where(others, tau * norms - gramian[primary] / norms, 0)
    unit = jnp.max(jnp.abs(lacking))
    unit = jnp.where(unit == 0, 1, unit)
    # Progress for all is possible unless a convex combination of their unit gradients vanishes. Along that the
    # multipliers would grow without bound, and how far they get depends on rounding: so it is looked for first. The
    # second program takes what the first one gives: side by side they might hang, see `mtlbalance.decompositions`.
    hull = simplex_qp(cosines, mask=others)
    # An interior point gives all of them some of the weight: what is rounding demands nothing.
    asking = others & (tau > 0)
    in_hull = hull > (10 * jnp.finfo(gramian.dtype).eps) ** 0.5 * jnp.max(hull)
    hull_vanishes = (numerics.squared_length(cosines, hull) == 0) & jnp.any(asking & in_hull)
    multipliers = nonnegative_qp(cosines, jnp.where(hull_vanishes, 0, -lacking / unit), others)
    # Without shares they never contradict each other: then no step at all satisfies them.
    demanding = jnp.any(lacking > 0) & jnp.any(asking)
    combination_vanishes = hull_vanishes | (numerics.squared_length(cosines, multipliers) == 0)
    # Where rounding has made the matrix indefinite, the solver stops long before the multipliers are so long.
    missing = jnp.max(lacking / unit - jnp.dot(cosines, multipliers, precision="highest"), where=others, initial=0)
    rounding = 10 * (4 + len(mask) ** 0.5) * jnp.finfo(gramian.dtype).eps
    contradict = demanding & (combination_vanishes | (missing > rounding * (1 + jnp.sum(multipliers))))
    multipliers = jnp.where(contradict | jnp.all(lacking <= 0), 0, multipliers)
    weights = jnp.where(others, unit * multipliers / norms, 0).at[primary].set(1)
    return jnp.where(mask, weights, 0)
