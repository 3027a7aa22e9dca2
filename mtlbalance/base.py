"""The contract of every method, and the boundary that all methods share.

A method's own file holds plain functions of one array of losses (or one Jacobian), a boolean ``mask`` of
the tasks present, and the state. :func:`scalarizer`, :func:`aggregator` and :func:`rowwise_aggregator` turn
them into the public ones: they flatten named losses, read :class:`Counted` losses and masks, check shapes
and dtypes, cast, keep what must not change, stop gradients into the state, and compile.

Every state's first leaf has one entry per task. That is how the boundary knows the shape it was made for.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtlbalance import inputs
from mtlbalance.gramian import combine, gramian, total


class Scalarizer(NamedTuple):
    """A method that turns losses into one scalar.

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
      learned: names of the state fields that are trained by gradient, see :func:`mtlbalance.learn`.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    end_epoch: Callable[..., Any]
    observe: Callable[..., Any]
    learned: tuple[str, ...] = ()


class Weighting(NamedTuple):
    """Turns a Jacobian, or its Gramian, into one weight per task.

    Attributes:
      init: ``((m, params)) -> state``; where only ``m`` matters, an int will do.
      apply: ``(state, statistic, *, values=None, mask=None) -> (weights, new_state)``, weights of shape ``[m]``.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


class Rowwise(NamedTuple):
    """The same from one row at a time, the Jacobian never whole.

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


