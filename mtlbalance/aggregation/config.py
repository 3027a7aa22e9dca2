"""ConFIG: the direction that has the same angle to all gradients, as long as the sum of their projections on it.

Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025,
https://arxiv.org/abs/2408.11104
"""

from collections.abc import Hashable
from functools import partial

from mtlbalance import base, numerics
from mtlbalance.annotations import PerTask
from mtlbalance.hyperparameters import preference
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def config(pref_vector: PerTask | None = None, *, axis_name: Hashable | None = None) -> base.Aggregator[SeenState]:
    r"""The direction whose cosines with the gradients are as preferred, as long as the sum of their projections on it.

    .. math:: g = \Big( \sum_i g_i \cdot u \Big) u, \quad u = \frac{d}{\lVert d \rVert}, \quad d = U^+ p

    where the rows of :math:`U` are the gradients' directions (zero for a zero gradient) and :math:`U^+` is its
    pseudoinverse: where they depend on each other, the cosines are as near to the preferred ones as can be. The
    weights have no fixed total and may be negative; all are zero where :math:`d` is, up to rounding.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      Here :math:`d` is found from the Gramian :math:`U U^\top`: directions that nearly depend on each other, with a
      singular value below about 1e-3 of the largest (in float32), count as dependent. TorchJD decomposes :math:`U`
      itself.

    Args:
      pref_vector: preference :math:`p`, one real number per task: an array or a tree of names; equal ones by default.
        Only its direction matters, and not its sign. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

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

    preferences = partial(preference, pref_vector)

    def weigh(state, gramian, values, mask):
        del values
        preferred = preferences(mask, gramian.dtype)
        return numerics.conflict_free(gramian, preferred), count_seen(state, mask)

    return base.aggregator(
        init_seen_after(preferences),
        gramian_weighting=weigh,
        axis_name=axis_name,
        per_task={"pref_vector": pref_vector},
    )
