"""Every so many coordinates of a parameter, chosen by its shape alone: a sample, for sums over large ones.

The stride is dealt out over the axes, so that what is kept has the parameter's axes and lies on devices as it does:
each device keeps coordinates of its own part, and nothing is moved.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mtlbalance.meshes import explicit_mesh
from mtlbalance.states import on_mesh

# So many are kept along an axis at least: they stand for a whole bias, and may lie on so many devices.
_FEWEST = 8
# Places in its block from which a coordinate is taken: each is a slice of the program.
_MOST_PLACES = 8


def kept_shape(shape: tuple[int, ...], stride: int) -> tuple[int, ...]:
    """The shape of what is kept of a parameter: one coordinate of ``stride``, more where an axis would be too short.

    Args:
      shape: the parameter's.
      stride: a power of two. Each factor goes to the axis that has had fewest, of axes of even length if there are
        any, the longest of several: so blocks are square, and axes can still be split over many devices.
    """
    kept, halvings = list(shape), [0] * len(shape)
    for _ in range(stride.bit_length() - 1):
        long = [axis for axis, n in enumerate(kept) if n >= 2 * _FEWEST]
        if not long:
            break
        axis = max(long, key=lambda axis: (kept[axis] % 2 == 0, -halvings[axis], kept[axis]))
        kept[axis], halvings[axis] = kept[axis] // 2, halvings[axis] + 1
    return tuple(kept)


def keep(x: chex.Array, shape: tuple[int, ...]) -> jax.Array:
    """One coordinate of every block of ``x``, of so many blocks along each axis that they have this shape.

    Which one changes from block to block, along diagonals, lest some rows and columns of a matrix stand for all. How
    large a block is follows from the two shapes: of a part of a parameter, as a device has it, it is the same.
    """
    sizes = [n // max(kept, 1) or 1 for n, kept in zip(x.shape, shape, strict=True)]
    mesh = explicit_mesh(x)
    # Where types say how arrays lie, JAX makes no shares that are not equal, and selects among what lies alike.
    lies = mesh and NamedSharding(mesh, _dividing(mesh, jax.typeof(x).sharding.spec, shape))
    x = jax.sharding.reshard(x, lies) if lies else x
    ends = [kept * size for kept, size in zip(shape, sizes, strict=True)]
    along = lambda axis: jnp.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    places = min(_MOST_PLACES, max(sizes)) if x.ndim > 1 else 1
    place = sum(map(along, range(x.ndim)), jnp.zeros([1] * x.ndim, int)) % places
    place = jax.sharding.reshard(place, lies) if lies and places > 1 else place
    kept = jax.lax.slice(x, [0] * x.ndim, ends, sizes)
    for i in range(1, places):
        starts = [i * size // places if size > places else i % size for size in sizes]
        kept = jnp.where(place == i, jax.lax.slice(x, starts, ends, sizes), kept)
    return kept


def kept_params(params: chex.ArrayTree, stride: int) -> chex.ArrayTree:
    """What is kept of each parameter, of which shape and sharding matter alone."""

    def leaf(param):
        shape = kept_shape(jnp.shape(param), stride)
        if isinstance(param, jax.core.Tracer):
            return keep(param, shape)
        sharding = getattr(param, "sharding", None)
        if on_mesh(sharding):
            sharding = NamedSharding(sharding.mesh, _dividing(sharding.mesh, sharding.spec, shape))
        return jax.ShapeDtypeStruct(shape, jnp.result_type(param), sharding=sharding)

    return jax.tree.map(leaf, params)


def _dividing(mesh, spec, shape):
    """The spec without the axes of the mesh over which something of this shape has no equal shares."""
    parts = []
    for names, n in zip([*spec, *[None] * len(shape)], shape, strict=False):
        size = math.prod(mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)) if name)
        parts.append(names if n % size == 0 else None)
    return PartitionSpec(*parts[: len(spec)])
