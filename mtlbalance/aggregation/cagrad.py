"""CAGrad: the direction near the mean gradient that is best for the task it is worst for.

Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, https://arxiv.org/abs/2110.14048
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import NONNEGATIVE, check, check_int, preference, reject
from mtlbalance.mapped_axes import varying_as
from mtlbalance.solvers import cagrad_dual, dual_cone
from mtlbalance.states import SeenState, count_seen, init_seen

# Of the shortest gradient. The solver looks for no combinations shorter than half of it.
_VANISHING = 2e-5


@base.memoized
def cagrad(c: Number = 0.5, rescale: int = 0, *, axis_name: Hashable | None = None) -> base.Aggregator[SeenState]:
    r"""Maximizes the least gain of a task within a ball around the mean gradient.

    .. math:: \max_g \min_i g_i \cdot g \quad \text{with} \quad \lVert g - g_0 \rVert \le c \lVert g_0 \rVert, \qquad
              g = g_0 + \frac{c \lVert g_0 \rVert}{\lVert g_w \rVert} g_w, \quad g_w = \sum_i w_i g_i

    where :math:`g_0` is the mean gradient and :math:`w` minimizes
    :math:`g_w \cdot g_0 + c \lVert g_0 \rVert \lVert g_w \rVert` on the simplex. The weights have no fixed total: 1 for
    :math:`c = 0`, the mean. From :math:`c = 1` on no task loses. Where :math:`g_w` vanishes, as with a gradient of zero
    or between opposite ones, the least gain is zero at best; of the directions with which no task loses :math:`g` is
    the one nearest to :math:`g_0`. Shorter than 2e-5 of the shortest gradient, or than rounding, counts as vanishing.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      TorchJD has no default for ``c`` and does not rescale; where :math:`g_w` vanishes it may return zero, though for
      :math:`c < 1` that is outside of the ball, and the official code the mean, with which a task may lose. Nash-MTL's
      code has c = 0.4 and multiplies LibMTL's result by m.

    Args:
      c: :math:`c \ge 0`. May be traced.
      rescale: 0 returns :math:`g`; 1 divides it by :math:`1 + c^2` (LibMTL), 2 by :math:`1 + c` (the authors' toy
        example).
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``c`` or ``rescale`` is out of bounds.
      TypeError: if ``rescale`` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.cagrad(c=0.5)
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.3f}" for x in gradient])
      ['0.184', '1.204', '1.204']

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning <https://arxiv.org/abs/2110.14048>`_,
      NeurIPS 2021, algorithm 1; https://github.com/Cranial-XIX/CAGrad.
    """
    check("c", c, NONNEGATIVE)
    check_int("rescale", rescale, 0)
    if rescale > 2:
        reject("rescale", "0, 1 or 2", f"{rescale}")

    def weigh(state, gramian, values, mask):
        del values
        gramian = gramian / numerics.scale(gramian)
        mean = preference(None, mask, gramian.dtype)
        w = cagrad_dual(gramian, c, mask)
        norm, mean_norm = (jnp.sqrt(numerics.squared_length(gramian, x)) for x in (w, mean))
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
        vanishes = norm <= _VANISHING * jnp.min(norms, where=norms > 0, initial=1)
        weights = mean + c * mean_norm / jnp.where(vanishes, 1, norm) * w
        # Under vmap both branches are computed: for zeros the solver has nothing to do.
        project = lambda: dual_cone(gramian, jnp.where(vanishes, mean, 0), mask)
        nearest = jax.lax.cond(vanishes, project, lambda: varying_as(jnp.zeros_like(mean), gramian, vanishes))
        weights = jnp.where(vanishes, nearest, weights)
        weights = jnp.where(c == 0, mean, weights)
        return weights / (1, 1 + c**2, 1 + c)[rescale], count_seen(state, mask)

    return base.aggregator(init_seen, gramian_weighting=weigh, axis_name=axis_name)
