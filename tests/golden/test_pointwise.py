"""Pointwise weights against the official codes, held as data.

``official_pointwise.json`` was recorded in float64 by ``record_pointwise.py``, of 20 calls each, with nine digits.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("official_pointwise.json").read_text())
DIGITS = {True: 5.1e-9, False: 1e-5}  # half of the ninth digit, in float64; in float32


@pytest.fixture(params=[True, False], ids=["float64", "float32"])
def close(request):
    """Compares in either precision, which the test then runs in."""
    with jax.enable_x64(request.param):
        yield partial(np.testing.assert_allclose, rtol=DIGITS[request.param], atol=1e-300)


def residuals_of(case):
    return np.array(case["residuals"], np.float32).astype(jnp.result_type(float))


def run(method, residuals, loss=jnp.square):
    """Scalars, gradients by the losses, and the states after each call."""

    def step(state, r):
        (scalar, new_state), weights = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, loss(r))
        return new_state, (scalar, weights, new_state)

    calls = jax.jit(lambda residuals: jax.lax.scan(step, method.init(residuals[0]), residuals)[1])
    return jax.device_get(calls(residuals))


@pytest.mark.parametrize("case", RECORDED["causal"], ids=lambda case: f"{len(case['tol'])} tol")
def test_causal(case, close):
    residuals, n_chunks = residuals_of(case), case["n_chunks"]
    scalars, weights, states = run(scalarization.causal(case["tol"], n_chunks), residuals)
    recorded = np.array(case["weights"])
    assert sorted(set(case["stages"])) == list(range(len(case["tol"])))
    np.testing.assert_array_equal(states.stage[:-1], case["stages"][1:])
    close(states.min_weight, recorded.min(axis=1))
    close(weights, np.repeat(recorded, residuals.shape[1] // n_chunks, axis=1) / residuals.shape[1])
    close(scalars, np.mean(np.mean(np.square(residuals).reshape(*recorded.shape, -1), axis=2) * recorded, axis=1))


@pytest.mark.parametrize("case", RECORDED["causal_components"], ids=lambda case: f"tol{case['tol']}")
@pytest.mark.parametrize("form", ["axis", "names", "nested"])
def test_causal_weights_of_several_equations_are_the_smallest(case, form, close):
    residuals, n_chunks = residuals_of(case), case["n_chunks"]
    _, n_equations, n_points = residuals.shape
    method = scalarization.causal(case["tol"], n_chunks, n_components=n_equations)
    loss = jnp.square
    if form != "axis":
        loss = lambda r: dict(zip("uvcd", r**2, strict=True))
    if form == "nested":
        method, loss = (
            mtl.nested(scalarization.sum(), {"pde": method}),
            lambda r: {"pde": dict(zip("uvcd", r**2, strict=True))},
        )
    step = jax.jit(lambda r: jax.value_and_grad(method.apply, argnums=1, has_aux=True)(method.init(loss(r)), loss(r)))
    for r, losses, weights in zip(residuals, case["losses"], case["weights"], strict=True):
        (scalar, _), found = step(r)
        close(scalar, np.sum(np.mean(np.array(losses) * weights, axis=1)))
        due = np.repeat(weights, n_points // n_chunks) / n_points
        for of_equation in found if form == "axis" else jax.tree.leaves(found):
            close(of_equation, due)


@pytest.mark.parametrize("case", RECORDED["residual_attention"], ids=lambda case: f"lr{case['lr']}")
def test_residual_attention(case, close):
    residuals = residuals_of(case)
    scalars, weights, states = run(scalarization.residual_attention(case["decay"], case["lr"]), residuals)
    close(states.multipliers, case["multipliers"])
    close(scalars, case["losses"])
    close(np.sqrt(weights * residuals.shape[1]), case["multipliers"])


@pytest.mark.parametrize("case", RECORDED["vrba"], ids=lambda case: f"{case['potential']} phi{case['phi']}")
def test_vrba(case, close):
    """Its quadratic potential makes residual-based attention."""
    settings = {name: case[name] for name in ("decay", "lr")} | {"initial_multipliers": 0.1}
    if case["potential"] == "exponential":
        method = scalarization.vrba(**settings, c_log=case["c_log"], phi=case["phi"])
    else:
        method = scalarization.residual_attention(**settings)
    scalars, _, states = run(method, residuals_of(case))
    close(states.multipliers, case["multipliers"])
    close(scalars, case["losses"])


@pytest.mark.parametrize("case", RECORDED["brdr"], ids=lambda case: f"beta_w{case['beta_w']}")
def test_brdr(case, close):
    residuals = residuals_of(case)
    scalars, weights, states = run(scalarization.brdr(case["beta_c"], case["beta_w"]), residuals)
    close(states.weights, case["weights"])
    close(weights, np.array(case["weights"]) / residuals.shape[1])
    close(scalars, np.mean(np.array(case["weights"]) * np.square(residuals), axis=1))


@pytest.mark.parametrize("case", RECORDED["self_adaptive"], ids=lambda case: "Adam")
def test_self_adaptive_weights_of_points(case, close):
    """The code climbs the mean over the points, we their sum: Adam's steps differ by its eps alone."""
    residuals, start = residuals_of(case), np.array(case["start"], np.float32)
    n_points = residuals.shape[1]
    method = scalarization.self_adaptive(start.astype(jnp.result_type(float)))
    scalars, _, states = run(mtl.learn(method, optax.adam(5e-3, eps=1e-8 * n_points)), residuals)
    close(states.inner.multipliers, case["multipliers"])
    close(scalars / n_points, case["losses"])
