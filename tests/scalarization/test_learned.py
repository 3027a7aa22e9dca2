"""The learned methods: their starts, their optima, their ascents. Their values are in tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import scalarization

LOSSES = jnp.array([0.25, 4.0, 100.0])
CLASSIFICATION = jnp.array([2.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("method", "field", "optimum"),
    [
        (scalarization.uw, "log_var", jnp.log(LOSSES)),
        (lambda: scalarization.uw(classification=True), "log_var", jnp.log(2 * LOSSES)),
        (lambda: scalarization.uw(classification=[True, False, False]), "log_var", jnp.log(LOSSES * CLASSIFICATION)),
        (scalarization.revised_uw, "sigma", jnp.sqrt((LOSSES + jnp.sqrt(LOSSES**2 + 8 * LOSSES)) / 4)),
        (scalarization.imtl_l, "log_scale", -jnp.log(LOSSES)),
    ],
)
def test_learned_fields_reach_their_optimum(method, field, optimum):
    learned = mtl.learn(method(), optax.adam(0.05))
    state, _ = jax.lax.scan(lambda state, _: learned.apply(state, LOSSES)[::-1], learned.init(3), length=4000)
    np.testing.assert_allclose(getattr(state.inner, field), optimum, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [0.5, [0.5, 1.0, -1.0], {"a": 0.5, "b": 1.0, "c": -1.0}])
def test_starts(start):
    expected = [0.5, 0.5, 0.5] if start == 0.5 else [0.5, 1.0, -1.0]
    np.testing.assert_array_equal(scalarization.uw(start).init(3).log_var, jnp.array(expected))
    np.testing.assert_array_equal(scalarization.imtl_l(start).init(3).log_scale, jnp.array(expected))


def test_a_start_of_another_length_raises():
    with pytest.raises(ValueError, match=r"initial_log_var: expected a scalar or one number per task, shape \(3,\)"):
        scalarization.uw([0.0, 1.0]).init(3)


def test_a_start_of_zero_raises_where_nothing_would_move():
    with pytest.raises(ValueError, match=r"initial_sigma: expected a number other than 0 for each task, found 0\.0"):
        scalarization.revised_uw(0.0).init(3)
    with pytest.raises(ValueError, match="initial_multipliers: expected a number other than 0 for each task, found"):
        scalarization.self_adaptive([1.0, 0.0, 1.0]).init(3)


def test_classification_must_be_boolean():
    with pytest.raises(TypeError, match="classification: expected booleans, found dtype float"):
        scalarization.uw(classification=0.5)
    with pytest.raises(ValueError, match=r"classification: expected a scalar or one number per task, shape \(3,\)"):
        scalarization.uw(classification=[True, False]).init(3)


@pytest.mark.parametrize(
    ("method", "field", "weights_of"),
    [
        (scalarization.minmax, "logits", lambda logits: 3 * jax.nn.softmax(logits)),
        (scalarization.self_adaptive, "multipliers", jnp.square),
    ],
)
def test_descent_on_the_state_climbs(method, field, weights_of):
    """One gradient step on parameters and weights together, and the same with ``learn``."""
    method, optimizer = method(), optax.sgd(0.01)
    state = method.init(3)
    grads, _ = jax.grad(method.apply, has_aux=True)(state, LOSSES)
    ascent = jax.grad(lambda leaf: weights_of(leaf) @ LOSSES)(getattr(state, field))
    np.testing.assert_allclose(getattr(grads, field), -ascent, rtol=1e-5)
    updates, _ = optimizer.update(grads, optimizer.init(state))
    jointly = optax.apply_updates(state, updates)
    learned = mtl.learn(method, optimizer)
    scalar, learned_state = learned.apply(learned.init(3), LOSSES)
    np.testing.assert_allclose(scalar, jnp.sum(LOSSES), rtol=1e-6)
    np.testing.assert_allclose(getattr(learned_state.inner, field), getattr(jointly, field), rtol=1e-6)
    assert learned.apply(learned_state, LOSSES)[0] > scalar


def test_a_joint_training_finds_the_saddle_point():
    """Of two parabolas whose larger one is least in the middle: the descent ends there, the weights balance it."""
    method = mtl.learn(scalarization.minmax(), optax.sgd(1e-2))
    losses = lambda x: jnp.stack([(x - 1) ** 2, (x + 1) ** 2 + 1])

    def step(carry, _):
        x, state = carry
        gradient, state = jax.grad(lambda x: method.apply(state, losses(x)), has_aux=True)(x)
        return (x - 1e-2 * gradient, state), None

    (x, state), _ = jax.lax.scan(step, (jnp.array(2.0), method.init(2)), length=20000)
    np.testing.assert_allclose(x, -0.25, atol=1e-2)  # where both are 1.5625
    np.testing.assert_allclose(jax.nn.softmax(state.inner.logits), [0.375, 0.625], atol=1e-2)
