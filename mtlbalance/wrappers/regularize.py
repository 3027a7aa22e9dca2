"""Regularize: losses that are no tasks, with weights of their own."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtlbalance import base, numerics
from mtlbalance.hyperparameters import FINITE, check, reject
from mtlbalance.names import check_task, positions_of
from mtlbalance.wrappers.plumbing import Method, check_method, forward_after_gradient, hooks_of, reweighted


class RegularizeState(NamedTuple):
    """State of :func:`regularize`.

    Attributes:
      inner: the state of the wrapped method.
      count: int32 scalar, the calls so far, for schedules; ``None`` without one.
    """

    inner: chex.ArrayTree
    count: chex.Array | None


@base.memoized
def regularize(
    method: Method, terms: Mapping[str | int, chex.Numeric | Callable[[chex.Array], chex.Numeric]]
) -> Method:
    r"""Adds losses that are no tasks, such as an entropy, a KL divergence or a weight penalty, beside the method.

    .. math:: L = \mathrm{method}(L_i,\ i \text{ a task}) + \sum_{k \text{ a term}} c_k L_k

    The terms stand among the losses, and the method never sees them: they are absent for it. Balanced as a task, what
    is there to hold the others back may win: many methods raise the weight of what is small or does not fall. With an
    aggregator a term costs what a task does, a row of the Jacobian.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Args:
      method: a scalarizer without learned fields, or an aggregator that makes weights.
      terms: :math:`c_k`, any real number, by the name of a loss or of a group of losses; by index where losses have no
        names; of two that name the same loss the later counts. May be traced; or a function of the number of calls so
        far, such as an optax schedule.

    Returns:
      A method of the same family with the same paths and state :class:`RegularizeState`, for tasks and terms together:
      what the method is given per task has entries for the terms too, which are not used.

    Raises:
      TypeError: if ``method`` is of neither family; if a term is given by neither name nor index; if a weight is not a
        real number.
      ValueError: if the method has learned fields, or makes no weights; if there are no terms, or a weight of one is
        not finite; from ``init``, for an index beyond the losses; in a call, if a term is none of them.

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
    for name, weight in terms.items():
        check_task("terms", name)
        if not callable(weight):
            check(f"terms[{name!r}]", weight, FINITE)
    is_scheduled = any(map(callable, terms.values()))

    def start(shape, dtype, inner):
        del dtype
        for name in terms:
            if not isinstance(name, str):  # a name may be a group's: it waits for those of the losses
                check_task("terms", name, math.prod(shape))
        return RegularizeState(inner, jnp.zeros((), jnp.int32) if is_scheduled else None)

    def weights_of_terms(state, mask, dtype):
        """Their weights, and which of the losses they are."""
        weights, are_terms = jnp.zeros(mask.shape, dtype), np.zeros(mask.shape, bool)
        for name, weight in terms.items():
            here = np.isin(np.arange(mask.size), positions_of("terms", name)).reshape(mask.shape)
            weight = weight(state.count) if callable(weight) else weight
            weights, are_terms = jnp.where(here, weight, weights), are_terms | here
        return weights, are_terms & mask

    def visible(state, mask):
        return mask & ~weights_of_terms(state, mask, jnp.float32)[1]

    def advanced(state):
        return state._replace(count=optax.safe_increment(state.count) if is_scheduled else None)

    def weigh(state, weights, mask):
        fixed, are_terms = weights_of_terms(state, mask, weights.dtype)
        return jnp.where(are_terms, fixed, weights), advanced(state)

    def last_weights(state):
        weights = method.last_weights(state.inner)
        return weigh(state, weights, jnp.ones(weights.shape, bool))[0]

    def apply(state, values, mask):  # with the scalarizer's scalar as it is
        fixed, are_terms = weights_of_terms(state, mask, values.dtype)
        scalar, inner = method.apply(state.inner, values, mask=mask & ~are_terms)
        return scalar + numerics.weighted_sum(fixed, values, are_terms), advanced(state._replace(inner=inner))

    def init(shape, dtype):
        return start(shape, dtype, method.init(jax.ShapeDtypeStruct(shape, dtype)))

    last_weights = method.last_weights and last_weights
    hooks = hooks_of(method, visible) | {"last_weights": last_weights}
    regularized: Any = (
        forward_after_gradient(method, base.scalarizer(init, apply, **hooks))
        if isinstance(method, base.Scalarizer)
        else reweighted(method, start, weigh, last_weights=last_weights, visible=visible)
    )
    return regularized
