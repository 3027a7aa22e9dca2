"""STCH's training rule: its warm-up, its nadir, and tasks that come late. Its values are in tests/golden."""

import jax
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
    return np.array(scalars), state


LOSSES = np.random.default_rng(0).uniform(0.1, 5.0, (12, 3)).astype(np.float32)


def test_warm_up_then_nadir_then_smooth_maximum():
    scalars, state = run(scalarization.stch(0.5, n_warmup_epochs=1), LOSSES, calls_per_epoch=3)
    logs = np.sum(np.log(LOSSES), axis=1)
    np.testing.assert_allclose(scalars[:6], logs[:6], rtol=1e-5)
    nadir = np.mean(LOSSES[3:6], axis=0)
    np.testing.assert_allclose(state.nadir, nadir, rtol=1e-6)
    expected = 3 * 0.5 * np.log(np.sum(np.exp(np.log(LOSSES[6:] / nadir) / 0.5), axis=1))
    np.testing.assert_allclose(scalars[6:], expected, rtol=1e-5, atol=1e-6)


def test_steps_per_epoch_is_end_epoch_after_that_many_calls():
    by_hand, _ = run(scalarization.stch(1.0, n_warmup_epochs=1), LOSSES, calls_per_epoch=3)
    by_itself, state = run(scalarization.stch(1.0, n_warmup_epochs=1, steps_per_epoch=3), LOSSES)
    np.testing.assert_allclose(by_itself, by_hand, rtol=1e-6)
    np.testing.assert_array_equal(state.epoch, [4, 4, 4])


def test_a_late_task_adds_its_logarithm_until_it_has_a_nadir():
    method = scalarization.stch(1.0, n_warmup_epochs=0)
    absent_at_first = np.array([[True, True, False]] * 2 + [[True] * 3] * 2)
    scalars, state = run(method, LOSSES[:4], calls_per_epoch=2, masks=absent_at_first)
    others, _ = run(method, LOSSES[:4, :2], calls_per_epoch=2)
    np.testing.assert_allclose(scalars[:2], others[:2], rtol=1e-5)
    np.testing.assert_allclose(scalars[2:], others[2:] + np.log(LOSSES[2:4, 2]), rtol=1e-5)
    np.testing.assert_array_equal(state.epoch, [2, 2, 1])
    np.testing.assert_allclose(np.asarray(state.nadir)[2], np.mean(LOSSES[2:4, 2]), rtol=1e-6)


def test_losses_of_very_different_scale_count_by_their_progress():
    method = scalarization.stch(1.0, n_warmup_epochs=0)
    start = np.float32([1e-15, 1.0, 1e15])
    _, state = run(method, start[None], calls_per_epoch=1)
    scalar, _ = method.apply(state, start * np.float32([1.0, 0.5, 2.0]))
    np.testing.assert_allclose(scalar, 3 * np.log(3.5), rtol=1e-5)


@pytest.mark.parametrize("nadir", [1.0, 1e-25])
def test_a_zero_loss_has_the_logarithm_of_the_constant(nadir):
    method = scalarization.stch(1.0, n_warmup_epochs=0)
    zero = np.zeros(1, np.float32)
    np.testing.assert_allclose(method.apply(method.init(1), zero)[0], np.log(1e-20), rtol=1e-6)
    _, state = run(method, np.float32([[nadir]]), calls_per_epoch=1)
    # Below the smallest normal number the constant times the nadir is held at that number.
    expected = np.log(max(1e-20, np.finfo(np.float32).tiny / nadir))
    np.testing.assert_allclose(method.apply(state, zero)[0], expected, rtol=1e-5)
    assert np.isfinite(jax.jit(jax.grad(lambda x: method.apply(state, x)[0]))(zero))


@pytest.mark.parametrize("loss", [0.0, -1.0, np.nan])
def test_a_nadir_that_is_not_positive_counts_as_one(loss):
    method = scalarization.stch(1.0, n_warmup_epochs=0)
    _, state = run(method, np.float32([[loss, 1.0]]), calls_per_epoch=1)
    scalar, _ = method.apply(state, np.float32([3.0, 2.0]))
    np.testing.assert_allclose(scalar, 2 * np.log(5.0), rtol=1e-6)