class Aggregator(NamedTuple):
    """A method that turns one gradient per task (a Jacobian) into one gradient.

    Attributes:
      init: ``((m, n)) -> state`` for a Jacobian matrix, ``((m, params)) -> state`` for a tree.
      apply: ``(state, jacobian, *, values=None, mask=None) -> (gradient, new_state)``. The Jacobian's leaves are
        ``[m, *param.shape]``; the gradient has the params' shapes, in the Jacobian's dtypes. ``values`` are the losses,
        for the methods that read them; ``mask`` says which tasks are present, as in :class:`Scalarizer`.
      end_epoch, observe: the hooks of :class:`Scalarizer`, so that one loop serves both families.
      weighting: of the Jacobian, where ``gradient = weights @ jacobian``.
      gramian_weighting: of ``J @ J.T``, where that is all the method needs.
      rowwise: where each row is needed once.
      jacobian_shaped: names of the state fields whose leaves are shaped like the Jacobian's.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    end_epoch: Callable[..., Any]
    observe: Callable[..., Any]
    weighting: Weighting | None = None
    gramian_weighting: Weighting | None = None
    rowwise: Rowwise | None = None
    jacobian_shaped: tuple[str, ...] = ()


# What a method's file calls.


def scalarizer(
    init: Callable[..., Any],
    apply: Callable[..., Any],
    *,
    end_epoch: Callable[..., Any] | None = None,
    observe: Callable[..., Any] | None = None,
    learned: tuple[str, ...] = (),
) -> Scalarizer:
    """Builds a :class:`Scalarizer` from plain functions.

    Args:
      init: ``(shape, dtype) -> state``.
      apply: ``(state, values, mask) -> (scalar, new_state)``; ``values`` and ``mask`` are arrays of that shape, and
        the values of absent tasks are 1.
      end_epoch: ``(state) -> new_state``.
      observe: ``(state, values, mask) -> new_state``.
      learned: state fields that are trained by gradient.
    """

    def public_init(shape):
        return _place(init(*inputs.read_shape(shape)), shape)

    def public_apply(state, values, *, mask=None):
        call = inputs.read_call(state, values, mask, required=True)
        scalar, new_state = apply(state, call.values, call.mask)
        if not call.all_present:
            scalar = jnp.where(jnp.any(call.mask), scalar, 0)
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(inputs.sums(values)))
        return scalar.astype(dtype), _settle(call, new_state, state)

    return Scalarizer(public_init, jax.jit(public_apply), *_hooks(end_epoch, observe), learned)


def aggregator(
    init: Callable[..., Any],
    *,
    apply: Callable[..., Any] | None = None,
    weighting: Callable[..., Any] | None = None,
    gramian_weighting: Callable[..., Any] | None = None,
    rowwise: Rowwise | None = None,
    end_epoch: Callable[..., Any] | None = None,
    observe: Callable[..., Any] | None = None,
    jacobian_shaped: tuple[str, ...] = (),
    reads_losses: bool = False,
    axis_name: Hashable | None = None,
) -> Aggregator:
    """Builds an :class:`Aggregator` from plain functions, of which one way to weigh, or to combine, is enough.

    Args:
      init: ``(m, params, dtype) -> state``.
      apply: ``(state, jacobian, values, mask) -> (gradient, new_state)``; by default the rows combined with the
        weights of ``weighting``. Absent rows are zero.
      weighting: ``(state, jacobian, values, mask) -> (weights, new_state)``; by default ``gramian_weighting`` of
        the Jacobian's Gramian.
      gramian_weighting: ``(state, gramian, values, mask) -> (weights, new_state)``.
      rowwise: ``visit: (state, i, row, values, mask)``, ``weigh`` or ``finish: (state, statistics, values, mask)``, and
        ``visits: (state, mask)`` or none.
      end_epoch: ``(state) -> new_state``.
      observe: ``(state, values, mask) -> new_state``.
      jacobian_shaped: state fields with leaves ``[m, *param.shape]``, whose absent rows the functions keep.
      reads_losses: whether a call without ``values`` is an error.
      axis_name: mapped axis over which parameters are split, for the Gramian.
    """

    if weighting is None and gramian_weighting is not None:
        weighting = _of_gramian(gramian_weighting, axis_name)
    if apply is None and weighting is not None:
        apply = _combined(weighting)

    def initializer(needs_params):
        def public_init(shape):
            m, params, dtype = inputs.read_pair(shape, needs_params=needs_params)
            return _place(init(m, params, dtype), params, jacobian_shaped)

        return public_init

    weighting_init = initializer(needs_params=bool(jacobian_shaped))

    def public_apply(state, jacobian, *, values=None, mask=None):
        call = inputs.read_call(state, values, mask, required=reads_losses)
        gradient, new_state = apply(state, inputs.read_jacobian(call, jacobian), call.values, call.mask)
        return _zero_if_none(call, gradient), _settle(call, new_state, state, jacobian_shaped)

    def compiled(read, weigh):
        def public_weigh(state, statistic, *, values=None, mask=None):
            call = inputs.read_call(state, values, mask, required=reads_losses)
            statistic = jax.lax.stop_gradient(read(call, statistic))
            weights, new_state = weigh(state, statistic, call.values, call.mask)
            weights = _finish_weights(weights, call.mask, inputs.state_dtype(state, statistic))
            return weights, _settle(call, new_state, state, jacobian_shaped)

        return jax.jit(public_weigh) if weigh else None

    def public_visit(state, i, row, *, values=None, mask=None):
        call = inputs.read_call(state, values, mask, required=reads_losses)
        row = jax.lax.stop_gradient(inputs.read_row(call.mask[i], row))
        return jax.lax.stop_gradient(rowwise.visit(state, i, row, call.values, call.mask))

    def public_finish(state, statistics, *, values=None, mask=None):
        call = inputs.read_call(state, values, mask, required=reads_losses)
        statistics = inputs.read_statistics(call, statistics)
        gradient, new_state = rowwise.finish(state, statistics, call.values, call.mask)
        gradient = jax.lax.stop_gradient(_zero_if_none(call, gradient))
        return gradient, _settle(call, new_state, state, jacobian_shaped)

    def public_visits(state, *, values=None, mask=None):
        return rowwise.visits(state, inputs.read_call(state, values, mask).mask)

    by_rows = rowwise and Rowwise(
        jax.jit(public_visit),
        compiled(inputs.read_statistics, rowwise.weigh),
        jax.jit(public_finish) if rowwise.finish else None,
        jax.jit(public_visits) if rowwise.visits else None,
    )
    of_jacobian = compiled(inputs.read_jacobian, weighting)
    of_gramian = compiled(inputs.read_gramian, gramian_weighting)
    return Aggregator(
        initializer(needs_params=True),
        jax.jit(public_apply),
        *_hooks(end_epoch, observe, jacobian_shaped),
        Weighting(weighting_init, of_jacobian) if of_jacobian else None,
        Weighting(weighting_init, of_gramian) if of_gramian else None,
        by_rows,
        jacobian_shaped,
    )


def rowwise_aggregator(
    init: Callable[..., Any],
    visit: Callable[..., Any],
    weigh: Callable[..., Any] | None = None,
    *,
    finish: Callable[..., Any] | None = None,
    visits: Callable[..., Any] | None = None,
    jacobian_shaped: str | None = None,
    **others: Any,
) -> Aggregator:
    """Builds an :class:`Aggregator` that needs each row of the Jacobian once.

    Args:
      init: ``(m, params, dtype) -> state``, with a field ``seen``.
      visit: ``(memory, row, task) -> (memory, statistic)`` for one :class:`Task`: ``row`` and that task's part of the
        Jacobian-shaped field are trees shaped like the parameters, in the state's dtype; without such a field there is
        no memory. Where the task is not present its memory must stay as it is; its row is zero, or may be anything
        where ``visits`` leaves it out.
      weigh: ``(state, statistics, values, mask) -> (weights, new_state)``, the Jacobian-shaped field as it is.
      finish: ``(state, statistics, values, mask) -> (gradient, new_state)`` in place of ``weigh``, for methods that
        combine what is in the Jacobian-shaped field.
      visits: ``(state, mask) -> indices`` of the rows that this call takes in; all by default.
      jacobian_shaped: the state field with leaves ``[m, *param.shape]``, if there is one.
      **others: as in :func:`aggregator`.
    """

    def read_memory(state, name, jacobian, skip):
        if jacobian_shaped is None:
            dtype = inputs.state_dtype(state, jacobian)
            return (), jax.tree.map(lambda j: j.astype(dtype), jacobian)
        memory = getattr(state, jacobian_shaped)
        inputs.check_params_like(name, jacobian, memory, skip)
        return memory, jax.tree.map(lambda j, old: j.astype(old.dtype), jacobian, memory)

    def with_memory(state, memory):
        return state if jacobian_shaped is None else state._replace(**{jacobian_shaped: memory})

    def tasks(state, values, mask):
        visited = mask if visits is None else mask & jnp.zeros_like(mask).at[visits(state, mask)].set(True)
        return Task(visited, values, state.seen)

    def visit_all(state, jacobian, values, mask):
        memory, jacobian = read_memory(state, "jacobian", jacobian, skip=0)
        memory, statistics = jax.vmap(visit)(memory, jacobian, tasks(state, values, mask))
        return with_memory(state, memory), statistics

    def visit_row(state, i, row, values, mask):
        memory, row = read_memory(state, "row", row, skip=1)
        old_row = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), memory)
        new_row, statistic = visit(old_row, row, jax.tree.map(lambda x: x[i], tasks(state, values, mask)))
        put = lambda x, r: jax.lax.dynamic_update_index_in_dim(x, r.astype(x.dtype), i, 0)
        memory = jax.tree.map(put, memory, new_row)
        return with_memory(state, memory), statistic

    def weighting(state, jacobian, values, mask):
        return weigh(*visit_all(state, jacobian, values, mask), values, mask)

    def apply(state, jacobian, values, mask):
        # As the new state, and what else is made of it, a constant of differentiation.
        state, statistics = visit_all(state, jax.lax.stop_gradient(jacobian), values, mask)
        gradient, state = finish(state, statistics, values, mask)
        return jax.tree.map(lambda g, j: g.astype(j.dtype), gradient, jacobian), state

    return aggregator(
        init,
        apply=apply if finish else None,
        weighting=weighting if weigh else None,
        rowwise=Rowwise(visit_row, weigh, finish, visits),
        jacobian_shaped=() if jacobian_shaped is None else (jacobian_shaped,),
        **others,
    )


def norms_aggregator(
    init: Callable[..., Any], weigh: Callable[..., Any], *, axis_name: Hashable | None = None, **others: Any
) -> Aggregator:
    """Builds an :class:`Aggregator` whose weights depend on the lengths of the gradients, and not on their angles.

    Args:
      init: ``(m, params, dtype) -> state``, with a field ``seen``.
      weigh: ``(state, squares, values, mask) -> (weights, new_state)``; ``squares`` are the squared norms, 0 for an
        absent task.
      axis_name: mapped axis over which parameters are split.
      **others: as in :func:`aggregator`.
    """

    def visit(memory, row, task):
        del task
        return memory, squared_norm(row, axis_name)

    def of_gramian(state, gramian, values, mask):
        return weigh(state, jnp.maximum(jnp.diagonal(gramian), 0), values, mask)

    return rowwise_aggregator(init, visit, weigh, gramian_weighting=of_gramian, axis_name=axis_name, **others)


def squared_norm(row: chex.ArrayTree, axis_name: Hashable | None = None) -> chex.Array:
    """The squared norm of one task's gradient, summed over the axis by which its parameters are split, if any."""
    square = jnp.asarray(total(jax.tree.map(jnp.square, row)))
    return square if axis_name is None else jax.lax.psum(square, axis_name)


