"""Mean: the average of the tasks' gradients."""

import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def mean() -> base.Aggregator[SeenState]:
    r"""The mean of the tasks' gradients, the gradient of the mean loss.

    .. math:: g = \frac{1}{m} \sum_i g_i

    The weights sum to 1. To train on a mean, :func:`mtlbalance.scalarization.mean` costs one backward pass; this
    is the baseline to put in an aggregator's place.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.mean()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print(gradient)
      [1. 1. 1.]
    """

    def weigh(state, gramian, values, mask):
        del gramian, values
        return mask / jnp.maximum(jnp.sum(mask), 1), count_seen(state, mask)

    return base.aggregator(init_seen, gramian_weighting=weigh, nan_if_nonfinite=False)
