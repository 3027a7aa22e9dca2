"""RLW: random loss weighting.

Lin et al., "Reasonable Effectiveness of Random Weighting", TMLR 2022, https://arxiv.org/abs/2111.10603
"""

import chex
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.hyperparameters import check_key, key_impl
from mtlbalance.states import RandomState, init_random, random_weights


@base.memoized
def random(key: int | chex.PRNGKey) -> base.Scalarizer[RandomState]:
    r"""New random weights at every call (RLW).

    .. math:: \sum_i w_i L_i, \quad w = \mathrm{softmax}(z), \quad z_i \sim \mathcal{N}(0, 1)

    Any real losses will do. The weights sum to 1. The state carries the key: the same state gives the same
    weights. To sweep seeds, build the method inside the function that is mapped:
    ``jax.vmap(lambda seed: train(scalarization.random(seed)))(jnp.arange(8))``.

    Args:
      key: a seed, or a :func:`jax.random.key`.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`RandomState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.random(key=0)
      >>> scalar, state = method.apply(method.init(3), jnp.ones(3))
      >>> print(f"{scalar:.4f}")
      1.0000

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning
      <https://arxiv.org/abs/2111.10603>`_, TMLR 2022, section 3.
    """
    check_key(key)

    def apply(state, values, mask):
        weights, state = random_weights(state, key_impl(key), mask)
        return jnp.sum(weights.astype(values.dtype) * values, where=mask), state

    return base.scalarizer(init_random(key), apply)