def products(jacobian: chex.ArrayTree, m: int, axis_name: Hashable | None = None) -> chex.Array:
    """The Gramian of m tasks; zeros where there are no parameters."""
    return gramian(jacobian, axis_name=axis_name) if jax.tree.leaves(jacobian) else jnp.zeros((m, m))


def zeros_jacobian(m: int, params: chex.ArrayTree, dtype: chex.ArrayDType) -> chex.ArrayTree:
    """Zeros with leaves ``[m, *param.shape]``, each sharded as its parameter is, the task axis on every device."""
    return _zeros(params, dtype, (m,))


def zeros_params(params: chex.ArrayTree, dtype: chex.ArrayDType) -> chex.ArrayTree:
    """Zeros with the params' shapes, each sharded as its parameter is."""
    return _zeros(params, dtype, ())


def _zeros(params, dtype, lead):
    def leaf(param):
        shape = (*lead, *jnp.shape(param))
        if isinstance(param, jax.core.Tracer):
            return jnp.broadcast_to(jnp.zeros_like(param, dtype=dtype), shape)
        sharding = getattr(param, "sharding", None)
        if _on_mesh(sharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*[None] * len(lead), *sharding.spec))
            return jnp.zeros(shape, dtype, device=sharding)
        return jnp.zeros(shape, dtype)

    return jax.tree.map(leaf, params)


