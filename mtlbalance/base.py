"""The builders that a method's file calls, ours or a user's; what they build is in :mod:`mtlbalance.contract`.

A method's file holds plain functions of one array of losses (or one Jacobian), a boolean ``mask`` of the tasks present,
and the state. A builder turns them into the public ones: it flattens named losses, reads :class:`Counted` losses and
masks, checks shapes and dtypes, casts, keeps what must not change, stops gradients into the state, and compiles.

==============================  ========================================================
:func:`scalarizer`              losses -> scalar
:func:`aggregator`              weights from the Jacobian or the Gramian, or a gradient
:func:`norms_aggregator`        weights from the lengths of the gradients
:func:`rowwise_aggregator`      each row of the Jacobian is needed once, or is remembered
==============================  ========================================================

A state is a ``NamedTuple`` of arrays whose first leaf has one entry per task: so a call knows what its state is for.
"""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mtlbalance import boundary, calls, returned
from mtlbalance.annotations import AggregatorInit, ScalarizerApply, ScalarizerInit, State, documented
from mtlbalance.contract import Aggregator, Rowwise, Scalarizer, Task, Weighting
from mtlbalance.given import derive
from mtlbalance.gramian import squared_norm
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import read_gramian, read_pair, read_shape, state_dtype, sums
from mtlbalance.memo import memoized as memoized
from mtlbalance.names import check_names, compile_with_names, with_names_for_init
from mtlbalance.state_checks import state_check
from mtlbalance.states import among, place


def scalarizer(
    init: Callable[..., State],
    apply: Callable[..., Any],
    *,
    end_epoch: Callable[..., Any] | None = None,
    observe: Callable[..., Any] | None = None,
    learned: tuple[str, ...] = (),
    last_weights: Callable[..., Any] | None = None,
    per_task: Mapping[str, Any] | None = None,
    needs: tuple[str, ...] = (),
) -> Scalarizer[State]:
    """Builds a :class:`Scalarizer` from plain functions.

    Args:
      init: ``(shape, dtype) -> state``.
      apply: ``(state, values, mask) -> (scalar, new_state)``; ``values`` and ``mask`` are arrays of that shape, and
        the values of absent tasks are 1.
      end_epoch: ``(state) -> new_state``.
      observe: ``(state, values, mask) -> new_state``.
      learned: state fields that are trained by gradient.
      last_weights: ``(state) -> weights`` of the last call, for a method that keeps them.
      per_task: hyperparameters with one number per task, by argument: their names must be the losses'.
      needs: the hooks without which the method does nothing, as ``("observe",)``.

    Returns:
      A :class:`~mtlbalance.Scalarizer` of compiled functions.

    Raises:
      TypeError: when it is used, if a function returns something else; the error says what and which.
      ValueError: from ``init``, if the state's first leaf has not one entry per task.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import base, states
      >>> def largest():  # the largest loss alone
      ...     def apply(state, values, mask):
      ...         return jnp.max(values, where=mask, initial=-jnp.inf), states.count_seen(state, mask)
      ...     return base.scalarizer(states.init_seen, apply)
      >>> method = largest()
      >>> scalar, state = method.apply(method.init(2), {"lift": 3.0, "drag": 5.0})
      >>> print(scalar)
      5.0
    """
    check = state_check(init, (apply, init))
    read = boundary.reader(check, required=True)

    def public_init(shape=None, *others):
        dims, dtype = read_shape(shape, *others)
        with with_names_for_init(shape):
            check_names(per_task)
            return place(returned.new_state(init(dims, dtype), dims, learned), shape)

    def public_apply(state, values, *, mask=None):
        call = read(state, values, mask)
        scalar, new_state = returned.scalar_and_state(apply(state, call.values, call.mask))
        if not call.all_present:
            scalar = jnp.where(jnp.any(call.mask), scalar, 0)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(sums(values)))
        return scalar.astype(dtype), boundary.settle("apply", call, new_state, state)

    hooks = boundary.public_hooks(check, end_epoch, observe, per_task=per_task)
    public = documented(compile_with_names(public_apply, per_task, losses_at=1, check=check), ScalarizerApply)
    last_weights, own_init = boundary.checked(check, last_weights), documented(public_init, ScalarizerInit, "init")
    return calls.made_in((apply, init), Scalarizer(own_init, public, *hooks, learned, (), last_weights, needs=needs))


