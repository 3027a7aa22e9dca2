"""Nash-MTL: the gradients' bargaining solution, at which all tasks gain alike.

Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, https://arxiv.org/abs/2202.01017
"""

from collections.abc import Hashable

import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import NONNEGATIVE_OR_INFINITE, check
from mtlbalance.solvers import nash_bargaining
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def nash_mtl(max_norm: Number = 1.0, *, axis_name: Hashable | None = None) -> base.Aggregator[SeenState]:
    r"""The direction that maximizes the product of the tasks' gains.

    .. math:: g = \sum_i w_i g_i, \quad G w = 1 / w, \quad w > 0

    Its norm is the square root of the number of non-zero gradients, however long they are, and is clipped to
    ``max_norm``: with the default the gradient always has length 1. The weights have no fixed total; a zero gradient
    has weight 0. The equations have no solution where a positive combination of gradients vanishes: then those
    gradients have large, finite weights with which they cancel, and do not count for the norm.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The equations are solved to about 1e-5 relative to the terms of their sums. The official code, TorchJD and LibMTL
      approach them by a sequence of convex problems that may stop elsewhere. Where they reuse weights for several
      steps (``update_weights_every``), here :func:`mtlbalance.amortize` does, with any method.

    Args:
      max_norm: largest norm of the gradient, at least 0; 0 for no bound. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``max_norm`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.nash_mtl(max_norm=0.0)
      >>> weighting = method.gramian_weighting
      >>> weights, state = weighting.apply(weighting.init(2), jnp.array([[4.0, 0.0], [0.0, 1.0]]))
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.5000', '1.0000']

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game <https://arxiv.org/abs/2202.01017>`_, ICML 2022, claim
      3.1; https://github.com/AvivNavon/nash-mtl.
    """
    check("max_norm", max_norm, NONNEGATIVE_OR_INFINITE)

    def weigh(state, gramian, values, mask):
        del values
        weights = nash_bargaining(gramian, mask)
        # Each product w_i (G w)_i is 1 at the solution: their sum cannot overflow, where the factors' squares could.
        norm = jnp.sqrt(jnp.maximum(jnp.sum(weights * jnp.dot(gramian, weights, precision="highest")), 0))
        clipped = (max_norm > 0) & (norm > max_norm)
        return weights * jnp.where(clipped, max_norm / jnp.where(clipped, norm, 1), 1), count_seen(state, mask)

    return base.aggregator(init_seen, gramian_weighting=weigh, axis_name=axis_name)
