"""First loss: each loss relative to its first value."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.states import count_seen, zero_counts


class FirstLossState(NamedTuple):
    """State of :func:`first_loss`; both fields have one entry per task.

    Attributes:
      seen: int32: the calls in which it was present.
      first: the magnitude of its first loss that was finite and not zero; 0 before.
    """

    seen: jax.Array
    first: jax.Array


@base.memoized
def first_loss() -> base.Scalarizer[FirstLossState]:
    r"""The losses relative to the first ones: each starts at 1, whatever its unit.

    .. math:: \sum_i w_i L_i, \qquad w_i = \frac{1}{|L_i^{(1)}|}

    with :math:`L_i^{(1)}` the loss in the task's first call: the weight stays what it is then. A first loss that is
    zero or not finite tells no scale: the weight is 1 until there is one that does. A negative loss goes on down.

    Note:
      The scale is that of one batch. For that of many give :func:`~mtlbalance.scalarization.constant` the weights 1 /
      mean loss.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`FirstLossState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.first_loss()
      >>> _, state = method.apply(method.init(2), jnp.array([4.0, 0.5]))
      >>> scalar, state = method.apply(state, jnp.array([2.0, 0.25]))
      >>> print(scalar)
      1.0
    """

    def init(shape, dtype):
        return FirstLossState(zero_counts(shape), jnp.zeros(shape, dtype))

    def apply(state, values, mask):
        size = jnp.abs(jax.lax.stop_gradient(values)).astype(state.first.dtype)
        first = jnp.where(mask & (state.first == 0) & jnp.isfinite(size), size, state.first)
        weights = 1 / jnp.where(first == 0, 1, first)
        return numerics.weighted_sum(weights, values, mask), count_seen(state._replace(first=first), mask)

    return base.scalarizer(init, apply)
