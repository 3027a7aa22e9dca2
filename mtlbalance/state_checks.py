"""Whether a state is one of the method that it is given to: by the names of types and fields, and by shapes.

All of it happens while tracing; a compiled call costs nothing more. What the method's own state is like is asked of its
plain ``init``, so that whoever writes a method declares nothing. Methods whose states are alike may take each other's.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mtlbalance.calls import factory_of
from mtlbalance.hyperparameters import asking_for_shapes, kind_of, reject
from mtlbalance.names import known_names
from mtlbalance.states import like_jacobian, read_field

_NO_PARAMS, _SOME_PARAMS = jax.tree.structure(()), jax.tree.structure({"some": 0})


def state_check(
    init: Callable[..., Any], functions: Iterable[Any], jacobian_shaped: tuple[str, ...] | None = None
) -> Callable[[Any], None]:
    """What raises unless a state is as a method's plain ``init`` makes it.

    It says nothing where ``init`` cannot be asked: where it raises for that number of tasks.

    Args:
      init: ``(shape, dtype) -> state`` or, of an aggregator, ``(m, params, dtype) -> state``.
      functions: plain functions of the method, some of them made in its factory: by that it is named.
      jacobian_shaped: as a builder takes it; ``None`` for a scalarizer.
    """
    method = factory_of(functions)

    @lru_cache(maxsize=16)
    def like_for(names, shape, treedef=_NO_PARAMS, shapes=()):
        """The state for losses of this shape and for such parameters; ``None`` where ``init`` raises."""
        del names  # `init` sees them itself: a state may depend on the groups in which they are
        params = jax.tree.unflatten(treedef, map(_float, shapes))
        try:
            return _make(init, shape, params, of_scalarizer=jacobian_shaped is None)
        except Exception:  # whatever it is that the author's function says to what may not be its tasks
            return None

    def like(*given):
        names = known_names()
        return like_for(names.entries if names else (), *given)

    def is_as_without_params(shape, expected):
        """Whether the state depends on no parameters: there is no knowing which if it remembers no gradients."""
        remembers = like_jacobian(jacobian_shaped or ()) or jacobian_shaped is None
        return remembers or _are_alike(expected, like(shape, _SOME_PARAMS, ((2, 3),)))

    def check(state):
        leaves, treedef = jax.tree.flatten(params_of(state, jacobian_shaped or ()))
        shape = next(map(np.shape, jax.tree.leaves(state)), ())
        expected = like(shape, treedef, tuple(leaf.shape for leaf in leaves))
        if _are_alike(expected, state):
            return
        by_type_only = expected is None or not is_as_without_params(shape, expected)
        expected = like((1,)) if expected is None else expected  # of one task it is of the same type
        if expected is not None:
            check_like("state", state, expected, method=method, by_type_only=by_type_only)

    return check


def check_like(name: str, found: Any, expected: Any, *, method: str | None = None, by_type_only: bool = False) -> None:
    """Raises unless a state is like another: in its types and fields, and in structure and shapes unless told not to.

    Args:
      name: of the state, for the error.
      found: the state.
      expected: what it should be like; shapes will do.
      method: of which method that is, if its type does not tell.
      by_type_only: what stands in the fields may be anything.
    """
    fields = getattr(expected, "_fields", None)
    if fields is not None:
        if _kind(found) != _kind(expected):
            is_any = "" if hasattr(found, "_fields") else "what the method's init returned, "
            reject(name, f"{is_any}{in_words(expected, method)}", described(found), TypeError)
        for field in () if by_type_only else fields:
            check_like(f"{name}.{field}", getattr(found, field), getattr(expected, field))
        return
    if by_type_only:
        return
    if type(expected) in (tuple, list) and type(found) is type(expected) and len(found) == len(expected):
        for i, part in enumerate(expected):
            check_like(f"{name}[{i}]", found[i], part)
        return
    structures = jax.tree.structure(expected), jax.tree.structure(found)
    if structures[0] != structures[1]:
        is_same_type = type(expected) is type(found)
        what = f"{in_words(found)} of another structure" if is_same_type else described(found)
        reject(name, f"{in_words(expected)} as init makes it", what, TypeError)
    for (path, leaf), like in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        if np.shape(leaf) != like.shape:
            where = f"{name}{jax.tree_util.keystr(path)}"
            reject(where, f"shape {like.shape}, as init makes it", f"shape {np.shape(leaf)}")


def params_of(state: Any, jacobian_shaped: tuple[str, ...]) -> chex.ArrayTree:
    """The parameters that a state is for, as shapes with shardings, if it has fields with leaves ``[m, *param.shape]``.

    Without such a field, or in a state of another kind, there are none.
    """
    try:
        remembered = [read_field(state, field) for field in like_jacobian(jacobian_shaped)]
    except AttributeError:
        remembered = []
    return jax.tree.map(_without_tasks, remembered[0]) if remembered else ()


def _without_tasks(leaf):
    # A tracer's sharding is its mesh's business, and what is made of it moves there.
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], jnp.result_type(leaf), sharding=sharding)


def _make(init, shape, params, *, of_scalarizer):
    """What a plain ``init`` makes, as shapes."""
    dtype = jnp.result_type(float)
    with asking_for_shapes():
        if of_scalarizer:
            return jax.eval_shape(lambda: init(shape, dtype))
        m = shape[0] if shape else 1
        return jax.eval_shape(lambda: init(m, params, dtype))


def _are_alike(one, other):
    """Whether two states have the same structure and shapes."""
    same = jax.tree.structure(one) == jax.tree.structure(other)
    return same and list(map(np.shape, jax.tree.leaves(one))) == list(map(np.shape, jax.tree.leaves(other)))


def _float(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _kind(x):
    # By name: a class that was pickled by value, or reloaded, is another object.
    return type(x).__name__, getattr(x, "_fields", None)


def described(x: Any) -> str:
    """What was found where a state is due."""
    hint = " (of a checkpoint? mtl.restore makes the state of it, like jax.eval_shape of init)"
    return in_words(x) + (hint if isinstance(x, dict | list) else "")


def in_words(x: Any, method: str | None = None) -> str:
    """A state by its type and fields, and by its method where a file has one; anything else in a few words."""
    if hasattr(x, "_fields"):
        *_, folder, file = ("", *type(x).__module__.split("."))
        if folder in ("scalarization", "aggregation", "wrappers", "autodiff"):
            method = file
        return f"{method}'s {kind_of(x)}" if method else kind_of(x)
    if isinstance(x, dict):
        return f"a dict of {', '.join(map(repr, x))}"
    if isinstance(x, list | tuple):
        return f"a {type(x).__name__} of {len(x)}"
    if hasattr(x, "dtype"):
        return f"an array of shape {np.shape(x)}"
    return kind_of(x)
