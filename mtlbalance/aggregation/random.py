"""Random: new random weights for the tasks' gradients at every call.

Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022, https://arxiv.org/abs/2111.10603
"""

import chex

from mtlbalance import base
from mtlbalance.hyperparameters import check_key, key_impl
from mtlbalance.states import RandomState, init_random, random_weights


@base.memoized
def random(key: int | chex.PRNGKey) -> base.Aggregator[RandomState]:
    r"""New random weights at every call (RGW).

    .. math:: g = \sum_i w_i g_i, \quad w = \mathrm{softmax}(z), \quad z_i \sim \mathcal{N}(0, 1)

    The weights sum to 1. The state carries the key: the same state gives the same weights. To sweep seeds,
    build the method inside the function that is mapped:
    ``jax.vmap(lambda seed: train(aggregation.random(seed)))(jnp.arange(8))``.

    Args:
      key: a seed, or a :func:`jax.random.key`.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`RandomState`, ``weighting`` and ``gramian_weighting``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.random(key=0)
      >>> weights, state = method.gramian_weighting.apply(method.gramian_weighting.init(3), jnp.eye(3))
      >>> print(f"{weights.sum():.4f}")
      1.0000

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning
      <https://arxiv.org/abs/2111.10603>`_, TMLR 2022, section 3.
    """
    check_key(key)

    def weigh(state, gramian, values, mask):
        del gramian, values
        return random_weights(state, key_impl(key), mask)

    return base.aggregator(init_random(key), gramian_weighting=weigh, nan_if_nonfinite=False)
