"""The dual of conflict-averse descent: judged by its value in float64."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance.solvers import cagrad_dual
from tests.solvers import problems

SOLVE = jax.jit(cagrad_dual)
BATCH = jax.jit(jax.vmap(cagrad_dual, in_axes=(0, None, 0)))
KINDS = list(problems.KINDS)
LOOSE = (
    "norms over 1e6",
    "opposite pairs",
    "rank-deficient",
    "Pareto-stationary",
    "Pareto-stationary, norms over 1e6",
)


def value(gramian, weights, c):
    """The value, and the magnitude of its terms or of a step along the smallest gradient, whichever is larger."""
    gramian, weights = gramian.astype(float), weights.astype(float)
    mean = np.mean(gramian, axis=1)
    radius = c * np.sqrt(max(np.mean(mean), 0))
    length = np.sqrt(max(weights @ gramian @ weights, 0))
    norms = np.sqrt(np.diag(gramian))
    smallest = np.min(norms, where=norms > 0, initial=np.max(norms, initial=0))
    magnitude = weights @ np.abs(mean) + radius * length
    return mean @ weights + radius * length, max(magnitude, (1 + c) / c * radius * smallest)


def gap(gramian, weights, c):
    """How far the value may be above the least one: the linearised problem's optimum is a corner (Frank and Wolfe)."""
    gramian, weights = gramian.astype(float), weights.astype(float)
    mean = np.mean(gramian, axis=1)
    product = gramian @ weights
    gradient = mean + c * np.sqrt(np.mean(mean)) * product / np.sqrt(weights @ product)
    return gradient @ weights - np.min(gradient)


@pytest.mark.parametrize("c", [0.1, 0.5, 1.0, 5.0])
def test_value_is_the_least(c):
    """Within 1e-5 of float64's value, judged on what is convex of the matrix. Within 3 roots of rounding where
    rows cancel, so that the combination's length is known no better, and where norms differ by 1e6."""
    for width, sizes in problems.PADDED.items():
        for size in sizes:
            matrices = problems.gramians(size, kinds=KINDS, count=32)
            padded, _, mask = problems.padded(matrices, matrices[:, 0], width)
            weights = np.asarray(BATCH(padded, c, mask))
            assert not weights[:, size:].any()
            assert np.all(weights >= 0)
            np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=1e-6)
            parts = np.stack([problems.convex(matrix) for matrix in matrices])
            padded, _, mask = problems.padded(parts, parts[:, 0], width)
            exact = problems.in_float64(lambda m, k: BATCH(m, c, k), padded, mask)[:, :size]
            for i, (part, found, best) in enumerate(zip(parts, weights[:, :size], exact, strict=True)):
                least, magnitude = value(part, best, c)
                tolerance = 1e-3 if KINDS[i % len(KINDS)] in LOOSE else 1e-5
                assert value(part, found, c)[0] - least <= tolerance * magnitude


@pytest.mark.parametrize("size", problems.SIZES)
def test_certified_gap(size):
    """No weights give 1e-5 less, whatever float64 says. For generic gradients: the bound multiplies a weight's error
    with the largest norm, and says nothing where rows cancel."""
    matrices = problems.gramians(size, seed=4, count=20, kinds=("generic",))
    padded, _, mask = problems.padded(matrices, matrices[:, 0], 11 if size <= 11 else 40)
    for c in 0.1, 0.5, 5.0:
        for matrix, weights in zip(matrices, np.asarray(BATCH(padded, c, mask))[:, :size], strict=True):
            assert gap(matrix, weights, c) <= 1e-5 * value(matrix, weights, c)[1]


def test_as_good_as_cvxpy():
    cvxpy = pytest.importorskip("cvxpy")
    for size in 2, 3, 5, 11:
        for matrix in problems.gramians(size, seed=2, count=3, kinds=("generic", "opposite pairs", "rank-deficient")):
            part = problems.convex(matrix) / np.max(np.diag(matrix))
            values, vectors = np.linalg.eigh(part)
            rows = vectors * np.sqrt(np.maximum(values, 0))
            mean = np.mean(rows, axis=0)
            weights = cvxpy.Variable(size, nonneg=True)
            objective = (rows @ mean) @ weights + 0.5 * np.linalg.norm(mean) * cvxpy.norm(rows.T @ weights)
            problem = cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(weights) == 1])
            problem.solve(solver="CLARABEL")
            found, magnitude = value(part, np.asarray(SOLVE(jnp.asarray(matrix), 0.5)), 0.5)
            assert found <= problem.value + 1e-5 * magnitude


