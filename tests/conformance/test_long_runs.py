"""Two hundred thousand steps of every method that remembers something: finite, as in float64, in constant memory.

Every method compiles twice, once per precision: an epoch is a scan, and the histories are a mapped axis of it.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance.states import SeenState
from tests.conformance.helpers import Built
from tests.events import compilations, recorded

pytestmark = pytest.mark.slow

N_EPOCHS, N_STEPS, N_TASKS, N_PARAMS = 20, 10_000, 3, 4
HISTORIES = "decaying", "constant", "spiked"
START, REST = np.array([3.0, 0.5, 20.0]), np.array([0.1, 0.02, 1.0])
STEPS_TO_DECAY = np.array([3e4, 1e5, 5e4])
SPIKE = 1e10
# A sum of that many equal steps, all of which are rounded in the same direction.
DRIFT = N_EPOCHS * N_STEPS * 2**-25
# Their steps solve problems, each in a loop of its own: they take only every fifth epoch.
DEAR = (
    "pcd",
    "cr_mogm-amortize-mgda",
    "amortize-chain-log-mgda",
    "transform-amortize-mgda",
    "nested-mgda",
    "skip_zero-mgda",
    "regularize-upgrad",
)
# At rest an absolute value's descent goes up and down by whole steps of Adam, by the sign of what is left of rounding.
KINKED = ("gradnorm",)


def remembers(built):
    return not isinstance(jax.eval_shape(built.init), SeenState)


@functools.cache
def histories():
    """Losses ``[step, history, task]`` and rows that are as long as the losses are large.

    What is constant changes in the last quarter, to show whether a method still follows.
    """
    rng, step = np.random.default_rng(0), np.arange(N_EPOCHS * N_STEPS)[:, None]
    noise = lambda: np.exp(0.2 * rng.normal(size=(len(step), N_TASKS)))
    decaying = (REST + START * np.exp(-step / STEPS_TO_DECAY)) * noise()
    constant = np.where(step < 0.75 * len(step), START, START[::-1])
    spiked = START * noise()
    spiked[N_STEPS // 2 :: N_STEPS, 1] = SPIKE
    losses = np.stack([decaying, constant, spiked], axis=1)
    directions = rng.normal(size=(N_TASKS, N_PARAMS)) + 0.3 * rng.normal(size=(len(step), 1, N_TASKS, N_PARAMS))
    return losses.astype(np.float32), (losses[..., None] * directions).astype(np.float32)


def epochs(built, dtype):
    """The inputs of one epoch after the other."""
    losses, rows = histories()
    for i in np.linspace(0, N_EPOCHS - 1, N_EPOCHS // 5 if built.case.name in DEAR else N_EPOCHS, dtype=int):
        now = slice(i * N_STEPS, (i + 1) * N_STEPS)
        yield np.asarray(losses[now], dtype), None if built.is_scalarizer else np.asarray(rows[now], dtype)


def trained(built):
    """The method with what it learns inside ``learn``."""
    return mtl.learn(built.method, optax.adam(1e-2)) if built.method.learned else built.method


def init(built, method, dtype):
    params = {"w": jax.ShapeDtypeStruct((N_PARAMS,), dtype)}
    start = method.init(jax.ShapeDtypeStruct((N_TASKS,), dtype) if built.is_scalarizer else (N_TASKS, params))
    return jax.tree.map(lambda x: jnp.stack([x] * len(HISTORIES)), start)


def apply(built, method, state, losses, rows):
    """The output, and the state; of a scalarizer the output is its gradient, the weights."""
    if built.is_scalarizer:
        (_, state), weights = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, losses)
        return weights, state
    gradient, state = method.apply(state, {"w": rows}, values=losses if built.case.reads_losses else None)
    return gradient["w"], state


def weights_of(built, method, state, losses, rows):
    """What :func:`apply` would give and, where the method makes weights, these."""
    output, _ = apply(built, method, state, losses, rows)
    if built.is_scalarizer or method.weighting is None:
        return output, output
    values = losses if built.case.reads_losses else None
    return output, method.weighting.apply(state, {"w": rows}, values=values)[0]


def epoch_of(built, method):
    """From the states of all histories and an epoch's inputs to states, whether all was finite, outputs, weights."""

    def step(carry, inputs):
        state, finite = carry
        output, state = apply(built, method, state, *inputs)
        state = method.observe(state, inputs[0] / (1 + inputs[0]))  # after the step, or an indicator from 0 to 1
        return (state, finite & jnp.all(jnp.isfinite(output))), None

    def epoch(state, losses, rows):
        (state, finite), _ = jax.lax.scan(step, (state, jnp.array(True)), (losses, rows))
        state, last = method.end_epoch(state), jax.tree.map(lambda x: x[-1], (losses, rows))
        return state, finite, *weights_of(built, method, state, *last)

    return jax.jit(jax.vmap(epoch, in_axes=(0, 1, 1)), donate_argnums=0)


def run(built, dtype):
    """The last states; of every epoch whether all was finite, a last output, weights; and what was held in memory."""
    method = trained(built)
    epoch, state = epoch_of(built, method), init(built, method, dtype)
    found, held = [], []
    with recorded() as events:
        for inputs in epochs(built, dtype):
            state, *rest = epoch(state, *inputs)
            found.append(jax.device_get(rest))
            held.append((compilations(events), sum(x.nbytes for x in jax.live_arrays())))
    return jax.device_get(state), [np.stack(x) for x in zip(*found, strict=True)], held


@pytest.mark.cases(lambda built: remembers(built))
def test_many_steps(built):
    """No step compiles anew or leaves anything in memory; weights are where the method says; float32 does not drift."""
    state, (finite, outputs, weights), held = run(built, jnp.float32)
    chex.assert_tree_all_finite((state, outputs, weights))
    assert np.all(finite)
    assert set(held[1:]) == {held[1]}
    if built.case.total:
        np.testing.assert_allclose(np.sum(weights, axis=-1), {"1": 1, "m": N_TASKS}[built.case.total], rtol=1e-5)
        assert np.all(weights >= 0)
    if built.case.name not in KINKED:
        with jax.enable_x64(True):
            _, (_, expected, _), _ = run(Built(built.case, built.family), jnp.float64)
        size = np.max(np.abs(expected), axis=-1, keepdims=True)
        assert np.all(np.abs(outputs - expected) <= DRIFT * size)
