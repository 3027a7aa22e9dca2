"""PCD: priority-constrained descent, the first task's gradient, bent until every other task progresses too.

Varam and AlHajri, "Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
Optimization", TMLR 2026, https://arxiv.org/abs/2606.29521
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import DECAY, FRACTION, NONNEGATIVE, check, per_task
from mtlbalance.names import check_task, index_of, names_of
from mtlbalance.solvers import priority_constrained
from mtlbalance.states import count_seen, unbiased_average, zero_counts


class PCDState(NamedTuple):
    """State of :func:`pcd`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      squares: running averages of the gradients' squared norms, one per task.
    """

    seen: jax.Array
    squares: jax.Array


@base.memoized
def pcd(
    tau: PerTask | float = 0.02,
    beta: Number = 0.999,
    eps: Number = 0.0,
    *,
    main: int | str = 0,
    axis_name: Hashable | None = None,
) -> base.Aggregator[PCDState]:
    r"""The step nearest to the main task's gradient that gives every other task its share of progress.

    .. math:: d = \arg\min_d \lVert d - s_1 g_1 \rVert \quad \text{with} \quad
              s_j g_j \cdot d \ge \tau_j \lVert s_j g_j \rVert^2 \quad (j \ge 2), \qquad
              g = \lVert g_1 \rVert \frac{d}{\lVert d \rVert}, \qquad s_i = \frac{1}{\sqrt{\hat v_i + \epsilon}}

    where :math:`\hat v_i` is the running average of :math:`\lVert g_i \rVert^2`, without bias towards its start. The
    main task counts as the first; where it is absent, the first of the others does. The weights have no fixed total,
    and the main task's is zero only if the whole gradient is. Where the constraints contradict each other they are
    dropped, all of them; where :math:`g_1` or :math:`d` vanishes, up to rounding, so does the gradient.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      TorchJD's :math:`\epsilon` is 1e-8; without it the scale of the gradients does not matter. It solves in float64
      on the host, and counts the calls of all tasks together.

    Args:
      tau: shares :math:`\tau` from 0 to 1: one for all other tasks, or one for each: shape ``[m - 1]`` in their order,
        or a tree of the losses' names. The share of the task in the first place is unused. May be traced.
      beta: decay of the running averages, at least 0 and below 1. May be traced.
      eps: :math:`\epsilon \ge 0`. May be traced.
      main: the name of the task that comes first, or its index where losses have no names.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`PCDState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``beta`` or ``eps`` is out of bounds; at ``init``, if ``tau`` is, or if it has not one number per
        other task; if ``main`` is no task, or an index where the losses have names.
      TypeError: if ``main`` is neither an int nor a name.

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
    check_task("main", main)
    is_named = bool(names_of(tau).entries)

    def read_tau(m, dtype):
        return per_task("tau", tau, (m if is_named else m - 1,), dtype, bound=FRACTION)

    def init(m, params, dtype):
        del params
        check_task("main", main, m)
        read_tau(m, dtype)
        return PCDState(zero_counts(m), jnp.zeros(m, dtype))

    def main_first(m):
        first = index_of("main", main)
        return [first, *(i for i in range(m) if i != first)]

    def weigh(state, gramian, values, mask):
        del values
        gramian = gramian.astype(state.squares.dtype)
        squares = unbiased_average(state.squares, jnp.diagonal(gramian), beta, state.seen)
        state = count_seen(state._replace(squares=jnp.where(mask, squares, state.squares)), mask)
        root = jnp.sqrt(state.squares + eps)
        scales = jnp.where(root == 0, 0, 1 / jnp.where(root == 0, 1, root))
        scaled = scales[:, None] * gramian * scales[None, :]
        order = jnp.array(main_first(len(mask)))
        shares = read_tau(len(mask), scaled.dtype)
        in_order = scaled[order][:, order], shares[order[1:]] if is_named else shares, mask[order]
        weights = jnp.zeros_like(scales).at[order].set(priority_constrained(*in_order))
        square, primary = numerics.squared_length(scaled, weights), order[jnp.argmax(mask[order])]
        vanishes = (square == 0) | (scaled[primary, primary] == 0)
        length = jnp.sqrt(gramian[primary, primary] / jnp.where(vanishes, 1, square))
        weights = jnp.where(vanishes, 0, weights * (scales * length))
        # An average that is not finite would make zeros of its task's gradients, and of the main one's all weights.
        return numerics.nan_unless(jnp.all(jnp.isfinite(state.squares) | ~mask), weights), state

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name, per_task={"tau": tau})
