"""SoftAdapt: weights from the slopes of the recent losses.

Heydari, Thompson and Mehmood, "SoftAdapt: Techniques for Adaptive Loss Weighting of Neural Networks with Multi-Part
Loss Functions", 2019, https://arxiv.org/abs/1912.12355
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FINITE, check, check_int, reject
from mtlbalance.states import increment, zero_counts

_VARIANTS = ("original", "normalized", "loss_weighted")
_LARGEST_WINDOW = 20  # the coefficients, binomial, grow by a factor of 2 with every loss


class SoftAdaptState(NamedTuple):
    """State of :func:`softadapt`; the first axes are those of the losses.

    Attributes:
      slope: the slope of each loss over its last full window.
      level: the mean of each loss over it.
      windows: int32, the full windows so far.
      count: int32, the losses gathered for the next one.
      recent: those losses, oldest first, along a last axis of length ``window``.
    """

    slope: jax.Array
    level: jax.Array
    windows: jax.Array
    count: jax.Array
    recent: jax.Array


@base.memoized
def softadapt(beta: Number = 0.1, window: int = 5, variant: str = "original") -> base.Scalarizer[SoftAdaptState]:
    r"""Weights each loss by how it moved over the last calls: a loss that rises, or falls slowly, gains.

    .. math:: \sum_i w_i L_i, \quad w_i \propto
              \begin{cases}
              e^{\beta s_i} & \text{original} \\
              e^{\beta s_i / \sum_j s_j} & \text{normalized} \\
              \bar L_i e^{\beta s_i} & \text{loss\_weighted}
              \end{cases}

    where :math:`s_i` is the slope of a loss per call and :math:`\bar L_i` its mean, both over a window of calls. When
    the window is full the weights are computed anew, with that call's losses and for that call, and the next window
    starts. They are constants of differentiation and sum to 1: equal until a first window is full, and a task without
    one keeps an equal share. Any real losses will do; with ``"loss_weighted"`` they should be positive, and a negative
    mean counts by its size.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      As in the official code the slope is that of the polynomial through the window's losses at its *oldest* one, and
      the normalized variant divides by the plain sum of the slopes: where they fall on the whole that sum is
      negative, and the loss that falls fastest gains. Slopes that add up to zero give equal weights there, NaN in the
      official code. Its example starts with weights of 1, not 1/m.

    Args:
      beta: :math:`\beta`, any finite number: below 0, losses that fall fast gain. May be traced.
      window: calls per window, from 2 to 20. Long ones magnify noise: the slope is that of a polynomial of degree
        ``window - 1``.
      variant: ``"original"``, ``"normalized"`` or ``"loss_weighted"``, which the authors recommend.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SoftAdaptState`.

    Raises:
      ValueError: if ``beta`` or ``window`` is out of bounds or ``variant`` unknown.
      TypeError: if ``window`` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.softadapt(window=3)
      >>> state = method.init(2)
      >>> for losses in [1.0, 10.0], [2.0, 9.0], [3.0, 8.0]:
      ...     scalar, state = method.apply(state, jnp.array(losses))
      >>> print(state.slope, f"{scalar:.4f}")  # softmax([.1, -.1]) @ [3, 8]
      [ 1. -1.] 5.2508

    References:
      Heydari et al., `SoftAdapt <https://arxiv.org/abs/1912.12355>`_, 2019, section 3.1;
      https://github.com/dr-aheydari/SoftAdapt.
    """
    check("beta", beta, FINITE)
    check_int("window", window, 2)
    if window > _LARGEST_WINDOW:
        reject("window", f"an int of at most {_LARGEST_WINDOW}", f"{window}")
    if variant not in _VARIANTS:
        reject("variant", f"one of {_VARIANTS}", f"{variant!r}")
    stencil = _forward_stencil(window)

    def init(shape, dtype):
        zeros, none = jnp.zeros(shape, dtype), zero_counts(shape)
        return SoftAdaptState(zeros, zeros, none, none, jnp.zeros((*shape, window), dtype))

    def apply(state, values, mask):
        state = gather(state, values, mask)
        ready = mask & (state.windows > 0)
        slope = state.slope
        if variant == "normalized":
            total = jnp.sum(slope, where=ready)
            slope = jnp.where(total == 0, 0, slope / jnp.where(total == 0, 1, total))
        scores = numerics.softmax(beta * slope, ready)
        if variant == "loss_weighted":
            scores = scores * jnp.abs(state.level)
        return numerics.weighted_sum(numerics.shares(scores, ready, mask), values, mask), state

    def gather(state, values, mask):
        """Puts each loss at its place in the window; what is full is summed up and emptied."""
        place = mask[..., None] & jax.nn.one_hot(state.count, window, dtype=bool)
        recent = jnp.where(place, values[..., None], state.recent)
        count = increment(state.count, mask)
        full = count >= window
        # Of the differences to the oldest: that of a constant loss is exactly zero.
        slope = jnp.matmul(recent[..., 1:] - recent[..., :1], jnp.array(stencil, recent.dtype), precision="highest")
        return SoftAdaptState(
            jnp.where(full, slope, state.slope),
            jnp.where(full, jnp.mean(recent, axis=-1), state.level),
            increment(state.windows, full),
            jnp.where(full, 0, count),
            recent,
        )

    return base.scalarizer(init, apply)


def _forward_stencil(n):
    """The derivative at 0 of the polynomial through n points at 0, 1, 2, ...: the coefficients of all but the first."""
    return [(-1) ** (k + 1) * math.comb(n - 1, k) / k for k in range(1, n)]
