"""What a method's plain functions return, checked where the builders get it: the errors are for the method's author.

Everything here happens while tracing; a compiled call costs nothing more.
"""

from operator import attrgetter
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtlbalance.hyperparameters import reject
from mtlbalance.losses import check_params_like


def new_state(state: Any, shape: tuple[int, ...], fields: tuple[str, ...] = ()) -> Any:
    """What ``init`` returned, if its first leaf has one entry per task and it has these fields."""
    leaves = jax.tree.leaves(state)
    found = f"shape {jnp.shape(leaves[0])}" if leaves else f"{state!r}, which has none"
    if not leaves or jnp.shape(leaves[0]) != shape:
        expected = f"a state whose first leaf has one entry per task, shape {shape} (states.SeenState counts calls)"
        reject("init", expected, found)
    check_fields(state, fields)
    return state


def check_fields(state: Any, fields: tuple[str, ...]) -> None:
    """Raises unless the state has these fields, such as ``"seen"`` or ``"inner.averages"``."""
    for field in fields:
        try:
            attrgetter(field)(state)
        except AttributeError:
            found = ", ".join(getattr(state, "_fields", ())) or type(state).__name__
            reject("init", f"a state with a field {field!r}", found)


def scalar_and_state(output: Any) -> tuple[chex.Array, Any]:
    """What a scalarizer's ``apply`` returned."""
    scalar, state = _pair("apply", "(scalar, new_state)", output)
    if not _is_array(scalar) or jnp.shape(scalar):
        reject("apply", "(scalar, new_state), the scalar of shape ()", _described(output), TypeError)
    return jnp.asarray(scalar), state


def weights_and_state(output: Any, shape: tuple[int, ...]) -> tuple[chex.Array, Any]:
    """What a weighting returned."""
    weights, state = _pair("weighting", "(weights, new_state)", output)
    if not _is_array(weights) or jnp.shape(weights) != shape:
        reject("weighting", f"(weights, new_state), the weights of shape {shape}", _described(output), TypeError)
    return jnp.asarray(weights), state


def gradient_and_state(output: Any, jacobian: chex.ArrayTree | None = None) -> tuple[chex.ArrayTree, Any]:
    """What combined the rows of a Jacobian returned, the gradient in the Jacobian's dtypes if that is at hand."""
    gradient, state = _pair("apply", "(gradient, new_state)", output)
    if jacobian is not None:
        check_params_like("apply's gradient (it returns (gradient, new_state))", gradient, jacobian, skip=1)
        gradient = jax.tree.map(lambda g, rows: jnp.asarray(g, rows.dtype), gradient, jacobian)
    return gradient, state


def visited(output: Any, memory: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """What a visit returned."""
    new, statistic = _pair("visit", "(memory, statistic)", output)
    check_same("visit's memory (it returns (memory, statistic))", new, memory)
    return new, statistic


def check_same(name: str, new: Any, old: Any) -> None:
    """Raises unless what is new has the structure and the shapes of the old."""
    found, expected = jax.tree.structure(new), jax.tree.structure(old)
    if found != expected:
        reject(name, f"the structure that it had, {expected}", f"{found}", TypeError)
    for (path, leaf), before in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True):
        if jnp.shape(leaf) != jnp.shape(before):
            expected = f"shape {jnp.shape(before)}, as before"
            reject(f"{name}{jax.tree_util.keystr(path)}", expected, f"shape {jnp.shape(leaf)}")


def _pair(where, expected, output):
    if not isinstance(output, tuple) or len(output) != 2:
        reject(where, expected, _described(output), TypeError)
    return output


def _is_array(x):
    return jax.tree_util.all_leaves([x]) and (hasattr(x, "dtype") or isinstance(x, float | int))


def _described(output):
    parts = output if type(output) is tuple else (output,)
    names = [f"an array of shape {jnp.shape(x)}" if _is_array(x) else type(x).__name__ for x in parts]
    return f"({', '.join(names)})" if type(output) is tuple else names[0]
