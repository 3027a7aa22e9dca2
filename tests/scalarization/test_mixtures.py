"""SLAW, CoBa and group DRO with a reference at their edges. Their values are in tests/golden."""

from functools import partial

import jax
import numpy as np
import pytest

from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized


@partial(jax.jit, static_argnums=0)
def gradient_of(method, state, losses, mask):
    return jax.grad(method.apply, argnums=1, has_aux=True)(state, losses, mask=mask)[0]


def weights_of(method, state, losses, mask=None):
    return np.asarray(gradient_of(method, state, np.float32(losses), mask))


def after(method, losses, masks=None, hook="apply"):
    """The state after these calls of ``apply``, or of ``observe``."""
    state = method.init(len(losses[0]))
    for i, values in enumerate(losses):
        mask = None if masks is None else np.array(masks[i])
        new = getattr(method, hook)(state, np.float32(values), mask=mask)
        state = new if hook == "observe" else new[1]
    return state


# SLAW.


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_slaw_does_not_depend_on_the_unit(scale):
    losses = np.array([[1.0, 3.0], [1.5, 2.0], [1.25, 2.5]]) * [1, scale]
    expected = 1 / np.array([np.std([1.0, 1.5, 1.25]), np.std([3.0, 2.0, 2.5])]) / [1, scale]
    weights = weights_of(scalarization.slaw(), after(scalarization.slaw(), losses[:2]), losses[2])
    np.testing.assert_allclose(weights, 2 * expected / np.sum(expected), rtol=1e-5, atol=1e-30)


def test_slaw_of_losses_that_do_not_move():
    """A constant one counts as if it moved by a hundred-thousandth, one that is always zero has an equal share."""
    method, losses = scalarization.slaw(), np.array([[2.0, 1.0, 0.0], [2.0, 3.0, 0.0]])
    weights = weights_of(method, after(method, losses[:1]), losses[1])
    scores = np.array([1 / 2e-5, 1.0])
    np.testing.assert_allclose(weights, [*(2 * scores / np.sum(scores)), 1.0], rtol=1e-5)
    np.testing.assert_allclose(weights_of(method, after(method, np.zeros((2, 3))), np.zeros(3)), 1)


def test_slaw_new_task_has_an_equal_share():
    method, masks = scalarization.slaw(), [[True, True, False]] * 2
    state = after(method, [[1.0, 2.0, np.nan], [2.0, 4.0, np.nan]], masks)
    np.testing.assert_allclose(weights_of(method, state, [1.0, 2.0, 9.0]), [4 / 3, 2 / 3, 1], rtol=1e-5)


def test_slaw_forgets():
    """A decay of 0 leaves nothing but the last loss, which does not move; of 1/2 mostly the last differences."""
    losses = [[100.0, 1.0], [1.0, 1.0], *[[1.0 + i % 2, 1.0 + 2 * (i % 2)] for i in range(40)]]
    np.testing.assert_allclose(weights_of(scalarization.slaw(0.0), after(scalarization.slaw(0.0), losses), [1, 1]), 1)
    method = scalarization.slaw(0.5)
    np.testing.assert_allclose(weights_of(method, after(method, losses[:-1]), losses[-1]), [4 / 3, 2 / 3], rtol=1e-3)


def test_slaw_bounds():
    with pytest.raises(ValueError, match=r"decay: expected a number from 0 to 1, found 1\.5"):
        scalarization.slaw(1.5)
    with pytest.raises(ValueError, match=r"eps: expected a finite number of at least 0, found -1\.0"):
        scalarization.slaw(eps=-1.0)


# CoBa.


def coba(**settings):
    return scalarization.coba(**{"window": 8, "n_warmup_steps": 3} | settings)


def falling(*rates, n=8):
    return np.exp(-np.array(rates) * np.arange(n)[:, None])


def test_coba_favours_who_converges_slowly_until_that_one_diverges():
    method, ones = coba(), np.ones(2)
    slowly = weights_of(method, after(method, falling(0.3, 0.05), hook="observe"), ones)
    assert slowly[1] > 0.6
    turned = np.concatenate([falling(0.3, 0.05, n=6), [[0.15, 0.9], [0.12, 1.1], [0.1, 1.3]]])
    assert weights_of(method, after(method, turned, hook="observe"), ones)[1] < 0.4


def test_coba_waits_for_its_warm_up():
    method, losses = coba(), falling(0.3, 0.05, n=5)
    for n in range(1, 6):
        weights = weights_of(method, after(method, losses[:n], hook="observe"), [1.0, 5.0])
        assert (weights[0] == weights[1]) == (n <= 3), n  # the first losses and two of three


def test_coba_apply_changes_nothing():
    method = coba()
    state = after(method, falling(0.3, 0.05), hook="observe")
    _, same = method.apply(state, np.float32([7.0, 0.1]))
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("level", [0.0, 1e-30, 0.7, 1e30])
def test_coba_without_slopes_weighs_equally(level):
    method = coba()
    state = after(method, np.full((9, 3), level), hook="observe")
    np.testing.assert_array_equal(state.slopes, 0)
    np.testing.assert_allclose(weights_of(method, state, np.ones(3)), 1 / 3, rtol=1e-6)


