"""DWA: dynamic weight average, weights from how fast each loss falls.

Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019,
https://arxiv.org/abs/1803.10704
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import POSITIVE_OR_INFINITE, check, check_count
from mtlbalance.states import increment, mean_rate, zero_counts


class DWAState(NamedTuple):
    """State of :func:`dwa`; every field has one entry per task.

    Attributes:
      average: mean loss of the epoch so far.
      count: int32, the calls of the epoch so far in which the task was present.
      newer: average of the last closed epoch; 0 before there is one.
      older: average of the epoch before that; 0 before there is one.
    """

    average: jax.Array
    count: jax.Array
    newer: jax.Array
    older: jax.Array


@base.memoized
def dwa(temperature: Number = 2.0, steps_per_epoch: int | jax.Array | None = None) -> base.Scalarizer[DWAState]:
    r"""Weights each loss by its rate of change over the last two epochs.

    .. math:: \sum_i w_i L_i, \quad w = m\,\mathrm{softmax}(r / T), \quad
              r_i = \bar L_i^{(e-1)} / \bar L_i^{(e-2)}

    where :math:`\bar L^{(e)}` is the mean loss of epoch :math:`e`. A loss that falls slowly gains weight. The
    weights are constants of differentiation, 1 in the first two epochs, and sum to m. Losses must keep their
    sign: a loss that changes it has a negative rate and silently loses weight.

    A task whose older average is zero has rate 1. An absent task's averages stay, and each average is over the
    calls in which its task was present.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      In TorchJD a zero older average makes all weights NaN. LibMTL takes the averages from its trainer.

    Args:
      temperature: :math:`T > 0`; large values make the weights equal. May be traced.
      steps_per_epoch: with ``None``, call ``state = method.end_epoch(state)`` after each epoch: without that call the
        weights stay 1. With an int of at least 1, ``apply`` closes a task's epoch itself after that many calls in which
        it was present, so that a whole training fits in one :func:`jax.lax.scan`; a small number gives DWA over a
        window of iterations. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`DWAState`.

    Raises:
      ValueError: if ``temperature`` or ``steps_per_epoch`` is out of bounds.
      TypeError: if ``steps_per_epoch`` is no integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.dwa(temperature=2.0)
      >>> state = method.init(3)
      >>> for losses in [2.0, 8.0, 3.0], [1.0, 6.0, 3.3]:  # two epochs of one call each
      ...     scalar, state = method.apply(state, jnp.array(losses))
      ...     state = method.end_epoch(state)
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(state, jnp.ones(3))
      >>> print([f"{weight:.5f}" for weight in weights])
      ['0.86132', '0.97601', '1.16267']

    References:
      Liu et al., `End-to-End Multi-Task Learning with Attention <https://arxiv.org/abs/1803.10704>`_,
      CVPR 2019, eq. 7.
    """
    check("temperature", temperature, POSITIVE_OR_INFINITE)
    if steps_per_epoch is not None:
        check_count("steps_per_epoch", steps_per_epoch, 1)

    def init(shape, dtype):
        zeros = jnp.zeros(shape, dtype)
        return DWAState(zeros, zero_counts(shape), zeros, zeros)

    def apply(state, values, mask):
        rate = numerics.ratio(state.newer, state.older)
        weights = jnp.sum(mask) * numerics.softmax(rate / temperature, mask)

        count = increment(state.count, mask)
        share = mean_rate(state.count, values.dtype)
        average = state.average + jnp.where(mask, share * (values - state.average), 0)
        state = state._replace(average=average, count=count)
        if steps_per_epoch is not None:
            state = _close(state, mask & (count >= steps_per_epoch))
        return numerics.weighted_sum(weights, values, mask), state

    def end_epoch(state):
        return _close(state, state.count > 0)

    needs = ("end_epoch",) if steps_per_epoch is None else ()
    return base.scalarizer(init, apply, end_epoch=end_epoch, needs=needs)


def _close(state, closing):
    """Makes the running average of the tasks in ``closing`` their newest epoch's."""
    closed = DWAState(jnp.zeros_like(state.average), jnp.zeros_like(state.count), state.average, state.newer)
    return jax.tree.map(lambda new, old: jnp.where(closing, new, old), closed, state)
