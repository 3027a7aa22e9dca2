"""Mean: the average of the losses, the plainest baseline."""

from mtlbalance import base, numerics
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def mean() -> base.Scalarizer[SeenState]:
    r"""The mean of the losses.

    .. math:: \frac{1}{m} \sum_i L_i

    Any real losses will do. The weights sum to 1.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.mean()
      >>> scalar, state = method.apply(method.init(3), jnp.array([1.0, 2.0, 6.0]))
      >>> print(scalar)
      3.0
    """

    def apply(state, values, mask):
        return numerics.mean(values, mask), count_seen(state, mask)

    return base.scalarizer(init_seen, apply)
