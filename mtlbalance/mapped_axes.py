"""Sums over parameters that are split over the axes of :func:`jax.shard_map`; what every device has whole counts once.

A type tells which of the two a leaf is: over which axes it varies. Where types do not tell, the sum would be wrong
without a word, so it is refused.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import reduce
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from mtlbalance.hyperparameters import reject


def add_up(parts: chex.ArrayTree, axis_name: Hashable | None) -> Any:
    """The sum of all leaves, over the devices too, of a tree shaped like the parameters.

    Args:
      parts: for each parameter what this device adds, all of one shape.
      axis_name: the mapped axes, if any; each leaf is added up over those that it is split over.
    """
    if axis_name is None:
        return sum(jax.tree.leaves(parts), 0.0)
    by_axes = defaultdict(float)
    for path, part in jax.tree.leaves_with_path(parts):
        by_axes[split_over(part, axis_name, path)] += part
    return sum((jax.lax.psum(part, axes) if axes else part for axes, part in by_axes.items()), 0.0)


def split_over(x: chex.Array, axis_name: Hashable | None, path: tuple[Hashable, ...] = ()) -> tuple[Hashable, ...]:
    """The axes in ``axis_name`` over which an array is split; along the others every device has it whole.

    Args:
      x: a parameter, or what was made of it.
      axis_name: the mapped axes, if any.
      path: of the parameter, for the error.

    Raises:
      ValueError: if the types do not tell.
    """
    split = tuple(name for name in axes_of(axis_name) if name in varying(x))
    for name in axes_of(axis_name):
        if name not in split and not types_tell(name):
            due = "an axis of jax.shard_map(..., check_vma=True), whose types tell what is split over it"
            way_out = "or give gramian_weighting the Gramian of all devices"
            found = f"{name!r} under check_vma=False, jax.vmap or jax.pmap"
            leaf = f"parameter {jax.tree_util.keystr(path)}" if path else "a parameter"
            reject("axis_name", f"{due} ({way_out})", f"{found}, where {leaf}, if whole, would count for every device")
    return split


def over_devices(reduction: Callable[..., chex.Array], x: chex.Array, axis_name: Hashable | None) -> jax.Array:
    """A reduction over the devices for which one may count more than once, such as :func:`jax.lax.pmax`."""
    # Axis by axis: a number that varies over some of several axes only is refused by JAX.
    return reduce(reduction, axes_of(axis_name), x)


def on_all_devices(ok: chex.Array, axis_name: Hashable | None) -> jax.Array:
    """Whether it is so on every device along these axes."""
    axes = axes_of(axis_name)
    return over_devices(jax.lax.psum, (~ok).astype(jnp.int32), axes) == 0 if axes else ok


def axes_of(axis_name: Hashable | None) -> tuple[Hashable, ...]:
    """``axis_name`` as a tuple of single axes: a user gives none, one or several."""
    if axis_name is None:
        return ()
    return tuple(axis_name) if isinstance(axis_name, tuple | list) else (axis_name,)


def manual_axes() -> tuple[Hashable, ...]:
    """All axes of the :func:`jax.shard_map` that is being traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual)


def varying(x: chex.Array) -> frozenset[Hashable]:
    """The mapped axes over which an array may differ, by its type."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # jax 0.8, and since 0.10


def varying_as(tree: chex.ArrayTree, *like: chex.ArrayTree) -> chex.ArrayTree:
    """The same numbers, of a type that varies over every axis over which an array of ``like`` does.

    Loops ask it of what they start with, pull-backs of what they are given, where devices train each on its own.
    """
    axes = set().union(*map(varying, jax.tree.leaves(like)))

    def cast(x):
        missing = tuple(axes - varying(x))
        if not missing:
            return x
        if hasattr(jax.lax, "pcast"):
            return jax.lax.pcast(x, missing, to="varying")
        return jax.lax.pvary(x, missing)  # jax 0.8.0

    return jax.tree.map(cast, tree) if axes else tree


def types_tell(name: Hashable) -> bool:
    """Whether types tell what varies over a mapped axis; there is nothing to tell of one device."""
    return jax.lax.axis_size(name) == 1 or name in varying(jax.lax.axis_index(name))
