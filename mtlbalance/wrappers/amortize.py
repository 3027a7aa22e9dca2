"""Amortize: the last weights kept, for steps that do not decide anew."""

import math
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.states import zero_counts
from mtlbalance.wrappers.plumbing import Method, check_method, reweighted


class AmortizeState(NamedTuple):
    """State of :func:`amortize`.

    Attributes:
      last_weights: the weights of the last call that decided, one per task; equal ones of total 1 before it.
      inner: the state of the wrapped method.
      not_taken: int32 scalar: the calls that decided, but whose weights were not taken.
    """

    last_weights: jax.Array
    inner: Any
    not_taken: jax.Array


@overload
def amortize(method: base.Scalarizer[Any]) -> base.Scalarizer[AmortizeState]: ...


@overload
def amortize(method: base.Aggregator[Any]) -> base.Aggregator[AmortizeState]: ...


@base.memoized
def amortize(method: Method) -> Method:
    """Keeps a method's last weights, so that :func:`mtlbalance.value_and_grad` may use them again.

    Its ``grad_fn(..., refresh=False)`` then takes one backward pass and leaves the state as it is, averages and random
    keys included; ``refresh=True``, or a call without it, takes the method's weights and keeps them. ``refresh`` may be
    traced: ``step % 1000 == 0`` inside ``scan``. Under ``vmap`` keep it unbatched, or both ways are computed: it is an
    argument for that reason, and no counter in the state. The first step should refresh: until then the weights are
    equal and sum to 1.

    Weights are taken only if all of them are finite, and so are the losses: one NaN at a refresh would be in every step
    up to the next. They are that call's output even so, for ``optax.apply_if_finite`` to see; the last good ones serve
    on, and ``not_taken`` counts.

    An absent task keeps its last weight for the time when it is back; in between it has none. A learned method goes
    inside: ``amortize(learn(uw(), optimizer))``; :func:`skip_nonfinite` goes outside. Others may stand on either side,
    but for :func:`chain`, whose weights are not its aggregator's: ``amortize(chain(...))``.

    Args:
      method: a scalarizer without learned fields, or an aggregator that makes weights.

    Returns:
      A method of the same family with the same paths and state :class:`AmortizeState`.

    Raises:
      TypeError: if ``method`` is of neither family.
      ValueError: if it has learned fields, or makes no weights.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> method = mtl.amortize(aggregation.mgda())
      >>> losses_fn = lambda params, scale: scale * jnp.array([1.0, 2.0]) * params
      >>> grad_fn = mtl.value_and_grad(losses_fn, method)
      >>> params, state = jnp.ones(2), method.init((2, 2))
      >>> (losses, state), grads = grad_fn(params, state, 1.0, refresh=True)
      >>> (losses, state), grads = grad_fn(params, state, jnp.array([1.0, 9.0]), refresh=False)
      >>> print([f"{x:.2f}" for x in state.last_weights], [f"{x:.2f}" for x in grads])
      ['0.80', '0.20'] ['0.80', '3.60']
    """
    check_method(method, "amortize(learn(method, optimizer))", makes_weights=True)

    def start(shape, dtype, inner):
        return AmortizeState(jnp.full(shape, 1 / math.prod(shape), dtype), inner, zero_counts(()))

    def remember(state, weights, mask):
        return weights, state._replace(last_weights=jnp.where(mask, weights, state.last_weights))

    return reweighted(method, start, remember, last_weights=lambda state: state.last_weights, keeps_scalar=True)
