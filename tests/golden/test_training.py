"""Whole trainings in float32 against TorchJD's in float64, recorded by ``record_training.py``: all parameters agree."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("torchjd_training.json").read_text())
RUNS = {(run["model"], run["method"], run["optimizer"]): run for run in RECORDED["runs"]}
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
METHODS = {
    "sum": scalarization.sum,
    "mean": scalarization.mean,
    "uw": scalarization.uw,
    "dwa": lambda: scalarization.dwa(temperature=0.5),
    "upgrad": aggregation.upgrad,
    "mgda": aggregation.mgda,
    "excess_mtl": lambda: aggregation.excess_mtl(robust_step_size=0.1, normalize_first_step=False),
}
# Parameters and losses are of size 1. What fifty steps made of float32's rounding was 1e-6 in the parameters.
TOLERANCE = 1e-4


def arrays(tree):
    return jax.tree.map(lambda x: np.array(x, np.float32), tree, is_leaf=lambda x: isinstance(x, list))


DATA = arrays((RECORDED["inputs"], RECORDED["targets"]))
STARTS = arrays(RECORDED["starts"])


# The models.


def network(layers, x):
    *hidden, last = (layers[name] for name in sorted(layers))
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"][None])
    return x @ last["w"] + last["b"][None]


def losses_of_network(params, inputs, targets):
    return jnp.mean((network(params, inputs) - targets) ** 2, axis=0)


def trunk(params, inputs, targets):
    del targets
    return jnp.tanh(network(params, inputs))


def head(task, params, features, inputs, targets):
    del inputs
    return jnp.mean((network(params, features)[:, 0] - targets[:, task]) ** 2)


HEADS = {"left": functools.partial(head, 0), "right": functools.partial(head, 1)}


def losses_of_heads(params, *data):
    features = trunk(params["trunk"], *data)
    return {name: of_head(params["heads"][name], features, *data) for name, of_head in HEADS.items()}


# The training.


def train(grad_fn, params, state, optimizer, end_epoch=lambda state: state):
    """Parameters and state after the last step, and the losses in the first step of every epoch."""
    optimizer = optimizer_of(optimizer)

    def step(carry, _):
        params, opt_state, state = carry
        (losses, state), grads = grad_fn(params, state, *DATA)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), losses

    def epoch(carry, _):
        (params, opt_state, state), losses = jax.lax.scan(step, carry, length=RECORDED["epoch"])
        return (params, opt_state, end_epoch(state)), jax.tree.map(lambda x: x[0], losses)

    @jax.jit
    def epochs(params, state):
        with jax.default_matmul_precision("highest"):
            carry = params, optimizer.init(params), state
            return jax.lax.scan(epoch, carry, length=RECORDED["steps"] // RECORDED["epoch"])

    (params, _, state), losses = epochs(params, state)
    return params, state, losses


def optimizer_of(name):
    return OPTIMIZERS[name](RECORDED["learning_rates"][name])


def train_network(method, optimizer):
    params = STARTS["network"]
    state = jax.jit(lambda: method.init(3 if isinstance(method, mtl.Scalarizer) else (3, params)))()
    return train(mtl.value_and_grad(losses_of_network, method, hooks=True), params, state, optimizer, method.end_epoch)


def check(run, params, losses):
    assert distance(params, arrays(run["params"])) < TOLERANCE
    losses = np.stack(jax.tree.leaves(losses), axis=-1) if isinstance(losses, dict) else losses
    np.testing.assert_allclose(losses, run["losses"], rtol=0, atol=TOLERANCE)


def distance(one, other):
    """The largest difference of a parameter."""
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.max(np.abs(np.subtract(x, y)))), one, other)))


# The comparisons.


def test_trainings_go_far_and_apart():
    """A hundred tolerances from the start, and fifty from where the plain sum leads, and with SGD the mean."""
    for (model, name, optimizer), run in RUNS.items():
        end = arrays(run["params"])
        assert distance(end, STARTS[model]) > 100 * TOLERANCE
        for plain in ("sum", "mean") if optimizer == "sgd" else ("sum",):
            if name not in ("sum", "mean"):
                assert distance(end, arrays(RUNS[model, plain, optimizer]["params"])) > 50 * TOLERANCE, (name, plain)


@pytest.mark.parametrize(("name", "optimizer"), [key[1:] for key in RUNS if key[0] == "network"])
@pytest.mark.by_default("*-sgd")
def test_network(name, optimizer):
    """One step for every method; UW's log-variances are trained by the same optimizer, inside the method."""
    method = METHODS[name]()
    if name == "uw":
        method = mtl.learn(method, optimizer_of(optimizer))
    run = RUNS["network", name, optimizer]
    params, state, losses = train_network(method, optimizer)
    check(run, params, losses)
    if name == "uw":
        assert distance(state.inner.log_var, arrays(run["learned"])["log_var"]) < TOLERANCE


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_uw_jointly(optimizer):
    """Parameters and log-variances as one tree, differentiated and trained together."""
    method = scalarization.uw()

    def scalar_fn(trained, *data):
        params, uw_state = trained
        losses = losses_of_network(params, *data)
        scalar, _ = method.apply(uw_state, losses)
        return scalar, losses

    def grad_fn(trained, state, *data):
        (_, losses), grads = jax.value_and_grad(scalar_fn, has_aux=True)(trained, *data)
        return (losses, state), grads

    run = RUNS["network", "uw", optimizer]
    (params, uw_state), _, losses = train(grad_fn, (STARTS["network"], method.init(3)), (), optimizer)
    check(run, params, losses)
    assert distance(uw_state.log_var, arrays(run["learned"])["log_var"]) < TOLERANCE


def test_dwa_that_closes_its_epochs():
    """With ``steps_per_epoch`` there is no ``end_epoch`` to call: calling it on an epoch without steps does nothing."""
    method = scalarization.dwa(temperature=0.5, steps_per_epoch=RECORDED["epoch"])
    params, _, losses = train_network(method, "sgd")
    check(RUNS["network", "dwa", "sgd"], params, losses)


@pytest.mark.parametrize("name", ["sum", "mean"])
def test_scalarizer_of_heads(name):
    """The baselines of the next two: a scalarizer weighs trunk and heads alike."""
    method, params = METHODS[name](), STARTS["trunk and heads"]
    grad_fn = mtl.value_and_grad(losses_of_heads, method)
    params, _, losses = train(grad_fn, params, method.init(dict.fromkeys(HEADS, 0.0)), "sgd")
    check(RUNS["trunk and heads", name, "sgd"], params, losses)


def test_shared_mask():
    """TorchJD's ``mtl_backward``: UPGrad for the shared parameters, for each head its own task's gradient."""
    method, params, shared = aggregation.upgrad(), STARTS["trunk and heads"], {"trunk": True, "heads": False}
    grad_fn = mtl.value_and_grad(losses_of_heads, method, shared=shared)
    params, _, losses = train(grad_fn, params, method.init((2, mtl.subset(params, shared))), "sgd")
    check(RUNS["trunk and heads", "upgrad", "sgd"], params, losses)


def test_trunk_and_heads():
    """The same from the trunk and the heads, whose parameters are a pair."""
    method, start = aggregation.upgrad(), STARTS["trunk and heads"]
    params = start["trunk"], start["heads"]
    grad_fn = mtl.value_and_grad((trunk, HEADS), method)
    params, _, losses = train(grad_fn, params, method.init((2, mtl.subset(params, (True, False)))), "sgd")
    check(RUNS["trunk and heads", "upgrad", "sgd"], dict(zip(("trunk", "heads"), params, strict=True)), losses)
