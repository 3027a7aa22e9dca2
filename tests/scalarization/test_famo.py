"""FAMO: its second look at the losses. Its values are in tests/golden."""

import functools

import chex
import jax
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized

BEFORE, AFTER = np.float32([1.0, 4.0, 0.3]), np.float32([0.5, 3.9, 0.29])


def test_an_apply_for_evaluation_changes_nothing_unless_its_state_is_kept():
    method = scalarization.famo()
    _, state = method.apply(method.init(3), BEFORE)
    method.apply(state, np.float32([9.0, 9.0, 9.0]))  # on other data, its state dropped
    observed = np.asarray(method.observe(state, AFTER).logits)
    _, kept = method.apply(state, np.float32([9.0, 9.0, 9.0]))
    np.testing.assert_array_equal(kept.previous, 9.0)
    assert np.any(np.asarray(method.observe(kept, AFTER).logits) != observed)
    decrease = np.log(BEFORE / AFTER)
    # The first step of Adam goes against the sign of the gradient.
    np.testing.assert_array_equal(np.sign(observed), -np.sign(decrease - np.mean(decrease)))


def test_delayed_takes_the_next_losses_for_those_after_the_step():
    losses = np.random.default_rng(0).uniform(0.1, 1, (20, 3)).astype(np.float32)
    delayed, method = scalarization.famo(delayed=True), scalarization.famo()
    delayed_state, state = delayed.init(3), method.init(3)
    for i, values in enumerate(losses):
        if i > 0:
            state = method.observe(state, values)
        expected, state = method.apply(state, values)
        scalar, delayed_state = delayed.apply(delayed_state, values)
        np.testing.assert_allclose(scalar, expected, rtol=1e-5, atol=1e-6)
        assert delayed.observe(delayed_state, AFTER) is delayed_state  # nothing to compute, so nothing to evaluate
    chex.assert_trees_all_close(delayed_state, state, rtol=1e-5)


def test_delayed_weights_are_constants_of_differentiation():
    method = scalarization.famo(delayed=True)
    _, state = method.apply(method.init(3), BEFORE)
    weights = jax.jit(jax.grad(lambda x: method.apply(state, x)[0]))(AFTER)
    z = np.exp(method.apply(state, AFTER)[1].logits)
    np.testing.assert_allclose(weights, z / AFTER / np.sum(z / AFTER), rtol=1e-5)


def test_observing_before_the_first_apply_does_nothing():
    method = scalarization.famo(min_losses=0.1)
    chex.assert_trees_all_equal(method.observe(method.init(3), AFTER), method.init(3))


def test_each_task_has_its_own_optimizer():
    """An absent task's logit, moments and step count stay; a task's first step is as long as any first step."""
    method = scalarization.famo()
    two = np.array([True, True, False])
    state = method.init(3)
    for _ in range(5):
        _, state = method.apply(state, np.float32([1.0, 4.0, np.nan]), mask=two)
        state = method.observe(state, np.float32([0.5, 3.9, np.nan]), mask=two)
    assert np.asarray(state.logits)[2] == 0
    _, state = method.apply(state, BEFORE)
    state = method.observe(state, AFTER)
    np.testing.assert_allclose(np.abs(state.logits)[2], 0.025, rtol=1e-3)


@pytest.mark.parametrize("bad", [0.05, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("guard", [lambda method: method, mtl.skip_nonfinite], ids=["bare", "guarded"])
@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.by_default("*-nan", "*-0.05")
def test_a_bad_loss_shows_and_does_not_poison_the_state(bad, guard, delayed):
    """One call with a loss below its bound, or not finite, before the step, and one after it."""
    method = guard(scalarization.famo(min_losses=0.1, delayed=delayed))
    state = method.init(3)
    for i, middle in enumerate([4.0, bad, 3.0, 2.0, 1.5]):
        scalar, state = method.apply(state, np.float32([BEFORE[0], middle, BEFORE[2]]))
        assert np.isfinite(scalar) == (i != 1)
        state = method.observe(state, np.float32([AFTER[0], bad if i == 2 else 0.9, AFTER[2]]))
    logits = np.asarray(getattr(state, "inner", state).logits)
    assert np.all(np.isfinite(logits))
    assert np.all(logits != 0)


def test_bounds():
    for name in "lr", "weight_decay":
        with pytest.raises(ValueError, match=rf"{name}: expected a finite number of at least 0, found -1\.0"):
            scalarization.famo(**{name: -1.0})
    with pytest.raises(ValueError, match=r"min_losses: expected a scalar or one number per task, shape \(3,\)"):
        scalarization.famo(min_losses=[0.0, 1.0]).init(3)


def test_a_loss_below_its_bound_makes_no_other_weight_negative():
    """As the weights share a normalizer, none means anything; absent, the task does not matter."""
    method, losses = scalarization.famo(min_losses=[0.0, 0.5]), np.float32([1.0, 0.14])
    state = method.init(2)
    weights_of = jax.jit(functools.partial(mtl.diagnostics.effective_weights, method))
    assert np.all(np.isnan(weights_of(state, losses)))
    present = np.array([True, False])
    for absent in losses, np.float32([1.0, np.nan]):
        weights = weights_of(state, absent, mask=present)
        np.testing.assert_allclose(weights, [1.0, 0.0], rtol=1e-6)