def aggregator(
    init: Callable[..., State],
    *,
    apply: Callable[..., Any] | None = None,
    weighting: Callable[..., Any] | None = None,
    gramian_weighting: Callable[..., Any] | None = None,
    rowwise: Rowwise | None = None,
    end_epoch: Callable[..., Any] | None = None,
    observe: Callable[..., Any] | None = None,
    jacobian_shaped: tuple[str, ...] = (),
    last_weights: Callable[..., Any] | None = None,
    reads_losses: bool = False,
    nan_if_nonfinite: bool = True,
    axis_name: Hashable | None = None,
    per_task: Mapping[str, Any] | None = None,
    needs: tuple[str, ...] = (),
    stop_gradient: bool = True,
    zero_absent: bool = True,
) -> Aggregator[State]:
    """Builds an :class:`Aggregator` from plain functions.

    Give one of ``gramian_weighting``, ``weighting`` and ``apply``; those after it are derived.

    Args:
      init: ``(m, params, dtype) -> state``.
      apply: ``(state, jacobian, values, mask) -> (gradient, new_state)``; by default the rows combined with the
        weights of ``weighting``.
      weighting: ``(state, jacobian, values, mask) -> (weights, new_state)``; by default ``gramian_weighting`` of
        the Jacobian's Gramian.
      gramian_weighting: ``(state, gramian, values, mask) -> (weights, new_state)``.
      rowwise: the same row by row, ``visit: (state, i, row, values, mask)``, ``weigh`` or ``finish: (state,
        statistics, values, mask)``, and ``visits: (state, mask)`` or none; :func:`rowwise_aggregator` makes it.
      end_epoch, observe, last_weights, per_task, needs: as in :func:`scalarizer`.
      jacobian_shaped: state fields with leaves ``[m, *param.shape]``, whose absent rows the functions keep, and, as
        ``"field.*"``, those of which each leaf has another entry per task that is kept so.
      reads_losses: whether a call without ``values`` is an error.
      nan_if_nonfinite: whether the builder makes the weights NaN for a Gramian that is not finite, of which solvers
        and comparisons may make finite ones. ``False`` for weights that do not depend on it, as the mean's.
      axis_name: mapped axis over which parameters are split, for the Gramian.
      stop_gradient: whether the weights are constants of differentiation. ``False`` for those of a hyperparameter, or
        of a method inside, which sees to it.
      zero_absent: whether rows of absent tasks are zero; ``False`` for a wrapper that leaves it to the method inside.

    Complex leaves reach the functions as :class:`~mtlbalance.complex_parts.ComplexParts`: two real leaves each.

    Returns:
      An :class:`~mtlbalance.Aggregator` with a weighting of whatever weighs, and ``rowwise`` if given.

    Raises:
      TypeError: if no function weighs or combines; when it is used, if one returns something else than it should.
      ValueError: from ``init``, if the state's first leaf has not one entry per task, or a field is not there.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import base, numerics, states
      >>> def agreeing():  # each gradient by its inner product with the sum of all, if that is positive
      ...     def weigh(state, gramian, values, mask):
      ...         weights = numerics.normalize(jnp.maximum(jnp.sum(gramian, axis=1), 0), mask)
      ...         return weights, states.count_seen(state, mask)
      ...     return base.aggregator(states.init_seen, gramian_weighting=weigh)
      >>> method = agreeing()
      >>> gradient, state = method.apply(method.init((2, 2)), jnp.array([[3.0, 0.0], [-1.0, 1.0]]))
      >>> print(gradient)
      [3. 0.]
    """
    functions = init, gramian_weighting, weighting, apply, rowwise and (rowwise.weigh or rowwise.finish)
    check = state_check(init, functions, jacobian_shaped)
    if nan_if_nonfinite and gramian_weighting is not None:
        gramian_weighting = boundary.nan_if_nonfinite("gramian_weighting", gramian_weighting)
    options = {"axis_name": axis_name, "zero_absent": zero_absent, "stop_gradient": stop_gradient}
    apply, name, weighting, statistic_of = derive(apply, weighting, gramian_weighting, **options)
    read = boundary.reader(check, required=reads_losses)
    settled = partial(boundary.settle, jacobian_shaped=jacobian_shaped)

    def initializer(needs_params):
        def public_init(shape=None, *others):
            m, params, dtype = read_pair(shape, *others, needs_params=needs_params)
            check_names(per_task)
            state = returned.new_state(init(m, params, dtype), (m,), jacobian_shaped)
            returned.check_rows(state, jacobian_shaped, m)
            return place(state, params, jacobian_shaped)

        return documented(public_init, AggregatorInit, "init")

    def public_weighting(name, weigh, read_statistic):
        if weigh is None:
            return None
        public = boundary.public_weigh(name, weigh, read_statistic, read, settled, per_task, stop_gradient)
        return Weighting(initializer(needs_params=bool(jacobian_shaped)), public)

    method = Aggregator(
        initializer(needs_params=True),
        boundary.public_apply(apply, read, settled, jacobian_shaped, per_task),
        *boundary.public_hooks(check, end_epoch, observe, jacobian_shaped, per_task),
        public_weighting(name, weighting, boundary.statistic_reader(statistic_of, jacobian_shaped)),
        public_weighting("gramian_weighting", gramian_weighting, boundary.without_state(read_gramian)),
        rowwise and boundary.public_rowwise(rowwise, read, settled, jacobian_shaped, per_task),
        jacobian_shaped=jacobian_shaped,
        last_weights=boundary.checked(check, last_weights),
        needs=needs,
    )
    return calls.made_in(functions, method)


