"""PCGrad: gradient surgery, each gradient projected off those that conflict with it.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, https://arxiv.org/abs/2001.06782
"""

from collections.abc import Hashable

import chex
import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.hyperparameters import check_key, key_impl
from mtlbalance.mapped_axes import varying_as
from mtlbalance.states import RandomState, count_seen, init_random, random_orders


@base.memoized
def pcgrad(key: int | chex.PRNGKey = 0, *, axis_name: Hashable | None = None) -> base.Aggregator[RandomState]:
    r"""The sum of the gradients, each without what points against the others.

    Each gradient :math:`g_i` meets the others in a random order of its own, and loses its component along those that
    it conflicts with:

    .. math:: g = \sum_i g_i^{\mathrm{PC}}, \quad
              g_i^{\mathrm{PC}} \leftarrow g_i^{\mathrm{PC}}
              - \frac{\min(g_i^{\mathrm{PC}} \cdot g_j, 0)}{\lVert g_j \rVert^2} g_j

    The weights are at least 1 each, and m in total where nothing conflicts. With two tasks there is but one order.

    Note:
      It is a sum, as in the paper, TorchJD and LibMTL: do not compare it with means at one learning rate. LibMTL adds
      1e-8 to the squared norm.

    Args:
      key: a seed, or a :func:`jax.random.key`, for the orders. To sweep seeds, build the method inside the function
        that is mapped.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`RandomState`, ``weighting`` and ``gramian_weighting``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.pcgrad()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.4f}" for x in gradient])
      ['0.5848', '3.8012', '3.8012']

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020,
      algorithm 1.
    """
    check_key(key)

    def weigh(state, gramian, values, mask):
        del values
        m = mask.shape[0]
        squares = jnp.diagonal(gramian)

        def project(i, order):
            def meet(n, coefficients):
                j = order[n]
                product = jnp.sum(coefficients * gramian[j])
                # An absent task's products are zero: it conflicts with none. Nor does one whose square underflows.
                conflict = (product < 0) & (squares[j] > 0) & (j != i)
                added = jnp.where(conflict, -product / jnp.where(conflict, squares[j], 1), 0)
                # Not by `.at[j]`: under vmap checkify's index checks fail on that.
                return coefficients + jnp.where(jnp.arange(m) == j, added, 0)

            return jax.lax.fori_loop(0, m, meet, varying_as(jax.nn.one_hot(i, m, dtype=gramian.dtype), gramian, order))

        orders, state = random_orders(state, key_impl(key), m)
        coefficients = jax.vmap(project)(jnp.arange(m), orders)
        return jnp.sum(coefficients, axis=0, where=mask[:, None]), count_seen(state, mask)

    return base.aggregator(init_random(key), gramian_weighting=weigh, axis_name=axis_name)
