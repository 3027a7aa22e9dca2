"""CoBa: convergence balancer, weights from the slopes of the validation losses.

Gong et al., "CoBa: Convergence Balancer for Multitask Finetuning of Large Language Models", EMNLP 2024,
https://arxiv.org/abs/2410.06741
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import NONNEGATIVE, check, check_count, check_int
from mtlbalance.states import count_seen, increment, zero_counts


class CoBaState(NamedTuple):
    """State of :func:`coba`; the first axes are those of the losses, but for the last three fields.

    Attributes:
      seen: int32, one per task: the calls of ``observe`` in which it was present.
      first: its validation loss in the first of them, one per task.
      ratios: the later ones over that, newest last, along a last axis of length ``window``.
      slopes: the slopes of ``ratios`` after each call since the warm-up, newest last, shaped like them; 0 before.
      worst_seen: int32, a scalar: the calls with a ratio.
      worst_ratios: the largest ratio in each of them, newest last, shape ``[window]``.
      worst_slopes: the slopes of ``worst_ratios``, shape ``[window]``.
    """

    seen: jax.Array
    first: jax.Array
    ratios: jax.Array
    slopes: jax.Array
    worst_seen: jax.Array
    worst_ratios: jax.Array
    worst_slopes: jax.Array


@base.memoized
def coba(tau: Number = 5.0, window: int = 200, n_warmup_steps: int | jax.Array = 100) -> base.Scalarizer[CoBaState]:
    r"""Weights that let the validation losses of all tasks converge together, and hold back those that diverge.

    .. math:: w = \mathrm{softmax} \big( m (D\,r + (1 - D)\,a) \big), \qquad
              r = \mathrm{softmax}_i \Big( \frac{m\,\alpha_i}{\sum_j |\alpha_j|} \Big), \quad
              a = \mathrm{softmax}_i \Big( \frac{-n_i \alpha_i}{\sum_t |\alpha_i^t|} \Big), \quad
              D = n\,\mathrm{softmax}_t \Big( \frac{-\tau n\,\alpha_\mathrm{max}^t}
                  {\sum_s |\alpha_\mathrm{max}^s|} \Big)_n

    where :math:`\alpha_i` is the least-squares slope of the task's validation losses over their first, in the last
    ``window`` calls of ``observe``, :math:`\alpha_i^t` the last :math:`n_i \le` ``window`` of these slopes, and
    :math:`\alpha_\mathrm{max}` the slope of the largest of the ratios. The relative score r favours tasks that converge
    slowly, the absolute one a those that still converge as fast as they did; as soon as the worst task's loss turns up,
    the divergence factor D passes from the first to the second. If a weight is below 0.1/m, all become 0.9 w + 0.1/m.

    ``apply`` weighs the training losses and changes nothing: without ``observe`` all shares stay equal. After a step,
    or every few, give the losses on a batch of validation data to ``observe``: the first call, best before the
    training, sets the first losses, the others enter the window. The weights are constants of differentiation and sum
    to 1; a task has an equal share during its warm-up. Validation losses should be positive. The ratio of a task that
    joins late is 1 at first, and may be the largest.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      This is the rule of the official code, with its softmax over the mixed scores and its least weight. It keeps all
      slopes of the worst ratio, here the last ``window``; and of each task's slopes the last ``window`` less the steps
      of the warm-up, plus 1. Until the window is full the weights are the same.

    Args:
      tau: :math:`\tau \ge 0`, how sharply D reacts. May be traced.
      window: how many validation losses a slope is of, and how many slopes are remembered: at least 2, advised are two
        to five times the warm-up.
      n_warmup_steps: calls of ``observe`` after the first one before a task's weight moves, at least 1; advised is the
        number of validation batches. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`CoBaState` and ``observe``.

    Raises:
      ValueError: if an argument is out of bounds.
      TypeError: if ``window`` or ``n_warmup_steps`` is no integer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.coba(window=4, n_warmup_steps=2)
      >>> state = method.init(2)
      >>> for validation_losses in [2.0, 2.0], [1.5, 1.9], [1.0, 1.8], [0.8, 1.7]:
      ...     state = method.observe(state, jnp.array(validation_losses))
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(state, jnp.array([1.0, 1.0]))
      >>> print([f"{weight:.4f}" for weight in weights])  # the second falls slowly
      ['0.2671', '0.7329']

    References:
      Gong et al., `CoBa <https://arxiv.org/abs/2410.06741>`_, EMNLP 2024; https://github.com/codefuse-ai/MFTCoder.
    """
    check("tau", tau, NONNEGATIVE)
    check_int("window", window, minimum=2)
    check_count("n_warmup_steps", n_warmup_steps, 1)

    def init(shape, dtype):
        each, worst = jnp.zeros((*shape, window), dtype), jnp.zeros(window, dtype)
        return CoBaState(zero_counts(shape), jnp.zeros(shape, dtype), each, each, zero_counts(()), worst, worst)

    def apply(state, values, mask):
        ready = mask & (state.seen > n_warmup_steps)
        n_ready = jnp.maximum(jnp.sum(ready), 1).astype(state.first.dtype)
        slopes = jnp.where(ready, state.slopes[..., -1], 0)
        relative = numerics.softmax(n_ready * _over_total(slopes, None), ready)
        absolute = numerics.softmax(-n_slopes(state.seen - 1) * _over_total(state.slopes, -1)[..., -1], ready)
        divergence = divergence_factor(state)
        weights = numerics.softmax(n_ready * (divergence * relative + (1 - divergence) * absolute), ready)
        least = 0.1 / n_ready
        weights = jnp.where(jnp.any(ready & (weights < least)), 0.9 * weights + least, weights)
        return numerics.weighted_sum(numerics.shares(weights, ready, mask), values, mask), state

    def n_slopes(n_ratios):
        """How many slopes of a history of so many ratios are remembered."""
        return jnp.clip(n_ratios - n_warmup_steps + 1, 0, window)

    def divergence_factor(state):
        n = n_slopes(state.worst_seen)
        logits = -tau * n * _over_total(state.worst_slopes, -1)
        return n * numerics.softmax(logits, jnp.arange(window) >= window - n)[-1]

    def observe(state, values, mask):
        is_first, is_later = mask & (state.seen == 0), mask & (state.seen > 0)
        first = jnp.where(is_first, values, state.first)
        ratio = numerics.ratio(values, first)
        ratios, slopes = extend(state.ratios, state.slopes, ratio, state.seen, is_later)
        is_any = jnp.any(is_later)
        worst = jnp.where(is_any, jnp.max(ratio, where=is_later, initial=-jnp.inf), 0)
        worst_seen = increment(state.worst_seen, is_any)
        histories = extend(state.worst_ratios, state.worst_slopes, worst, worst_seen, is_any)
        return count_seen(CoBaState(state.seen, first, ratios, slopes, worst_seen, *histories), mask)

    def extend(ratios, slopes, ratio, n_ratios, is_new):
        """Both histories with a new ratio, which makes it ``n_ratios``, and with the slope that this gives."""
        push = lambda history, x: jnp.concatenate([history[..., 1:], x[..., None]], axis=-1)
        new_ratios = push(ratios, ratio)
        slope = jnp.where(n_ratios >= n_warmup_steps, _slope(new_ratios, n_ratios), 0)
        is_new = is_new[..., None]
        return jnp.where(is_new, new_ratios, ratios), jnp.where(is_new, push(slopes, slope), slopes)

    return base.scalarizer(init, apply, observe=observe, needs=("observe",))


def _slope(history, n):
    """The least-squares slope of the newest ``n`` entries, along the last axis; exactly 0 where they are the same."""
    window = history.shape[-1]
    n = jnp.minimum(n, window)[..., None].astype(history.dtype)
    x = jax.lax.broadcasted_iota(history.dtype, history.shape, history.ndim - 1)
    x = jnp.where(x >= window - n, x - (window - (n + 1) / 2), 0)  # less its mean
    # Halves are exact: no difference overflows, and no fused rounding is left where both are the same.
    y = history / 2 - history[..., -1:] / 2
    size = numerics.scale(y, -1)
    squares = jnp.sum(x**2, axis=-1)
    slope = jnp.sum(x * (y / size), axis=-1) / jnp.where(squares == 0, 1, squares)
    return numerics.finite(2 * size[..., 0] * slope)


def _over_total(x, axis):
    """Each over the sum of the sizes along an axis; zeros stay zeros."""
    x = x / numerics.scale(x, axis)
    total = jnp.sum(jnp.abs(x), axis, keepdims=True)
    return x / jnp.where(total == 0, 1, total)
