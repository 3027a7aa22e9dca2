"""The state of what a checkpoint gives without a target: serialisers keep names and numbers, and no types."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mtlbalance.annotations import ArrayTree
from mtlbalance.hyperparameters import kind_of, reject
from mtlbalance.states import on_mesh

# How many names an error lists: a tree of parameters may have thousands.
_MOST_LISTED = 6


def restore(saved: ArrayTree | Mapping[str, Any], like: ArrayTree) -> Any:
    """The state of what a checkpoint gives without a target, by the names of its fields.

    Orbax then gives dicts for named tuples and lists for tuples, ``flax.serialization.msgpack_restore`` dicts with the
    positions of tuples as text, and :func:`numpy.load` a flat collection of names. What has no arrays in it, as
    ``optax.EmptyState()``, may be there or not. Where a serialiser takes a target, as orbax and
    ``flax.serialization.from_bytes`` do, that is ``like`` itself, and this function is not needed.

    Flat names are those of :func:`jax.tree_util.keystr`, as in ``.inner.log_var``, or with ``simple=True,
    separator="/"``, as in ``inner/log_var``.

    Args:
      saved: nested dicts, lists and tuples of arrays, or a flat mapping from names to arrays.
      like: what it should be like: the state that ``init`` makes, or its shapes, ``jax.eval_shape(lambda:
        method.init(3))``; or any other tree of arrays, such as ``(params, opt_state, state)``.

    Returns:
      A tree of ``like``'s types with the numbers of ``saved``, copied; on a mesh where ``like``'s arrays are.

    Raises:
      TypeError: if an entry of ``like`` is not in ``saved``, or ``saved`` has others besides, as the state of another
        method; if one is no array, or of another dtype.
      ValueError: if one has another shape, as with another number of tasks: restored like the state for the old tasks,
        :func:`mtlbalance.carry_over` makes that for the new ones.

    Example:
      >>> import io, jax, numpy as np
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method, file = scalarization.dwa(), io.BytesIO()
      >>> _, state = method.apply(method.init(2), np.array([3.0, 1.0]))
      >>> name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
      >>> np.savez(file, **{name(path): array for path, array in jax.tree.leaves_with_path(state)})
      >>> template = jax.eval_shape(lambda: method.init(2))
      >>> state = mtl.restore(np.load(io.BytesIO(file.getvalue())), like=template)
      >>> print(type(state).__name__, state.average, state.count)
      DWAState [3. 1.] [1 1]
    """
    expected, treedef = jax.tree_util.tree_flatten_with_path(like)
    found = _by_name(saved, [path for path, _ in expected])
    if () in found and () not in [path for path, _ in expected]:
        reject("saved", "dicts and lists of arrays, or a mapping from names to arrays", kind_of(saved), TypeError)
    missing = [(path, leaf) for path, leaf in expected if _name(path) not in found]
    others = [name for name in found if name not in {_name(path) for path, _ in expected}]
    if missing:
        path, leaf = missing[0]
        instead = f"beside {_listed(others)}" if others else "and nothing else in its place"
        hint = _without_names(others) if len(missing) == len(expected) else ""
        where = f"saved{jax.tree_util.keystr(path)}"
        reject(where, f"an array of shape {np.shape(leaf)}, as in like", f"none, {instead}{hint}", TypeError)
    if others:
        reject("saved", "what like has", f"besides that {_listed(others)}", TypeError)
    return treedef.unflatten([_read(path, found[_name(path)], leaf) for path, leaf in expected])


def _by_name(saved, paths):
    """What was saved, by the parts of its name; a flat mapping has the names of these paths in one piece."""
    try:
        nested = jax.tree_util.tree_leaves_with_path(dict(saved) if isinstance(saved, Mapping) else saved)
    except ValueError:  # keys that have no order
        reject("saved", "names of one type in each dict, as in like", "several types", TypeError)
    spellings = jax.tree_util.keystr, lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    parts = {(spelling(path),): _name(path) for spelling in spellings for path in paths}
    parts |= {_name(path): _name(path) for path in paths}  # what is a name as it stands is no other one in one piece
    return {parts.get(_name(path), _name(path)): leaf for path, leaf in nested}


def _name(path):
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _listed(names):
    shown = ", ".join(repr("/".join(name)) for name in names[:_MOST_LISTED])
    return shown + (f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else "")


def _without_names(others):
    """What to do with leaves in their order alone."""
    by_position = others and all(len(name) == 1 and re.fullmatch(r"(arr_)?\d+", name[0]) for name in others)
    return " (of jax.tree.leaves? jax.tree.unflatten(jax.tree.structure(like), leaves))" if by_position else ""


def _read(path, found, like):
    """One array, if it is as it should be; where ``like`` has it."""
    where = f"saved{jax.tree_util.keystr(path)}"
    if not hasattr(like, "dtype"):
        reject(
            f"like{jax.tree_util.keystr(path)}",
            "an array (jnp.asarray(x) for a Python number)",
            kind_of(like),
            TypeError,
        )
    dtype = like.dtype
    if not hasattr(found, "dtype") or isinstance(found, jax.ShapeDtypeStruct):
        reject(where, f"an array of shape {np.shape(like)}, as in like", kind_of(found), TypeError)
    if found.dtype == np.dtype(f"V{dtype.itemsize}"):  # how NumPy's files keep bfloat16
        found = np.asarray(found).view(dtype)
    if np.shape(found) != np.shape(like):
        is_other_number = np.shape(found)[1:] == np.shape(like)[1:] and np.ndim(found) == np.ndim(like) > 0
        hint = " (of other tasks? restore it like their state, then mtl.carry_over)" if is_other_number else ""
        reject(where, f"shape {np.shape(like)}, as in like", f"shape {np.shape(found)}{hint}")
    if found.dtype != dtype:
        reject(where, f"dtype {dtype}, as in like", f"dtype {found.dtype}", TypeError)
    sharding = None if isinstance(like, jax.core.Tracer) else getattr(like, "sharding", None)
    found = jnp.array(found, copy=True)  # so that it can be donated
    return jax.device_put(found, sharding) if isinstance(sharding, NamedSharding) and on_mesh(sharding) else found
