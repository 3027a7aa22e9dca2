"""STCH, COSMOS, PBI and constant weights: what a preference does, and two hundred of them in one program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import scalarization

pytestmark = pytest.mark.unoptimized

FIRST = np.linspace(0.0025, 0.9975, 200, dtype=np.float32)
PREFERENCES = np.stack([FIRST, 1 - FIRST], axis=1)
LOSSES = np.float32([0.3, 2.0])
METHODS = {
    "constant": scalarization.constant,
    "stch": lambda preference: scalarization.stch(0.1, preference),
    "cosmos": lambda preference: scalarization.cosmos(2.0, preference),
    "pbi": lambda preference: scalarization.pbi(5.0, preference),
}


def value_and_weights(method, losses=LOSSES):
    (scalar, _), weights = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(method.init(losses), losses)
    return scalar, weights


@partial(jax.jit, static_argnums=0)
def traced(build, *hyperparameters, losses=LOSSES):
    """Compiled once for all hyperparameters: they are traced."""
    return value_and_weights(build(*hyperparameters), losses)


@pytest.mark.parametrize("build", METHODS.values(), ids=METHODS.keys())
def test_two_hundred_preferences_in_one_program(build):
    of_all = jax.jit(jax.vmap(lambda preference: value_and_weights(build(preference))))
    scalars, weights = jax.device_get(of_all(PREFERENCES))
    chosen = 0, 77, 199
    one_by_one = jax.jit(lambda: [value_and_weights(build(PREFERENCES[i])) for i in chosen])
    for i, (scalar, row) in zip(chosen, one_by_one(), strict=True):
        np.testing.assert_allclose(scalars[i], scalar, rtol=1e-5)
        np.testing.assert_allclose(weights[i], row, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("build", METHODS.values(), ids=METHODS.keys())
def test_named_preferences_and_wrong_ones(build):
    names = {"b": 0.25, "a": 0.75}
    method, losses = build(names), {"a": np.float32(0.3), "b": np.float32(2.0)}
    scalar, _ = method.apply(method.init(losses), losses)
    np.testing.assert_allclose(scalar, traced(build, np.float32([0.75, 0.25]))[0], rtol=1e-6)
    for wrong in np.ones(3), 1.0:
        with pytest.raises(ValueError, match=r"weights: expected one number per task, shape \(2,\), found shape"):
            build(wrong).init(2)


def test_stch_tends_to_the_weighted_maximum():
    preference, reference = np.float32([0.25, 0.75]), np.float32([-1.0, 0.5])
    maximum = np.max(preference * (LOSSES - reference))
    gaps = [np.asarray(traced(scalarization.stch, mu, preference, reference)[0]) - maximum for mu in (1.0, 0.1, 1e-3)]
    assert gaps[0] > gaps[1] > gaps[2] >= 0
    assert gaps[2] < 1e-6
    for mu, gap in zip((1.0, 0.1, 1e-3), gaps, strict=True):
        assert gap <= mu * np.log(2) + 1e-6  # the bound of the paper's proposition


def test_cosmos_rewards_the_direction_at_any_scale():
    preference = np.float32([0.6, 0.8])
    for scale in 1e-30, 1.0, 1e30:
        losses = np.float32(scale) * LOSSES
        linear, scalar = (traced(scalarization.cosmos, x, preference, losses=losses)[0] for x in (0.0, 1.0))
        np.testing.assert_allclose(linear, scale * (preference @ LOSSES), rtol=1e-6)
        if scale <= 1:  # the cosine is lost in the digits of the huge sum
            expected = np.asarray(linear) - preference @ LOSSES / np.linalg.norm(LOSSES)
            np.testing.assert_allclose(scalar, expected, rtol=1e-6)


def test_pbi_on_the_ray_and_beside_it():
    preference = np.float32([3.0, 4.0])
    for length in 1e-30, 1.0, 1e30:
        scalar, weights = traced(scalarization.pbi, 5.0, preference, losses=np.float32(length) * preference / 5)
        # The rounding of the losses puts them beside the ray by a few 1e-8 of their length.
        np.testing.assert_allclose(scalar, length, rtol=1e-5, atol=5e-6)
        assert np.all(np.isfinite(weights))
    scalar, _ = traced(scalarization.pbi, 5.0, preference, 1.0, losses=np.float32([1.0 - 0.8, 1.0 + 0.6]))
    np.testing.assert_allclose(scalar, 5.0, rtol=1e-6)  # at distance 1, at right angles


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: scalarization.stch(0.0), "mu: expected a finite number above 0, found 0.0"),
        (lambda: scalarization.stch(1.0, n_warmup_epochs=-1), "n_warmup_epochs: expected an int of at least 0"),
        (lambda: scalarization.stch(1.0, np.ones(2), n_warmup_epochs=1), "n_warmup_epochs: expected None together"),
        (lambda: scalarization.stch(1.0, reference=[0.0], n_warmup_epochs=1), "n_warmup_epochs: expected None"),
        (lambda: scalarization.stch(1.0, n_warmup_epochs=1, steps_per_epoch=0), "steps_per_epoch: expected an int"),
        (lambda: scalarization.stch(1.0, steps_per_epoch=5), "steps_per_epoch: expected None without n_warmup_epochs"),
        (
            lambda: scalarization.cosmos(-1.0, np.ones(2)),
            "lambda_: expected a finite number of at least 0, found -1.0",
        ),
        (lambda: scalarization.pbi(-1.0, np.ones(2)), "theta: expected a finite number of at least 0, found -1.0"),
        (
            lambda: scalarization.pbi(1.0, jnp.zeros(2)).init(2),
            "weights: expected a number of at least 0, not all",
        ),
        (
            lambda: scalarization.pbi(1.0, [1.0, -1.0]).init(2),
            "weights: expected a number of at least 0, not all",
        ),
        (lambda: scalarization.pbi(1.0, np.ones(2), [1.0]).init(2), "reference: expected a scalar or one number per"),
    ],
)
def test_bounds(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_stch_shows_a_loss_that_is_not_finite(bad):
    scalar, weights = traced(scalarization.stch, 1.0, losses=np.float32([1.0, bad]))
    assert not np.isfinite(scalar)
    assert not np.all(np.isfinite(weights))
