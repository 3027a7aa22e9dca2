"""What all wrappers stand on: which methods they take, and the paths and hooks of the method inside.

A wrapper's state is a named tuple in whose field ``inner`` is the state of the wrapped method.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import ArrayTree
from mtlbalance.complex_parts import is_complex
from mtlbalance.contract import Aggregator, Rowwise, Scalarizer, check_is_method, has_weights, weights_of
from mtlbalance.hyperparameters import reject
from mtlbalance.states import increment, select

HOOKS = "observe", "end_epoch"
Method = TypeVar("Method", Scalarizer, Aggregator)


def check_method(method: Any, usage: str, *, makes_weights: bool = False, argument: str = "method") -> None:
    """Raises unless this is a method with nothing left to learn, as in ``usage``, and makes weights if it must."""
    check_is_method(argument, method, "a Scalarizer or an Aggregator", Scalarizer, Aggregator)
    if method.learned:
        reject(argument, f"a method with nothing left to learn, as in {usage}", f"learned={method.learned}")
    if makes_weights and not has_weights(method):
        makes_them = "an aggregator that makes weights (mtl.transform_rows goes around this wrapper)"
        reject(argument, makes_them, "one without a weighting")


def all_of(state: Any, mask: jax.Array) -> jax.Array:
    """The tasks that the wrapped method sees, in most wrappers: those present."""
    del state
    return mask


def hooks_of(method: Method, visible: Callable[..., Any] = all_of) -> dict[str, Any]:
    """The hooks of the wrapped method, on the inner state, as a builder takes them; for the tasks that it sees."""

    def end_epoch(state):
        return state._replace(inner=method.end_epoch(state.inner))

    def observe(state, values, mask):
        return state._replace(inner=method.observe(state.inner, values, mask=visible(state, mask)))

    last_weights = method.last_weights and (lambda state: method.last_weights(state.inner))
    return {"end_epoch": end_epoch, "observe": observe, "last_weights": last_weights, "needs": method.needs}


def needs_of(*methods: Any) -> tuple[str, ...]:
    """The hooks that one of several methods needs."""
    return tuple(hook for hook in HOOKS if any(hook in method.needs for method in methods))


def state_after(method: Any, old: Any, new: Any, finite: jax.Array, dropped: jax.Array | None = None) -> Any:
    """A method's state after a step: the new one, unless it has a guard, which is told how the gradient was."""
    return method.after_gradient(old, new, finite, dropped) if method.after_gradient else new


def forward_after_gradient(method: Any, wrapper: Any) -> Any:
    """The wrapper with the hook ``after_gradient``, if the wrapped method has it."""
    if method.after_gradient is None:
        return wrapper

    def after_gradient(old, new, finite, dropped=None):
        return new._replace(inner=state_after(method, old.inner, new.inner, finite, dropped))

    return wrapper._replace(after_gradient=after_gradient)


def rows_of(method, weigh: Callable[..., Any], visible: Callable[..., Any] = all_of) -> Rowwise:
    """The wrapped method row by row, with another ``weigh``."""

    def visit(state, i, row, values, mask):
        inner, statistic = method.rowwise.visit(state.inner, i, row, values=values, mask=visible(state, mask))
        return state._replace(inner=inner), statistic

    return Rowwise(visit, weigh, visits=visits_of(method, visible))


def visits_of(method: Aggregator, visible: Callable[..., Any] = all_of) -> Callable[..., Any] | None:
    """Which rows the wrapped method takes in; ``None`` for all."""
    if method.rowwise is None or method.rowwise.visits is None:
        return None
    visits = method.rowwise.visits
    return lambda state, mask: visits(state.inner, mask=visible(state, mask))


def nan_tree_unless(ok: jax.Array, output: ArrayTree) -> ArrayTree:
    """What a method gives; NaN unless ``ok``, and in both parts of what is complex."""
    nan = numerics.nan_where(~ok)
    nan_like = lambda x: jax.lax.complex(nan, nan).astype(x.dtype) if is_complex(x) else nan
    return jax.tree.map(lambda x: jnp.where(ok, x, nan_like(x)), output)


