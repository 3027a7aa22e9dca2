"""Gramian methods against TorchJD's, recorded in float64 by ``record_gramian.py``."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation

RECORDED = json.loads(Path(__file__).with_name("torchjd_gramian.json").read_text())
METHODS = {
    "upgrad": aggregation.upgrad,
    "dual_proj": aggregation.dual_proj,
    "fairgrad": aggregation.fairgrad,
    "imtl_g": aggregation.imtl_g,
    "aligned_mtl": aggregation.aligned_mtl,
    "aligned_mtl_median": lambda: aggregation.aligned_mtl(scale_mode="median"),
    "aligned_mtl_rmse": lambda: aggregation.aligned_mtl(scale_mode="rmse"),
    "config": aggregation.config,
    "krum": lambda: aggregation.krum(n_byzantine=1, n_selected=2),
    "pcgrad": aggregation.pcgrad,
    "gradvac": aggregation.gradvac,
}


def cases(name):
    return [case for case in RECORDED["cases"] if name in case["methods"]]


@pytest.mark.parametrize("name", METHODS)
def test_gradients(name):
    """Within 1e-3 of the Jacobian's norm, but where TorchJD's own float32 is 1e-4 from its float64."""
    method, judged = METHODS[name](), 0
    for case in cases(name):
        rows, expected = jnp.array(case["jacobian"], jnp.float32), case["methods"][name]
        if expected["difference_in_float32"] > 1e-4:
            continue
        gradient, _ = method.apply(method.init(rows.shape), rows)
        error = np.linalg.norm(gradient - np.array(expected["gradient"])) / np.linalg.norm(rows)
        assert error < 1e-3, (case["kind"], rows.shape, error)
        judged += 1
    assert judged >= 0.8 * len(cases(name)), judged


def test_mgda_is_not_longer():
    """By the objective: near the optimum many weights have the same."""
    method = aggregation.mgda()
    for case in cases("mgda"):
        rows = jnp.array(case["jacobian"], jnp.float32)
        gradient, _ = method.apply(method.init(rows.shape), rows)
        theirs = np.linalg.norm(case["methods"]["mgda"]["gradient"])
        # A Gramian in float32 knows a short combination only to a part of the shortest row.
        norms = np.linalg.norm(rows, axis=1)
        shortest = np.min(norms[norms > 0])
        assert np.linalg.norm(gradient) <= (1 + 1e-4) * theirs + 1e-3 * shortest, (case["kind"], rows.shape)


def test_cagrad_has_the_least_gain_of_the_peers():
    """By the objective, the least gain of a task, over the lengths of the gradient and of the shortest of the rows."""
    method = aggregation.cagrad(c=0.5)
    for case in cases("cagrad"):
        rows = np.array(case["jacobian"])
        gradient, _ = method.apply(method.init(rows.shape), jnp.array(rows, jnp.float32))
        expected = np.array(case["methods"]["cagrad"]["gradient"])
        if not expected.any():  # TorchJD takes a short direction for none
            continue
        mean = rows.mean(0)
        assert np.linalg.norm(gradient - mean) <= 0.5001 * np.linalg.norm(mean)
        tolerance = 1e-3 * np.linalg.norm(rows) * np.linalg.norm(mean)
        assert np.min(rows @ np.array(gradient, float)) >= np.min(rows @ expected) - tolerance, case["kind"]


def test_nash_mtl_solves_its_equations():
    """Where no positive combination vanishes; the peers' iterations stop elsewhere on some of these."""
    weighting, judged = aggregation.nash_mtl(max_norm=0.0).gramian_weighting, 0
    for case in RECORDED["cases"]:
        if case["kind"] in ("generic", "aligned", "scales"):
            rows = np.array(case["jacobian"])
            weights, _ = weighting.apply(weighting.init(len(rows)), jnp.array(rows @ rows.T, jnp.float32))
            gains = rows @ (rows.T @ np.array(weights, float))
            np.testing.assert_allclose(weights * gains, np.ones(len(rows)), rtol=1e-3)
            judged += 1
    assert judged == 24


def test_sequence_of_gradvac():
    case = RECORDED["gradvac_sequence"]
    method = aggregation.gradvac()
    state = method.init(np.shape(case["jacobians"][0]))
    for rows, expected in zip(case["jacobians"], case["gradients"], strict=True):
        rows = jnp.array(rows, jnp.float32)
        gradient, state = method.apply(state, rows)
        # A turn divides by sines: 1e-7 of a cosine near 1 is 3e-4 of its sine.
        np.testing.assert_allclose(gradient, expected, atol=1e-4 * np.linalg.norm(rows))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("modo", aggregation.modo),
        ("sdmgrad", aggregation.sdmgrad),
        ("cr_mogm", lambda: aggregation.cr_mogm(aggregation.imtl_g())),
    ],
)
def test_weights_of_ten_calls(name, make):
    case, weighting = RECORDED[name], make().gramian_weighting
    state = weighting.init(4)
    for matrix, expected in zip(case["matrices"], case["weights"], strict=True):
        weights, state = weighting.apply(state, jnp.array(matrix, jnp.float32))
        # SDMGrad's steps are ten times the scaled gradient, twenty of them in a call.
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)


PINNED = {
    "upgrad": [0.2929, 1.9004, 1.9004],
    "dual_proj": [0.5563, 1.1109, 1.1109],
    "fairgrad": [0.0766, 0.9985, 0.9985],
    "mgda": [0.0, 1.0, 1.0],
    "cagrad": [0.1835, 1.2041, 1.2041],
    "nash_mtl": [0.0542, 0.7061, 0.7061],
    "aligned_mtl": [0.2133, 0.9673, 0.9673],
    "config": [0.1588, 2.0706, 2.0706],
    "imtl_g": [0.0767, 1.0, 1.0],
    "pcgrad": [0.5848, 3.8012, 3.8012],
    "gradvac": [0.5848, 3.8012, 3.8012],
}


@pytest.mark.parametrize("name", PINNED)
def test_pinned_gradients(name):
    """The values that TorchJD's own tests pin, with four decimals."""
    method, rows = getattr(aggregation, name)(), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    gradient, _ = method.apply(method.init(rows.shape), rows)
    np.testing.assert_allclose(gradient, PINNED[name], rtol=0, atol=1e-4)
