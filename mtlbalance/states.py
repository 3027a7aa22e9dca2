"""What states have in common: counts of calls, keys, zeros like the parameters, an optimizer's step on some fields."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtlbalance.hyperparameters import is_asking_for_shapes, new_key_data, reject
from mtlbalance.numerics import bias_correction, or_all

# At the end of a field's name: the leaves in it have one entry per task, of whatever shape.
_ANY_SHAPE = ".*"


class SeenState(NamedTuple):
    """State of a stateless method: how often each task was present.

    Such methods may take each other's: there is nothing in it that one of them would read differently.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
    """

    seen: jax.Array


class RandomState(NamedTuple):
    """State of a method that draws.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      key: uint32, the data of the key for the next draw (:func:`jax.random.key_data`).
    """

    seen: jax.Array
    key: jax.Array


# Functions that serve as ``init``, in either family: the number of tasks, or the shape of the losses, comes first.


def init_seen(tasks: int | tuple[int, ...], *_) -> SeenState:
    """``init`` of a stateless method."""
    return SeenState(zero_counts(tasks))


def init_seen_after(check: Callable[[chex.Array, chex.ArrayDType], Any]) -> Callable[..., SeenState]:
    """``init`` of a stateless method whose arguments may not fit the tasks.

    Args:
      check: ``(mask, dtype)``, which raises then: what reads hyperparameters with one number per task will do. It is
        called once in ``init``, so that its error comes before the training.
    """

    def init(tasks, *others):
        *_, dtype = others  # an aggregator's have the parameters before it
        if not is_asking_for_shapes():
            check(jnp.ones(tasks, bool), dtype)
        return init_seen(tasks)

    return init


def init_random(key: int | chex.Array) -> Callable[..., RandomState]:
    """``init`` of a method that remembers a key and nothing else."""
    return lambda tasks, *_: RandomState(zero_counts(tasks), new_key_data(key))


def zero_counts(tasks: int | tuple[int, ...]) -> jax.Array:
    """int32 zeros, one per task."""
    return jnp.zeros(tasks, jnp.int32)


def zeros_jacobian(m: int, params: chex.ArrayTree, dtype: chex.ArrayDType) -> chex.ArrayTree:
    """Zeros with leaves ``[m, *param.shape]``, each sharded as its parameter is, the task axis on every device."""
    return _zeros(params, dtype, (m,))


def zeros_params(params: chex.ArrayTree, dtype: chex.ArrayDType) -> chex.ArrayTree:
    """Zeros with the params' shapes, each sharded as its parameter is."""
    return _zeros(params, dtype, ())


def place(state: chex.ArrayTree, given: Any, jacobian_shaped: tuple[str, ...] = ()) -> chex.ArrayTree:
    """Copies of a new state's leaves, on the mesh of what ``init`` was given, if that lies on one.

    Copies, so that a state can be donated: no leaf may share its buffer with another or with a hyperparameter. On the
    mesh, or the first step would move them. Those in ``jacobian_shaped`` are there already.
    """
    jacobians = like_jacobian(jacobian_shaped)
    shardings = [getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(given)]
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding) and on_mesh(s)]

    def leaf(path, x):
        if is_in(jacobians, path):
            return x
        is_placed = not isinstance(x, jax.core.Tracer) and on_mesh(getattr(x, "sharding", None))
        x = jnp.array(x, jnp.result_type(x), copy=True)  # with the dtype said, it is not weak
        return jax.device_put(x, NamedSharding(meshes[0], PartitionSpec())) if meshes and not is_placed else x

    return jax.tree_util.tree_map_with_path(leaf, state)


# The next state.


def count_seen(state, mask: chex.Array):
    """The state with ``seen`` one higher for every task present; it stops at the largest int32."""
    return state._replace(seen=increment(state.seen, mask))


def increment(counts: chex.Array, mask: chex.Array) -> jax.Array:
    """The counts one higher where ``mask``; they stop at the largest int32."""
    return jnp.where(mask, optax.safe_increment(counts), counts)


def running_average(average: chex.Array, new: chex.Array, decay: chex.Numeric, seen: chex.Array) -> jax.Array:
    """``decay * average + (1 - decay) * new``, for a task on its first call ``new`` itself."""
    return jnp.where(seen == 0, new, decay * average + (1 - decay) * new)


def mean_rate(seen: chex.Array, dtype: chex.ArrayDType, least: chex.Numeric = 0.0) -> jax.Array:
    """The share of a call in the mean of a task's calls, with ``seen`` before it: 1 at first, at least ``least``.

    And at least one in a million: float32 would round off what a call adds to a mean over many more.
    """
    return jnp.maximum(1 / (jnp.minimum(seen, 2**20).astype(dtype) + 1), least)


def unbiased_average(average: chex.Array, new: chex.Array, decay: chex.Numeric, seen: chex.Array) -> jax.Array:
    """A running average after one more call, without what would be left of its start at 0; at 1 :func:`mean_rate`'s.

    Args:
      average: the last one, without its bias towards the start.
      new: what comes in.
      decay: from 0 to 1.
      seen: the calls before this one.
    """
    rate = unbiased_rate(decay, seen, average.dtype)
    return jnp.where(seen == 0, new, average + rate * (new - average))


def unbiased_rate(decay: chex.Numeric, seen: chex.Array, dtype: chex.ArrayDType) -> jax.Array:
    """The share of a call in :func:`unbiased_average`, with ``seen`` before it: 1 at first."""
    count, decay = optax.safe_increment(seen), jnp.asarray(decay, dtype)
    below = jnp.where(decay == 1, 0, decay)
    rate = (1 - below) / bias_correction(below, count)
    return jnp.where(decay == 1, mean_rate(seen, dtype), rate)