def within(field: str, fields: tuple[str, ...]) -> tuple[str, ...]:
    """The fields of a state that is itself a field."""
    return tuple(f"{field}.{name}" for name in fields)


def reweighted(
    method: Method,
    start: Callable[..., Any],
    change: Callable[..., Any],
    *,
    last_weights: Callable[..., Any] | None = None,
    keeps_scalar: bool = False,
    per_task: dict[str, Any] | None = None,
    visible: Callable[..., Any] = all_of,
) -> Method:
    """The method with its weights looked at, or changed, on every path.

    Args:
      method: a method that makes weights.
      start: ``(shape, dtype, inner) -> state``, with the first leaf of ``shape``. If it remembers weights it has a
        field ``not_taken``, an int32 scalar: the calls whose weights or losses were not finite; ``None`` there if it
        remembers nothing after all. After these no other field but ``inner`` is new.
      change: ``(state, weights, mask) -> (weights, state)``, the state with the new ``inner`` in it already.
      last_weights: ``(state) -> weights`` of the last call, if they are in the state.
      keeps_scalar: whether a scalarizer's scalar stays as it is. Else it is the losses' sum with the changed weights,
        which are constants of differentiation.
      per_task: the wrapper's own hyperparameters with one number per task, as the builders take them.
      visible: ``(state, mask) -> mask`` of the tasks that the method sees; of the others present it gives no weights.
    """
    hooks = hooks_of(method, visible) | {"last_weights": last_weights, "per_task": per_task}
    change = _if_finite(change)
    if isinstance(method, Scalarizer):
        return forward_after_gradient(
            method, _reweighted_scalarizer(method, start, change, hooks, keeps_scalar, visible)
        )
    # Weights that are looked at only are what they are inside.
    hooks |= {"stop_gradient": not keeps_scalar}
    return forward_after_gradient(method, _reweighted_aggregator(method, start, change, hooks, visible))


def _if_finite(change):
    """The change, not remembered where the weights, or the losses that they may be made of, are not finite."""

    def change_if_finite(state, weights, values, mask):
        if getattr(state, "not_taken", None) is None:
            return change(state, weights, mask)
        given = (weights,) if values is None else (weights, values)
        ok = jnp.all(jnp.array([jnp.all(jnp.isfinite(x) | ~mask) for x in given]))
        changed, new = change(state, weights, mask)
        own = lambda state: {name: getattr(state, name) for name in state._fields if name != "inner"}
        kept = own(state) | {"not_taken": increment(state.not_taken, ~ok)}
        return changed, new._replace(**select(ok, own(new), kept))

    return change_if_finite


def _reweighted_scalarizer(method, start, change, hooks, keeps_scalar, visible):
    def init(shape, dtype):
        return start(shape, dtype, method.init(jax.ShapeDtypeStruct(shape, dtype)))

    def apply(state, values, mask):
        weights, inner = weights_of(method, state.inner, jax.lax.stop_gradient(values), visible(state, mask))
        weights, new_state = change(state._replace(inner=inner), weights, values, mask)
        if keeps_scalar:
            return method.apply(state.inner, values, mask=mask)[0], new_state
        return numerics.weighted_sum(weights, values, mask), new_state

    return base.scalarizer(init, apply, **hooks)


def _reweighted_aggregator(method, start, change, hooks, visible):
    def changed(weigh):
        def weigh_and_change(state, statistic, values, mask):
            weights, inner = weigh(state.inner, statistic, values=values, mask=visible(state, mask))
            return change(state._replace(inner=inner), weights, values, mask)

        return weigh_and_change

    return base.aggregator(
        lambda m, params, dtype: start((m,), dtype, method.init((m, params))),
        weighting=changed(method.weighting.apply),
        gramian_weighting=method.gramian_weighting and changed(method.gramian_weighting.apply),
        rowwise=method.rowwise and rows_of(method, changed(method.rowwise.weigh), visible),
        jacobian_shaped=within("inner", method.jacobian_shaped),
        nan_if_nonfinite=False,
        zero_absent=False,
        **hooks,
    )
