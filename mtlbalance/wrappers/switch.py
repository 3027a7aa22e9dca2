"""Switch: one method that is several, chosen by an integer that may be traced."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.contract import Rowwise
from mtlbalance.hyperparameters import check_count, kind_of, reject
from mtlbalance.mapped_axes import manual_axes, varying_as
from mtlbalance.wrappers.plumbing import Method, check_method, needs_of, state_after, within


class SwitchState(NamedTuple):
    """State of :func:`switch`.

    Attributes:
      states: the states of all methods, in their order; those of the others stay as ``init`` made them.
    """

    states: tuple[Any, ...]


@overload
def switch(methods: Sequence[base.Scalarizer[Any]]) -> Callable[[int | jax.Array], base.Scalarizer[SwitchState]]: ...


@overload
def switch(methods: Sequence[base.Aggregator[Any]]) -> Callable[[int | jax.Array], base.Aggregator[SwitchState]]: ...


@base.memoized
def switch(methods: Sequence[Method]) -> Callable[[int | jax.Array], Method]:
    """Several methods in one program, chosen by an integer that may be traced.

    For comparing methods: ``jax.lax.map`` over the index trains the same network with each of them, one after the
    other, in a program that is compiled once, where a loop over methods compiles a training for each. What stands for
    the index is a method of the same family, which threads as any other::

        choose = mtl.switch((scalarization.mean(), scalarization.uw_so(), scalarization.dwa(steps_per_epoch=100)))
        results = jax.lax.map(lambda i: train(choose(i), seed), jnp.arange(3))

    The chosen method runs on its own state, and gives what it gives alone; the states of all are in memory, and XLA
    copies them at a call (a state shaped like the Jacobian is large: half as long again). Under :func:`jax.vmap` over
    the index every method is computed, and all but one dropped: map over it by ``lax.map``, and over seeds or
    hyperparameters, inside or outside of that, by ``vmap``. A traced index that is out of range is the first or the
    last one, as in :func:`jax.lax.switch`. There may be another index at each step, a schedule of methods: each sees
    the calls in which it was chosen.

    The hooks are those of the chosen method; it needs those that one of the methods needs, such as ``dwa()`` its
    epochs. It has the paths that all methods have: with one that makes no weights it makes none. Row by row it computes
    every row, also for a method that visits some. It keeps its last weights, for ``refresh=``, if all are made by
    :func:`amortize`. Groups of :func:`nested` are computed from the rows of all losses.

    Args:
      methods: a tuple or list of methods of one family, with nothing left to learn.

    Returns:
      A function of the index, an integer from 0 to ``len(methods) - 1``, to a method of that family with state
      :class:`SwitchState`.

    Raises:
      TypeError: if ``methods`` is no tuple or list of methods, or they are of both families; if the index is no
        integer.
      ValueError: if there is none, or one has learned fields (:func:`learn` goes inside); if the index is out of range,
        and not traced.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> choose = mtl.switch((aggregation.mean(), aggregation.mgda(), aggregation.trimmed_mean(0)))
      >>> rows = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> def gradient(i):
      ...     method = choose(i)
      ...     return method.apply(method.init((2, 2)), rows)[0]
      >>> print([f"{x:.1f} {y:.1f}" for x, y in jax.lax.map(gradient, jnp.arange(3))])
      ['0.5 1.5', '0.9 0.3', '0.5 1.5']
    """
    methods = tuple(_checked(methods))
    return lambda index: switched(methods, index)


@base.memoized
def switched(methods: tuple[Any, ...], index: int | jax.Array) -> Any:
    """The method of this index; a function by itself, so that the method is printed with all that it may be."""
    check_count("index", index, 0, len(methods) - 1)
    build = _scalarizer if isinstance(methods[0], base.Scalarizer) else _aggregator
    return build(_Switch(methods, index))


def _checked(methods):
    if type(methods) not in (tuple, list):  # a method is a named tuple
        expected = "a tuple or list of methods, as in switch((aggregation.mean(), aggregation.mgda()))"
        reject("methods", expected, kind_of(methods), TypeError)
    if not methods:
        reject("methods", "at least one method", "none")
    for i, method in enumerate(methods):
        check_method(method, f"methods[{i}] = learn(method, optimizer)", argument=f"methods[{i}]")
    families = {type(method).__name__ for method in methods}
    if len(families) > 1:
        reject("methods", "methods of one family", " and ".join(sorted(families)), TypeError)
    return methods


class _Switch(NamedTuple):
    """The methods, and which of them is meant."""

    methods: tuple[Any, ...]
    index: Any

    def run(self, call, state):
        """What ``call(i, its state) -> (output, its new state)`` gives for the chosen method, and all states."""

        def branch(i):
            def of_states(states):
                output, new = call(i, states[i])
                return output, SwitchState(_with(states, i, new))

            return of_states

        branches = [branch(i) for i in range(len(self.methods))]
        if manual_axes():  # one method may give every device the same where another does not
            shapes = [jax.eval_shape(branch, state.states) for branch in branches]
            alike = lambda branch: lambda states: jax.tree.map(varying_as, branch(states), *shapes)
            branches = list(map(alike, branches))
        return jax.lax.switch(self.index, branches, state.states)

    def path(self, name):
        """A path of the chosen method, as a builder takes it; ``None`` unless all have it."""
        parts = [getattr(method, name) for method in self.methods]
        functions = [part and part.apply for part in parts]

        def call(state, given, values, mask):
            return self.run(lambda i, inner: functions[i](inner, given, values=values, mask=mask), state)

        return call if all(functions) else None

    def hooks(self):
        """The hooks of the chosen method, as a builder takes them."""

        def end_epoch(state):
            return self.run(lambda i, inner: ((), self.methods[i].end_epoch(inner)), state)[1]

        def observe(state, values, mask):
            return self.run(lambda i, inner: ((), self.methods[i].observe(inner, values, mask=mask)), state)[1]

        def last_weights(state):
            return self.run(lambda i, inner: (self.methods[i].last_weights(inner), inner), state)[0]

        keep_them = all(method.last_weights for method in self.methods)
        hooks = {"end_epoch": end_epoch, "observe": observe, "last_weights": last_weights if keep_them else None}
        return hooks | {"needs": needs_of(*self.methods)}

    def after_gradient(self, old, new, *told):
        """The hook of guards; for a method without one it is the identity."""
        after = lambda i, inner: ((), state_after(self.methods[i], old.states[i], inner, *told))
        return self.run(after, new)[1]

    def finished(self, method):
        guards = any(method.after_gradient for method in self.methods)
        return method._replace(after_gradient=self.after_gradient) if guards else method


def _with(items, i, new):
    return (*items[:i], new, *items[i + 1 :])


def _scalarizer(chosen):
    def init(shape, dtype):
        return SwitchState(tuple(method.init(jax.ShapeDtypeStruct(shape, dtype)) for method in chosen.methods))

    def apply(state, values, mask):
        return chosen.run(lambda i, inner: chosen.methods[i].apply(inner, values, mask=mask), state)

    return chosen.finished(base.scalarizer(init, apply, **chosen.hooks()))


def _aggregator(chosen):
    def init(m, params, dtype):
        del dtype
        return SwitchState(tuple(method.init((m, params)) for method in chosen.methods))

    def apply(state, jacobian, values, mask):
        return chosen.run(lambda i, inner: chosen.methods[i].apply(inner, jacobian, values=values, mask=mask), state)

    jacobian_shaped = [within(f"states.{i}", method.jacobian_shaped) for i, method in enumerate(chosen.methods)]
    method = base.aggregator(
        init,
        apply=apply,
        weighting=chosen.path("weighting"),
        gramian_weighting=chosen.path("gramian_weighting"),
        rowwise=_rowwise(chosen),
        jacobian_shaped=sum(jacobian_shaped, ()),
        nan_if_nonfinite=False,
        stop_gradient=False,
        zero_absent=False,
        **chosen.hooks(),
    )
    return chosen.finished(method)


def _rowwise(chosen):
    """Row by row, if all methods weigh so, or all combine what they remember; each has its own statistics."""

    def visit(state, row_index, row, values, mask):
        def visit_by(i, inner):
            inner, statistic = chosen.methods[i].rowwise.visit(inner, row_index, row, values=values, mask=mask)
            return statistic, inner

        shapes = [jax.eval_shape(partial(visit_by, i), inner)[0] for i, inner in enumerate(state.states)]
        none = tuple(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shape) for shape in shapes)

        def padded(i, inner):
            statistic, inner = visit_by(i, inner)
            return _with(none, i, statistic), inner

        statistics, state = chosen.run(padded, state)
        return state, statistics

    def last(name):
        functions = [method.rowwise and getattr(method.rowwise, name) for method in chosen.methods]

        def call(state, statistics, values, mask):
            return chosen.run(lambda i, inner: functions[i](inner, statistics[i], values=values, mask=mask), state)

        return call if all(functions) else None

    weigh, finish = last("weigh"), last("finish")
    return Rowwise(visit, weigh, finish) if weigh or finish else None
