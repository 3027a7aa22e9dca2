"""The methods with multipliers against Cooper, mdmm and PECANN-CAPU, as ``record_constraints.py`` recorded them."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("official_constraints.json").read_text())
SETTING = RECORDED["setting"]
lagrangian = partial(
    scalarization.lagrangian,
    {"upper": dict(zip("ab", SETTING["upper"], strict=True)), "exact": SETTING["exact"]},
    lr=SETTING["lr"],
    equality=("exact",),
)
METHODS = {
    "dual first": lagrangian(),
    "simultaneous": lagrangian(simultaneous=True),
    "augmented": lagrangian(damping=2.0),
    "nuPI": lagrangian(kappa_p=4.0, nu=0.3),
    "nuPI simultaneous": lagrangian(kappa_p=2.0, simultaneous=True),
    "mdmm": scalarization.lagrangian(
        {"exact": SETTING["exact"]}, SETTING["lr"], 2.0, equality=("exact",), simultaneous=True
    ),
}


def losses_of(x):
    objective = (x[0] - 2) ** 2 + (x[1] - 1) ** 2
    return {"objective": objective, "upper": {"a": x[0] + x[1], "b": x[0]}, "exact": x[0] * x[1]}


def descend(method, losses_fn, n_steps):
    def step(carry, _):
        x, state = carry
        (_, state), gradient = jax.value_and_grad(lambda x: method.apply(state, losses_fn(x)), has_aux=True)(x)
        x = x - SETTING["step_size"] * gradient
        return (x, state), (x, state.multipliers)

    start = jnp.array(SETTING["start"])
    return jax.lax.scan(step, (start, method.init(losses_fn(start))), length=n_steps)[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_descent(name):
    """In float64, as recorded: point and multipliers after every step."""
    expected = {key: np.array(rows) for key, rows in RECORDED["descents"][name].items()}
    losses_fn = losses_of
    order = ["exact", "objective", "upper.a", "upper.b"]  # as JAX sorts the names
    known = ["upper.a", "upper.b", "exact"]
    if name == "mdmm":
        losses_fn = lambda x: {key: loss for key, loss in losses_of(x).items() if key != "upper"}
        order, known = order[:2], ["exact"]
    with jax.enable_x64(True):
        points, multipliers = jax.jit(lambda: descend(METHODS[name], losses_fn, len(expected["points"])))()
    np.testing.assert_allclose(points, expected["points"], rtol=1e-8)
    np.testing.assert_allclose(
        multipliers[:, [order.index(task) for task in known]], expected["multipliers"], rtol=1e-8, atol=1e-10
    )
    assert np.all(np.ptp(multipliers[:, order.index("objective")]) == 0)


def test_capu():
    """Calls with given losses: the state after each, and the scalar and the weights that the code descends on next."""
    case = RECORDED["capu"]
    bounds = [np.inf, 0.0, 0.0]
    method = scalarization.capu(bounds, eta=[0.0, *case["eta"]])

    def call(state, losses):
        (value, state), weights = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, losses)
        return state, (value, weights, state)

    with jax.enable_x64(True):
        losses = jnp.array(case["losses"])
        values, weights, states = jax.jit(lambda: jax.lax.scan(call, method.init(losses[0]), losses)[1])()
    np.testing.assert_allclose(values, case["values"], rtol=1e-8)
    np.testing.assert_allclose(weights, case["weights"], rtol=1e-8)
    for name in "multipliers", "penalties", "squares":
        np.testing.assert_allclose(getattr(states, name)[:, 1:], case[name], rtol=1e-8, err_msg=name)
