"""GradDrop and the trimmed mean against TorchJD's, recorded in float64 by ``record_coordinatewise.py``."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("torchjd_coordinatewise.json").read_text())
PURITIES = {"identity": None, "steep": lambda p: 1 / (1 + jnp.exp(-6 * (p - 0.5)))}


def size(case):
    m, _ = np.shape(case["jacobian"])
    return f"m{m}-k{case['trim_number']}" if "trim_number" in case else f"m{m}-leak{max(case['leak'])}-{case['f']}"


@pytest.mark.parametrize("case", RECORDED["trimmed_mean"], ids=size)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.by_default("float32-*")
def test_trimmed_mean(case, dtype):
    """What is kept is the same, so that only its sum is rounded, once for each term and once for the division."""
    rows, expected = np.array(case["jacobian"], np.float32), np.array(list(map(float.fromhex, case["gradient"])))
    with jax.enable_x64(dtype == "float64"):
        method = aggregation.trimmed_mean(case["trim_number"])
        gradient, _ = method.apply(method.init(rows.shape), jnp.array(rows, dtype))
    assert gradient.dtype == dtype
    kept = np.sort(rows, axis=0)[case["trim_number"] : len(rows) - case["trim_number"]]
    # Theirs is rounded as often, in float64.
    roundings = (len(kept) + 1) * (np.finfo(dtype).eps + np.finfo(float).eps) / 2
    assert np.all(np.abs(np.array(gradient, float) - expected) <= roundings * np.mean(np.abs(kept), axis=0))


@pytest.mark.parametrize("case", RECORDED["graddrop"], ids=size)
@pytest.mark.by_default("m2-*", "m8-*-steep")
def test_graddrop(case):
    """The moments of as many draws, of another generator; and those of the two values that a coordinate can have."""
    rows, leak, n_draws = np.array(case["jacobian"]), np.array(case["leak"]), case["n_draws"]

    @jax.jit
    @jax.vmap
    def draw(seed):
        method = aggregation.graddrop(seed, jnp.array(leak, jnp.float32), PURITIES[case["f"]])
        return method.apply(method.init(rows.shape), jnp.array(rows, jnp.float32))[0]

    draws = np.array(draw(jnp.arange(n_draws)), float)
    mean, variance, fourth = exact_moments(rows, leak, case["f"])
    # Rounding, of coordinates that have but one value.
    rounding = 1e-6 * (1 + np.sum(np.abs(rows), axis=0)) ** 2
    mean_error = np.sqrt(variance / n_draws)
    variance_error = np.sqrt(np.maximum(fourth - variance**2, 0) / n_draws)
    # Six standard errors: by chance less than 1e-8 for each of the some hundred numbers. The errors are the exact ones:
    # a coordinate that seldom changes its value has a sample's far off.
    for found, expected, factor in (draws, (mean, variance), 1), (draws, (case["mean"], case["variance"]), 2):
        found_mean, found_variance = np.mean(found, axis=0), np.var(found, axis=0)
        bound = 6 * np.sqrt(factor)
        assert np.all(np.abs(found_mean - expected[0]) <= bound * mean_error + rounding)
        assert np.all(np.abs(found_variance - expected[1]) <= bound * variance_error + rounding)


def exact_moments(rows, leak, purity):
    """Mean, variance and fourth central moment of each coordinate."""
    shares = np.maximum(rows, 0).sum(0) / np.abs(rows).sum(0)
    chance = shares if purity == "identity" else 1 / (1 + np.exp(-6 * (shares - 0.5)))
    leaked = leak[:, None] * rows
    positive = np.where(rows > 0, rows, leaked).sum(0)
    negative = np.where(rows < 0, rows, leaked).sum(0)
    mean = chance * positive + (1 - chance) * negative
    central = lambda power: chance * (positive - mean) ** power + (1 - chance) * (negative - mean) ** power
    return mean, central(2), central(4)


def test_the_recorded_fourth_moments_are_those_of_two_values():
    """So that the standard errors above hold for TorchJD's draws as well."""
    for case in RECORDED["graddrop"]:
        _, _, fourth = exact_moments(np.array(case["jacobian"]), np.array(case["leak"]), case["f"])
        np.testing.assert_allclose(case["fourth"], fourth, rtol=0.2, atol=1e-9)
