"""STCH's training rule: its warm-up, its nadir, and tasks that come late. Its values are in tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized


def run(method, losses, calls_per_epoch=None, masks=None):
    """The scalar of every call, and the last state."""
    state, scalars = method.init(losses.shape[1]), []
    for i, values in enumerate(losses):
        scalar, state = method.apply(state, values, mask=None if masks is None else masks[i])
        scalars.append(scalar)
        if calls_per_epoch and i % calls_per_epoch == calls_per_epoch - 1:
            state = method.end_epoch(state)
    return jnp.stack(scalars), state


LOSSES = jax.random.uniform(jax.random.key(0), (12, 3), minval=0.1, maxval=5.0)


def test_warm_up_then_nadir_then_smooth_maximum():
    scalars, state = run(scalarization.stch(0.5, n_warmup_epochs=1), LOSSES, calls_per_epoch=3)
    logs = jnp.sum(jnp.log(LOSSES), axis=1)
    np.testing.assert_allclose(scalars[:6], logs[:6], rtol=1e-5)
    nadir = jnp.mean(LOSSES[3:6], axis=0)
    np.testing.assert_allclose(state.nadir, nadir, rtol=1e-6)
    expected = 3 * 0.5 * jnp.log(jnp.sum(jnp.exp(jnp.log(LOSSES[6:] / nadir[None]) / 0.5), axis=1))
    np.testing.assert_allclose(scalars[6:], expected, rtol=1e-5, atol=1e-6)


def test_steps_per_epoch_is_end_epoch_after_that_many_calls():
    by_hand, _ = run(scalarization.stch(1.0, n_warmup_epochs=1), LOSSES, calls_per_epoch=3)
    by_itself, state = run(scalarization.stch(1.0, n_warmup_epochs=1, steps_per_epoch=3), LOSSES)
    np.testing.assert_allclose(by_itself, by_hand, rtol=1e-6)
    np.testing.assert_array_equal(state.epoch, [4, 4, 4])


def test_a_late_task_adds_its_logarithm_until_it_has_a_nadir():
    method = scalarization.stch(1.0, n_warmup_epochs=0)
    absent_at_first = jnp.array([[True, True, False]] * 2 + [[True] * 3] * 2)
    scalars, state = run(method, LOSSES[:4], calls_per_epoch=2, masks=absent_at_first)
    others, _ = run(method, LOSSES[:4, :2], calls_per_epoch=2)
    np.testing.assert_allclose(scalars[:2], others[:2], rtol=1e-5)
    np.testing.assert_allclose(scalars[2:], others[2:] + jnp.log(LOSSES[2:4, 2]), rtol=1e-5)
    np.testing.assert_array_equal(state.epoch, [2, 2, 1])
    np.testing.assert_allclose(state.nadir[2], jnp.mean(LOSSES[2:4, 2]), rtol=1e-6)


def test_losses_of_very_different_scale_count_by_their_progress():
    method = scalarization.stch(1.0, n_warmup_epochs=0)
    start = jnp.array([1e-15, 1.0, 1e15])
    _, state = run(method, start[None], calls_per_epoch=1)
    scalar, _ = method.apply(state, start * jnp.array([1.0, 0.5, 2.0]))
    np.testing.assert_allclose(scalar, 3 * np.log(3.5), rtol=1e-5)


@pytest.mark.parametrize("nadir", [1.0, 1e-25])
def test_a_zero_loss_has_the_logarithm_of_the_constant(nadir):
    method = scalarization.stch(1.0, n_warmup_epochs=0)
    zero = jnp.zeros(1)
    np.testing.assert_allclose(method.apply(method.init(1), zero)[0], np.log(1e-20), rtol=1e-6)
    _, state = run(method, jnp.array([[nadir]]), calls_per_epoch=1)
    # Below the smallest normal number the constant times the nadir is held at that number.
    expected = np.log(max(1e-20, np.finfo(np.float32).tiny / nadir))
    np.testing.assert_allclose(method.apply(state, zero)[0], expected, rtol=1e-5)
    assert jnp.isfinite(jax.grad(lambda x: method.apply(state, x)[0])(zero))


@pytest.mark.parametrize("loss", [0.0, -1.0, jnp.nan])
def test_a_nadir_that_is_not_positive_counts_as_one(loss):
    method = scalarization.stch(1.0, n_warmup_epochs=0)
    _, state = run(method, jnp.array([[loss, 1.0]]), calls_per_epoch=1)
    scalar, _ = method.apply(state, jnp.array([3.0, 2.0]))
    np.testing.assert_allclose(scalar, 2 * np.log(5.0), rtol=1e-6)
