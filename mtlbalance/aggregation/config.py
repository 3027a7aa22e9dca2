"""ConFIG: a direction that has the same angle to all gradients, and as long as they reach along it.

Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025,
https://arxiv.org/abs/2408.11104
"""

from collections.abc import Hashable

import chex
import jax.numpy as jnp

from mtlbalance import base, inputs, numerics
from mtlbalance.baselines import SeenState, count_seen


def config(pref_vector: chex.ArrayTree | float = 1.0, *, axis_name: Hashable | None = None) -> base.Aggregator:
    r"""The direction with preferred projections of the gradients' directions, times the sum of their projections.

    .. math:: g = \Big( \sum_i g_i \cdot u \Big) u, \quad u = \frac{d}{\lVert d \rVert}, \quad d = U^+ p

    where the rows of :math:`U` are the gradients' directions (zero for a zero gradient). Only the direction of the
    preference :math:`p` matters. The weights have no fixed total and may be negative; all are zero where :math:`d`
    is, up to rounding.

    Note:
      Here :math:`d` is found from the Gramian :math:`U U^\top`: directions that depend on each other nearly, with a
      singular value below about 1e-3 of the largest (in float32), count as dependent. TorchJD decomposes :math:`U`
      itself.

    Args:
      pref_vector: preference :math:`p`: one real number for all tasks or one for each, an array or a tree of names.
        May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which every parameter is split.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: at ``init``, if there is not one preference per task.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.config()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.4f}" for x in gradient])
      ['0.1588', '2.0706', '2.0706']

    References:
      Liu et al., `ConFIG <https://arxiv.org/abs/2408.11104>`_, ICLR 2025, eq. 2; https://github.com/tum-pbs/ConFIG.
    """

    def init(m, params, dtype):
        del params
        inputs.per_task("pref_vector", pref_vector, (m,), dtype)
        return SeenState(jnp.zeros(m, jnp.int32))

    def weigh(state, gramian, values, mask):
        del values
        preferred = jnp.where(mask, inputs.per_task("pref_vector", pref_vector, mask.shape, gramian.dtype), 0)
        norms, cosines = numerics.cosines(gramian)
        v = numerics.solve_psd(numerics.eigh_psd(cosines), preferred)
        projections = jnp.dot(cosines, v, precision="highest")  # of the directions on d
        rounding = 10 * len(v) * jnp.finfo(v.dtype).eps * jnp.max(jnp.abs(preferred))
        square = jnp.where(jnp.max(jnp.abs(projections)) > rounding, jnp.sum(v * projections), 0)
        length = jnp.sum(norms * projections) / jnp.where(square > 0, square, 1)
        moves = (square > 0) & (norms > 0)
        return jnp.where(moves, length * (v / jnp.where(moves, norms, 1)), 0), count_seen(state, mask)

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name)
