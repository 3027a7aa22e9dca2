"""SoftAdapt, CoV-Weighting, LBTW, DTP and group DRO at their edges. Their values are in tests/golden."""

from functools import partial

import jax
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized


def run(method, losses, masks=None):
    losses = np.asarray(losses, np.float32)
    state = method.init(losses[0])
    for i, values in enumerate(losses):
        _, state = method.apply(state, values, mask=None if masks is None else masks[i])
    return state


@partial(jax.jit, static_argnums=0)
def gradient_of(method, state, losses):
    return jax.grad(method.apply, argnums=1, has_aux=True)(state, losses)[0]


def weights_of(method, state, losses=(1.0, 1.0, 1.0)):
    return np.asarray(gradient_of(method, state, np.float32(losses)))


def softmax(*logits):
    return np.exp(logits) / np.sum(np.exp(logits))


# SoftAdapt.


@pytest.mark.parametrize("window", [2, 3, 4, 5, 7, 9])
def test_softadapt_slope_is_exact_for_polynomials_at_the_oldest_loss(window):
    x = np.arange(window)
    losses = np.stack([x**degree - 3.0 * x + 2.0 for degree in (0, 1, window - 1)], axis=1).astype(np.float32)
    state = run(scalarization.softadapt(window=window), losses)
    expected = np.array([-3.0, -2.0, -3.0 + (window == 2)])
    # The coefficients, up to 126 for nine points, multiply losses up to 8**8.
    np.testing.assert_allclose(state.slope, expected, atol=1e-6 * np.max(np.abs(losses)) * 100)
    np.testing.assert_allclose(state.level, losses.mean(0), rtol=1e-5)


def test_softadapt_weights_are_equal_until_a_window_is_full_and_new_at_once():
    method = scalarization.softadapt(beta=1.0, window=3)
    state = method.init(2)
    for i, losses in enumerate(np.float32([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [9.0, 9.0]])):
        weights = weights_of(method, state, losses)
        _, state = method.apply(state, losses)
        expected = [0.5, 0.5] if i < 2 else softmax(1.0, -1.0)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
    np.testing.assert_array_equal(state.count, [1, 1])