def _on_mesh(sharding):
    return isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)


def select(
    keep_new: chex.Array, new: chex.ArrayTree, old: chex.ArrayTree, new_anyway: tuple[str, ...] = ()
) -> chex.ArrayTree:
    """``new`` where ``keep_new``, else ``old``; the fields named in ``new_anyway`` are new in both cases."""

    def leaf(path, new, old):
        return new if is_in(new_anyway, path) else jnp.where(keep_new, new, old)

    return jax.tree_util.tree_map_with_path(leaf, new, old)


def is_in(fields: tuple[str, ...], path: tuple[Any, ...]) -> bool:
    """Whether a leaf's path runs through a state field of one of these names."""
    return any(getattr(key, "name", None) in fields for key in path)


def _of_gramian(gramian_weighting, axis_name):
    def weighting(state, jacobian, values, mask):
        return gramian_weighting(state, products(jacobian, len(mask), axis_name), values, mask)

    return weighting


def _combined(weighting):
    def apply(state, jacobian, values, mask):
        # The weights are constants of differentiation: an outer grad never enters a solver.
        weights, new_state = weighting(state, jax.lax.stop_gradient(jacobian), values, mask)
        weights = _finish_weights(weights, mask, inputs.state_dtype(state, jacobian))
        return combine(weights, jacobian), new_state

    return apply


def _zero_if_none(call, gradient):
    """The gradient; zero with no task present."""
    if call.all_present:
        return gradient
    return select(jnp.any(call.mask), gradient, jax.tree.map(jnp.zeros_like, gradient))


def _finish_weights(weights, mask, dtype):
    return jax.lax.stop_gradient(jnp.where(mask, weights, 0).astype(dtype))


def _settle(call, new_state, state, jacobian_shaped=()):
    # With no task present nothing has happened. Jacobian-shaped leaves see to that row by row: selecting
    # between two whole ones would hold both in memory.
    if not call.all_present:
        new_state = select(jnp.any(call.mask), new_state, state, new_anyway=jacobian_shaped)
    same_dtype = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), new_state, state)
    return jax.lax.stop_gradient(same_dtype)


def _hooks(end_epoch, observe, jacobian_shaped=()) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def public_end_epoch(state):
        return jax.lax.stop_gradient(end_epoch(state))

    def public_observe(state, values, *, mask=None):
        call = inputs.read_call(state, values, mask)
        return _settle(call, observe(state, call.values, call.mask), state, jacobian_shaped)

    return (
        jax.jit(public_end_epoch) if end_epoch else lambda state: state,
        jax.jit(public_observe) if observe else lambda state, values, *, mask=None: state,
    )


def _place(state, given, jacobian_shaped=()):
    # Copies, so that a state can be donated: no leaf may share its buffer with another or with a hyperparameter.
    # Where what was given lies on a mesh, the small leaves go there too, or the first step would move them.
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(given)]
    meshes = [sharding.mesh for sharding in shardings if _on_mesh(sharding)]

    def leaf(path, x):
        if is_in(jacobian_shaped, path):
            return x
        is_placed = not isinstance(x, jax.core.Tracer) and _on_mesh(getattr(x, "sharding", None))
        x = jnp.array(x, copy=True)
        return jax.device_put(x, NamedSharding(meshes[0], PartitionSpec())) if meshes and not is_placed else x

    return jax.tree_util.tree_map_with_path(leaf, state)
