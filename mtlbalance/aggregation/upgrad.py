"""UPGrad: the mean of the gradients, each projected so that it conflicts with none.

Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, https://arxiv.org/abs/2406.16232
"""

from collections.abc import Hashable
from functools import partial

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONNEGATIVE, check, preference
from mtlbalance.solvers import dual_cone
from mtlbalance.states import SeenState, count_seen, init_seen_after

# Projections solved together. Each takes a few m x m matrices: all m at once would take m^3, and were not faster.
_AT_ONCE = 16


@base.memoized
def upgrad(
    pref_vector: PerTask | None = None,
    reg_eps: Number = 1e-4,
    norm_eps: Number = 0.0,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[SeenState]:
    r"""The sum, weighted by preference, of the gradients projected on the cone of directions that conflict with none.

    .. math:: g = \sum_i w_i g_i, \quad w = \sum_i \arg\min_{v \ge p_i e_i} v^\top \Big( \frac{G}{\mathrm{tr}\, G}
              + \epsilon I \Big) v

    With :math:`\epsilon = 0` the projections are exact: the gradient conflicts with none of the tasks'. The weights
    are at least the preference each and have no fixed total.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      TorchJD regularizes by 1e-4 of the trace, and so does this function by default; ``reg_eps=0.0`` is the paper's.
      That moves the result by up to 1e-2 of the Jacobian's norm where norms differ by 10, and by a tenth of it or
      more where they differ by 1e3. TorchJD takes Gramians with a trace below 1e-4 for zero: ``norm_eps=1e-4`` does
      so here.

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
      >>> method = aggregation.upgrad()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.3f}" for x in gradient])
      ['0.293', '1.900', '1.900']

    References:
      Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization <https://arxiv.org/abs/2406.16232>`_, 2024,
      section 3; https://github.com/SimplexLab/TorchJD.
    """
    check("reg_eps", reg_eps, NONNEGATIVE)
    check("norm_eps", norm_eps, NONNEGATIVE)

    preferences = partial(preference, pref_vector)

    def weigh(state, gramian, values, mask):
        del values
        preferred = preferences(mask, gramian.dtype)
        regularized = numerics.regularized(gramian, reg_eps, norm_eps)
        project = lambda lower: dual_cone(regularized, lower, mask)
        solutions = jax.lax.map(project, jnp.diag(preferred), batch_size=_AT_ONCE)
        return jnp.sum(solutions, axis=0), count_seen(state, mask)

    return base.aggregator(
        init_seen_after(preferences),
        gramian_weighting=weigh,
        axis_name=axis_name,
        per_task={"pref_vector": pref_vector},
    )
