"""MoCo: multi-objective gradient correction, MGDA a little at a time on gradients followed over the calls.

Fernando et al., "Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach", ICLR 2023,
https://openreview.net/forum?id=dLAYGdKTi2
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.gramian import combine, gramian_of_tasks, squared_norm
from mtlbalance.hyperparameters import FRACTION, NONNEGATIVE, POSITIVE, check
from mtlbalance.states import count_seen, zero_counts, zeros_jacobian


class MoCoState(NamedTuple):
    """State of :func:`moco`.

    Attributes:
      weights: one per task.
      seen: int32, one per task: the calls in which it was present.
      tracked: what follows the gradients, leaves ``[m, *param.shape]``.
    """

    weights: jax.Array
    seen: jax.Array
    tracked: Any


@base.memoized
def moco(
    beta: Number = 0.5,
    beta_sigma: Number = 0.5,
    lr: Number = 0.1,
    lr_sigma: Number = 0.5,
    rho: Number = 0.0,
    *,
    normalize: bool = False,
    softmax: bool = False,
    axis_name: Hashable | None = None,
) -> base.Aggregator[MoCoState]:
    r"""Descends towards the shortest combination of what follows each gradient, one step a call.

    .. math:: y_i \leftarrow y_i - \frac{\beta}{k^{\sigma_\beta}} (y_i - g_i), \qquad
              w \leftarrow \Pi_\Delta \Big( w - \frac{\gamma}{k^{\sigma_\gamma}} (Y Y^\top + \rho I) w \Big), \qquad
              g = \sum_i w_i y_i

    at the task's call number k, where :math:`\Pi_\Delta` projects onto the simplex: the weights sum to 1 and start
    equal. The :math:`y_i` start at zero and are as large as the Jacobian. Without ``normalize`` the weights' step is of
    the order of the squared gradients: choose :math:`\gamma` by it.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      LibMTL, after code of the authors, takes :math:`L_i g_i / \lVert g_i \rVert` in place of :math:`g_i`
      (``normalize=True``) and a softmax in place of the projection (``softmax=True``), which leaves the weights near
      each other. The paper projects :math:`y_i` onto a ball too, whose radius it leaves open: not done here. In its
      algorithm the model moves before the weights do; here, as in LibMTL, after them.

    Args:
      beta: :math:`\beta`, from 0 to 1. May be traced.
      beta_sigma: :math:`\sigma_\beta \ge 0`. May be traced.
      lr: step size of the weights :math:`\gamma > 0`. May be traced.
      lr_sigma: :math:`\sigma_\gamma \ge 0`, how fast it falls. May be traced.
      rho: :math:`\rho \ge 0`, draws the weights together. May be traced.
      normalize: whether to make each gradient as long as its loss is large. The losses must be positive then, and
        given as ``values=``: where one is negative the gradient is NaN, and what follows that task's stays. What
        follows a loss of 1e19 or more cannot be squared any more: the gradient is NaN until it has come down.
      softmax: whether to make weights by a softmax.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`MoCoState` and ``rowwise``. It has no weighting: what it
      combines are not the gradients of the call.

    Raises:
      ValueError: if an argument is out of bounds.
      TypeError: with ``normalize``, if a call has no ``values``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.moco(beta=1.0, lr=0.125)
      >>> rows = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(gradient, state.weights)  # the longer gradient loses weight
      [0.8125  0.59375] [0.40625 0.59375]

    References:
      Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning
      <https://openreview.net/forum?id=dLAYGdKTi2>`_, ICLR 2023, algorithm 1.
    """
    check("beta", beta, FRACTION)
    check("lr", lr, POSITIVE)
    for name, value in {"beta_sigma": beta_sigma, "lr_sigma": lr_sigma, "rho": rho}.items():
        check(name, value, NONNEGATIVE)

    def init(m, params, dtype):
        return MoCoState(jnp.full(m, 1 / m, dtype), zero_counts(m), zeros_jacobian(m, params, dtype))

    def visit(tracked, gradient, task):
        rate = jnp.where(task.present, beta / (task.seen + 1.0) ** beta_sigma, 0)
        square = ()
        if normalize:
            rate = jnp.where(task.loss < 0, 0, rate)  # its gradient would be followed upwards
            square = squared_norm(gradient, axis_name)
            norm = jnp.sqrt(square)
            gradient = jax.tree.map(lambda g: task.loss * (g / jnp.where(norm == 0, 1, norm)), gradient)
        return jax.tree.map(lambda y, g: y - rate * (y - g), tracked, gradient), square

    def finish(state, statistics, values, mask):
        del statistics
        weights = numerics.normalize(state.weights, mask)
        gramian = gramian_of_tasks(state.tracked, len(mask), axis_name)
        step = jnp.dot(gramian, weights, precision="highest") + rho * weights
        step = lr / (state.seen + 1.0) ** lr_sigma * step
        weights = numerics.softmax(weights - step, mask) if softmax else numerics.simplex_step(weights, step, mask)
        weights = numerics.nan_unless(jnp.all(jnp.isfinite(gramian)), jnp.where(mask, weights, 0))
        shown = numerics.nan_where(jnp.any(mask & (values < 0))) if normalize else 1
        gradient = combine(weights * shown, state.tracked)
        state = state._replace(weights=jnp.where(mask, weights, state.weights))
        return gradient, count_seen(state, mask)

    return base.rowwise_aggregator(init, visit, finish=finish, memory="tracked", reads_losses=normalize)
