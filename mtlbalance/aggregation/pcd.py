"""PCD: priority-constrained descent, the first task's gradient, bent until every other task progresses too.

Varam and AlHajri, "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
Optimization", TMLR 2026, https://arxiv.org/abs/2606.29521
"""

from collections.abc import Hashable
from typing import NamedTuple

import chex
import jax.numpy as jnp
import optax

from mtlbalance import base, numerics
from mtlbalance.hyperparameters import DECAY, FRACTION, NONNEGATIVE, check, per_task
from mtlbalance.solvers import priority_constrained
from mtlbalance.states import select, zero_counts


class PCDState(NamedTuple):
    """State of :func:`pcd`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      squares: running averages of the gradients' squared norms, one per task.
    """

    seen: chex.Array
    squares: chex.Array


def pcd(
    tau: chex.ArrayTree | float = 0.02,
    beta: chex.Numeric = 0.999,
    eps: chex.Numeric = 0.0,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator:
    r"""The step nearest to the first task's gradient that gives every other task its share of progress.

    .. math:: d = \arg\min_d \lVert d - s_1 g_1 \rVert \quad \text{with} \quad
              s_j g_j \cdot d \ge \tau_j \lVert s_j g_j \rVert^2 \quad (j \ge 2), \qquad
              g = \lVert g_1 \rVert \frac{d}{\lVert d \rVert}, \qquad s_i = \frac{1}{\sqrt{\hat v_i + \epsilon}}

    where :math:`\hat v_i` is the running average of :math:`\lVert g_i \rVert^2`, without bias towards its start. The
    first task present is the primary one. The weights have no fixed total, and the primary task's is zero only if the
    whole gradient is. Where the constraints contradict each other they are dropped, all of them; where :math:`g_1` or
    :math:`d` vanishes, up to rounding, so does the gradient.

    Note:
      TorchJD's :math:`\epsilon` is 1e-8; without it the scale of the gradients does not matter. It solves in float64
      on the host, and counts the calls of all tasks together.

    Args:
      tau: shares :math:`\tau` from 0 to 1: one for all other tasks, or one for each, shape ``[m - 1]``. Entry j - 2 is
        task j's, also when an earlier task is absent; the share of a task that is primary is unused. May be traced.
      beta: decay of the running averages, at least 0 and below 1. May be traced.
      eps: :math:`\epsilon \ge 0`. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which every parameter is split.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`PCDState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``beta`` or ``eps`` is out of bounds; at ``init``, if ``tau`` is, or if it has not one number per
        other task.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.pcd()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.3f}" for x in gradient])
      ['-0.820', '2.943', '2.943']

    References:
      Varam and AlHajri, `Not All Objectives Are Born Equal <https://arxiv.org/abs/2606.29521>`_, TMLR 2026;
      https://github.com/DaraVaram/priority-constrained-descent.
    """
    check("beta", beta, DECAY)
    check("eps", eps, NONNEGATIVE)

    def read_tau(m, dtype):
        return per_task("tau", tau, (m - 1,), dtype, bound=FRACTION)

    def init(m, params, dtype):
        del params
        read_tau(m, dtype)
        return PCDState(zero_counts(m), jnp.zeros(m, dtype))

    def weigh(state, gramian, values, mask):
        del values
        gramian = gramian.astype(state.squares.dtype)
        state = select(mask, average(state, jnp.diagonal(gramian)), state)
        root = jnp.sqrt(state.squares + eps)
        scales = jnp.where(root > 0, 1 / jnp.where(root > 0, root, 1), 0)
        scaled = gramian * scales * scales[:, None]
        weights = priority_constrained(scaled, read_tau(len(scales), scaled.dtype), mask)
        square, primary = numerics.squared_length(scaled, weights), jnp.argmax(mask)
        vanishes = (square == 0) | (scaled[primary, primary] == 0)
        length = jnp.sqrt(gramian[primary, primary] / jnp.where(vanishes, 1, square))
        return jnp.where(vanishes, 0, weights * (scales * length)), state

    def average(state, squares):
        seen = optax.safe_increment(state.seen)
        decay = jnp.asarray(beta, squares.dtype)
        rate = (1 - decay) / numerics.bias_correction(decay, seen)  # 1 on the first call, 1 - beta in the end
        return PCDState(seen, state.squares + rate * (squares - state.squares))

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name)
