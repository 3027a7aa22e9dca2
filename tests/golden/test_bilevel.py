"""EPO and Auto-Lambda against their official codes, held as data.

``official_bilevel.json`` was recorded by ``record_bilevel.py``, which needs torch, cvxpy and cvxopt; none is needed
here. Where a code departs from its paper, or from what we do, a test pins its way beside ours.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("official_bilevel.json").read_text())
TASKS = ("a", "b", "c")


# EPO.


@pytest.mark.by_default("3-*", "2-relaxTrue")
@pytest.mark.parametrize("case", RECORDED["epo"], ids=lambda case: f"{len(case['preference'])}-relax{case['relax']}")
def test_epo_weights(case):
    """Number for number; the corners of m rows amplify rounding, by up to some 200 here."""
    preference, losses = (np.array(case[name], np.float32) for name in ("preference", "losses"))
    rows = padded(case["jacobians"])
    expected = np.array(case["weights"])
    solved = expected[:, 0] != -1
    of_call = lambda relax: lambda rows, losses: weights_of(preference, relax, rows, losses)
    weights = np.asarray(jax.jit(jax.vmap(of_call(case["relax"])))(rows, losses))
    np.testing.assert_allclose(weights[solved], expected[solved], rtol=0, atol=5e-5)
    assert {"bal", "dom"} == set(case["moves"])
    if not np.all(solved):  # where its program has no solution, the official code stops
        assert not case["relax"]
        relaxed = np.asarray(jax.jit(jax.vmap(of_call(True)))(rows, losses))
        np.testing.assert_allclose(weights[~solved], relaxed[~solved], rtol=0, atol=1e-6)


def test_where_the_official_program_has_no_solution():
    assert sum(weights[0] == -1 for case in RECORDED["epo"] for weights in case["weights"]) == 3


def weights_of(preference, relax, rows, losses):
    weighting = aggregation.epo(preference, relax=relax).weighting
    return weighting.apply(weighting.init(rows.shape), rows, values=losses)[0]


def padded(jacobians):
    """Gradients of two lengths, with zeros behind the short ones, which change no inner product."""
    arrays = [np.array(rows, np.float32) for rows in jacobians]
    return np.stack([np.pad(rows, [(0, 0), (0, 12 - rows.shape[1])]) for rows in arrays])


@pytest.mark.parametrize("case", RECORDED["epo_search"], ids=lambda case: f"{case['preference'][0]}")
def test_epo_search(case):
    """The official search on its concave front: sixty steps, each ten max(mu, 0.1) step sizes long."""
    preference = np.array(case["preference"], np.float32)
    method = aggregation.epo(preference)

    def step(carry, _):
        x, state = carry
        losses, rows = mtl.value_and_jac(concave)(x)
        gradient, state = method.apply(state, rows, values=losses)
        shares = preference * losses / jnp.sum(preference * losses)
        mu = jnp.sum(shares * jnp.log(2 * shares))
        return (x - 10 * jnp.maximum(mu, 0.1) * case["step_size"] * gradient, state), losses

    search = lambda x: jax.lax.scan(step, (x, method.init((2, x))), length=len(case["losses"]))[1]
    losses = jax.jit(search)(np.array(case["start"], np.float32))
    np.testing.assert_allclose(losses, case["losses"], atol=2e-3)


def concave(x):
    centre = jnp.asarray(1 / np.sqrt(len(x)), x.dtype)
    return 1 - jnp.exp(-jnp.stack([jnp.sum((x - sign * centre) ** 2) for sign in (1, -1)]))


# Auto-Lambda.


def network_losses(params, x, y):
    first, second = params
    return dict(zip(TASKS, jnp.mean((jnp.tanh(x @ first) @ second - y) ** 2, axis=0), strict=True))


def optimizer_of(settings):
    velocity = optax.trace(settings["momentum"]) if "momentum" in settings else optax.identity()
    return optax.chain(optax.add_decayed_weights(settings["weight_decay"]), velocity, optax.scale(-settings["lr"]))


def train(case, meta_optimizer):
    """The losses and weights of every step, and what moved the weights."""
    optimizer = optimizer_of(case["settings"])
    grad_fn = mtl.auto_lambda(network_losses, optimizer, case["primary"], meta_optimizer, return_weights=True)
    train_x, train_y, val_x, val_y, first, second = (
        np.array(case[name], np.float32) for name in ("train_x", "train_y", "val_x", "val_y", "first", "second")
    )

    def step(carry, batch):
        params, opt_state, state = carry
        x, y, *validation = batch
        outputs, grads = grad_fn(params, state, x, y, validation=tuple(validation), opt_state=opt_state)
        losses, state, weights = outputs
        updates, opt_state = optimizer.update(grads, opt_state, params)
        in_order = lambda tree: jnp.stack([tree[task] for task in TASKS])
        return (optax.apply_updates(params, updates), opt_state, state), (in_order(losses), in_order(weights))

    params = first, second

    @jax.jit
    def steps():
        carry = params, optimizer.init(params), grad_fn.init(params, train_x[0], train_y[0])
        return jax.lax.scan(step, carry, (train_x, train_y, val_x, val_y))[1]

    return steps()


@pytest.mark.parametrize("case", RECORDED["auto_lambda"], ids=lambda case: "-".join(case["primary"]))
def test_auto_lambda_training(case):
    """Losses and weights of eight steps; Adam makes steps of 0.01 of the sign of a gradient, however small."""
    losses, weights = train(case, optax.adam(0.01))
    np.testing.assert_allclose(losses, case["losses"], rtol=1e-4)
    np.testing.assert_allclose(weights, case["weights"], atol=2e-5)


@pytest.mark.parametrize("case", RECORDED["auto_lambda"], ids=lambda case: "-".join(case["primary"]))
def test_the_hypergradient_is_exact_and_the_official_one_near_it(case):
    """Ours by a step of plain descent on the weights; theirs is off by up to 1e-4 of its length, in float64."""
    _, weights = train(case, optax.sgd(1.0))
    hypergradient = 0.1 - np.asarray(weights[0])  # the first step's: later ones depend on it
    exact, by_differences = np.array(case["exact"]), np.array(case["by_differences"])
    np.testing.assert_allclose(hypergradient, exact[0], atol=1e-6)
    off = np.linalg.norm(by_differences - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert 1e-6 < np.min(off) < np.max(off) < 2e-4
