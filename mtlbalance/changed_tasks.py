"""The state for a changed set of tasks: a state has entries by position, and only its maker knows of which tasks."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mtlbalance.annotations import ArrayTree
from mtlbalance.contract import Aggregator, Scalarizer, check_is_method
from mtlbalance.hyperparameters import asking_for_shapes, reject
from mtlbalance.losses import shape_of, state_dtype, sums
from mtlbalance.names import Names, names_of, with_names
from mtlbalance.state_checks import check_like, params_of


def carry_over(
    method: Scalarizer | Aggregator,
    state: ArrayTree,
    old_losses: ArrayTree | Iterable[str],
    new_losses: ArrayTree | Iterable[str],
    *,
    params: ArrayTree | None = None,
) -> Any:
    """The state for a changed set of tasks, by their names.

    Tasks that stay keep their entries, also where their place among the sorted names is another one; new ones start as
    ``init`` starts them; those that go are dropped. What has no entry per task, as a key or a count of all calls, is
    kept. A state does not hold the names: give both sets, or it would be read by position.

    Weights that add up to 1 are carried over like all else, and add up again at the next call: where nobody goes, a new
    task starts with 1/m beside a total of 1, not with an equal share.

    Args:
      method: for the new tasks. Its hyperparameters with one number per task have the new names, and are checked as by
        ``init``; without any it may be the same as before.
      state: of this method, or of the one for the old tasks. Of an optax chain whose first link is
        :func:`mtlbalance.aggregate` it is the first entry of the optimizer's state.
      old_losses: the named losses that the state was made for, whatever their values, or the names alone: a list, a
        tuple or a set, in the order of a dict with these keys.
      new_losses: the same of the new ones.
      params: as given to an aggregator's ``init``: only for a method whose state depends on them and has no field
        shaped like them, nor like their Jacobian, as ``excess_mtl(accumulate=64)``.

    Returns:
      A state as ``method.init`` makes it for the new tasks.

    Raises:
      TypeError: if ``method`` is of neither family, or ``state`` is not one of it.
      ValueError: if losses have no names, or one twice, or there is none; if the state is for another number of tasks
        than ``old_losses``; and as ``init``.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = scalarization.dwa()
      >>> losses = {"cls": jnp.array(3.0), "reg": jnp.array(1.0)}
      >>> scalar, state = method.apply(method.init(losses), losses)
      >>> state = mtl.carry_over(method, state, losses, ["cls", "depth", "reg"])
      >>> print(state.average, state.count)
      [3. 0. 1.] [1 0 1]
    """
    check_is_method("method", method, "a Scalarizer or an Aggregator", Scalarizer, Aggregator)
    _, old = _read("old_losses", old_losses)
    new_losses, new = _read("new_losses", new_losses)
    params = _params_of(method, state) if params is None else params
    axes = _task_axes(method, state, old.entries, params)

    with with_names(new):
        if isinstance(method, Scalarizer):
            dtype = state_dtype(state, ())
            start = method.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), dtype), new_losses))
        else:
            start = method.init((len(new.entries), params))
    leaves, treedef = jax.tree.flatten(start)
    positions = [old.entries.index(name) if name in old.entries else None for name in new.entries]

    def merge(old, start):
        return [_merged(*given, positions) if given[2] else given[0] for given in zip(old, start, axes, strict=True)]

    merged = jax.jit(merge)(jax.tree.leaves(state), leaves)  # one program, and not one for each entry
    return treedef.unflatten(map(_placed, merged, leaves, axes))


def _read(argument, losses):
    """The losses as a tree of anything, and their names in its order; of names alone one vector."""
    is_collection = isinstance(losses, Iterable) and not isinstance(losses, Mapping | str | jax.Array | np.ndarray)
    alone = list(losses) if is_collection else [None]
    if all(isinstance(name, str) for name in alone):
        # In the order of a dict's keys. The losses may be an array: numbers for each may have their order too.
        losses, names = np.zeros(len(alone)), Names(tuple(sorted(alone)), n_leaves=1)
    else:
        losses = sums(jax.tree.map(lambda x: 0.0 if x is None else x, losses, is_leaf=lambda x: x is None))
        names = names_of(losses)
    if not sum(map(np.size, jax.tree.leaves(losses))):
        reject(argument, "at least one task", "none")
    if not names.entries:
        reject(argument, "named losses, or a list of their names", "losses without names")
    if len(set(names.entries)) != len(names.entries):
        reject(argument, "each name once", f"{list(names.entries)}")
    return losses, names


def _params_of(method, state):
    """The parameters that a state is for, by a field shaped like their Jacobian, or like them; none without any."""
    if isinstance(method, Scalarizer) or method.jacobian_shaped:
        return params_of(state, method.jacobian_shaped)
    probe = {"some": jax.ShapeDtypeStruct((2, 3), jnp.float32)}
    with asking_for_shapes():
        expected = jax.eval_shape(lambda: method.init((1, probe)))

    def found(like, state):
        if jax.tree.structure(like) == jax.tree.structure(probe):
            return [state] if like["some"].shape == probe["some"].shape else []
        if type(like) is type(state) is tuple:  # the states of several methods
            parts = zip(like, state, strict=False)
        else:
            fields = [name for name in getattr(like, "_fields", ()) if hasattr(state, name)]
            parts = [(getattr(like, name), getattr(state, name)) for name in fields]
        return [x for part in parts for x in found(*part)]

    return next(iter(found(expected, state)), ())


def _task_axes(method, state, names, params):
    """For each leaf of the state the axes along which it has one entry per task: those that grow with their number."""

    def like(m):
        with asking_for_shapes():
            return jax.eval_shape(lambda: method.init(m if isinstance(method, Scalarizer) else (m, params)))

    m = len(names)
    expected, larger = like(m), like(m + 1)
    check_like("state", state, expected, by_type_only=True)
    if shape_of(state) != (m,):
        reject("state", f"one entry for each of old_losses {list(names)}", f"shape {shape_of(state)}")
    check_like("state", state, expected)
    if jax.tree.structure(expected) != jax.tree.structure(larger):
        reject("method", "a state with arrays that have one entry per task", "one whose structure depends on them")

    def axes(path, one, more):
        grown = tuple(axis for axis, (n, more_n) in enumerate(zip(one.shape, more.shape, strict=True)) if n != more_n)
        if any((one.shape[axis], more.shape[axis]) != (m, m + 1) for axis in grown):
            where = f"state{jax.tree_util.keystr(path)}"
            reject(
                where, "axes with one entry per task", f"shape {one.shape} for {m} tasks and {more.shape} for one more"
            )
        return grown

    paths = jax.tree.leaves_with_path(expected)
    return [axes(path, one, more) for (path, one), more in zip(paths, jax.tree.leaves(larger), strict=True)]


def _merged(old, start, axes, positions):
    """The old entries of tasks that stay, along every axis of tasks, and those of the start elsewhere."""
    stays = np.array(True)
    for axis in axes:
        # Slices: of a leaf that is sharded along other axes each device takes its own part.
        parts = [jax.lax.slice_in_dim(old, i or 0, (i or 0) + 1, axis=axis) for i in positions]
        old = jnp.concatenate(parts, axis)
        of_axis = np.array([i is not None for i in positions])
        stays = stays & of_axis.reshape([-1 if n == axis else 1 for n in range(old.ndim)])
    return jnp.where(stays, old, start.astype(old.dtype))


def _placed(merged, start, axes):
    """Where ``init`` puts it, if that is on a mesh; what is no new array a copy, so that it can be donated."""
    if not axes:
        merged = jnp.array(merged, jnp.result_type(merged), copy=True)
    sharding = None if isinstance(start, jax.core.Tracer) else start.sharding
    return jax.device_put(merged, sharding) if isinstance(sharding, NamedSharding) else merged
