"""A sweep ends: decompositions side by side waited for each other on a CPU, see ``mtlbalance.decompositions``."""

import os
import subprocess
import sys

import pytest

SWEEP = """
import os, sys
if hasattr(os, "sched_setaffinity"):  # with more cores it takes more of them to hang
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from mtlbalance import aggregation

method = getattr(aggregation, sys.argv[1])()

def train(key):
    targets = jax.random.normal(key, (6, 8, 20))

    def step(carry, _):
        moved = [method.apply(state, point - rows) for (point, state), rows in zip(carry, targets)]
        return [(point - 0.01 * gradient, state) for (point, _), (gradient, state) in zip(carry, moved)], None

    start = [(jnp.zeros(20), method.init((8, 20)))] * 6
    return [point for point, _ in jax.lax.scan(step, start, length=500)[0]]

found = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 96))
assert all(jnp.all(jnp.isfinite(point)) for point in found)
"""
LIMIT = 180  # seconds; it takes 5 to 20, and hung in every run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imtl_g", "config", "aligned_mtl"])
def test_a_sweep_with_six_decisions_a_step_ends(name):
    """96 trainings of eight tasks, as a user's process compiles them."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, name], env=environment, timeout=LIMIT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