def rowwise_aggregator(
    init: Callable[..., State],
    visit: Callable[..., Any],
    weigh: Callable[..., Any] | None = None,
    *,
    finish: Callable[..., Any] | None = None,
    visits: Callable[..., Any] | None = None,
    memory: str | None = None,
    of_moduli: bool = False,
    nan_if_nonfinite: bool = True,
    **others: Any,
) -> Aggregator[State]:
    """Builds an :class:`Aggregator` that needs each row of the Jacobian once.

    Args:
      init: ``(m, params, dtype) -> state``, with a field ``seen``: int32 counts, one per task.
      visit: ``(memory, row, task) -> (memory, statistic)`` for one :class:`Task`: ``row`` and that task's part of the
        field ``memory`` are trees shaped like the parameters, in the state's dtype; without such a field the memory is
        empty. Where the task is not present its memory must stay as it is; its row is zero, or may be anything
        where ``visits`` leaves it out.
      weigh: ``(state, statistics, values, mask) -> (weights, new_state)``, the field ``memory`` as it is.
      finish: ``(state, statistics, values, mask) -> (gradient, new_state)`` in place of ``weigh``, for methods that
        combine what is in ``memory``.
      visits: ``(state, mask) -> indices`` of the rows that this call takes in; all by default.
      memory: the state field with leaves ``[m, *param.shape]``, made by :func:`mtlbalance.states.zeros_jacobian`, or as
        ``"field.*"`` one with leaves ``[m, ...]`` of any shape; none by default.
      of_moduli: whether ``memory`` has one real leaf for a complex parameter, made for its ``entries``, and not two.
      nan_if_nonfinite: as in :func:`aggregator`, also of the statistics.
      **others: as there.

    Returns:
      An :class:`~mtlbalance.Aggregator` with ``rowwise``, and a weighting if there is ``weigh``.

    Raises:
      TypeError: unless there is one of ``weigh`` and ``finish``; and as :func:`aggregator`.
      ValueError: as :func:`aggregator`; and if a leaf of ``memory`` has not one row per task.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from typing import Any, NamedTuple
      >>> from mtlbalance import base, gramian, states
      >>> class LastState(NamedTuple):
      ...     seen: Any
      ...     last: Any
      >>> def persistent():  # each gradient weighs as much as it agrees with the one before
      ...     def init(m, params, dtype):
      ...         return LastState(states.zero_counts(m), states.zeros_jacobian(m, params, dtype))
      ...     def visit(last, row, task):
      ...         product = gramian.total(jax.tree.map(jnp.multiply, last, row))
      ...         return jax.tree.map(lambda old, new: jnp.where(task.present, new, old), last, row), product
      ...     def weigh(state, products, values, mask):
      ...         return jnp.maximum(products, 0), states.count_seen(state, mask)
      ...     return base.rowwise_aggregator(init, visit, weigh, memory="last")
      >>> method, rows = persistent(), jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> gradient, state = method.apply(method.init((2, 2)), rows)
      >>> gradient, state = method.apply(state, rows)
      >>> print(gradient)
      [1. 8.]
    """
    if (weigh is None) == (finish is None):
        reject("rowwise_aggregator", "one of weigh and finish", "none" if weigh is None else "both", TypeError)
    showing = boundary.nan_if_nonfinite if nan_if_nonfinite else lambda name, function: function
    weigh, finish = weigh and showing("weigh", weigh), finish and showing("finish", finish)

    def counting_init(m, params, dtype):
        state = init(m, params, dtype)
        returned.check_fields(state, ("seen",))
        return state

    field = memory and memory.removesuffix(".*")

    def read_memory(state, name, jacobian):
        cast = lambda rows, dtype: jax.tree.map(lambda x: x.astype(dtype), rows)
        remembered = getattr(state, field) if field else ()
        if field is None or field != memory:  # there is nothing to compare with
            return remembered, cast(jacobian, state_dtype(state, jacobian))
        if not of_moduli:
            boundary.check_kinds(name, jacobian, remembered)
        return remembered, jax.tree.map(lambda old, rows: cast(rows, old.dtype), remembered, jacobian)

    with_memory = lambda state, remembered: state._replace(**{field: remembered}) if field else state

    def tasks(state, values, mask):
        return Task(mask if visits is None else among(visits(state, mask), mask), values, state.seen)

    def visit_all(state, jacobian, values, mask):
        remembered, jacobian = read_memory(state, "jacobian", jacobian)
        new = boundary.for_each_task(lambda *given: returned.visited(visit(*given), given[0]), mask)
        remembered, statistics = new(remembered, jacobian, tasks(state, values, mask))
        return with_memory(state, remembered), statistics

    def visit_row(state, i, row, values, mask):
        remembered, row = read_memory(state, "row", row)
        old = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), remembered)
        task = jax.tree.map(lambda x: x[i], tasks(state, values, mask))
        new, statistic = returned.visited(visit(old, row, task), old)
        put = lambda x, r: jax.lax.dynamic_update_index_in_dim(x, r.astype(x.dtype), i, 0)
        return with_memory(state, jax.tree.map(put, remembered, new)), statistic

    def weighting(state, jacobian, values, mask):
        output = weigh(*visit_all(state, jacobian, values, mask), values, mask)
        return returned.weights_and_state("weigh", output, mask.shape)

    def apply(state, jacobian, values, mask):
        state, statistics = visit_all(state, jax.lax.stop_gradient(jacobian), values, mask)
        output = jax.lax.stop_gradient(finish(state, statistics, values, mask))  # as the new state is
        return returned.gradient_and_state("finish", output, state)

    return aggregator(
        counting_init,
        apply=apply if finish else None,
        weighting=weighting if weigh else None,
        rowwise=Rowwise(visit_row, weigh, finish, visits),
        jacobian_shaped=() if memory is None else (memory,),
        nan_if_nonfinite=nan_if_nonfinite,
        **others,
    )


def norms_aggregator(
    init: Callable[..., State], weigh: Callable[..., Any], *, axis_name: Hashable | None = None, **others: Any
) -> Aggregator[State]:
    """Builds an :class:`Aggregator` whose weights depend on the lengths of the gradients, and not on their angles.

    Args:
      init: ``(m, params, dtype) -> state``, with a field ``seen``: int32 counts, one per task.
      weigh: ``(state, squares, values, mask) -> (weights, new_state)``; ``squares`` are the squared norms, 0 for an
        absent task.
      axis_name: mapped axis over which parameters are split.
      **others: as in :func:`aggregator`.

    Returns:
      An :class:`~mtlbalance.Aggregator` with ``weighting``, ``gramian_weighting`` and ``rowwise``.

    Raises as :func:`aggregator`.
    """

    def visit(memory, row, _task):
        return memory, squared_norm(row, axis_name)

    def of_diagonal(state, gramian, values, mask):
        return weigh(state, jnp.maximum(jnp.diagonal(gramian), 0), values, mask)

    return rowwise_aggregator(init, visit, weigh, gramian_weighting=of_diagonal, axis_name=axis_name, **others)
