"""What methods of both families share: the baselines' states, the count of calls, draws, an optimizer's step."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax


class SeenState(NamedTuple):
    """State of a method that remembers nothing but who was there.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
    """

    seen: chex.Array


class RandomState(NamedTuple):
    """State of random weights.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      key: uint32, the data of the key for the next draw (:func:`jax.random.key_data`).
    """

    seen: chex.Array
    key: chex.Array


def count_seen(state, mask: chex.Array):
    """The state with ``seen`` one higher for every task present; it stops at the largest int32."""
    return state._replace(seen=jnp.where(mask, optax.safe_increment(state.seen), state.seen))


def split_key(state, impl):
    """A key to draw with, and the state with the next one."""
    key, draw_key = jax.random.split(jax.random.wrap_key_data(state.key, impl=impl))
    return draw_key, state._replace(key=jax.random.key_data(key))


def random_weights(state: RandomState, impl, mask: chex.Array) -> tuple[chex.Array, RandomState]:
    """Softmax of normal draws over the tasks present, and the state with the next key."""
    draw_key, state = split_key(state, impl)
    # float32 whatever the state's dtype, so that a seed gives the same weights in either precision.
    draws = jax.random.normal(draw_key, mask.shape, jnp.float32)
    return jax.nn.softmax(draws, axis=None, where=mask), count_seen(state, mask)


def random_orders(state, impl, m: int):
    """One random order of all tasks for each task, ``[m, m]``, and the state with the next key."""
    draw_key, state = split_key(state, impl)
    orders = jax.vmap(lambda key: jax.random.permutation(key, m))(jax.random.split(draw_key, m))
    return orders, state


def optimizer_step(optimizer, value_fn, opt_state, fields, mask: chex.Array):
    """The fields after one step of an optimizer down a function, and its state; entries of absent tasks stay in both.

    Those of the optimizer's state are in the leaves that mirror a field, by its name and by having one entry per task.

    Args:
      optimizer: an :class:`optax.GradientTransformationExtraArgs`.
      value_fn: from fields to a scalar; it, its value and its gradient are passed to optimizers that want them.
      opt_state: the state of the optimizer.
      fields: a dict of names to arrays with one entry per task.
      mask: which tasks are present.
    """

    def keep_absent(path, new, old):
        mirrors = any(getattr(key, "key", None) in fields for key in path) and jnp.shape(new) == mask.shape
        return jnp.where(mask if mirrors else True, new, old)

    value, grad = jax.value_and_grad(value_fn)(fields)
    updates, new_state = optimizer.update(grad, opt_state, fields, value=value, grad=grad, value_fn=value_fn)
    new_fields = optax.apply_updates(fields, updates)
    new_fields = jax.tree.map(lambda new, old: jnp.where(mask, new, old), new_fields, fields)
    return new_fields, jax.tree_util.tree_map_with_path(keep_absent, new_state, opt_state)