def split_key(state, impl):
    """A key to draw with, and the state with the next one."""
    key, draw_key = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
    return draw_key, state._replace(key=jax.random.key_data(key))


def random_weights(state: RandomState, impl, mask: chex.Array) -> tuple[jax.Array, RandomState]:
    """Softmax of normal draws over the tasks present, and the state with the next key."""
    draw_key, state = split_key(state, impl)
    # float32 whatever the state's dtype, so that a seed gives the same weights in either precision.
    draws = jax.random.normal(draw_key, mask.shape, jnp.float32)
    weights = jax.nn.softmax(draws, axis=None, where=or_all(mask))
    return jnp.where(mask, weights, 0), count_seen(state, mask)


def random_orders(state, impl, m: int):
    """One random order of all tasks for each task, ``[m, m]``, and the state with the next key."""
    draw_key, state = split_key(state, impl)
    orders = jax.vmap(lambda key: jax.random.permutation(key, m))(jax.random.split(draw_key, m))
    return orders, state


def read_optimizer(
    optimizer: optax.GradientTransformation,
    argument: str = "optimizer",
    expected: str = "an optax optimizer, such as optax.adam(1e-2)",
) -> optax.GradientTransformationExtraArgs:
    """An optimizer as one that takes extra arguments; anything else is refused."""
    if not isinstance(optimizer, optax.GradientTransformation):
        name = getattr(optimizer, "__name__", "")
        found = f"the function {name}" if name else type(optimizer).__name__
        reject(argument, expected, found, TypeError)
    return optax.with_extra_args_support(optimizer)


def optimizer_step(optimizer, value_fn, opt_state, fields, mask: chex.Array):
    """The fields after one step of an optimizer down a function, and its state; entries of absent tasks stay in both.

    Args:
      optimizer: an :class:`optax.GradientTransformationExtraArgs`.
      value_fn: from fields to a scalar; it, its value and its gradient are passed to optimizers that want them.
      opt_state: the state of the optimizer.
      fields: a dict of names to arrays with one entry per task.
      mask: which tasks are present.
    """
    value, grad = jax.value_and_grad(value_fn)(fields)
    updates, new_state = updated(optimizer, grad, opt_state, fields, mask, value=value, grad=grad, value_fn=value_fn)
    new_fields = optax.apply_updates(fields, updates)
    return jax.tree.map(lambda new, old: jnp.where(mask, new, old), new_fields, fields), new_state


def updated(transformation, updates, opt_state, fields, present: chex.Array, **extra_args):
    """What an optax transformation makes of updates, and its state, with the entries of absent tasks as they were.

    Those are of leaves whose path names an update and that have one entry per task.

    Args:
      transformation: an :class:`optax.GradientTransformationExtraArgs`.
      updates: a dict of names to arrays with one entry per task.
      opt_state: the state of the transformation.
      fields: what is updated, or ``None``.
      present: which tasks are.
      **extra_args: for transformations that want them.
    """

    def keep_absent(path, new, old):
        mirrors = any(getattr(key, "key", None) in updates for key in path) and jnp.shape(new) == present.shape
        return jnp.where(present if mirrors else True, new, old)

    updates, new_state = transformation.update(updates, opt_state, fields, **extra_args)
    return updates, jax.tree_util.tree_map_with_path(keep_absent, new_state, opt_state)


def select(
    keep_new: chex.Array, new: chex.ArrayTree, old: chex.ArrayTree, new_anyway: tuple[str, ...] = ()
) -> chex.ArrayTree:
    """``new`` where ``keep_new``, else ``old``; the fields named in ``new_anyway`` are new in both cases."""

    def leaf(path, new, old):
        return new if is_in(new_anyway, path) else jnp.where(keep_new, new, old)

    return jax.tree_util.tree_map_with_path(leaf, new, old)


def is_in(fields: tuple[str, ...], path: tuple[Any, ...]) -> bool:
    """Whether a leaf's path begins with one of these fields, such as ``"averages"`` or ``"inner.averages"``."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    return any(names[: len(parts)] == parts for parts in map(_parts, fields))


def read_field(state: Any, field: str) -> Any:
    """What stands in a field, such as ``"averages"``, ``"inner.averages"`` or ``"transformation.0.mu"``.

    Raises AttributeError if there is no such field.
    """
    for part in _parts(field):
        if type(state) in (tuple, list) and part.isdecimal() and int(part) < len(state):
            state = state[int(part)]
        elif isinstance(state, dict) and part in state:
            state = state[part]
        else:
            state = getattr(state, part)
    return state


def like_jacobian(fields: tuple[str, ...]) -> tuple[str, ...]:
    """The fields shaped like the Jacobian, without those of which all that is known is that each task has its own."""
    return tuple(field for field in fields if not field.endswith(_ANY_SHAPE))


def among(indices: chex.Array, mask: chex.Array) -> jax.Array:
    """The tasks present whose index is among these."""
    return mask & jnp.zeros_like(mask).at[indices].set(True)


def _parts(field):
    return field.removesuffix(_ANY_SHAPE).split(".")


def _zeros(params, dtype, lead):
    def leaf(param):
        shape = (*lead, *jnp.shape(param))
        if isinstance(param, jax.core.Tracer):
            return jnp.broadcast_to(jnp.zeros_like(param, dtype=dtype), shape)
        sharding = getattr(param, "sharding", None)
        if on_mesh(sharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*[None] * len(lead), *sharding.spec))
            return jnp.zeros(shape, dtype, device=sharding)
        return jnp.zeros(shape, dtype)

    return jax.tree.map(leaf, params)


def on_mesh(sharding: Any) -> bool:
    """Whether a sharding is one over the axes of a mesh."""
    return isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)
