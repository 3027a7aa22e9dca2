"""IMTL-G: impartial multi-task learning on the gradients, equal projections onto all of them.

Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr
"""

from collections.abc import Hashable

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.decompositions import orthonormal
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def imtl_g(*, axis_name: Hashable | None = None) -> base.Aggregator[SeenState]:
    r"""The combination of the gradients whose projections onto each of their directions are equal.

    .. math:: g = \sum_i w_i g_i, \quad w = \frac{v}{\sum_i v_i}, \quad v = G^+ d, \quad d_i = \lVert g_i \rVert

    with the pseudoinverse of the Gramian :math:`G`. The weights sum to 1 and may be negative; where :math:`v` adds up
    to less than zero, the projections are negative, and every task loses. The weights are zero where only a gradient of
    zero has equal projections, as between opposite gradients; where :math:`v` adds up to zero; and when all gradients
    are zero.

    Note:
      The paper and LibMTL solve a system of m - 1 equations, which has the same solution for independent gradients,
      and none for most dependent ones: there the pseudoinverse is TorchJD's. But where only one gradient depends on the
      others, as between opposite gradients of different lengths, the system has one, a gradient of zero, and TorchJD
      goes on. Which gradients depend on each other is told by their cosines, whatever their norms, where what is
      rounding error counts as zero. TorchJD decomposes :math:`G`: in float32 its dependent gradients whose norms differ
      by 1e3 or more are what the longest make of them.

    Args:
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.imtl_g()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.4f}" for x in gradient])
      ['0.0767', '1.0000', '1.0000']

    References:
      Liu et al., `Towards Impartial Multi-Task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021,
      section 3.1.
    """

    def weigh(state, gramian, values, mask):
        del values
        gramian = gramian / numerics.scale(gramian)
        nonzero, norms, cosines = numerics.cosines(gramian)
        cosines = cosines + jnp.diag(1 - nonzero.astype(gramian.dtype))  # zero gradients depend on none
        decomposition = numerics.eigh_psd(cosines)
        _, vectors, independent = decomposition
        # D^-1 C^+ D^-1 inverts G = D C D where that can be, and P with its null space projected out on both sides makes
        # it the pseudoinverse. The cosines C keep their digits where the norms D differ much. Under vmap two branches,
        # one for each case, would be two decompositions.
        # Nothing is said of a zero gradient: what rounding leaves there would be as large as the shortest one is short.
        dependent = nonzero[:, None] & ~independent[None]
        null_basis = jnp.where(dependent, orthonormal(jnp.where(dependent, vectors / norms[:, None], 0)), 0)
        project = lambda x: x - jnp.dot(null_basis, jnp.dot(x, null_basis, precision="highest"), precision="highest")
        distances = project(jnp.where(nonzero, norms, 0))
        v = jnp.where(nonzero, project(numerics.solve_psd(decomposition, distances / norms) / norms), 0)
        total, rounding = jnp.sum(v), 10 * len(v) * jnp.finfo(v.dtype).eps
        # Between opposite gradients v itself is rounding, and so are the projections.
        projections = jnp.dot(gramian, v, precision="highest")
        vanishes = jnp.max(jnp.abs(projections)) <= rounding * jnp.max(norms, where=nonzero, initial=0)
        vanishes |= jnp.abs(total) <= rounding * jnp.sum(jnp.abs(v))
        # One null vector n: unless sum(n) = 0, only a zero gradient has equal projections.
        unequal = jnp.abs(jnp.sum(vectors[:, 0], where=nonzero)) > jnp.sqrt(jnp.finfo(v.dtype).eps)
        vanishes |= (jnp.sum(~independent) == 1) & unequal
        return jnp.where(vanishes, 0, v / jnp.where(vanishes, 1, total)), count_seen(state, mask)

    return base.aggregator(init_seen, gramian_weighting=weigh, axis_name=axis_name)
