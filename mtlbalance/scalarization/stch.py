"""STCH: smooth Tchebycheff scalarization, a smooth maximum of the preferred losses.

Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024,
https://arxiv.org/abs/2402.19078
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import POSITIVE, check, check_count, per_task, reject
from mtlbalance.states import count_seen, increment, init_seen_after, mean_rate, zero_counts


class STCHState(NamedTuple):
    """State of :func:`stch` with a warm-up; every field has one entry per task.

    Attributes:
      nadir: mean loss of the epoch after the warm-up; 0 before.
      count: int32, the calls of the epoch so far in which the task was present.
      epoch: int32, the epochs closed.
    """

    nadir: jax.Array
    count: jax.Array
    epoch: jax.Array


@base.memoized
def stch(
    mu: Number,
    weights: PerTask | None = None,
    reference: PerTask | None = None,
    n_warmup_epochs: int | jax.Array | None = None,
    steps_per_epoch: int | jax.Array | None = None,
) -> base.Scalarizer:
    r"""A smooth maximum of the losses: with a small mu, its minima for all preferences are the Pareto front.

    .. math:: \mu \log \sum_i \exp\big( \lambda_i (L_i - z_i) / \mu \big)

    It tends to the weighted maximum as :math:`\mu` falls. Any real losses will do, but they should be of one scale.
    Its gradient is a softmax times :math:`\lambda`: with the default preference 1/m the weights sum to 1/m.

    With ``n_warmup_epochs`` it is instead the training rule of the official code, which needs positive losses but not
    of one scale: the sum of :math:`\log(L_i + 10^{-20})` in the first ``n_warmup_epochs + 1`` epochs; then, with the
    mean losses of the last of them, the nadir :math:`n`,

    .. math:: m\,\mu \log \sum_i \exp\big( \log(L_i / n_i + 10^{-20}) / \mu \big)

    The weights are :math:`1/L_i` in the first epochs, and m times a softmax over :math:`L_i` later. A loss of zero
    has a weight up to :math:`10^{20} / n_i`; a negative one makes the scalar and its weight NaN. A task that
    joins late has epochs of its own: until it has a nadir it adds its logarithm to the smooth maximum of the others.

    Note:
      The paper's equation is that of TorchJD, the warm-up that of the official code and LibMTL, which have neither
      preference nor reference, start with ``mu=1.0, n_warmup_epochs=4``, and leave a constant of differentiation out
      of the scalar: m times the largest logarithm. A nadir that is not positive counts as 1.

    Args:
      mu: smoothing :math:`\mu > 0`. May be traced.
      weights: preference :math:`\lambda`, one real number per task: an array of the losses' shape, or a tree of the
        same names. May be traced: ``vmap`` over it traces a Pareto front. 1/m each by default.
      reference: ideal point :math:`z`, one real number for all tasks or one for each; zero by default. May be traced.
      n_warmup_epochs: ``None``, or an int of at least 0, then without ``weights`` and ``reference``. May be traced.
      steps_per_epoch: with ``None``, call ``state = method.end_epoch(state)`` after each epoch: without that call the
        warm-up never ends. With an int of at least 1, ``apply`` closes a task's epoch itself after that many calls in
        which it was present. Only with a warm-up. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`; :class:`STCHState` with a warm-up.

    Raises:
      ValueError: if ``mu``, ``n_warmup_epochs`` or ``steps_per_epoch`` is out of bounds, if a preference or reference
        comes with a warm-up, or ``steps_per_epoch`` without; at ``init``, if one has another shape than the losses.
      TypeError: if ``n_warmup_epochs`` or ``steps_per_epoch`` is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.stch(mu=0.1, weights=jnp.array([0.5, 0.5]))
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, 3.0]))
      >>> print(f"{scalar:.4f}")
      1.5000

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, ICML 2024, eq. 10; https://github.com/Xi-L/STCH.
    """
    check("mu", mu, POSITIVE)
    if n_warmup_epochs is not None:
        check_count("n_warmup_epochs", n_warmup_epochs, 0)
        if weights is not None or reference is not None:
            reject("n_warmup_epochs", "None together with weights or reference", f"{n_warmup_epochs}")
    if steps_per_epoch is not None:
        check_count("steps_per_epoch", steps_per_epoch, 1)
        if n_warmup_epochs is None:
            reject("steps_per_epoch", "None without n_warmup_epochs", f"{steps_per_epoch}")

    def preferences(mask, dtype):
        by_default = jnp.ones(mask.shape, dtype) / jnp.maximum(jnp.sum(mask), 1) if weights is None else weights
        at = 0.0 if reference is None else reference
        return (
            per_task("weights", by_default, mask.shape, dtype, scalar=False),
            per_task("reference", at, mask.shape, dtype),
        )

    def apply(state, values, mask):
        preferred, ideal = preferences(mask, values.dtype)
        return _smooth_max(preferred * (values - ideal), mu, mask), count_seen(state, mask)

    if n_warmup_epochs is None:
        named = {"weights": weights, "reference": reference}
        return base.scalarizer(init_seen_after(preferences), apply, per_task=named)

    def init_warm_up(shape, dtype):
        zeros = zero_counts(shape)
        return STCHState(jnp.zeros(shape, dtype), zeros, zeros)

    def apply_warm_up(state, values, mask):
        ready = mask & (state.epoch > n_warmup_epochs)
        nadir = jnp.where(ready & (state.nadir > 0), state.nadir, 1)
        # The logarithm of the quotient, which itself might overflow.
        above = numerics.nonnegative(values + jnp.maximum(1e-20 * nadir, jnp.finfo(nadir.dtype).tiny))
        logs = jnp.log(above) - jnp.log(nadir)
        warming_up = jnp.sum(logs, where=mask & ~ready)
        scalar = warming_up + jnp.sum(ready) * _smooth_max(logs, mu, ready)

        count = increment(state.count, mask)
        gathered = state.nadir + mean_rate(state.count, values.dtype) * (values - state.nadir)
        nadir = jnp.where(mask & (state.epoch == n_warmup_epochs), gathered, state.nadir)
        state = STCHState(nadir, count, state.epoch)
        if steps_per_epoch is not None:
            state = _close(state, mask & (count >= steps_per_epoch))
        return scalar, state

    def end_epoch(state):
        return _close(state, state.count > 0)

    needs = ("end_epoch",) if steps_per_epoch is None else ()
    return base.scalarizer(init_warm_up, apply_warm_up, end_epoch=end_epoch, needs=needs)


def _smooth_max(x, mu, mask):
    """``mu * log(sum(exp(x / mu)))`` of the tasks in ``mask``; 0 for none."""
    # What is not finite must show: in the gradient too, hence the product.
    shown = numerics.nan_where(~jnp.all(jnp.isfinite(x), where=mask))
    x, some = numerics.finite(x), jnp.any(mask)
    largest = jax.lax.stop_gradient(jnp.max(x, where=mask, initial=-jnp.inf))
    largest = jnp.where(some, largest, 0)
    added = jnp.sum(jnp.exp(jnp.where(mask, (x - largest) / mu, -jnp.inf)))
    return shown * (mu * jnp.log(jnp.where(some, added, 1)) + largest)


def _close(state, closing):
    """Ends the running epoch of the tasks in ``closing``."""
    return state._replace(count=jnp.where(closing, 0, state.count), epoch=increment(state.epoch, closing))
