"""Constant: fixed weights chosen by the user."""

from mtlbalance import base
from mtlbalance.annotations import PerTask
from mtlbalance.hyperparameters import FINITE, per_task
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def constant(weights: PerTask) -> base.Aggregator[SeenState]:
    r"""The tasks' gradients weighted by fixed numbers.

    .. math:: g = \sum_i w_i g_i

    The weights are taken as they are: their total is yours.

    Args:
      weights: one real number per task: an array or a tree of names. May be traced, so that ``vmap`` sweeps weightings,
        and differentiated.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: at ``init``, if there is not one weight per task.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.constant(jnp.array([0.5, 2.0]))
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print(gradient)
      [10.   2.5  2.5]
    """

    def fixed_weights(mask, dtype):
        return per_task("weights", weights, mask.shape, dtype, scalar=False, bound=FINITE)

    def weigh(state, gramian, values, mask):
        del values
        return fixed_weights(mask, gramian.dtype), count_seen(state, mask)

    return base.aggregator(
        init_seen_after(fixed_weights),
        gramian_weighting=weigh,
        per_task={"weights": weights},
        nan_if_nonfinite=False,
        stop_gradient=False,
    )