def test_softadapt_task_without_a_window_keeps_an_equal_share():
    masks = np.array([[True, True, False]] * 2 + [[True] * 3])
    method = scalarization.softadapt(beta=1.0, window=2)
    state = run(method, [[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [1.0, 1.0, 1.0]], masks)
    expected = [*(2 / 3 * softmax(1.0, 0.0)), 1 / 3]
    assert state.windows.tolist() == [1, 1, 0]
    np.testing.assert_allclose(weights_of(method, state._replace(count=np.zeros(3, np.int32))), expected, rtol=1e-5)


def test_softadapt_normalized_by_slopes_that_add_up_to_zero():
    method = scalarization.softadapt(window=2, variant="normalized")
    state = run(method, [[1.0, 2.0, 5.0], [2.0, 1.0, 5.0]])
    np.testing.assert_allclose(weights_of(method, state), np.full(3, 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
@pytest.mark.parametrize("window", [2, 3, 5, 10, 20])
@pytest.mark.by_default("3-*", "20-original")
def test_softadapt_constant_losses_have_no_slope(window, variant):
    method = scalarization.softadapt(window=window, variant=variant)
    losses = np.float32([1.3e8, 0.7, 1e30])
    state = run(method, np.tile(losses, (window, 1)))
    np.testing.assert_array_equal(state.slope, np.zeros(3))
    expected = losses / losses.sum() if variant == "loss_weighted" else np.full(3, 1 / 3)
    np.testing.assert_allclose(weights_of(method, state), expected, rtol=1e-5)


def test_softadapt_huge_slopes():
    for variant in "original", "normalized", "loss_weighted":
        method = scalarization.softadapt(window=2, variant=variant)
        weights = weights_of(method, run(method, [[1.0, 1.0, 1.0], [1.1e30, 1.1e30, 1.0]]))
        np.testing.assert_allclose(np.sum(weights), 1.0, rtol=1e-6)
        np.testing.assert_allclose(weights[0], weights[1], rtol=1e-6)


def test_softadapt_bounds():
    with pytest.raises(ValueError, match="window: expected an int of at least 2, found 1"):
        scalarization.softadapt(window=1)
    with pytest.raises(ValueError, match="window: expected an int of at most 20, found 21"):
        scalarization.softadapt(window=21)
    with pytest.raises(ValueError, match="beta: expected a finite number, found nan"):
        scalarization.softadapt(beta=float("nan"))
    with pytest.raises(ValueError, match=r"variant: expected one of \('original', .*found 'fancy'"):
        scalarization.softadapt(variant="fancy")
    with pytest.raises(ValueError, match=r"beta: expected a scalar, found shape \(2,\)"):
        scalarization.softadapt(beta=np.ones(2))


# CoV-Weighting.


def test_cov_weighting_is_the_coefficient_of_variation_of_the_ratios():
    losses = np.random.default_rng(0).uniform(0.5, 2.0, (30, 3)).astype(np.float32)
    method = scalarization.cov_weighting()
    means = np.cumsum(losses, axis=0) / np.arange(1, 31)[:, None]
    ratios = np.concatenate([np.ones((1, 3)), losses[1:] / means[:-1]])
    expected = np.sqrt(ratios.var(0) + 1e-8) / ratios.mean(0)
    np.testing.assert_allclose(weights_of(method, run(method, losses)), expected / expected.sum(), rtol=1e-4)


def test_cov_weighting_new_task_has_an_equal_share():
    masks = np.array([[True, True, False]] * 3)
    method = scalarization.cov_weighting()
    weights = weights_of(method, run(method, [[4.0, 1.0, 0.0], [3.0, 0.9, 0.0], [2.5, 0.7, 0.0]], masks))
    np.testing.assert_allclose(weights[2], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(np.sum(weights), 1.0, rtol=1e-6)


def test_cov_weighting_settled_losses_have_equal_weights():
    method = scalarization.cov_weighting()
    for losses in np.zeros((5, 3)), np.tile([1e-30, 1.0, 1e30], (5, 1)):
        np.testing.assert_allclose(weights_of(method, run(method, losses)), np.full(3, 1 / 3), rtol=1e-5)


def test_cov_weighting_after_a_huge_jump():
    """The squares of the deviations would overflow."""
    method = scalarization.cov_weighting()
    losses = np.random.default_rng(1).uniform(0.5, 2.0, (30, 3))
    losses[0, 0] = 1e-20
    state = run(method, losses.astype(np.float32))
    means = np.cumsum(losses, axis=0) / np.arange(1, 31)[:, None]
    ratios = np.concatenate([np.ones((1, 3)), losses[1:] / means[:-1]])
    expected = ratios.std(0) / ratios.mean(0)
    np.testing.assert_allclose(weights_of(method, state), expected / expected.sum(), rtol=1e-4)


def test_cov_weighting_bounds():
    with pytest.raises(ValueError, match=r"decay: expected a number from 0 to 1, found 1\.5"):
        scalarization.cov_weighting(1.5)


# LBTW.


def test_lbtw_begins_anew_with_every_epoch():
    method, by_itself = scalarization.lbtw(), scalarization.lbtw(steps_per_epoch=2)
    losses = np.float32([[4.0, 1.0], [1.0, 1.0], [9.0, 9.0], [9.0, 1.0]])
    expected = [[1.0, 1.0], [2 / 3, 4 / 3], [1.0, 1.0], [1.5, 0.5]]
    state, own_state = method.init(2), by_itself.init(2)
    for i, values in enumerate(losses):
        np.testing.assert_allclose(weights_of(method, state, values), expected[i], rtol=1e-6)
        np.testing.assert_allclose(weights_of(by_itself, own_state, values), expected[i], rtol=1e-6)
        _, state = method.apply(state, values)
        _, own_state = by_itself.apply(own_state, values)
        state = method.end_epoch(state) if i % 2 else state


def test_lbtw_zeros():
    method = scalarization.lbtw()
    _, state = method.apply(method.init(3), np.float32([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(weights_of(method, state, [5.0, 1.0, 0.0]), [1.5, 1.5, 0.0], rtol=1e-6)
    np.testing.assert_allclose(weights_of(method, state._replace(initial=np.ones(3, np.float32)), np.zeros(3)), 1)


def test_lbtw_powers_that_would_overflow():
    method = scalarization.lbtw(alpha=3.0)
    _, state = method.apply(method.init(3), np.ones(3, np.float32))
    np.testing.assert_allclose(weights_of(method, state, [1e20, 1e20, 1.0]), [1.5, 1.5, 0.0], rtol=1e-6)
    _, state = method.apply(method.init(3), np.float32([1e-30, 1.0, 1.0]))
    np.testing.assert_allclose(weights_of(method, state, [1e30, 1.0, 1.0]), [3.0, 0.0, 0.0], rtol=1e-6)


def test_lbtw_a_change_of_sign_is_seen():
    method = scalarization.lbtw()
    _, state = method.apply(method.init(3), np.float32([-1.0, 1.0, 1.0]))
    assert np.isnan(method.apply(state, np.ones(3, np.float32))[0])


def test_lbtw_bounds():
    with pytest.raises(ValueError, match=r"alpha: expected a finite number of at least 0, found -0\.5"):
        scalarization.lbtw(-0.5)
    with pytest.raises(ValueError, match="steps_per_epoch: expected an int of at least 1, found 0"):
        scalarization.lbtw(steps_per_epoch=0)


# DTP.


def test_dtp_follows_the_indicators():
    method = scalarization.dtp(gamma=2.0, alpha=0.25)
    state = method.init(3)
    np.testing.assert_array_equal(weights_of(method, state), np.ones(3))
    for indicators in [0.5, 0.9, np.nan], [0.9, 0.9, np.nan]:
        state = method.observe(state, np.float32(indicators), mask=np.array([True, True, False]))
    kpi = np.array([0.6, 0.9])
    np.testing.assert_allclose(weights_of(method, state)[:2], -((1 - kpi) ** 2) * np.log(kpi), rtol=1e-5)
    assert weights_of(method, state)[2] == 1


def test_dtp_at_the_ends_and_beyond():
    method = scalarization.dtp()
    weights = weights_of(method, method.observe(method.init(3), np.float32([0.0, 1.0, 0.5])))
    np.testing.assert_allclose(weights[:2], [-np.log(np.finfo(np.float32).tiny), 0.0], rtol=1e-6)
    beyond = method.observe(method.init(3), np.float32([1.5, -0.1, 0.5]))
    np.testing.assert_array_equal(np.isnan(weights_of(method, beyond)), [True, True, False])


def test_dtp_bounds():
    with pytest.raises(ValueError, match=r"gamma: expected a finite number of at least 0, found -1\.0"):
        scalarization.dtp(gamma=-1.0)
    for alpha in 0.0, 1.5:
        with pytest.raises(ValueError, match=f"alpha: expected a number above 0 and at most 1, found {alpha}"):
            scalarization.dtp(alpha=alpha)


# Group DRO.


def test_group_dro_moves_before_it_weighs():
    method = scalarization.group_dro(robust_step_size=0.5)
    scalar, state = method.apply(method.init(2), np.float32([1.0, 3.0]))
    weights = softmax(0.5, 1.5)
    np.testing.assert_allclose(np.exp(state.log_weights), weights, rtol=1e-6)
    np.testing.assert_allclose(scalar, weights @ [1.0, 3.0], rtol=1e-6)


def test_group_dro_with_losses_that_would_overflow():
    method = scalarization.group_dro(robust_step_size=1.0)
    state = run(method, [[1e30, 2e30, 1e30]] * 3)
    np.testing.assert_array_equal(weights_of(method, state), [0.0, 1.0, 0.0])
    equal = run(method, [[1.1e30] * 3] * 3)
    np.testing.assert_allclose(np.exp(equal.log_weights), np.full(3, 1 / 3), rtol=1e-6)


def test_group_dro_stays_finite_at_the_largest_numbers():
    method = scalarization.group_dro(robust_step_size=1.0)
    state = run(method, [[3e38, -3e38]] * 3)
    scalar, state = method.apply(state, np.ones(2, np.float32), mask=np.array([False, True]))
    assert float(scalar) == 1
    assert np.all(np.isfinite(state.log_weights))


def test_group_dro_bounds():
    for eta in 0.0, float("inf"):
        with pytest.raises(ValueError, match=f"robust_step_size: expected a finite number above 0, found {eta}"):
            scalarization.group_dro(eta)


@jax.jit
def a_million_calls(state, losses):
    apply = scalarization.cov_weighting().apply
    epoch = lambda _, state: jax.lax.scan(lambda state, x: apply(state, x)[::-1], state, losses)[0]
    return jax.lax.fori_loop(0, 2**6, epoch, state)


@pytest.mark.parametrize("seen", [2**20, 2**24, 2**31 - 1])
def test_a_long_run_of_cov_weighting_goes_on_as_it_was(seen):
    """A million calls more: the deviation is that of the ratios, whatever the count, and does not drift."""
    start = scalarization.CoVWeightingState(
        mean_loss=np.ones(2, np.float32),
        mean_ratio=np.ones(2, np.float32),
        deviation=np.float32([0.1, 0.3]),
        seen=np.full(2, seen, np.int32),
    )
    losses = np.float32(1 + np.random.default_rng(0).normal(size=(2**14, 2)) * [0.1, 0.3])
    state = jax.device_get(a_million_calls(start, losses))
    np.testing.assert_allclose(state.deviation, np.std(losses, axis=0), rtol=1e-2)
    np.testing.assert_allclose(state.mean_loss, np.mean(losses, axis=0), rtol=1e-3)
    assert np.all(state.seen > 0)


# Name to a method, the field that is a plain mean, and the one that counts its calls.
MEANS = {
    "dwa": (scalarization.dwa(), "average", "count"),
    "stch": (scalarization.stch(1.0, n_warmup_epochs=0), "nadir", "count"),
    "slaw": (scalarization.slaw(decay=1.0), "mean", "seen"),
    "gradient_shares": (aggregation.gradient_shares(1.0, decay=1.0), "norms", "seen"),
}


@pytest.mark.parametrize(("method", "mean", "count"), MEANS.values(), ids=MEANS)
def test_a_plain_mean_goes_on_after_two_billion_calls(method, mean, count):
    """A millionth of what it lacks at each call: by 1 / n float32 would not move it."""
    is_scalarizer = isinstance(method, mtl.Scalarizer)
    state = method.init(2 if is_scalarizer else (2, 2))
    state = state._replace(**{mean: np.ones(2, np.float32), count: np.full(2, 2**31 - 2, np.int32)})
    now = np.float32([3.0, 9.0])
    for _ in range(3):
        _, state = method.apply(state, now if is_scalarizer else np.diag(now))
    np.testing.assert_allclose(getattr(state, mean), 1 + 3 * (now - 1) / 2**20, rtol=3e-7)
    np.testing.assert_array_equal(getattr(state, count), 2**31 - 1)
