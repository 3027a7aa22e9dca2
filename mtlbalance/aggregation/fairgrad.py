"""FairGrad: the direction that shares the progress of the tasks alpha-fairly.

Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, https://arxiv.org/abs/2402.15638
"""

from collections.abc import Hashable

from mtlbalance import base
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import POSITIVE, check
from mtlbalance.solvers import alpha_fair
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def fairgrad(alpha: Number = 1.0, *, axis_name: Hashable | None = None) -> base.Aggregator[SeenState]:
    r"""The combination of the gradients in which task i gains :math:`w_i^{-1/\alpha}`.

    .. math:: g = \sum_i w_i g_i, \quad G w = w^{-1/\alpha}, \quad w > 0

    A task that gains little has a large weight. With :math:`\alpha = 1` it is the direction of
    :func:`~mtlbalance.aggregation.nash_mtl`; the larger :math:`\alpha` is, the more the task counts that gains least.
    The weights have no fixed total; a zero gradient has weight 0. The equations have no solution where a positive
    combination of gradients vanishes: then those gradients have large, finite weights with which they cancel.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The equations are solved to about 1e-5 relative to the terms of their sums (1e-4 for :math:`\alpha` other than 1),
      TorchJD's and LibMTL's least squares to their tolerance. TorchJD's ``alpha=0``, the mean, is an error here. The
      official code multiplies the gradient of the shared parameters by m, clips it to norm 1, and uses ``alpha=2``.

    Args:
      alpha: :math:`\alpha > 0`. May be traced. In float32 it is accurate from 1/2 to 2, and from 1/5 to 5 where the
        norms differ by a factor of up to 1e3.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``alpha`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.fairgrad(alpha=1.0)
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.4f}" for x in gradient])
      ['0.0766', '0.9985', '0.9985']

    References:
      Ban and Ji, `Fair Resource Allocation in Multi-Task Learning <https://arxiv.org/abs/2402.15638>`_, ICML 2024,
      eq. 8; https://github.com/OptMN-Lab/fairgrad.
    """
    check("alpha", alpha, POSITIVE)

    def weigh(state, gramian, values, mask):
        del values
        return alpha_fair(gramian, alpha, mask), count_seen(state, mask)

    return base.aggregator(init_seen, gramian_weighting=weigh, axis_name=axis_name)
