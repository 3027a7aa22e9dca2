"""LBTW: loss-balanced task weighting, by how far each loss has come in the epoch.

Liu, Liang and Gitter, "Loss-Balanced Task Weighting to Reduce Negative Transfer in Multi-Task Learning", AAAI 2019,
https://doi.org/10.1609/aaai.v33i01.33019977
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import NONNEGATIVE, check, check_count
from mtlbalance.states import increment, zero_counts


class LBTWState(NamedTuple):
    """State of :func:`lbtw`; both fields have one entry per task.

    Attributes:
      initial: the loss in the first call of the epoch.
      count: int32, the calls of the epoch so far in which the task was present.
    """

    initial: jax.Array
    count: jax.Array


@base.memoized
def lbtw(alpha: Number = 0.5, steps_per_epoch: int | jax.Array | None = None) -> base.Scalarizer[LBTWState]:
    r"""Weights each loss by its ratio to the first one of the epoch: what has been learned loses weight.

    .. math:: \sum_i w_i L_i, \quad w_i \propto \Big( \frac{L_i}{L_i^{(0)}} \Big)^\alpha

    The weights are constants of differentiation and sum to m. A task on the first call of its epoch has ratio 1, and
    so has one whose first loss is zero. Losses must keep their sign: where one changes it the scalar and the
    weights are NaN until its epoch ends.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      Without ``end_epoch`` the first call of all is the reference for the whole training. The normalization to m is
      that of the official code.

    Args:
      alpha: :math:`\alpha \ge 0`; 0 gives equal weights. May be traced.
      steps_per_epoch: with ``None``, call ``state = method.end_epoch(state)`` after each epoch. With an int of at
        least 1, ``apply`` closes a task's epoch itself after that many calls in which it was present. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`LBTWState`.

    Raises:
      ValueError: if ``alpha`` or ``steps_per_epoch`` is out of bounds.
      TypeError: if ``steps_per_epoch`` is no integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.lbtw()
      >>> _, state = method.apply(method.init(2), jnp.array([4.0, 1.0]))
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(state, jnp.array([1.0, 1.0]))
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.6667', '1.3333']

    References:
      Liu et al., `Loss-Balanced Task Weighting <https://doi.org/10.1609/aaai.v33i01.33019977>`_, AAAI 2019, algorithm
      1; https://github.com/chao1224/Loss-Balanced-Task-Weighting.
    """
    check("alpha", alpha, NONNEGATIVE)
    if steps_per_epoch is not None:
        check_count("steps_per_epoch", steps_per_epoch, 1)

    def init(shape, dtype):
        return LBTWState(jnp.zeros(shape, dtype), zero_counts(shape))

    def apply(state, values, mask):
        initial = jnp.where(mask & (state.count == 0), values, state.initial)
        ratio = numerics.nonnegative(jnp.where(mask, numerics.ratio(values, initial), 0))
        ratio = ratio / numerics.scale(ratio)  # so that no power overflows
        weights = numerics.normalize(ratio**alpha, mask, jnp.sum(mask))
        count = increment(state.count, mask)
        if steps_per_epoch is not None:
            count = jnp.where(mask & (count >= steps_per_epoch), 0, count)
        return numerics.weighted_sum(weights, values, mask), LBTWState(initial, count)

    def end_epoch(state):
        return state._replace(count=jnp.zeros_like(state.count))

    return base.scalarizer(init, apply, end_epoch=end_epoch)
