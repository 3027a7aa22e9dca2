"""DB-MTL: dual balancing, logarithms of the losses whose gradients are stretched to the length of the longest.

Lin et al., "Dual-Balancing for Multi-Task Learning", 2023, https://arxiv.org/abs/2308.12029
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import Number
from mtlbalance.gramian import combine, squared_norm
from mtlbalance.hyperparameters import FRACTION, NONNEGATIVE, check
from mtlbalance.states import count_seen, init_seen, zero_counts, zeros_jacobian


class DBMTLState(NamedTuple):
    """State of :func:`db_mtl` with averages; without them it is :class:`SeenState`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      averages: running averages of the gradients, leaves ``[m, *param.shape]``.
    """

    seen: jax.Array
    averages: Any


@base.memoized
def db_mtl(
    beta: Number | None = None, beta_sigma: Number = 0.0, *, axis_name: Hashable | None = None
) -> base.Aggregator:
    r"""The sum of the gradients, each as long as the longest; with ``beta`` of their running averages.

    .. math:: g = \sum_i w_i \bar g_i, \quad w_i = \frac{\max_j \lVert \bar g_j \rVert}{\lVert \bar g_i \rVert}, \qquad
              \bar g_i \leftarrow \beta_k \bar g_i + (1 - \beta_k) g_i, \quad \beta_k = \frac{\beta}{k^\sigma}

    at the task's call number k; without ``beta``, :math:`\bar g_i = g_i`. The averages start at zero, and are as large
    as the Jacobian. The weights are at least 1, except 0 for a zero gradient, and have no fixed total.

    The paper's :math:`g_i` are the gradients of the *logarithms* of positive losses. The whole method is
    ``mtl.chain(scalarization.scale_invariant(), aggregation.db_mtl(beta=0.9))``.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      LibMTL's default is ``beta=0.9``. It adds 1e-8 to the losses and to the norms. Like it, this function does not
      divide the averages by :math:`1 - \beta^k`: the first gradient is :math:`1 - \beta` as long as later ones.

    Args:
      beta: :math:`\beta`, from 0 to 1, of the running averages; none by default. May be traced.
      beta_sigma: :math:`\sigma \ge 0`, how fast :math:`\beta_k` falls. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with ``rowwise``. Without ``beta`` also with ``weighting`` and
      ``gramian_weighting``, and state :class:`SeenState`; with it, which combines the averages and not the gradients
      of the call, state :class:`DBMTLState`.

    Raises:
      ValueError: if ``beta`` or ``beta_sigma`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.db_mtl()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.4f}" for x in gradient])
      ['0.1881', '2.4530', '2.4530']

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_, 2023, section 3;
      averages: algorithm 1.
    """
    check("beta_sigma", beta_sigma, NONNEGATIVE)

    def stretch(squares, mask):
        norms = jnp.sqrt(squares)
        nonzero = mask & (norms != 0)
        longest = jnp.max(norms, where=nonzero, initial=0)
        return jnp.where(nonzero, longest / jnp.where(nonzero, norms, 1), 0)

    def weigh(state, squares, values, mask):
        del values
        return stretch(squares, mask), count_seen(state, mask)

    if beta is None:
        return base.norms_aggregator(init_seen, weigh, axis_name=axis_name)
    check("beta", beta, FRACTION)

    def init_averages(m, params, dtype):
        return DBMTLState(zero_counts(m), zeros_jacobian(m, params, dtype))

    def visit(average, gradient, task):
        decay = beta / (task.seen + 1.0) ** beta_sigma
        follow = lambda old, new: jnp.where(task.present, decay * old + (1 - decay) * new, old)
        average = jax.tree.map(follow, average, gradient)
        return average, squared_norm(average, axis_name)

    def finish(state, squares, values, mask):
        del values
        return combine(stretch(squares, mask), state.averages), count_seen(state, mask)

    return base.rowwise_aggregator(init_averages, visit, finish=finish, memory="averages")
