"""Prioritize: a user's prior on the weights of a method."""

from collections.abc import Callable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base
from mtlbalance.annotations import PerTask
from mtlbalance.hyperparameters import NONNEGATIVE, is_asking_for_shapes, per_task
from mtlbalance.names import by_group, known_names, names_of
from mtlbalance.wrappers.plumbing import Method, check_method, reweighted


class PrioritizeState(NamedTuple):
    """State of :func:`prioritize`.

    Attributes:
      inner: the state of the wrapped method.
      count: int32 scalar, the calls so far, for a schedule; ``None`` without one.
      last_weights: where the method inside keeps its last weights, those that were made of them; else ``None``. Equal
        ones before the first call, as inside, where the losses' names were not known yet.
    """

    inner: Any
    count: jax.Array | None
    last_weights: jax.Array | None


@overload
def prioritize(
    method: base.Scalarizer[Any], prior: PerTask | Callable[[jax.Array], PerTask]
) -> base.Scalarizer[PrioritizeState]: ...


@overload
def prioritize(
    method: base.Aggregator[Any], prior: PerTask | Callable[[jax.Array], PerTask]
) -> base.Aggregator[PrioritizeState]: ...


@base.memoized
def prioritize(method: Method, prior: PerTask | Callable[[jax.Array], PerTask]) -> Method:
    r"""Multiplies the weights of a method by what the user knows of the tasks' importance.

    .. math:: w_i = p_i \, \hat w_i

    where :math:`\hat w` are the method's own weights. A task with a prior of 0 is absent for the method: it takes no
    part in its decision, whatever its loss and gradient are, and its entries in the state stay as they were. A weight
    of 0 is no mask: times what is not finite it is NaN. A scalarizer becomes the sum of the losses with these weights,
    which are constants of differentiation.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Args:
      method: a scalarizer without learned fields, or an aggregator that makes weights.
      prior: :math:`p_i \ge 0`: one number for all tasks; an array for losses without names; or a tree of the losses'
        names, or of the names of groups of them. May be traced. Or a function of the number of calls so far, such as an
        optax schedule, that returns one of these.

    Returns:
      A method of the same family with the same paths and state :class:`PrioritizeState`.

    Raises:
      TypeError: if ``method`` is of neither family.
      ValueError: if it has learned fields, or makes no weights; if ``prior`` is negative, or its names are not
        the losses': as soon as these are known.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.prioritize(scalarization.sum(), {"seg": 1.0, "pose": 0.1})
      >>> losses = {"seg": 2.0, "pose": {"angle": 3.0, "place": 5.0}}
      >>> scalar, state = method.apply(method.init(losses), losses)
      >>> print(f"{scalar:.1f}")
      2.8
    """
    check_method(method, "prioritize(learn(method, optimizer), prior)", makes_weights=True)
    is_schedule = callable(prior)
    read = lambda prior, shape, dtype: per_task("prior", by_group("prior", prior), shape, dtype, bound=NONNEGATIVE)

    def start(shape, dtype, inner):
        is_known = known_names() is not None or not names_of(prior).entries  # else it waits for the losses' names
        last = method.last_weights and method.last_weights(inner)
        state = PrioritizeState(inner, jnp.zeros((), jnp.int32) if is_schedule else None, last)
        if is_schedule or not is_known or is_asking_for_shapes():
            return state
        read(prior, shape, dtype)
        return with_last(state)

    def with_last(state):
        if method.last_weights is None:
            return state
        last = method.last_weights(state.inner)
        return state._replace(last_weights=priors(state, jnp.ones(last.shape, bool), last.dtype) * last)

    def priors(state, mask, dtype):
        return jnp.where(mask, read(prior(state.count) if is_schedule else prior, mask.shape, dtype), 0)

    def visible(state, mask):
        return mask & (priors(state, mask, jnp.float32) != 0)

    def weigh(state, weights, mask):
        count = optax.safe_increment(state.count) if is_schedule else None
        return priors(state, mask, weights.dtype) * weights, with_last(state)._replace(count=count)

    last_weights = method.last_weights and (lambda state: state.last_weights)
    return reweighted(method, start, weigh, last_weights=last_weights, visible=visible)
