"""DWA: epochs, and what its averages do at the edges."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized


@partial(jax.jit, static_argnums=0)
def weights_of(method, state):
    return jax.grad(method.apply, argnums=1, has_aux=True)(state, jnp.ones_like(state.average))[0]


def after_epochs(method, *epochs):
    """The state after epochs of one call each."""
    state = method.init(len(epochs[0]))
    for losses in epochs:
        state = method.end_epoch(method.apply(state, np.float32(losses))[1])
    return state


def weights_by_rates(*rates):
    """Rates over the temperature."""
    return len(rates) * np.exp(rates) / np.sum(np.exp(rates))


def test_weights_are_one_for_two_epochs():
    method = scalarization.dwa()
    state = method.init(2)
    for losses in [1.0, 3.0], [5.0, 2.0]:
        np.testing.assert_array_equal(weights_of(method, state), [1.0, 1.0])
        state = method.end_epoch(method.apply(state, np.float32(losses))[1])
    np.testing.assert_allclose(weights_of(method, state), weights_by_rates(5.0 / 2, 2.0 / 3.0 / 2), rtol=1e-6)


def test_a_zero_older_average_has_rate_one():
    method = scalarization.dwa(temperature=1.0)
    state = after_epochs(method, [0.0, 2.0], [5.0, 6.0])
    np.testing.assert_allclose(weights_of(method, state), weights_by_rates(1.0, 3.0), rtol=1e-6)


def test_a_huge_rate_takes_all_the_weight():
    method = scalarization.dwa()
    for older in 1e-38, 1e-44:  # the second is subnormal
        state = after_epochs(method, [older, 1.0], [1e3, 1.0])
        weights = weights_of(method, state)
        chex.assert_tree_all_finite(weights)
        np.testing.assert_allclose(np.sum(np.asarray(weights)), 2.0, rtol=1e-6)


def test_consistently_negative_losses_are_like_positive_ones():
    method = scalarization.dwa()
    negative = after_epochs(method, [-1.0, -4.0], [-2.0, -3.0])
    positive = after_epochs(method, [1.0, 4.0], [2.0, 3.0])
    np.testing.assert_array_equal(weights_of(method, negative), weights_of(method, positive))


def test_an_epoch_without_calls_is_no_epoch():
    method = scalarization.dwa()
    state = after_epochs(method, [1.0, 4.0], [2.0, 3.0])
    chex.assert_trees_all_equal(method.end_epoch(state), state)
    chex.assert_trees_all_equal(method.end_epoch(method.init(2)), method.init(2))


def test_averages_are_over_the_calls_in_which_a_task_was_present():
    method = scalarization.dwa()
    losses = np.random.default_rng(0).uniform(0.5, 2.0, (50, 3)).astype(np.float32)
    masks = np.random.default_rng(1).uniform(size=(50, 3)) < 0.4
    state = method.init(3)
    for values, mask in zip(losses, masks, strict=True):
        state = method.apply(state, np.where(mask, values, np.float32(np.nan)), mask=mask)[1]
    np.testing.assert_array_equal(state.count, masks.sum(0))
    np.testing.assert_allclose(state.average, np.mean(losses, axis=0, where=masks), rtol=1e-5)
    others = np.array([True, True, False])
    absent_all_epoch = method.apply(method.end_epoch(state), np.ones(3, np.float32), mask=others)[1]
    closed = method.end_epoch(absent_all_epoch)
    np.testing.assert_array_equal(closed.newer, np.where(others, np.float32(1), state.average))
    np.testing.assert_array_equal(np.asarray(closed.older)[2], 0.0)


def test_a_large_loss_does_not_overflow_the_average():
    method = scalarization.dwa()
    state = method.init(1)
    for _ in range(3):
        state = method.apply(state, np.float32([2e38]))[1]
    np.testing.assert_allclose(state.average, [2e38], rtol=1e-6)


def test_steps_per_epoch_is_end_epoch_after_that_many_calls():
    losses = np.random.default_rng(0).uniform(0.1, 1, (12, 3)).astype(np.float32)
    by_itself, by_hand = scalarization.dwa(steps_per_epoch=4), scalarization.dwa()
    run = jax.jit(lambda: jax.lax.scan(lambda s, x: by_itself.apply(s, x)[::-1], by_itself.init(3), losses)[1])
    scalars = np.asarray(run())
    state = by_hand.init(3)
    for i, values in enumerate(losses):
        scalar, state = by_hand.apply(state, values)
        np.testing.assert_allclose(scalars[i], scalar, rtol=1e-6)
        if i % 4 == 3:
            state = by_hand.end_epoch(state)


def test_bounds():
    for temperature in 0.0, -1.0, float("nan"), np.array(-2.0), jnp.array(-2.0):
        with pytest.raises(ValueError, match="temperature: expected a number above 0, found"):
            scalarization.dwa(temperature)
    with pytest.raises(ValueError, match=r"temperature: expected a scalar, found shape \(3,\)"):
        scalarization.dwa(np.ones(3))
    with pytest.raises(ValueError, match="steps_per_epoch: expected an int of at least 1, found 0"):
        scalarization.dwa(steps_per_epoch=0)
    for never in 2**31, np.uint32(2**32 - 1):
        with pytest.raises(ValueError, match=f"steps_per_epoch: expected an int from 1 to 2147483647, found {never}"):
            scalarization.dwa(steps_per_epoch=never)
    with pytest.raises(TypeError, match=r"steps_per_epoch: expected an int, found 2\.0"):
        scalarization.dwa(steps_per_epoch=2.0)
