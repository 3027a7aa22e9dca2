"""The learned methods: their starts, their optima, their ascents. Their values are in tests/golden."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized

LOSSES = np.float32([0.25, 4.0, 100.0])
CLASSIFICATION = np.float32([2.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("method", "field", "optimum"),
    [
        (scalarization.uw, "log_var", np.log(LOSSES)),
        (lambda: scalarization.uw(classification=True), "log_var", np.log(2 * LOSSES)),
        (lambda: scalarization.uw(classification=[True, False, False]), "log_var", np.log(LOSSES * CLASSIFICATION)),
        (scalarization.revised_uw, "sigma", np.sqrt((LOSSES + np.sqrt(LOSSES**2 + 8 * LOSSES)) / 4)),
        (scalarization.imtl_l, "log_scale", -np.log(LOSSES)),
    ],
)
def test_learned_fields_reach_their_optimum(method, field, optimum):
    learned = mtl.learn(method(), optax.adam(0.05))
    call = lambda state, _: learned.apply(state, LOSSES)[::-1]
    state, _ = jax.jit(lambda: jax.lax.scan(call, learned.init(3), length=4000))()
    np.testing.assert_allclose(getattr(state.inner, field), optimum, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", [0.5, [0.5, 1.0, -1.0], {"a": 0.5, "b": 1.0, "c": -1.0}])
def test_starts(start):
    expected = [0.5, 0.5, 0.5] if start == 0.5 else [0.5, 1.0, -1.0]
    np.testing.assert_array_equal(scalarization.uw(start).init(3).log_var, np.float32(expected))
    np.testing.assert_array_equal(scalarization.imtl_l(start).init(3).log_scale, np.float32(expected))


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

    @jax.jit
    def step_on_the_state():
        state = method.init(3)
        grads, _ = jax.grad(method.apply, has_aux=True)(state, LOSSES)
        ascent = jax.grad(lambda leaf: weights_of(leaf) @ LOSSES)(getattr(state, field))
        updates, _ = optimizer.update(grads, optimizer.init(state))
        return grads, ascent, optax.apply_updates(state, updates)

    grads, ascent, jointly = jax.device_get(step_on_the_state())
    np.testing.assert_allclose(getattr(grads, field), -ascent, rtol=1e-5)
    learned = mtl.learn(method, optimizer)
    scalar, learned_state = learned.apply(learned.init(3), LOSSES)
    np.testing.assert_allclose(scalar, np.sum(LOSSES), rtol=1e-6)
    np.testing.assert_allclose(getattr(learned_state.inner, field), getattr(jointly, field), rtol=1e-6)
    assert float(learned.apply(learned_state, LOSSES)[0]) > float(scalar)


def test_a_joint_training_finds_the_saddle_point():
    """Of two parabolas whose larger one is least in the middle: the descent ends there, the weights balance it."""
    method = mtl.learn(scalarization.minmax(), optax.sgd(1e-2))
    losses = lambda x: jnp.stack([(x - 1) ** 2, (x + 1) ** 2 + 1])

    def step(carry, _):
        x, state = carry
        gradient, state = jax.grad(lambda x: method.apply(state, losses(x)), has_aux=True)(x)
        return (x - 1e-2 * gradient, state), None

    (x, state), _ = jax.jit(lambda: jax.lax.scan(step, (jnp.array(2.0), method.init(2)), length=20000))()
    np.testing.assert_allclose(x, -0.25, atol=1e-2)  # where both are 1.5625
    scores = np.exp(state.inner.logits)
    np.testing.assert_allclose(scores / np.sum(scores), [0.375, 0.625], atol=1e-2)


@partial(jax.jit, static_argnums=0)
def gradients(method, state, losses):
    """The scalar, and its gradients to the state and to the losses."""
    return jax.value_and_grad(lambda state, losses: method.apply(state, losses)[0], argnums=(0, 1))(state, losses)


CORNERS = {
    # The factory, its learned field, and where a loss of zero drives it; then the scalar there at losses of 1 and 0.
    "uw": (scalarization.uw, "log_var", (0.0, -90.0), -44.5),
    "uw, further": (scalarization.uw, "log_var", (0.0, -1e6), 0.5 - 0.5e6),
    "uw, classification": (lambda: scalarization.uw(classification=True), "log_var", (0.0, -90.0), -44.0),
    "revised_uw": (scalarization.revised_uw, "sigma", (1.0, 1e-20), 1.1931),
    "revised_uw at zero": (scalarization.revised_uw, "sigma", (1.0, 0.0), 1.1931),
    "imtl_l": (scalarization.imtl_l, "log_scale", (0.0, 90.0), -89.0),
    "self_adaptive": (scalarization.self_adaptive, "multipliers", (1.0, 1e20), 1.0),
}
LEARNED = {"uw": "log_var", "revised_uw": "sigma", "imtl_l": "log_scale", "self_adaptive": "multipliers"}


@pytest.mark.parametrize(("method", "field", "at", "expected"), CORNERS.values(), ids=CORNERS.keys())
def test_a_weight_beyond_all_bounds_meets_a_loss_of_zero(method, field, at, expected):
    """No infinity times zero; and where the loss is there again, the descent finds back."""
    method = method()
    state = method.init(2)._replace(**{field: np.float32(at)})
    scalar, (to_state, to_values) = jax.device_get(gradients(method, state, np.float32([1.0, 0.0])))
    np.testing.assert_allclose(scalar, expected, rtol=1e-4)
    chex.assert_tree_all_finite((to_state, to_values))
    assert getattr(to_state, field)[1] == 0
    _, (to_state, to_values) = jax.device_get(gradients(method, state, np.float32([1.0, 1.0])))
    chex.assert_tree_all_finite((to_state, to_values))
    returning = getattr(to_state, field)[1]
    assert np.isfinite(returning**2)  # as Adam squares it
    # Multipliers are driven further by any loss.
    assert np.sign(returning) == {"log_var": -1, "sigma": -1, "log_scale": 1, "multipliers": 0}[field]


@pytest.mark.parametrize(
    ("method", "at", "expected"),
    [
        (scalarization.uw, 1e30, 5e29),
        (scalarization.revised_uw, 1e20, 0.5 + np.log(2) + 2 * np.log(1e20)),
        (scalarization.revised_uw, -1e38, 0.5 + np.log(2) + 2 * np.log(1e38)),
        (scalarization.imtl_l, -1e30, 1e30),
        (scalarization.minmax, -1e38, 2.0),
    ],
)
def test_a_weight_near_zero_after_a_huge_loss(method, at, expected):
    """One step of plain descent on a loss of 1e30 is as long: what comes after is finite, for the guard's sake too."""
    method = method()
    state = jax.tree.map(lambda learned: np.float32([learned[0], at]), jax.device_get(method.init(2)))
    scalar, found = jax.device_get(gradients(method, state, np.ones(2, np.float32)))
    np.testing.assert_allclose(scalar, expected, rtol=1e-5)
    chex.assert_tree_all_finite(found)


