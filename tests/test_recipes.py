"""What the guides say of their recipes, shown on them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.pages import block_below

pytestmark = pytest.mark.unoptimized


# Frozen parameters.


@pytest.fixture(scope="module")
def frozen():
    """The recipe's variables after it has run."""
    variables = {}
    exec(compile(block_below("guides/parts_of_a_model.md", "Frozen parameters"), "guide", "exec"), variables)
    return variables


def with_conflicts(task_losses):
    """Losses that push the frozen parameters, and no others, in contrary ways."""
    signs = np.float32([1.0, -1.0, 2.0])
    return lambda params, *batch: task_losses(params, *batch) + 100.0 * signs * jnp.sum(params["encoder"])


METHODS = {
    "gramian": aggregation.imtl_g(),
    "lengths": aggregation.db_mtl(),
    "remembers": aggregation.excess_mtl(),
    "without weights": aggregation.m_config(),
    "losses": scalarization.dwa(steps_per_epoch=100),
}


@pytest.mark.by_default("gramian")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_frozen_parameters_take_no_part_in_the_decision(method, frozen):
    params, trained, batch = frozen["params"], frozen["trained"], (frozen["x"], frozen["y"])
    assert trained == {"encoder": False, "trunk": True, "heads": True}

    def gradient(losses_fn, **given):
        grad_fn = mtl.value_and_grad(losses_fn, method, **given)
        part = mtl.subset(params, next(iter(given.values()))) if given else params
        state = method.init(3) if isinstance(method, mtl.Scalarizer) else method.init((3, part))
        grad_fn = jax.jit(grad_fn)
        for _ in range(3):
            (_, state), grads = grad_fn(params, state, *batch)
        return jax.device_get({name: grads[name] for name in ("trunk", "heads")})

    plain, pushed = frozen["task_losses"], with_conflicts(frozen["task_losses"])
    close = lambda x, y: all(np.allclose(x[name], y[name], rtol=1e-3, atol=1e-6) for name in x)
    decided = gradient(plain, shared=trained)
    assert close(gradient(pushed, shared=trained), decided)
    if isinstance(method, mtl.Aggregator):
        assert not close(gradient(pushed), decided)
        if method.weighting is not None:
            assert close(gradient(pushed, decide_on=trained), decided)


def test_frozen_parameters_are_not_trained_and_the_others_are(frozen):
    shapes, keys = frozen["shapes"], frozen["keys"]
    start = {name: jax.random.normal(key, shapes[name]) / 4 for name, key in zip(shapes, keys, strict=False)}
    moved = {name: not np.allclose(frozen["params"][name], start[name], atol=1e-4) for name in start}
    assert moved == frozen["trained"]


def test_frozen_parameters_cost_nothing(frozen):
    """By XLA's count of operations, of a large frozen part; the same step without ``shared=`` takes over twice them."""
    width, n_layers = 64, 4
    shapes = {"encoder": (n_layers, width, width), "trunk": (width, 16), "heads": (16, 3)}
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    x, y = np.zeros((64, width), np.float32), np.zeros((64, 3), np.float32)

    def task_losses(params, x, y):
        for layer in params["encoder"]:
            x = jnp.tanh(x @ layer)
        return frozen["task_losses"]({"encoder": jnp.eye(width)} | {k: params[k] for k in ("trunk", "heads")}, x, y)

    def operations(method, shared=None):
        grad_fn = mtl.value_and_grad(task_losses, method, shared=shared)
        part = params if shared is None else mtl.subset(params, shared)

        def step(params, opt_state, state):
            (_, state), grads = grad_fn(params, state, x, y)
            updates, opt_state = frozen["optimizer"].update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, state

        state = method.init(3) if isinstance(method, mtl.Scalarizer) else method.init((3, part))
        compiled = jax.jit(step).lower(params, frozen["optimizer"].init(params), state).compile()
        return compiled.cost_analysis()["flops"]

    plain = operations(scalarization.sum())
    assert operations(frozen["method"], frozen["trained"]) < 1.2 * plain
    assert operations(frozen["method"]) > 2 * plain


# A hinge that is met.


def test_a_hinge_that_is_met_is_absent():
    """Its neighbours are weighted as without it, its statistics stay, and no gradient is NaN."""

    def task_losses(params, met):
        hinge = jnp.maximum(params.sum() - jnp.where(met, 10.0, 0.5), 0)
        return {"data": jnp.sum((params - 2) ** 2), "edge": params[0] ** 2, "hinge": mtl.Counted(hinge, hinge > 0)}

    params, method = np.float32([1.0, 2.0]), aggregation.excess_mtl()
    grad_fn = jax.jit(mtl.value_and_grad(task_losses, method, return_weights=True))
    state = method.init((3, params))
    for _ in range(2):
        (losses, state, _), _ = jax.device_get(grad_fn(params, state, False))
    assert losses["hinge"].sum == 2.5
    (_, after, weights), grads = jax.device_get(grad_fn(params, state, True))
    np.testing.assert_array_equal(after.seen, [3, 3, 2])
    assert after.baseline[2] == state.baseline[2]
    assert weights["hinge"] == 0
    np.testing.assert_allclose(weights["data"] + weights["edge"], 1.0, rtol=1e-6)
    assert np.all(np.isfinite(grads))

    two = mtl.value_and_grad(lambda params: [task_losses(params, True)[name] for name in ("data", "edge")], method)
    without = state._replace(**jax.tree.map(lambda leaf: leaf[:2], state._asdict()))
    _, expected = jax.jit(two)(params, without)
    np.testing.assert_allclose(grads, expected, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [None, 2])
def test_the_average_of_met_hinges_is_over_those_that_are_not(microbatches):
    """Summed over the batch, as the count is; and with all of them met the task is absent."""

    def task_losses(params, x):
        hinge = jnp.maximum(params * x, 0)
        return {"hinge": mtl.Counted(jnp.sum(hinge), jnp.sum(hinge > 0)), "plain": jnp.mean((params - x) ** 2)}

    method = scalarization.mean()
    grad_fn = jax.jit(mtl.value_and_grad(task_losses, method, microbatches=microbatches, return_weights=True))
    for x, mean, weights in ([3.0, -1.0, -1.0, 1.0], 2.0, [0.5, 0.5]), ([-1.0, -2.0, -1.0, -2.0], 0.0, [0.0, 1.0]):
        (losses, _, found), grads = jax.device_get(grad_fn(np.float32(1.0), method.init(2), np.float32(x)))
        assert losses["hinge"].sum / max(losses["hinge"].count, 1) == mean
        np.testing.assert_allclose([found["hinge"], found["plain"]], weights, rtol=1e-6)
        plain = np.mean(2 * (1 - np.array(x)))
        np.testing.assert_allclose(grads, weights[0] * mean + weights[1] * plain, rtol=1e-6)


# The scalar is no curve.


@pytest.mark.parametrize("make", [scalarization.uw, scalarization.imtl_l, scalarization.self_adaptive])
def test_a_scalar_moves_where_no_loss_does(make):
    method, losses = mtl.learn(make(), optax.sgd(0.1)), np.float32([0.5, 3.0])
    step = lambda state, _: method.apply(state, losses)[::-1]
    scalars = np.asarray(jax.jit(lambda: jax.lax.scan(step, method.init(2), length=20)[1])())
    assert np.ptp(scalars) > 0.1 * np.abs(scalars[0])
