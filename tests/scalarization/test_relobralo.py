"""ReLoBRaLo: its schedule, its lookback, and tasks that come and go. Its values are in tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized

LOSSES = np.float32([[4.0, 1.0, 0.5], [3.0, 0.9, 0.6], [2.5, 0.7, 0.55]])


def weights_of_calls(method, losses, masks=None):
    state, weights = method.init(3), []
    for i, values in enumerate(losses):
        _, state = method.apply(state, values, mask=None if masks is None else masks[i])
        weights.append(state.weights)
    return np.stack(weights)


def relative(values, reference):
    scores = np.exp(values / reference)
    return 3 * scores / np.sum(scores)


def test_without_memory_every_call_is_relative_to_the_last():
    weights = weights_of_calls(scalarization.relobralo(alpha=0.0), LOSSES)
    expected = [np.ones(3), relative(LOSSES[1], LOSSES[0]), relative(LOSSES[2], LOSSES[1])]
    np.testing.assert_allclose(weights, np.stack(expected), rtol=1e-6)


def test_a_lookback_is_relative_to_the_first_losses():
    weights = weights_of_calls(scalarization.relobralo(alpha=1.0, rho=0.0), LOSSES)
    np.testing.assert_allclose(weights[2], relative(LOSSES[2], LOSSES[0]), rtol=1e-6)


def test_lookbacks_are_drawn_anew_with_their_probability():
    """With full memory nothing else moves the weights: the calls until the first lookback are geometric."""
    losses = np.concatenate([LOSSES[:2], np.tile(LOSSES[2], (60, 1))])

    def calls_until_a_lookback(key):
        method = scalarization.relobralo(alpha=1.0, rho=0.8, key=key)

        def call(state, values):
            _, state = method.apply(state, values)
            return state, state.weights

        _, weights = jax.lax.scan(call, method.init(3), losses)
        looked_back = jnp.all(jnp.isclose(weights[2:], relative(losses[2], losses[0])[None]), axis=1)
        return 1 + jnp.argmax(looked_back), jnp.any(looked_back)

    n_calls, happened = jax.device_get(jax.jit(jax.vmap(calls_until_a_lookback))(np.arange(500)))
    assert np.mean(happened) > 0.99
    mean, deviation = 1 / 0.2, np.sqrt(0.8) / 0.2
    np.testing.assert_allclose(np.mean(n_calls), mean, atol=4 * deviation / np.sqrt(500))


def test_a_task_on_its_first_call_keeps_its_weight_and_the_total_holds():
    masks = np.array([[True, True, False], [True, True, False], [True, True, True]])
    weights = weights_of_calls(scalarization.relobralo(), LOSSES, masks)
    np.testing.assert_array_equal(weights[:2, 2], [1.0, 1.0])
    np.testing.assert_allclose(np.sum(weights[1, :2]), 2.0, rtol=1e-6)
    np.testing.assert_allclose(np.sum(weights[2]), 3.0, rtol=1e-6)


def test_the_constant_counts_for_losses_of_its_size():
    losses = np.float32([[1e-12, 4e-12, 1.0], [1e-12, 2e-12, 1.0]])
    weights = weights_of_calls(scalarization.relobralo(), losses)
    np.testing.assert_allclose(weights[1], relative(np.array([0.5, 0.4, 1.0]), 1), rtol=1e-5)


def test_losses_below_the_constant_get_equal_weights():
    weights = weights_of_calls(scalarization.relobralo(), np.float32([[1e-20, 1e-25, 0.0], [1e-21, 1e-25, 0.0]]))
    np.testing.assert_allclose(weights[1], np.ones(3), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", 0.0), ("alpha", 1.1), ("rho", -0.1), ("rho", float("nan"))]
)
def test_bounds(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected a number .*, found {value}"):
        scalarization.relobralo(**{name: value})
