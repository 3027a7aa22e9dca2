"""MGDA: the shortest gradient between those of the tasks.

Désidéri, "Multiple-gradient Descent Algorithm (MGDA) for Multiobjective Optimization", Comptes Rendus Mathematique
350, 2012, https://doi.org/10.1016/j.crma.2012.03.014; Sener and Koltun, "Multi-Task Learning as Multi-Objective
Optimization", NeurIPS 2018, https://arxiv.org/abs/1810.04650
"""

from collections.abc import Hashable

from mtlbalance import base
from mtlbalance.solvers import simplex_qp
from mtlbalance.states import count_seen, init_seen


@base.memoized
def mgda(*, axis_name: Hashable | None = None) -> base.Aggregator:
    r"""The combination of the gradients with the least norm.

    .. math:: g = \sum_i w_i g_i, \quad w = \arg\min_{w \in \Delta} \Big\lVert \sum_i w_i g_i \Big\rVert^2

    It conflicts with no gradient, and is zero where the tasks are Pareto-stationary. The weights sum to 1.
    Most of the weight goes to the short gradients. It stops at a gradient of zero; :func:`mtlbalance.skip_zero` goes
    on without that task.

    Note:
      The problem is solved to rounding. TorchJD's and LibMTL's iterations stop sooner, with about three correct digits.

    Args:
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.mgda()
      >>> weighting = method.gramian_weighting
      >>> weights, state = weighting.apply(weighting.init(2), jnp.array([[4.0, 0.0], [0.0, 1.0]]))
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.2000', '0.8000']

    References:
      Désidéri, `Multiple-gradient Descent Algorithm (MGDA) for Multiobjective Optimization
      <https://doi.org/10.1016/j.crma.2012.03.014>`_, Comptes Rendus Mathematique 350, 2012.

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_,
      NeurIPS 2018, eq. 3.
    """

    def weigh(state, gramian, values, mask):
        del values
        return simplex_qp(gramian, mask=mask), count_seen(state, mask)

    return base.aggregator(init_seen, gramian_weighting=weigh, axis_name=axis_name)
