"""Keywords of the Gramian methods that are not the default ones, against TorchJD's results in float64."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("torchjd_gramian.json").read_text())["keywords"]
PREFERENCE = np.array(RECORDED[0]["preference"])
METHODS = {
    "upgrad": aggregation.upgrad(PREFERENCE),
    "dual_proj": aggregation.dual_proj(PREFERENCE),
    "aligned_mtl": aggregation.aligned_mtl(PREFERENCE),
    "aligned_mtl, rmse": aggregation.aligned_mtl(PREFERENCE, scale_mode="rmse"),
    "config": aggregation.config(PREFERENCE),
    "upgrad, norm_eps": aggregation.upgrad(norm_eps=1e9),  # above every trace: the weights are the preference
    "upgrad, reg_eps": aggregation.upgrad(reg_eps=1e-2),
    "pcd, tau": aggregation.pcd(tau=0.5),
    "cagrad, c": aggregation.cagrad(c=1.5),
    "fairgrad, alpha": aggregation.fairgrad(alpha=2.0),
    "sdmgrad, lr": aggregation.sdmgrad(lr=0.1, pref_vector=PREFERENCE),
}


@pytest.mark.parametrize("name", METHODS)
def test_gradients(name):
    """FairGrad's weights have powers of the norms for units: relative to the gradient; else to the Jacobian's norm."""
    method = METHODS[name]
    for case in RECORDED:
        rows, expected = np.array(case["jacobian"]), np.array(case["gradients"][name])
        gradient, _ = method.apply(method.init(rows.shape), jnp.array(rows, jnp.float32))
        size = np.linalg.norm(expected if "fairgrad" in name else rows)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-4 * size)


def test_config_minds_only_the_direction_of_the_preference():
    rows = jnp.array(RECORDED[0]["jacobian"], jnp.float32)
    one, other = (aggregation.config(factor * PREFERENCE).apply for factor in (1, -3))
    state = METHODS["config"].init(rows.shape)
    np.testing.assert_allclose(other(state, rows)[0], one(state, rows)[0], rtol=1e-4, atol=1e-5)


def test_a_preference_may_have_the_tasks_names():
    rows = jnp.array(RECORDED[0]["jacobian"], jnp.float32)
    named = aggregation.upgrad(dict(zip("abcd", PREFERENCE, strict=True)))
    state, losses = named.init(rows.shape), dict.fromkeys("abcd", jnp.float32(1.0))
    np.testing.assert_array_equal(named.apply(state, rows, values=losses)[0], METHODS["upgrad"].apply(state, rows)[0])


@pytest.mark.slow
def test_rescaled_cagrad():
    rows = jnp.array(RECORDED[0]["jacobian"], jnp.float32)
    plain, by_square, by_sum = (aggregation.cagrad(0.5, rescale) for rescale in (0, 1, 2))
    state = plain.init(rows.shape)
    gradient = plain.apply(state, rows)[0]
    np.testing.assert_allclose(by_square.apply(state, rows)[0], gradient / 1.25, rtol=1e-6)
    np.testing.assert_allclose(by_sum.apply(state, rows)[0], gradient / 1.5, rtol=1e-6)


def test_cr_mogm_starts_from_given_weights():
    method = aggregation.cr_mogm(aggregation.mean(), alpha=0.5, initial_weights=jnp.array([1.0, 0.0, 0.0]))
    rows, mask = jnp.eye(3), jnp.array([True, True, False])
    weights, state = method.weighting.apply(method.init((3, 3)), rows, mask=mask)
    np.testing.assert_allclose(weights, [0.75, 0.25, 0.0])
    weights, _ = method.weighting.apply(state, rows)
    np.testing.assert_allclose(weights, [0.5417, 0.2917, 0.1667], atol=1e-4)


def test_eps_of_gradvac():
    """At one half of the largest norm it shortens what is added: by 1 / (1 + eps) for equal norms, twice."""
    rows = jnp.array([[1.0, 0.0], [-0.6, 0.8]])
    for eps in 1e-8, 0.5:
        gradient, _ = aggregation.gradvac(eps=eps).apply(aggregation.gradvac().init(rows.shape), rows)
        added = 0.6 / (1 + eps) ** 2
        np.testing.assert_allclose(gradient, (1 + added) * rows.sum(0), rtol=1e-5)