@partial(jax.jit, static_argnums=0)
def scalar_and_weights(method, state, losses):
    return jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, losses)


@pytest.mark.parametrize("name", [*LEARNED, "minmax"])
@pytest.mark.parametrize("loss", [1e30, -1e30])
def test_a_huge_loss_that_overflows_at_the_bound_leaves_the_state_finite(name, loss):
    """1e12 times 1e30 is infinite, and so may the scalar be, but in no later call."""
    method = mtl.learn(getattr(scalarization, name)(), optax.sgd(0.1))
    state = method.init(2)
    for values in [[1.0, loss]] * 4 + [[1.0, 1.0]] * 2:
        (scalar, state), weights = jax.device_get(scalar_and_weights(method, state, np.float32(values)))
        chex.assert_tree_all_finite((state, weights))
    assert np.isfinite(scalar)


@pytest.mark.parametrize("name", LEARNED)
def test_a_loss_of_zero_for_a_long_run_and_then_a_sane_one(name):
    """With the guard around it nothing is ever skipped: it has nothing to catch, and so nothing to wait for."""
    method = mtl.skip_nonfinite(mtl.learn(getattr(scalarization, name)(), optax.adam(1e-2)))

    def run(state, losses, n_calls):
        step = jax.value_and_grad(method.apply, argnums=1, has_aux=True)
        call = lambda state, _: (lambda scalar, weights: (scalar[1], (scalar[0], weights)))(*step(state, losses))
        return jax.lax.scan(call, state, length=n_calls)

    def whole():
        stuck, first = run(method.init(2), jnp.array([1.0, 0.0]), 20_000)
        recovered, second = run(stuck, jnp.array([1.0, 1.0]), 2_000)
        return stuck, recovered, (first, second)

    stuck, recovered, outputs = jax.device_get(jax.jit(whole)())
    chex.assert_tree_all_finite((stuck, recovered, outputs))
    assert stuck.skipped == recovered.skipped == 0
    before, after = (np.abs(getattr(state.inner.inner, LEARNED[name])[1]) for state in (stuck, recovered))
    assert after < before if name in ("uw", "imtl_l") else after > before


def test_weights_of_at_most_one_half_by_optax():
    """The recipe of the guide: log-variances of at least 0."""
    optimizer = optax.chain(optax.adam(1e-2), optax.keep_params_nonnegative())
    method = mtl.learn(scalarization.uw(), optimizer)
    run = lambda state, _: method.apply(state, jnp.array([3.0, 0.01, 0.0]))[::-1]
    state, _ = jax.jit(lambda: jax.lax.scan(run, method.init(3), length=2000))()
    np.testing.assert_allclose(state.inner.log_var, [np.log(3.0), 0.0, 0.0], atol=1e-3)


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf])
def test_the_largest_weight_must_be_positive_and_finite(name, bad):
    with pytest.raises(ValueError, match="max_weight: expected a finite number above 0, found"):
        getattr(scalarization, name)(max_weight=bad)


@pytest.mark.parametrize("name", LEARNED)
def test_no_weight_is_beyond_the_largest(name):
    """And below it a weight is what it is without a bound."""
    losses = np.float32([0.5, 2.0])
    weights = lambda **given: mtl.diagnostics.effective_weights(
        method := getattr(scalarization, name)(**given), method.init(2), losses
    )
    np.testing.assert_allclose(weights(max_weight=0.125), 0.125, rtol=1e-6)
    np.testing.assert_array_equal(weights(), weights(max_weight=1e30))
