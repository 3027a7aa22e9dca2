"""The contract of every method of either family: named tuples of pure functions."""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import chex
import jax

from mtlbalance.annotations import (
    AggregatorApply,
    AggregatorInit,
    EndEpoch,
    Observe,
    ScalarizerApply,
    ScalarizerInit,
    State,
    WeightingApply,
)
from mtlbalance.calls import shown
from mtlbalance.hyperparameters import reject


class Nesting(NamedTuple):
    """A method over the scalars of groups of losses, so that a training step computes a row for each group alone.

    Attributes:
      outer: the method over the groups; its state is the field ``outer`` of the whole one's.
      groups: ``(state, values, *, mask=None) -> (scalars, inside, present, new_state)``: the groups' scalars by name,
        the weight of each loss in each group ``[groups, losses]``, which groups are present, and the state with all
        but ``outer`` new.
    """

    outer: Any
    groups: Callable[..., Any]


class Scalarizer(NamedTuple, Generic[State]):
    """A method that turns losses into one scalar.

    A state has one entry per task, by position: it knows how many tasks it is for, and not which. Given to as many
    others it is theirs without an error: a pure function cannot remember names, and they are no arrays to be kept in a
    state. For a changed set of tasks there is :func:`mtlbalance.carry_over`.

    Attributes:
      init: ``(shape) -> state``. ``shape`` is an int ``n`` (meaning ``(n,)``), a tuple of ints, an array or
        :class:`jax.ShapeDtypeStruct`, or a tree of those (named losses: a vector of their total size).
      apply: ``(state, values, *, mask=None) -> (scalar, new_state)``. ``values`` is an array of the shape
        given to ``init``, or a tree of named losses; leaves may be :class:`Counted`. ``mask`` (booleans, like
        ``values``) says which tasks are present. An absent task's value may be anything, but a NaN in the
        *gradient* behind it cannot be repaired here: divide by ``max(count, 1)``, or use :class:`Counted`.
      end_epoch: ``(state) -> new_state``, the identity unless the method has epochs.
      observe: ``(state, values, *, mask=None) -> new_state``, the identity unless the method looks at the losses
        again after the optimizer's step (FAMO), or at another number per task (DTP).
      learned: names of the state fields that are trained by gradient, see :func:`mtlbalance.learn`. ``apply`` leaves
        them as they are: it cannot know whether its caller trains them.
      jacobian_shaped: none; as in :class:`Aggregator`.
      last_weights: ``(state) -> weights`` that the last call gave, shaped like the losses; ``None`` for a method that
        does not keep them. See :func:`mtlbalance.amortize`.
      after_gradient: ``(state, new_state, finite, dropped=None) -> new_state``, of a guard: ``value_and_grad`` ends a
        step by telling it the state from before, the one that ``apply`` made, whether the gradient is finite, which
        ``apply`` does not see, and which tasks ``nonfinite="drop_task"`` has dropped; the state it returns is the next.
        ``None`` for all others. See :func:`mtlbalance.skip_nonfinite`.
      nesting: of a method over groups of losses, see :func:`mtlbalance.nested`; ``None`` for all others.
      needs: the hooks, of ``"observe"`` and ``"end_epoch"``, without which the method, with these hyperparameters, does
        nothing: its weights stay what they were at the start. ``apply`` cannot know whether they are called;
        :func:`mtlbalance.value_and_grad` and :func:`mtlbalance.aggregate` ask.
    """

    init: ScalarizerInit[State]
    apply: ScalarizerApply[State]
    end_epoch: EndEpoch[State]
    observe: Observe[State]
    learned: tuple[str, ...] = ()
    jacobian_shaped: tuple[str, ...] = ()
    last_weights: Callable[[State], Any] | None = None
    after_gradient: Callable[..., Any] | None = None
    nesting: Nesting | None = None
    needs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The call that made the method, as ``scalarization.uw(max_weight=100.0)``; it stays after ``_replace``."""
        return shown(self)


class Weighting(NamedTuple, Generic[State]):
    """Turns a Jacobian, or its Gramian, into one weight per task.

    Attributes:
      init: ``((m, params)) -> state``; where only ``m`` matters, an int will do.
      apply: ``(state, statistic, *, values=None, mask=None) -> (weights, new_state)``, weights of shape ``[m]``.
    """

    init: Callable[..., State]
    apply: WeightingApply[State]


class Rowwise(NamedTuple):
    """The weighting computed row by row; the whole Jacobian is never in memory.

    Attributes:
      visit: ``(state, i, row, *, values=None, mask=None) -> (state, statistic)`` for every task ``i`` once; ``row`` is
        shaped like the parameters. Changes row ``i`` of the Jacobian-shaped leaves and nothing else.
      weigh: ``(state, statistics, *, values=None, mask=None) -> (weights, new_state)`` after the last visit;
        ``statistics`` are the visits' statistics stacked along a leading task axis. ``None`` where there is ``finish``.
      finish: ``(state, statistics, *, values=None, mask=None) -> (gradient, new_state)`` in place of ``weigh``, for
        methods that combine what they remember of the rows, and not the rows of this call. As the state is, their
        gradient is a constant of an outer differentiation, also from ``apply``.
      visits: ``(state, *, values=None, mask=None) -> indices``, for methods that take in some rows only at a call:
        visiting these, a fixed number, is enough. Zeros stand for the statistics of the others. ``None``: all rows.
    """

    visit: Callable[..., Any]
    weigh: Callable[..., Any] | None = None
    finish: Callable[..., Any] | None = None
    visits: Callable[..., Any] | None = None


class Task(NamedTuple):
    """What a visit knows of its task besides the row.

    Attributes:
      present: whether its row counts.
      loss: its loss; ``None`` where none were given.
      seen: in how many calls it was present before.
    """

    present: chex.Array
    loss: chex.Array | None
    seen: chex.Array


class Aggregator(NamedTuple, Generic[State]):
    """A method that turns one gradient per task (a Jacobian) into one gradient.

    Its state knows how many tasks it is for, and not which, as that of a :class:`Scalarizer`.

    Attributes:
      init: ``((m, n)) -> state`` for a Jacobian matrix, ``((m, params)) -> state`` for a tree.
      apply: ``(state, jacobian, *, values=None, mask=None) -> (gradient, new_state)``. The Jacobian's leaves are
        ``[m, *param.shape]``, real or complex; the gradient has the params' shapes, in the Jacobian's dtypes.
        ``values`` are the losses, for the methods that read them; ``mask`` says which tasks are present, as in
        :class:`Scalarizer`.
      end_epoch, observe: the hooks of :class:`Scalarizer`, so that one loop serves both families.
      weighting: of the Jacobian, where ``gradient = weights @ jacobian``.
      gramian_weighting: of ``J @ J.T``, where that is all the method needs.
      rowwise: the method computed row by row; ``None`` if it needs all rows together.
      learned: none; as in :class:`Scalarizer`.
      jacobian_shaped: the state fields whose leaves are shaped like the Jacobian's, as ``"averages"``, or
        ``"inner.averages"`` under a wrapper, ``"transformation.0.mu"`` in a tuple. After these may stand fields such as
        ``"transformation.*"``: each leaf in it has one entry per task, of any shape. Rows and entries of tasks whose
        gradient does not count stay as they were.
      last_weights: as in :class:`Scalarizer`, of shape ``[m]``.
      after_gradient, nesting, needs: as in :class:`Scalarizer`.
    """

    init: AggregatorInit[State]
    apply: AggregatorApply[State]
    end_epoch: EndEpoch[State]
    observe: Observe[State]
    weighting: Weighting[State] | None = None
    gramian_weighting: Weighting[State] | None = None
    rowwise: Rowwise | None = None
    learned: tuple[str, ...] = ()
    jacobian_shaped: tuple[str, ...] = ()
    last_weights: Callable[[State], Any] | None = None
    after_gradient: Callable[..., Any] | None = None
    nesting: Nesting | None = None
    needs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """The call that made the method, as ``aggregation.cagrad(c=0.4)``; it stays after ``_replace``."""
        return shown(self)


def has_weights(method: Scalarizer | Aggregator) -> bool:
    """Whether a method makes one weight per task, as ``mtl.value_and_grad(..., return_weights=True)`` asks.

    Args:
      method: of either family. A scalarizer's weights are the derivative of its scalar; some aggregators have none.

    Returns:
      Whether it has.

    Raises:
      TypeError: if it is of neither family.

    Example:
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> mtl.has_weights(aggregation.upgrad()), mtl.has_weights(aggregation.graddrop())
      (True, False)
    """
    check_is_method("method", method, "a Scalarizer or an Aggregator", Scalarizer, Aggregator)
    return isinstance(method, Scalarizer) or method.weighting is not None


def check_is_method(argument: str, method: Any, expected: str, *families: type) -> None:
    """Raises unless this is a method of one of these families."""
    if isinstance(method, families):
        return
    found, name = type(method).__name__, getattr(method, "__name__", "")
    if isinstance(method, type):
        found = f"the class {name}"
    elif callable(method):
        is_factory = "<locals>" not in getattr(method, "__qualname__", "<locals>")
        found = f"function {name}: a factory must be called, {name}()" if is_factory else "a function"
    elif isinstance(method, str):
        found = f"{method!r}: the factory of that name must be called"
    reject(argument, expected, found, TypeError)


_CALLS = {
    "observe": "state = method.observe(state, ...) after each optimizer step, with what its docstring says",
    "end_epoch": "state = method.end_epoch(state) after each epoch",
}


def check_hooks(method: Any, hooks: bool) -> None:
    """Raises for a method that does nothing without its hooks, unless its user says that they are called."""
    if not isinstance(hooks, bool):
        reject("hooks", "True or False", f"{hooks!r}", TypeError)
    if method.needs and not hooks:
        calls = " and ".join(_CALLS[hook] for hook in method.needs)
        spared = (
            "where an argument of the method's spares it, as steps_per_epoch= or delayed=True, its docstring says so"
        )
        reject("hooks", f"True, to say that your loop calls {calls}; {spared}", f"False, with needs={method.needs}")


def weights_of(
    method: Scalarizer, state: Any, values: chex.ArrayTree, mask: chex.Array | None
) -> tuple[chex.ArrayTree, Any]:
    """A scalarizer's weights, which are the derivative of its scalar, in the losses' structure; and its new state.

    The weights may be differentiated in turn: where they are to be constants, stop the gradient of the values.
    """
    return jax.grad(lambda values: method.apply(state, values, mask=mask), has_aux=True)(values)
