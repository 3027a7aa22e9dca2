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
from mtlbalance.gramian import combine, gramian


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
    """The same weights from one row at a time, the Jacobian never whole.

    Attributes:
      visit: ``(state, i, row, *, mask=None) -> (state, statistic)`` for every task ``i`` once; ``row`` is shaped
        like the parameters. Changes row ``i`` of the Jacobian-shaped leaves and nothing else.
      weigh: ``(state, statistics, *, values=None, mask=None) -> (weights, new_state)`` after the last visit;
        ``statistics`` are the visits' statistics stacked along a leading task axis.
    """

    visit: Callable[..., Any]
    weigh: Callable[..., Any]


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
        if values is None:
            inputs.reject("values", "the losses", "None", TypeError)
        call = inputs.read_call(state, values, mask)
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
    axis_name: Hashable | None = None,
) -> Aggregator:
    """Builds an :class:`Aggregator` from plain functions, of which one way to weigh is enough.

    Args:
      init: ``(m, params, dtype) -> state``.
      apply: ``(state, jacobian, values, mask) -> (gradient, new_state)``; by default the rows combined with the
        weights of ``weighting``. Absent rows are zero.
      weighting: ``(state, jacobian, values, mask) -> (weights, new_state)``; by default ``gramian_weighting`` of
        the Jacobian's Gramian.
      gramian_weighting: ``(state, gramian, values, mask) -> (weights, new_state)``.
      rowwise: ``visit: (state, i, row, mask)`` and ``weigh: (state, statistics, values, mask)``.
      end_epoch: ``(state) -> new_state``.
      observe: ``(state, values, mask) -> new_state``.
      jacobian_shaped: state fields with leaves ``[m, *param.shape]``, whose absent rows the functions keep.
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
        call = inputs.read_call(state, values, mask)
        jacobian = inputs.read_jacobian(call, jacobian)
        gradient, new_state = apply(state, jacobian, call.values, call.mask)
        if not call.all_present:
            gradient = select(jnp.any(call.mask), gradient, jax.tree.map(jnp.zeros_like, gradient))
        return gradient, _settle(call, new_state, state, jacobian_shaped)

    def compiled(read, weigh):
        def public_weigh(state, statistic, *, values=None, mask=None):
            call = inputs.read_call(state, values, mask)
            statistic = jax.lax.stop_gradient(read(call, statistic))
            weights, new_state = weigh(state, statistic, call.values, call.mask)
            weights = _finish_weights(weights, call.mask, inputs.state_dtype(state, statistic))
            return weights, _settle(call, new_state, state, jacobian_shaped)

        return jax.jit(public_weigh)

    return Aggregator(
        initializer(needs_params=True),
        jax.jit(public_apply),
        *_hooks(end_epoch, observe, jacobian_shaped),
        Weighting(weighting_init, compiled(inputs.read_jacobian, weighting)) if weighting else None,
        Weighting(weighting_init, compiled(inputs.read_gramian, gramian_weighting)) if gramian_weighting else None,
        Rowwise(_public_visit(rowwise.visit), compiled(inputs.read_statistics, rowwise.weigh)) if rowwise else None,
        jacobian_shaped,
    )


def rowwise_aggregator(
    init: Callable[..., Any],
    visit: Callable[..., Any],
    weigh: Callable[..., Any],
    *,
    jacobian_shaped: str,
    end_epoch: Callable[..., Any] | None = None,
    observe: Callable[..., Any] | None = None,
) -> Aggregator:
    """Builds an :class:`Aggregator` that needs each row of the Jacobian once.

    Args:
      init: ``(m, params, dtype) -> state``.
      visit: ``(memory, row, present) -> (memory, statistic)`` for one task: ``row`` and that task's part of the
        Jacobian-shaped field are trees shaped like the parameters, in the state's dtype. An absent task's row
        is zero, and its memory must stay as it is.
      weigh: ``(state, statistics, values, mask) -> (weights, new_state)``, the Jacobian-shaped field as it is.
      jacobian_shaped: the state field with leaves ``[m, *param.shape]``.
      end_epoch: ``(state) -> new_state``.
      observe: ``(state, values, mask) -> new_state``.
    """

    def read_memory(state, name, jacobian, skip):
        memory = getattr(state, jacobian_shaped)
        inputs.check_params_like(name, jacobian, memory, skip)
        return memory, jax.tree.map(lambda j, old: j.astype(old.dtype), jacobian, memory)

    def weighting(state, jacobian, values, mask):
        memory, jacobian = read_memory(state, "jacobian", jacobian, skip=0)
        memory, statistics = jax.vmap(visit)(memory, jacobian, mask)
        return weigh(state._replace(**{jacobian_shaped: memory}), statistics, values, mask)

    def visit_row(state, i, row, mask):
        memory, row = read_memory(state, "row", row, skip=1)
        old_row = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), memory)
        new_row, statistic = visit(old_row, row, mask[i])
        memory = jax.tree.map(lambda x, r: jax.lax.dynamic_update_index_in_dim(x, r, i, 0), memory, new_row)
        return state._replace(**{jacobian_shaped: memory}), statistic

    return aggregator(
        init,
        weighting=weighting,
        rowwise=Rowwise(visit_row, weigh),
        end_epoch=end_epoch,
        observe=observe,
        jacobian_shaped=(jacobian_shaped,),
    )


def zeros_jacobian(m: int, params: chex.ArrayTree, dtype: chex.ArrayDType) -> chex.ArrayTree:
    """Zeros with leaves ``[m, *param.shape]``, each sharded as its parameter is, the task axis on every device."""

    def leaf(param):
        shape = (m, *jnp.shape(param))
        if isinstance(param, jax.core.Tracer):
            return jnp.broadcast_to(jnp.zeros_like(param, dtype=dtype), shape)
        sharding = getattr(param, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
            return jnp.zeros(shape, dtype, device=sharding)
        return jnp.zeros(shape, dtype)

    return jax.tree.map(leaf, params)


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
        (m,) = mask.shape
        without_params = jnp.zeros((m, m))
        products = gramian(jacobian, axis_name=axis_name) if jax.tree.leaves(jacobian) else without_params
        return gramian_weighting(state, products, values, mask)

    return weighting


def _combined(weighting):
    def apply(state, jacobian, values, mask):
        # The weights are constants of differentiation: an outer grad never enters a solver.
        weights, new_state = weighting(state, jax.lax.stop_gradient(jacobian), values, mask)
        weights = _finish_weights(weights, mask, inputs.state_dtype(state, jacobian))
        return combine(weights, jacobian), new_state

    return apply


def _public_visit(visit):
    def public_visit(state, i, row, *, mask=None):
        call = inputs.read_call(state, None, mask)
        row = jax.lax.stop_gradient(inputs.read_row(call.mask[i], row))
        return jax.lax.stop_gradient(visit(state, i, row, call.mask))

    return jax.jit(public_visit)


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
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)]

    def leaf(path, x):
        if is_in(jacobian_shaped, path):
            return x
        x = jnp.array(x, copy=True)
        return jax.device_put(x, NamedSharding(meshes[0], PartitionSpec())) if meshes else x

    return jax.tree_util.tree_map_with_path(leaf, state)
