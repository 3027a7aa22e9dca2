"""Skip what is not finite: a method's state kept from being poisoned."""

from collections.abc import Hashable
from functools import partial
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.contract import Rowwise
from mtlbalance.gramian import squared_norm
from mtlbalance.mapped_axes import axes_of, on_all_devices, varying
from mtlbalance.states import among, increment, is_in, select
from mtlbalance.wrappers.plumbing import (
    Method,
    check_method,
    hooks_of,
    nan_tree_unless,
    visits_of,
    within,
)


class SkipNonfiniteState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Attributes:
      inner: the state of the wrapped method.
      nonfinite: int32, one per task: the calls in which its loss, or its row of the Jacobian, was not finite.
      skipped: int32 scalar: the calls that left ``inner`` as it was, whatever the reason.
    """

    inner: Any
    nonfinite: jax.Array
    skipped: jax.Array


@overload
def skip_nonfinite(
    method: base.Scalarizer[Any], *, axis_name: Hashable | None = None
) -> base.Scalarizer[SkipNonfiniteState]: ...


@overload
def skip_nonfinite(
    method: base.Aggregator[Any], *, axis_name: Hashable | None = None
) -> base.Aggregator[SkipNonfiniteState]: ...


@base.memoized
def skip_nonfinite(method: Method, *, axis_name: Hashable | None = None) -> Method:
    """Keeps a method's state from being poisoned by a loss or gradient that is not finite.

    On such a call the state stays as it was, and the output and its gradient are NaN, so that
    ``optax.apply_if_finite`` after it drops the update too. A gradient whose norm is beyond 1e16 counts as not finite,
    so that a million squares add up in float32. A call that would turn a finite number of the state into one that is
    not is skipped as well, and one whose scalar, weights or gradient are not finite: those of a negative loss in a
    logarithm.

    In :func:`mtlbalance.value_and_grad` it hears of the gradient that a step ends with, too, and skips that step where
    it is not finite: a scalarizer sees losses alone, which may be finite where their gradient is not, and an absent
    task's gradient comes through the backward pass that it shares with the others. Whose it was is not known then:
    ``skipped`` counts the step, ``nonfinite`` nobody. A step of your own has the same by ``state =
    method.after_gradient(state, new_state, finite)``; without it only what comes to ``apply`` is counted. Tasks that
    ``value_and_grad(..., nonfinite="drop_task")`` drops are counted in ``nonfinite``, and their steps not skipped.

    Rows of Jacobian-shaped fields are kept one by one: where one task's loss or gradient is not finite, the other
    tasks' rows still take theirs in, as they must when rows are visited one at a time and never seen together. Overflow
    inside the method is not caught there, as of a gradient times a scalarizer's weight in :func:`chain`: guard both
    parts, ``chain(skip_nonfinite(scalarizer), skip_nonfinite(aggregator))``.

    It reads the Jacobian once more than the method does, and writes out no copy of it, nor does a mask: a call of
    :func:`~mtlbalance.aggregation.excess_mtl` takes up to 1.3 times as long (``tests/benchmarks/excess_mtl.py``).

    Args:
      method: a method of either family.
      axis_name: under :func:`jax.shard_map`, the axis over which an aggregator's parameters are split.

    Returns:
      A method of the same family with the same paths and state :class:`SkipNonfiniteState`.

    Raises:
      TypeError: if ``method`` is of neither family.
      ValueError: if it has learned fields: :func:`learn` goes inside.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.skip_nonfinite(scalarization.dwa())
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, jnp.nan]))
      >>> print(scalar, state.nonfinite, state.skipped, state.inner.count)
      nan [0 1] 1 [0 0]
    """
    check_method(method, "skip_nonfinite(learn(method, optimizer))")
    # Compiled, as what the builders make is: a step need not be inside of jit.
    after_gradient = jax.jit(partial(_after_gradient, jacobian_shaped=method.jacobian_shaped, axis_name=axis_name))
    if isinstance(method, base.Scalarizer):
        axis_name = None  # its losses are the same on every device
    guard = partial(_advance, jacobian_shaped=method.jacobian_shaped, axis_name=axis_name)

    def observe(state, values, mask):
        inner = method.observe(state.inner, values, mask=mask)
        ok = jnp.all(_finite_losses(values, mask))
        ok &= _stays_finite(inner, state.inner, True, method.jacobian_shaped, axis_name)
        return state._replace(inner=select(ok, inner, state.inner))

    hooks = hooks_of(method) | {"observe": observe}
    guarded = (
        _skip_scalarizer(method, guard, hooks)
        if isinstance(method, base.Scalarizer)
        else _skip_aggregator(method, guard, hooks, axis_name)
    )
    return guarded._replace(after_gradient=after_gradient)


def _skip_scalarizer(method, guard, hooks):
    def init(shape, dtype):
        return _guarded(method.init(jax.ShapeDtypeStruct(shape, dtype)), shape)

    def apply(state, values, mask):
        scalar, inner = method.apply(state.inner, values, mask=mask)
        # Finite losses may be outside of what the method is for: a negative one has no logarithm.
        state, ok = guard(state, inner, _finite_losses(values, mask), jnp.isfinite(scalar))
        # The product makes the gradient NaN too, where the values themselves would not.
        return scalar * numerics.nan_where(~ok), state

    return base.scalarizer(init, apply, **hooks)


def _skip_aggregator(method, guard, hooks, axis_name):
    visits = visits_of(method)

    def nan_unless_finite(state, inner, output, finite):
        state, ok = guard(state, inner, finite, numerics.all_finite(output))
        return nan_tree_unless(ok, output), state

    def given(mask, finite):
        """The tasks that the method inside is given: non-finite ones would stay in remembered rows."""
        # Where rows have turns, none: without the one whose turn it is another would have it, unseen.
        return mask & (finite if visits is None else jnp.all(finite))

    def guarded(apply, finite_tasks):
        def guarded_apply(state, statistic, values, mask):
            finite = finite_tasks(statistic, mask) | ~mask
            if visits is not None:
                finite |= ~among(visits(state, mask), mask)
            finite &= _finite_losses(values, mask)
            output, inner = apply(state.inner, statistic, values=values, mask=given(mask, finite))
            return nan_unless_finite(state, inner, output, finite)

        return guarded_apply

    def finite_rows(jacobian, mask):
        return jax.vmap(lambda row: _leaves_room(row, axis_name), axis_size=len(mask))(jacobian)

    def finite_diagonal(gramian, mask):
        del mask
        return _adds_up(jnp.diagonal(gramian))

    def visit(state, i, row, values, mask):
        finite = _leaves_room(row, axis_name)
        all_finite = _finite_losses(values, mask)
        mask = given(mask, all_finite.at[i].set(all_finite[i] & finite))
        inner, statistic = method.rowwise.visit(state.inner, i, row, values=values, mask=mask)
        return state._replace(inner=inner), (statistic, ~finite)

    def after_visits(last):
        def guarded_last(state, statistics, values, mask):
            statistics, nonfinite = statistics
            finite = (~nonfinite | ~mask) & _finite_losses(values, mask)
            output, inner = last(state.inner, statistics, values=values, mask=given(mask, finite))
            return nan_unless_finite(state, inner, output, finite)

        return last and guarded_last

    of_gramian, rowwise = method.gramian_weighting, method.rowwise
    return base.aggregator(
        lambda m, params, dtype: _guarded(method.init((m, params)), (m,)),
        apply=guarded(method.apply, finite_rows),
        weighting=method.weighting and guarded(method.weighting.apply, finite_rows),
        gramian_weighting=of_gramian and guarded(of_gramian.apply, finite_diagonal),
        rowwise=rowwise and Rowwise(visit, after_visits(rowwise.weigh), after_visits(rowwise.finish), visits),
        jacobian_shaped=within("inner", method.jacobian_shaped),
        nan_if_nonfinite=False,
        stop_gradient=False,
        zero_absent=False,
        **hooks,
    )


def _guarded(inner, shape):
    return SkipNonfiniteState(inner, jnp.zeros(shape, jnp.int32), jnp.zeros((), jnp.int32))


def _advance(state, inner, finite, finite_output, *, jacobian_shaped, axis_name):
    """The state after a call in which the tasks in ``finite`` were so, and whether its inner state has moved."""
    ok = jnp.all(finite) & _stays_finite(inner, state.inner, finite_output, jacobian_shaped, axis_name)
    inner = select(ok, inner, state.inner, new_anyway=jacobian_shaped)
    return SkipNonfiniteState(inner, increment(state.nonfinite, ~finite), increment(state.skipped, ~ok)), ok


def _after_gradient(old, new, finite, dropped=None, *, jacobian_shaped, axis_name):
    """The state after a step: where its gradient was not finite the inner one from before, and the call counted."""
    ok = _everywhere(finite, axis_name, like=old.skipped)
    inner = select(ok, new.inner, old.inner, new_anyway=jacobian_shaped)
    skipped = jnp.where(ok, new.skipped, increment(old.skipped, ~ok))
    nonfinite = new.nonfinite if dropped is None else increment(new.nonfinite, dropped)
    return new._replace(inner=inner, nonfinite=nonfinite, skipped=skipped)


def _stays_finite(new_state, state, ok, jacobian_shaped, axis_name):
    """Whether all is ``ok``, and every finite number outside the Jacobian-shaped fields still so, on every device."""
    ok = jnp.asarray(ok)
    for (path, new), old in zip(jax.tree.leaves_with_path(new_state), jax.tree.leaves(state), strict=True):
        if not is_in(jacobian_shaped, path):
            # What was infinite before may be so by design: the best value so far of a line search.
            ok &= jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))
    return _everywhere(ok, axis_name)


def _everywhere(ok, axis_name, like=None):
    """Whether it is so on every device; also along the axes over which it varies, and ``like`` does not."""
    axes = dict.fromkeys(axes_of(axis_name))
    if like is not None:
        axes |= dict.fromkeys(varying(ok) - varying(like))
    return on_all_devices(ok, tuple(axes))


def _finite_losses(values, mask):
    """Which losses are finite, or of absent tasks."""
    return jnp.ones_like(mask) if values is None else jnp.isfinite(values) | ~mask


def _leaves_room(row, axis_name):
    """Whether a gradient is finite, and small enough that 2**20 of its squares can be added up."""
    return _adds_up(squared_norm(row, axis_name))


def _adds_up(square):
    return jnp.isfinite(2**20 * square)
