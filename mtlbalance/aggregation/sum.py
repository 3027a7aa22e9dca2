"""Sum: the tasks' gradients added up."""

import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def sum() -> base.Aggregator[SeenState]:
    r"""The sum of the tasks' gradients, the gradient of the summed loss.

    .. math:: g = \sum_i g_i

    The weights sum to m. To train on a sum, :func:`mtlbalance.scalarization.sum` costs one backward pass; this is
    the baseline to put in an aggregator's place.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.sum()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print(gradient)
      [2. 2. 2.]
    """

    def weigh(state, gramian, values, mask):
        del gramian, values
        return jnp.ones(mask.shape), count_seen(state, mask)

    return base.aggregator(init_seen, gramian_weighting=weigh, nan_if_nonfinite=False)
