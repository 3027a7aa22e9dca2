"""States to a file and back by three serialisers, with a target and without; and half a run in each of two processes.

``python -m tests.checkpoints first-half FOLDER`` and ``second-half FOLDER`` are what ``test_checkpoints.py`` runs.
"""

import functools
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.conformance.helpers import Built

FIRST_HALF, SECOND_HALF = "first-half", "second-half"
N_STEPS = 6


def numbered(like):
    """A tree of the same shapes with a number of its own in every entry."""
    leaves, treedef = jax.tree.flatten(like)
    return treedef.unflatten(
        [np.arange(i, i + x.size).reshape(x.shape).astype(x.dtype) for i, x in enumerate(leaves, 1)]
    )


def flat_names(tree):
    """Arrays by their names in one piece."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


# The serialisers that are installed: the oldest and newest releases of JAX are tested without them.
serialization = lambda: pytest.importorskip("flax.serialization")
orbax = lambda: pytest.importorskip("orbax.checkpoint")


def save_by_orbax(path, tree):
    with orbax().StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def load_by_orbax(path, like=None):
    with orbax().StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def save_by_flax(path, tree):
    path.write_bytes(serialization().to_bytes(tree))


def load_by_flax(path, like=None):
    data = path.read_bytes()
    return serialization().msgpack_restore(data) if like is None else serialization().from_bytes(like, data)


def save_by_numpy(path, tree):
    with path.open("wb") as file:
        np.savez(file, **flat_names(tree))


def load_by_numpy(path, like=None):
    with np.load(path) as file:
        arrays = dict(file)
    if like is None:
        return arrays
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in flat_names(like)])


# To a file, and back: with a target that is a state of the same shapes, or without one as types get lost.
FORMATS = {
    "orbax": (save_by_orbax, load_by_orbax),
    "flax": (save_by_flax, load_by_flax),
    "numpy": (save_by_numpy, load_by_numpy),
}


# A run of every row of the catalogue, cut in two.


def cases():
    families = {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}
    return {f"{family}-{case.name}": Built(case, family) for family, rows in families.items() for case in rows}


@functools.cache
def step_of(built):
    return jax.jit(built.step)


def run(built, state, first, last):
    """The outputs and the state after the calls from the first to before the last."""
    xs, outputs = built.stack(N_STEPS), []
    for i in range(first, last):
        output, state = step_of(built)(state, built.restrict(xs, i))
        outputs.append(output)
    return outputs, state


def first_half(folder):
    """Saves the states of all rows halfway, and what comes after."""
    halfway, ends = {}, {}
    for name, built in cases().items():
        _, halfway[name] = run(built, built.init(), 0, N_STEPS // 2)
        ends[name] = run(built, halfway[name], N_STEPS // 2, N_STEPS)
    for name, (save, _) in FORMATS.items():
        save(folder / name, halfway)
    save_by_numpy(folder / "ends", ends)


def second_half(folder):
    """Goes on from what was saved, and saves what comes after by each format."""
    built = cases()
    templates = {name: jax.eval_shape(one.init) for name, one in built.items()}
    for name, (_, load) in FORMATS.items():
        # Orbax's arrays are committed to a device, and for such jit compiles every step once more.
        halfway = jax.device_get(load(folder / name, templates))
        ends = {row: run(built[row], halfway[row], N_STEPS // 2, N_STEPS) for row in built}
        save_by_numpy(folder / f"ends-{name}", ends)


if __name__ == "__main__":
    half, folder = sys.argv[1:]
    {FIRST_HALF: first_half, SECOND_HALF: second_half}[half](Path(folder))
