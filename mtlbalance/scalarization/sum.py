"""Sum: the losses added up, equal weights of 1."""

import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def sum() -> base.Scalarizer[SeenState]:
    r"""The sum of the losses, what is called equal weighting (EW).

    .. math:: \sum_i L_i

    Any real losses will do. The weights sum to m.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.sum()
      >>> scalar, state = method.apply(method.init(3), jnp.array([1.0, 2.0, 6.0]))
      >>> print(scalar)
      9.0
    """

    def apply(state, values, mask):
        return jnp.sum(values, where=mask), count_seen(state, mask)

    return base.scalarizer(init_seen, apply)
