"""FAMO: fast adaptive multitask optimization, equal rates of decrease from the loss values alone.

Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, https://arxiv.org/abs/2306.03792
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONNEGATIVE, check, per_task
from mtlbalance.states import count_seen, select, zero_counts


class FAMOState(NamedTuple):
    """State of :func:`famo`; every leaf has one entry per task.

    Attributes:
      logits: :math:`w`, whose softmax weighs the tasks.
      seen: int32, the calls of ``apply`` in which the task was present.
      previous: its loss in the last of them; 0 before.
      mu: Adam's running mean of the gradient.
      nu: Adam's running mean of its square.
      count: int32, Adam's steps.
    """

    logits: jax.Array
    seen: jax.Array
    previous: jax.Array
    mu: jax.Array
    nu: jax.Array
    count: jax.Array


@base.memoized
def famo(
    min_losses: PerTask | float = 0.0,
    lr: Number = 0.025,
    weight_decay: Number = 1e-3,
    delayed: bool = False,
) -> base.Scalarizer[FAMOState]:
    r"""Weights that make all losses fall at one relative rate, learned from how they changed.

    .. math:: c \sum_i z_i \log d_i, \quad z = \mathrm{softmax}(w), \quad d_i = L_i - b_i + 10^{-8}, \quad
              c = \Big( \sum_i z_i / d_i \Big)^{-1}

    where :math:`z` and :math:`c` are constants of differentiation: the weights :math:`c z_i / d_i` sum to 1. After
    the optimizer's step, give the losses of the same batch (with the same ``mask``) to ``observe``: it takes one step
    of Adam on :math:`w` with the gradient

    .. math:: z_i (\delta_i - \textstyle\sum_j z_j \delta_j), \quad
              \delta_i = \log d_i^\mathrm{before} - \log d_i^\mathrm{after}

    ``observe`` compares with the last ``apply`` whose state was kept: to evaluate, call ``apply`` and drop its state.
    With ``delayed=True`` no second evaluation is needed: ``apply`` takes the losses at hand for those after the last
    step, updates :math:`w` by them first, and ``observe`` does nothing. That costs nothing, but the losses are those
    of another batch. With neither of the two :math:`w` stays where it starts.

    With a loss at its bound all weight goes there, and training stops; :func:`mtlbalance.skip_zero` goes on without a
    task whose loss is zero.

    Losses must be above their bounds :math:`b`. Where one is below, the scalar and the weights are NaN; a task that was
    below before or after the optimizer's step, or whose loss was not finite, takes no part in the step of :math:`w`.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The weight decay is that of the paper's algorithm 2, TorchJD and LibMTL; the official code has 0.01 in one file
      and 1e-5 in the other, 0 for its toy problem, where it uses the delayed form. It also clips the gradient of the
      shared parameters to norm 1: put ``optax.clip_by_global_norm(1.0)`` before your optimizer. The decay is added to
      the gradient, as in ``torch.optim.Adam``. A loss below its bound makes all of :math:`w` NaN there.

    Args:
      min_losses: lower bounds :math:`b`: one real number, or one per task (an array or a tree of the same names). May
        be traced.
      lr: Adam's learning rate, at least 0. May be traced.
      weight_decay: at least 0. May be traced.
      delayed: whether the next call's losses stand in for those after the step.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`FAMOState`.

    Raises:
      ValueError: if ``lr`` or ``weight_decay`` is out of bounds; at ``init``, if ``min_losses`` has another shape
        than the losses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.famo()
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, 4.0]))
      >>> state = method.observe(state, jnp.array([0.5, 3.9]))  # after the optimizer's step
      >>> print([f"{weight:.4f}" for weight in jax.nn.softmax(state.logits)])  # the second falls too slowly
      ['0.4875', '0.5125']

    References:
      Liu et al., `FAMO: Fast Adaptive Multitask Optimization <https://arxiv.org/abs/2306.03792>`_, NeurIPS 2023,
      algorithm 2; https://github.com/Cranial-XIX/FAMO.
    """
    check("lr", lr, NONNEGATIVE)
    check("weight_decay", weight_decay, NONNEGATIVE)

    def distance(values):
        return values - jax.lax.stop_gradient(per_task("min_losses", min_losses, values.shape, values.dtype)) + 1e-8

    def init(shape, dtype):
        zeros, none = jnp.zeros(shape, dtype), zero_counts(shape)
        distance(zeros)
        return FAMOState(zeros, none, zeros, zeros, zeros, none)

    def apply(state, values, mask):
        if delayed:
            state = step(state, jax.lax.stop_gradient(values), mask)
        weights = numerics.softmax(state.logits, mask)
        distances = numerics.nonnegative(jnp.where(mask, distance(values), 1))
        # Without a task present there is nothing to divide.
        weights = weights / jnp.where(jnp.any(mask), jnp.sum(weights / distances, where=mask), 1)
        scalar = numerics.weighted_sum(weights, jnp.log(distances), mask)
        state = state._replace(previous=jnp.where(mask, values, state.previous))
        return scalar, count_seen(state, mask)

    def step(state, values, mask):
        decrease = jnp.log(distance(state.previous)) - jnp.log(distance(values))
        moving = mask & (state.seen > 0) & jnp.isfinite(decrease)
        weights = numerics.softmax(state.logits, moving)
        gradient = weights * (decrease - jnp.sum(weights * decrease, where=moving))
        return select(moving, adam(state, gradient + weight_decay * state.logits), state)

    def adam(state, gradient):
        # By hand: every task has a step count of its own, and Optax's `1 - 0.999**count` is 1e-5 off in float32.
        mu, nu = 0.9 * state.mu + 0.1 * gradient, 0.999 * state.nu + 0.001 * gradient**2
        count = optax.safe_increment(state.count)
        mean, square = mu / numerics.bias_correction(0.9, count), nu / numerics.bias_correction(0.999, count)
        logits = state.logits - lr * mean / (jnp.sqrt(square) + 1e-8)
        return state._replace(logits=logits, mu=mu, nu=nu, count=count)

    named = {"min_losses": min_losses}
    if delayed:
        return base.scalarizer(init, apply, per_task=named)
    return base.scalarizer(init, apply, observe=step, per_task=named, needs=("observe",))
