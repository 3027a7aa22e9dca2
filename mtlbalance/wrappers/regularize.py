"""Regularize: losses that are no tasks, with weights of their own."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FINITE, check, is_asking_for_shapes, reject
from mtlbalance.names import check_task, known_names, positions_of
from mtlbalance.wrappers.plumbing import Method, check_method, forward_after_gradient, hooks_of, reweighted


class RegularizeState(NamedTuple):
    """State of :func:`regularize`.

    Attributes:
      inner: the state of the wrapped method.
      count: int32 scalar, the calls so far, for schedules; ``None`` without one.
      last_weights: where the method inside keeps its last weights, those that were made of them; else ``None``. Equal
        ones before the first call, as inside, where the losses' names were not known yet.
    """

    inner: Any
    count: jax.Array | None
    last_weights: jax.Array | None


@overload
def regularize(
    method: base.Scalarizer[Any], terms: Mapping[str | int, Number | Callable[[jax.Array], Number]]
) -> base.Scalarizer[RegularizeState]: ...


@overload
def regularize(
    method: base.Aggregator[Any], terms: Mapping[str | int, Number | Callable[[jax.Array], Number]]
) -> base.Aggregator[RegularizeState]: ...


@base.memoized
def regularize(method: Method, terms: Mapping[str | int, Number | Callable[[jax.Array], Number]]) -> Method:
    r"""Adds losses that are no tasks, such as an entropy, a KL divergence or a weight penalty, beside the method.

    .. math:: L = \mathrm{method}(L_i,\ i \text{ a task}) + \sum_{k \text{ a term}} c_k L_k

    The terms stand among the losses, and the method never sees them: they are absent for it. Balanced as a task, what
    is there to hold the others back may win: many methods raise the weight of what is small or does not fall.

    What changes all weights, as :func:`transform_weights`, goes inside: around this wrapper it would change those of
    the terms, which have equal ones in a warm-up and count in a total. :func:`nested` inside has a group for the terms
    too.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Args:
      method: a scalarizer without learned fields, or an aggregator that makes weights.
      terms: :math:`c_k`, any real number, by the name of a loss or of a group of losses; by index where losses have no
        names. May be traced; or a function of the number of calls so far, such as an optax schedule.

    Returns:
      A method of the same family with the same paths and state :class:`RegularizeState`, for tasks and terms together:
      what the method is given per task has entries for the terms too, which are not used.

    Raises:
      TypeError: if ``method`` is of neither family; if a weight is not a real number.
      ValueError: if the method has learned fields, or makes no weights; if there are no terms, or a weight of one is
        not finite; if a term is none of the losses, or one is in two of them: as soon as the losses are known.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.regularize(scalarization.mean(), {"kl": 0.01})
      >>> losses = {"kl": 50.0, "rate": 1.0, "distortion": 2.0}
      >>> scalar, state = method.apply(method.init(losses), losses)
      >>> print(scalar)  # (1 + 2) / 2 + 0.01 * 50
      2.0
    """
    check_method(method, "regularize(learn(method, optimizer), terms)", makes_weights=True)
    if not isinstance(terms, Mapping) or not terms:
        reject("terms", 'a dict from losses to their weights, such as {"kl": 1e-3}', f"{terms!r}")
    terms = dict(terms)  # as they are now
    for name, weight in terms.items():
        check_task("terms", name)
        if not callable(weight):
            check(f"terms[{name!r}]", weight, FINITE)
    is_scheduled = any(map(callable, terms.values()))

    def start(shape, dtype, inner):
        last = method.last_weights and method.last_weights(inner)
        state = RegularizeState(inner, jnp.zeros((), jnp.int32) if is_scheduled else None, last)
        is_known = known_names() is not None or not any(isinstance(name, str) for name in terms)
        if is_known and not is_asking_for_shapes():
            weights_of_terms(state, jnp.ones(shape, bool), dtype)
            return with_last(state)
        return state

    def with_last(state):
        if method.last_weights is None:
            return state
        last = method.last_weights(state.inner)
        fixed, are_terms = weights_of_terms(state, jnp.ones(last.shape, bool), last.dtype)
        return state._replace(last_weights=jnp.where(are_terms, fixed, last))

    def weights_of_terms(state, mask, dtype):
        """Their weights, and which of the losses they are."""
        weights, are_terms = jnp.zeros(mask.shape, dtype), np.zeros(mask.shape, bool)
        for name, weight in terms.items():
            here = np.isin(np.arange(mask.size), positions_of("terms", name)).reshape(mask.shape)
            if not here.any():
                reject("terms", f"an index below the number of losses {mask.size}", f"{name}")
            if np.any(here & are_terms):
                reject("terms", "each loss once, by itself or in a group", f"{list(terms)}")
            weight = weight(state.count) if callable(weight) else weight
            weights, are_terms = jnp.where(here, weight, weights), are_terms | here
        return weights, are_terms & mask

    def visible(state, mask):
        return mask & ~weights_of_terms(state, mask, jnp.float32)[1]

    def advanced(state):
        return with_last(state)._replace(count=optax.safe_increment(state.count) if is_scheduled else None)

    def weigh(state, weights, mask):
        fixed, are_terms = weights_of_terms(state, mask, weights.dtype)
        return jnp.where(are_terms, fixed, weights), advanced(state)

    def apply(state, values, mask):  # with the scalarizer's scalar as it is
        fixed, are_terms = weights_of_terms(state, mask, values.dtype)
        scalar, inner = method.apply(state.inner, values, mask=mask & ~are_terms)
        return scalar + numerics.weighted_sum(fixed, values, are_terms), advanced(state._replace(inner=inner))

    def init(shape, dtype):
        return start(shape, dtype, method.init(jax.ShapeDtypeStruct(shape, dtype)))

    last_weights = method.last_weights and (lambda state: state.last_weights)
    hooks = hooks_of(method, visible) | {"last_weights": last_weights}
    regularized: Any = (
        forward_after_gradient(method, base.scalarizer(init, apply, **hooks))
        if isinstance(method, base.Scalarizer)
        else reweighted(method, start, weigh, last_weights=last_weights, visible=visible)
    )
    return regularized