def test_coba_ratios_that_would_overflow():
    method = coba()
    losses = np.concatenate([np.full((1, 3), 1e-30), 1e30 * falling(0.1, 0.2, -0.1, n=9)])
    state = after(method, losses, hook="observe")
    weights = weights_of(method, state, np.ones(3))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state, weights)))
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)


def test_coba_no_weight_falls_below_a_tenth_of_an_equal_one():
    method = coba(tau=0.0)  # the relative scores alone
    losses = falling(-0.5, 0.01, 0.02, 0.03, 0.04, 0.05, n=9)
    weights = weights_of(method, after(method, losses, hook="observe"), np.ones(6))
    assert 1 / 60 < np.min(weights) < 1.2 / 60
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)


def test_coba_late_task_waits_with_an_equal_share():
    """The others divide the rest as they would alone."""
    method, losses = coba(), falling(0.3, 0.05, 1.0)
    masks = [[True, True, i > 5] for i in range(8)]
    weights = weights_of(method, after(method, losses, masks, hook="observe"), np.ones(3))
    alone = weights_of(method, after(method, losses[:, :2], hook="observe"), np.ones(2))
    np.testing.assert_allclose(weights[2], 1 / 3, rtol=1e-6)
    # The newcomer's ratio never is the largest.
    np.testing.assert_allclose(weights[:2], 2 / 3 * alone, rtol=1e-5)


def test_coba_bounds():
    with pytest.raises(ValueError, match=r"tau: expected a finite number of at least 0, found -1\.0"):
        scalarization.coba(-1.0)
    with pytest.raises(ValueError, match="window: expected an int of at least 2, found 1"):
        scalarization.coba(window=1)
    with pytest.raises(ValueError, match="n_warmup_steps: expected an int of at least 1, found 0"):
        scalarization.coba(n_warmup_steps=0)


# Group DRO with a reference, and smoothed.


def test_group_dro_follows_what_exceeds_the_reference():
    method = scalarization.group_dro(0.5, {"code": 1.0, "text": 3.0})
    losses = {"code": np.float32(2.0), "text": np.float32(2.5)}
    scalar, state = method.apply(method.init(losses), losses)
    scores = np.exp([0.5, 0.0])  # text is better than its reference: that is no excess
    expected = scores / np.sum(scores)
    np.testing.assert_allclose(np.exp(state.log_weights), expected, rtol=1e-6)
    np.testing.assert_allclose(scalar, expected @ [2.0, 2.5], rtol=1e-6)  # of the losses themselves
    with pytest.raises(ValueError, match=r"reference: expected the losses' names \['a', 'b'\]"):
        method.init({"a": 0.0, "b": 0.0})


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_group_dro_smoothing_gives_every_task_its_least(smoothing):
    """To absent ones nothing, and of the others' total."""
    method = scalarization.group_dro(1.0, smoothing=smoothing)
    state = after(method, [[1e30, 1.0, 1.0]] * 3)
    least = smoothing / 3
    np.testing.assert_allclose(np.exp(state.log_weights), [1 - 2 * least, least, least], rtol=1e-5, atol=1e-30)
    losses, mask = np.float32([9.0, 1.0, 2.0]), np.array([False, True, True])
    weights = weights_of(method, state, losses, mask)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-5)
    _, masked = method.apply(state, losses, mask=mask)
    masked, before = np.asarray(masked.log_weights), np.asarray(state.log_weights)
    assert masked[0] == before[0]
    np.testing.assert_allclose(np.sum(np.exp(masked)), 1, rtol=1e-5)


def test_group_dro_average_is_over_the_calls_of_each_task():
    method, masks = scalarization.group_dro(0.5), [[True, True, True], [True, False, True], [True, True, True]]
    state, rows = method.init(3), []
    for losses, mask in zip([[1.0, 2.0, 0.5], [3.0, np.nan, 1.0], [0.1, 0.2, 2.0]], masks, strict=True):
        _, state = method.apply(state, np.float32(losses), mask=np.array(mask))
        rows.append(np.exp(state.log_weights))
    np.testing.assert_allclose(state.average, np.average(rows, axis=0, weights=masks), rtol=1e-5)
    np.testing.assert_array_equal(state.seen, [3, 2, 3])


def test_group_dro_bounds_of_the_smoothing():
    with pytest.raises(ValueError, match=r"smoothing: expected a number from 0 to 1, found 1\.5"):
        scalarization.group_dro(smoothing=1.5)
    with pytest.raises(ValueError, match=r"reference: .*shape \(3,\), found shape \(2,\)"):
        scalarization.group_dro(reference=np.ones(2)).init(3)


def test_a_methods_hyperparameters_act_through_constants():
    """Their gradient is zero, not NaN: the logarithm of no smoothing is infinite."""

    def scalar(step_size, reference, smoothing):
        method = scalarization.group_dro(step_size, reference, smoothing)
        return method.apply(method.init(3), np.float32([1.0, 2.0, 0.5]))[0]

    assert jax.device_get(jax.jit(jax.grad(scalar, argnums=(0, 1, 2)))(0.1, 0.5, 0.0)) == (0, 0, 0)
