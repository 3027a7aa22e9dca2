"""ReLoBRaLo: relative loss balancing with random lookback.

Bischof and Kraus, "Multi-Objective Loss Balancing for Physics-Informed Deep Learning", 2021,
https://arxiv.org/abs/2110.09813
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FRACTION, POSITIVE_OR_INFINITE, check, check_key, key_impl, new_key_data
from mtlbalance.states import count_seen, split_key, zero_counts


class ReLoBRaLoState(NamedTuple):
    """State of :func:`relobralo`; all but the key have one entry per task.

    Attributes:
      weights: the weights of the last call.
      previous: the losses of the last call.
      initial: the losses of the first.
      seen: int32, the calls in which the task was present.
      key: uint32, the data of the key for the next draw (:func:`jax.random.key_data`).
    """

    weights: jax.Array
    previous: jax.Array
    initial: jax.Array
    seen: jax.Array
    key: jax.Array


@base.memoized
def relobralo(
    temperature: Number = 1.0,
    alpha: Number = 0.999,
    rho: Number = 1.0,
    key: int | chex.PRNGKey = 0,
) -> base.Scalarizer[ReLoBRaLoState]:
    r"""Weights each loss by its progress since the last call and, where it looks back, since the first.

    .. math:: w(t) = \alpha \big( \varrho\, w(t-1) + (1 - \varrho)\, \hat w(t, 0) \big) + (1 - \alpha)\, \hat w(t, t-1),
              \quad \hat w_i(t, t') = m\,\mathrm{softmax}_i \frac{L_i(t)}{T L_i(t') + 10^{-12}},
              \quad \varrho \sim \mathrm{Bernoulli}(\rho)

    The scalar is :math:`\sum_i w_i L_i`. The weights are constants of differentiation and sum to m; they are 1 on the
    first call and :math:`\hat w(t, t-1)` on the second. Losses must keep their sign: one that changes it loses
    weight. Those far below 1e-12 count as zero. The exponent is linear in the ratio: small temperatures put nearly
    all weight on one loss.

    A task on its first call keeps its weight; in the softmax of the others its ratio is 1. An absent task's weight
    stays; those of the present ones are scaled to their number.

    To sweep seeds, build the method inside the function that is mapped.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code takes the losses of its second step for the first ones, and may look back to losses of 1 on
      its first step. By default it never looks back, as here; ConFIG's version has ``temperature=0.1, rho=0.999``.

    Args:
      temperature: :math:`T > 0`. May be traced.
      alpha: how much of the past is kept, from 0 to 1. May be traced.
      rho: probability of keeping the running weights rather than looking back, from 0 to 1: at 1 it never looks back,
        and draws nothing that matters. May be traced.
      key: a seed, or a :func:`jax.random.key`, for the lookback.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`ReLoBRaLoState`.

    Raises:
      ValueError: if ``temperature``, ``alpha`` or ``rho`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.relobralo()
      >>> state = method.init(3)
      >>> for losses in [4.0, 1.0, 0.5], [3.0, 0.9, 0.6]:
      ...     scalar, state = method.apply(state, jnp.array(losses))
      >>> print([f"{weight:.4f}" for weight in state.weights])
      ['0.8043', '0.9344', '1.2613']

    References:
      Bischof and Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep Learning
      <https://arxiv.org/abs/2110.09813>`_, 2021; https://github.com/rbischof/relative_balancing.
    """
    check("temperature", temperature, POSITIVE_OR_INFINITE)
    check("alpha", alpha, FRACTION)
    check("rho", rho, FRACTION)
    check_key(key)

    def init(shape, dtype):
        zeros = jnp.zeros(shape, dtype)
        return ReLoBRaLoState(jnp.ones(shape, dtype), zeros, zeros, zero_counts(shape), new_key_data(key))

    def apply(state, values, mask):
        draw_key, state = split_key(state, key_impl(key))
        keeps = jax.random.uniform(draw_key, (), jnp.float32) < rho
        n_present = jnp.sum(mask)
        first, second = state.seen == 0, state.seen == 1

        def relative_to(losses):
            return n_present * numerics.softmax(values / (temperature * losses + 1e-12), mask)

        initial = jnp.where(first, values, state.initial)
        recent = relative_to(jnp.where(first, values, state.previous))
        running = numerics.normalize(state.weights, mask, n_present)
        mixed = alpha * jnp.where(keeps, running, relative_to(initial)) + (1 - alpha) * recent
        weights = jnp.where(first, running, jnp.where(second, recent, mixed))
        weights = numerics.normalize(weights, mask, n_present)

        state = state._replace(
            weights=jnp.where(mask, weights, state.weights),
            previous=jnp.where(mask, values, state.previous),
            initial=jnp.where(mask, initial, state.initial),
        )
        return numerics.weighted_sum(weights, values, mask), count_seen(state, mask)

    return base.scalarizer(init, apply)
