"""DB-MTL: dual balancing, logarithms of the losses whose gradients are stretched to the length of the longest.

Lin et al., "Dual-Balancing for Multi-Task Learning", 2023, https://arxiv.org/abs/2308.12029
"""

from collections.abc import Hashable

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.baselines import SeenState, count_seen


def db_mtl(*, axis_name: Hashable | None = None) -> base.Aggregator:
    r"""The sum of the gradients, each as long as the longest.

    .. math:: g = \sum_i w_i g_i, \quad w_i = \frac{\max_j \lVert g_j \rVert}{\lVert g_i \rVert}

    The paper's :math:`g_i` are the gradients of the *logarithms* of positive losses: give it the Jacobian of
    ``jnp.log(losses)``. The weights are at least 1, except 0 for a zero gradient, and have no fixed total.

    Note:
      In the paper, and in LibMTL, the :math:`g_i` are also running averages over the calls. This function has none: it
      is the method with a decay :math:`\beta = 0`. LibMTL adds 1e-8 to the losses and to the norms.

    Args:
      axis_name: under :func:`jax.shard_map`, the axis over which every parameter is split.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.db_mtl()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.4f}" for x in gradient])
      ['0.1881', '2.4530', '2.4530']

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning <https://arxiv.org/abs/2308.12029>`_, 2023, section 3.
    """

    def init(m, params, dtype):
        del params, dtype
        return SeenState(jnp.zeros(m, jnp.int32))

    def weigh(state, gramian, values, mask):
        del values
        moving, norms, _ = numerics.cosines(gramian / numerics.scale(gramian))
        longest = jnp.max(norms, where=moving, initial=0)
        return jnp.where(moving, longest / norms, 0), count_seen(state, mask)

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name)
