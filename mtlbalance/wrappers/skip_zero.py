"""Skip what is zero: a task without loss or gradient counts as absent."""

from collections.abc import Hashable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.contract import Rowwise
from mtlbalance.gramian import squared_norm
from mtlbalance.hyperparameters import reject
from mtlbalance.states import increment
from mtlbalance.wrappers.plumbing import (
    Method,
    check_method,
    forward_after_gradient,
    hooks_of,
    visits_of,
    within,
)


class SkipZeroState(NamedTuple):
    """State of :func:`skip_zero`.

    Attributes:
      inner: the state of the wrapped method.
      zeros: int32, one per task: the calls of ``apply`` in which its loss or gradient was zero.
      was_zero: booleans, one per task: whether it was so in the last of them.
    """

    inner: Any
    zeros: jax.Array
    was_zero: jax.Array


@overload
def skip_zero(method: base.Scalarizer[Any], *, axis_name: Hashable | None = None) -> base.Scalarizer[SkipZeroState]: ...


@overload
def skip_zero(method: base.Aggregator[Any], *, axis_name: Hashable | None = None) -> base.Aggregator[SkipZeroState]: ...


@base.memoized
def skip_zero(method: Method, *, axis_name: Hashable | None = None) -> Method:
    """A task whose loss or gradient is exactly zero, or a gradient whose square underflows, is absent in that call.

    A loss may be met for a while, as a hinge or a constraint, and has no gradient then. Some methods stop the whole
    training there, because of their formula: the shortest combination of the gradients is zero
    (:func:`~mtlbalance.aggregation.mgda`), or all weight goes to the smallest loss
    (:func:`~mtlbalance.scalarization.famo`, :func:`~mtlbalance.scalarization.uw_so`,
    :func:`~mtlbalance.scalarization.geometric_mean`). Under this wrapper they go on with the others, and the task is
    back, its entries in the state as they were, as soon as it has something to say.

    A gradient counts as zero where the sum of its squares is, in float32 where it is shorter than about 1e-22. An
    aggregator's tasks are judged by both, if it is given the losses. In ``observe`` a task is absent that was so in
    ``apply``, and one for which it gets zero. Around :func:`amortize` a task that is skipped keeps its last weight;
    inside of it that would be zero until the next refresh. Of a :func:`chain` wrap the aggregator, or the whole.
    Inside of :func:`regularize` its terms are not judged.

    Args:
      method: a method of either family, of which every call takes in all rows: not
        :func:`~mtlbalance.aggregation.m_config`.
      axis_name: under :func:`jax.shard_map`, the axis over which an aggregator's parameters are split.

    Returns:
      A method of the same family with the same paths and state :class:`SkipZeroState`.

    Raises:
      TypeError: if ``method`` is of neither family.
      ValueError: if it has learned fields, or takes in some rows only at a call.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> rows = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])  # the third loss is met
      >>> for method in aggregation.mgda(), mtl.skip_zero(aggregation.mgda()):
      ...     gradient, state = method.apply(method.init((3, 2)), rows)
      ...     print([f"{x:.2f}" for x in gradient])
      ['0.00', '0.00']
      ['0.80', '0.40']
      >>> print(state.zeros)
      [0 0 1]
    """
    check_method(method, "skip_zero(learn(method, optimizer))")
    if isinstance(method, base.Aggregator) and visits_of(method) is not None:
        reject("method", "one that takes in all rows at every call", "one whose rows have turns")

    def observe(state, values, mask):
        mask = mask & ~state.was_zero & ~_zero_losses(values, mask)
        return state._replace(inner=method.observe(state.inner, values, mask=mask))

    hooks = hooks_of(method) | {"observe": observe}
    if isinstance(method, base.Scalarizer):
        return forward_after_gradient(method, _skip_scalarizer(method, hooks))
    return forward_after_gradient(method, _skip_aggregator(method, hooks, axis_name))


def _skip_scalarizer(method, hooks):
    def init(shape, dtype):
        return _watched(method.init(jax.ShapeDtypeStruct(shape, dtype)), shape)

    def apply(state, values, mask):
        zero = _zero_losses(values, mask)
        scalar, inner = method.apply(state.inner, values, mask=mask & ~zero)
        return scalar, _advance(state, inner, zero, mask)

    return base.scalarizer(init, apply, **hooks)


def _skip_aggregator(method, hooks, axis_name):
    def without(apply, zero_rows):
        def apply_without(state, statistic, values, mask):
            zero = mask & (zero_rows(statistic, mask) | _zero_losses(values, mask))
            output, inner = apply(state.inner, statistic, values=values, mask=mask & ~zero)
            return output, _advance(state, inner, zero, mask)

        return apply and apply_without

    def in_gramian(gramian, mask):
        del mask
        return jnp.diagonal(gramian) == 0

    def in_jacobian(jacobian, mask):
        return jax.vmap(lambda row: _is_zero(row, axis_name), axis_size=len(mask))(jacobian)

    def visit(state, i, row, values, mask):
        zero = _is_zero(row, axis_name)
        mask = mask.at[i].set(mask[i] & ~zero) & ~_zero_losses(values, mask)
        inner, statistic = method.rowwise.visit(state.inner, i, row, values=values, mask=mask)
        return state._replace(inner=inner), (statistic, zero)

    def after_visits(last):
        def last_without(state, statistics, values, mask):
            statistics, zero = statistics
            zero = mask & (zero | _zero_losses(values, mask))
            output, inner = last(state.inner, statistics, values=values, mask=mask & ~zero)
            return output, _advance(state, inner, zero, mask)

        return last and last_without

    of_jacobian, of_gramian, rowwise = method.weighting, method.gramian_weighting, method.rowwise
    paths = {
        "apply": without(method.apply, in_jacobian),
        "weighting": of_jacobian and without(of_jacobian.apply, in_jacobian),
    }
    return base.aggregator(
        lambda m, params, dtype: _watched(method.init((m, params)), (m,)),
        # Where all else is made of the Gramian, so are the lengths.
        **({"axis_name": axis_name} if of_gramian and not rowwise else paths),
        gramian_weighting=of_gramian and without(of_gramian.apply, in_gramian),
        rowwise=rowwise and Rowwise(visit, after_visits(rowwise.weigh), after_visits(rowwise.finish)),
        jacobian_shaped=within("inner", method.jacobian_shaped),
        nan_if_nonfinite=False,
        stop_gradient=False,
        zero_absent=False,
        **hooks,
    )


def _watched(inner, shape):
    return SkipZeroState(inner, jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def _advance(state, inner, zero, mask):
    """The state after a call in which the tasks in ``zero`` were so; absent ones keep what they had."""
    return SkipZeroState(inner, increment(state.zeros, zero), jnp.where(mask, zero, state.was_zero))


def _zero_losses(values, mask):
    """Which tasks present have a loss of zero."""
    return jnp.zeros_like(mask) if values is None else (values == 0) & mask


def _is_zero(row, axis_name):
    return squared_norm(row, axis_name) == 0
