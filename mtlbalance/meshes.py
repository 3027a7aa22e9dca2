"""Meshes of the kind Explicit, on which an array's type says how it lies: tasks are brought to every device.

Methods compare the tasks with each other, and there are few of them. On an Auto mesh XLA sees to that.
"""

import chex
import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def explicit_mesh(x: chex.Array) -> AbstractMesh | Mesh | None:
    """The mesh on which an array lies, if its type says how."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def with_whole_tasks(x: chex.Array, n_axes: int | None = None) -> jax.Array:
    """An array whose first axes, all by default, are of tasks, with every task on every device; others lie as before.

    Free where there is nothing to move, as on an Auto mesh.
    """
    spec = jax.typeof(x).sharding.spec
    mesh = explicit_mesh(x)
    if mesh is None or all(axis is None for axis in spec[:n_axes]):
        return x
    n = x.ndim if n_axes is None else n_axes
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*[None] * n, *spec[n:])))


def with_tasks_as(x: chex.Array, like: chex.Array) -> jax.Array:
    """An array whose first axis, of tasks, lies as that of another one, if the types say how."""
    mesh, first = explicit_mesh(like), jax.typeof(like).sharding.spec[:1]
    if mesh is None or not any(first):
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*first, *[None] * (x.ndim - 1))))
