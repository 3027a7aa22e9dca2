"""DualProj: the mean of the gradients, projected so that it conflicts with none.

Lopez-Paz and Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017,
https://arxiv.org/abs/1706.08840
"""

from collections.abc import Hashable
from functools import partial

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONNEGATIVE, check, preference
from mtlbalance.solvers import dual_cone
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def dual_proj(
    pref_vector: PerTask | None = None,
    reg_eps: Number = 1e-4,
    norm_eps: Number = 0.0,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[SeenState]:
    r"""The sum of the gradients, weighted by preference, projected on the cone of directions that conflict with none.

    .. math:: g = \sum_i w_i g_i, \quad w = \arg\min_{v \ge p} v^\top \Big( \frac{G}{\mathrm{tr}\, G}
              + \epsilon I \Big) v

    With :math:`\epsilon = 0` the projection is exact: the gradient conflicts with none of the tasks'. The weights are
    at least the preference each and have no fixed total.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The regularization and the threshold are those of :func:`~mtlbalance.aggregation.upgrad`, whose note says how
      they compare with TorchJD's, and by how much the result moves; the original has neither.

    Args:
      pref_vector: preference :math:`p`, one real number per task: an array or a tree of names; 1/m each by default.
        May be traced.
      reg_eps: :math:`\epsilon \ge 0`. May be traced.
      norm_eps: a trace below it counts as zero; then the weights are the preference. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``reg_eps`` or ``norm_eps`` is out of bounds; at ``init``, if there is not one preference per
        task.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.dual_proj()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.3f}" for x in gradient])
      ['0.556', '1.111', '1.111']

    References:
      Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning <https://arxiv.org/abs/1706.08840>`_,
      NeurIPS 2017, eq. 11.
    """
    check("reg_eps", reg_eps, NONNEGATIVE)
    check("norm_eps", norm_eps, NONNEGATIVE)

    preferences = partial(preference, pref_vector)

    def weigh(state, gramian, values, mask):
        del values
        preferred = preferences(mask, gramian.dtype)
        regularized = numerics.regularized(gramian, reg_eps, norm_eps)
        return dual_cone(regularized, preferred, mask), count_seen(state, mask)

    return base.aggregator(
        init_seen_after(preferences),
        gramian_weighting=weigh,
        axis_name=axis_name,
        per_task={"pref_vector": pref_vector},
    )