def test_golden_values():
    """TorchJD's directions, g_0 + c |g_0| g_w / |g_w|."""
    for rows, expected in (
        ([[-4.0, 1, 1], [6, 1, 1]], [0.1835, 1.2041, 1.2041]),
        (
            [[-0.7, -0.7, -1.8, 1.5], [9.2, -6.8, -1.2, 2], [-0.05, 0.575, -0.2, -0.375]],
            [2.67941, -0.729939, -1.61567, 0.0122789],
        ),
    ):
        rows = np.array(rows)
        step = np.asarray(SOLVE(jnp.asarray(rows @ rows.T, jnp.float32), 0.5)) @ rows
        mean = np.mean(rows, axis=0)
        direction = mean + 0.5 * np.linalg.norm(mean) * step / np.linalg.norm(step)
        np.testing.assert_allclose(direction, expected, atol=1e-4)


def test_opposite_gradients_cancel():
    rows = np.array([[1.0, 0], [-2, 0], [0, 1]])
    weights = SOLVE(jnp.asarray(rows @ rows.T, jnp.float32), 1.0)
    np.testing.assert_allclose(weights @ rows, [0, 0], atol=1e-4)


def test_a_zero_gradient_takes_the_weight():
    np.testing.assert_allclose(SOLVE(jnp.diag(jnp.array([1.0, 0.0, 4.0])), 0.5), [0, 1, 0], atol=1e-4)
    np.testing.assert_allclose(SOLVE(jnp.zeros((3, 3)), 0.5), np.full(3, 1 / 3), rtol=1e-5)


def test_without_a_ball_the_least_component_along_the_mean_has_all_weight():
    np.testing.assert_allclose(SOLVE(jnp.diag(jnp.array([4.0, 1.0, 9.0])), 0.0), [0, 1, 0], atol=1e-5)


def test_one_task_and_none():
    np.testing.assert_allclose(SOLVE(jnp.full((1, 1), 4.0), 0.5), [1.0], rtol=1e-6)
    np.testing.assert_array_equal(SOLVE(jnp.eye(2), 0.5, jnp.zeros(2, bool)), [0.0, 0.0])


def test_c_may_be_traced():
    matrix = jnp.asarray(problems.gramians(3, count=1)[0])
    swept = jax.vmap(lambda c: SOLVE(matrix, c))(jnp.array([0.0, 0.5, 2.0]))
    np.testing.assert_allclose(swept, jnp.stack([SOLVE(matrix, c) for c in (0.0, 0.5, 2.0)]), atol=1e-5)


def test_masked_is_the_smaller_problem():
    matrix = jnp.asarray(problems.gramians(5, count=1)[0]).at[1].set(jnp.nan).at[:, 1].set(jnp.nan)
    mask, kept = jnp.array([True, False, True, True, False]), np.array([0, 2, 3])
    weights = SOLVE(matrix, 0.5, mask)
    np.testing.assert_array_equal(weights[np.array([1, 4])], 0)
    np.testing.assert_allclose(weights[kept], SOLVE(matrix[kept][:, kept], 0.5), atol=2e-5)


def test_vmap_is_a_loop():
    matrices = jnp.asarray(problems.gramians(3, count=6, kinds=("generic", "norms over 1e3")))
    looped = jnp.stack([SOLVE(matrix, 0.5) for matrix in matrices])
    np.testing.assert_allclose(BATCH(matrices, 0.5, jnp.ones((6, 3), bool)), looped, atol=2e-5)


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_scale_does_not_matter(factor):
    for matrix in problems.gramians(3, count=6, kinds=("generic", "norms over 1e3")):
        expected = SOLVE(jnp.asarray(matrix), 0.5)
        np.testing.assert_allclose(SOLVE(factor * jnp.asarray(matrix), 0.5), expected, atol=2e-4)


def test_what_is_not_finite_shows():
    assert np.all(np.isnan(SOLVE(jnp.eye(3).at[1].set(jnp.nan), 0.5)))
    assert np.all(np.isnan(SOLVE(jnp.eye(3).at[0, 0].set(jnp.inf), 0.5)))


def test_exports_without_callbacks():
    shape = jax.ShapeDtypeStruct((3, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    exported = jax.export.export(SOLVE, platforms=["cpu", "cuda", "tpu"])(*shape)
    assert not re.search(r"custom_call @\S*callback", exported.mlir_module())
