"""What a method's plain functions return, checked where the builders get it: the errors are for the method's author.

Everything here happens while tracing; a compiled call costs nothing more.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtlbalance.hyperparameters import kind_of, reject
from mtlbalance.parameters import check_params_like
from mtlbalance.states import read_field


def new_state(state: Any, shape: tuple[int, ...], fields: tuple[str, ...] = ()) -> Any:
    """What ``init`` returned, if its first leaf has one entry per task and it has these fields."""
    if not hasattr(state, "_fields"):
        reject("init", "a state that is a NamedTuple of arrays, such as states.SeenState", kind_of(state), TypeError)
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
            read_field(state, field)
        except AttributeError:
            found = ", ".join(getattr(state, "_fields", ())) or type(state).__name__
            reject("init", f"a state with a field {field!r}", found)


def check_rows(state: Any, fields: tuple[str, ...], m: int) -> None:
    """Raises unless every leaf of the fields shaped like the Jacobian has one row per task."""
    for field in fields:
        for path, leaf in jax.tree.leaves_with_path(read_field(state, field)):
            if jnp.shape(leaf)[:1] != (m,):
                where = f"init: the field {field!r}{jax.tree_util.keystr(path)}"
                reject(where, f"a leading axis of {m}, as states.zeros_jacobian makes it", f"shape {jnp.shape(leaf)}")


def scalar_and_state(output: Any) -> tuple[jax.Array, Any]:
    """What a scalarizer's ``apply`` returned."""
    scalar, state = _pair("apply", "(scalar, new_state)", output)
    if not _is_array(scalar) or jnp.shape(scalar):
        reject("apply", "(scalar, new_state), the scalar of shape ()", _described(output), TypeError)
    return jnp.asarray(scalar), state


def weights_and_state(name: str, output: Any, shape: tuple[int, ...]) -> tuple[jax.Array, Any]:
    """What the function of this name returned, which weighs."""
    weights, state = _pair(name, "(weights, new_state)", output)
    if not _is_array(weights) or jnp.shape(weights) != shape:
        reject(name, f"(weights, new_state), the weights of shape {shape}", _described(output), TypeError)
    return jnp.asarray(weights), state


def gradient_and_state(
    name: str, output: Any, state: Any, jacobian: chex.ArrayTree | None = None
) -> tuple[chex.ArrayTree, Any]:
    """What the function of this name returned, which combines; in the Jacobian's dtypes if that is at hand."""
    gradient, new_state = _pair(name, "(gradient, new_state)", output)
    if jax.tree.structure(gradient) == jax.tree.structure(state):
        reject(name, "(gradient, new_state)", _described(output), TypeError)
    if jacobian is not None:
        check_params_like(f"the gradient of {name}", gradient, jacobian, skip=1)
        gradient = jax.tree.map(lambda g, rows: jnp.asarray(g, rows.dtype), gradient, jacobian)
    return gradient, new_state


def visited(output: Any, memory: chex.ArrayTree) -> tuple[chex.ArrayTree, chex.ArrayTree]:
    """What a visit returned."""
    new, statistic = _pair("visit", "(memory, statistic)", output)
    check_same("the memory of visit, the first of (memory, statistic)", new, memory)
    return new, statistic


def check_same(name: str, new: Any, old: Any) -> None:
    """Raises unless what is new has the structure, the shapes and the kinds of numbers of the old."""
    found, expected = jax.tree.structure(new), jax.tree.structure(old)
    if found != expected:
        kinds = kind_of(old), kind_of(new)
        was, now = kinds if kinds[0] != kinds[1] else (f"{expected}", f"{found}")
        reject(name, f"what it was, {was}", now, TypeError)
    for (path, leaf), before in zip(jax.tree.leaves_with_path(new), jax.tree.leaves(old), strict=True):
        where = f"{name}{jax.tree_util.keystr(path)}"
        if jnp.shape(leaf) != jnp.shape(before):
            reject(where, f"shape {jnp.shape(before)}, as before", f"shape {jnp.shape(leaf)}")
        # Another precision is cast back; a number that would be truncated, or a count that is none any more, is a slip.
        now, was = jnp.result_type(leaf), jnp.result_type(before)
        if jnp.issubdtype(now, jnp.floating) != jnp.issubdtype(was, jnp.floating):
            reject(where, f"dtype {was}, as before", f"dtype {now}", TypeError)


def _pair(where, expected, output):
    if not isinstance(output, tuple) or len(output) != 2:
        reject(where, expected, _described(output), TypeError)
    return output


def _is_array(x):
    is_number = hasattr(x, "dtype") or isinstance(x, float | int)
    return jax.tree_util.all_leaves([x]) and is_number and not jnp.iscomplexobj(x)


def _described(output):
    parts = output if type(output) is tuple else (output,)
    names = [f"an array of shape {jnp.shape(x)}" if _is_array(x) else f"a {type(x).__name__}" for x in parts]
    return f"({', '.join(names)})" if type(output) is tuple else names[0]
