"""Least value on the simplex: judged in float64 by optimality conditions and a certified bound, not by the weights."""

import jax
import numpy as np
import pytest

from mtlbalance.solvers import simplex_qp
from tests.solvers import problems

SOLVE = jax.jit(simplex_qp)
BATCH = jax.jit(jax.vmap(simplex_qp))


def with_linear(size):
    """Every other problem has a linear term too, small or large beside the matrix."""
    matrices = problems.gramians(size)
    rng = np.random.default_rng(size)
    linear = rng.normal(size=(len(matrices), size)) * 10 ** rng.uniform(-3, 3, (len(matrices), 1))
    linear *= np.array([harmonic(matrix) for matrix in matrices])[:, None] * rng.integers(2, size=(len(matrices), 1))
    return matrices, linear.astype(np.float32)


def harmonic(matrix):
    """Harmonic mean of the squared norms that are not zero."""
    diagonal = np.diag(matrix).astype(float)
    return 1 / np.mean(1 / diagonal[diagonal > 0]) if diagonal.any() else 1.0


def value(matrix, linear, weights):
    return weights @ matrix @ weights / 2 + linear @ weights


def conditional_gap(matrix, linear, weights):
    """How far the value may be above the least one: the linearised problem's optimum is a corner (Frank and Wolfe)."""
    gradient = matrix @ weights + linear
    return gradient @ weights - np.min(gradient)


@pytest.fixture(scope="module")
def solved():
    """By size: matrices, linear terms, weights, and float64 weights of the convex part."""
    results = {}
    for width, sizes in problems.PADDED.items():
        for size in sizes:
            matrices, linear = with_linear(size)
            weights = np.asarray(BATCH(*problems.padded(matrices, linear, width)))
            assert not weights[:, size:].any()
            parts = np.stack([problems.convex(matrix) for matrix in matrices])
            exact = problems.in_float64(BATCH, *problems.padded(parts, linear, 40))
            results[size] = matrices, parts, linear, weights[:, :size], exact[:, :size]
    return results


@pytest.mark.parametrize("size", problems.SIZES)
def test_value_within_a_certified_gap(solved, size):
    """Within 1e-6 of the harmonic mean, and of the range of c; the float64 solution bounds the least value."""
    for _, matrix, linear, weights, exact in zip(*solved[size], strict=True):
        scale = harmonic(matrix) + np.ptp(linear)
        assert np.all(exact >= 0)
        np.testing.assert_allclose(np.sum(exact), 1, rtol=1e-14)
        bound = conditional_gap(matrix, linear, exact)
        assert bound <= 1e-8 * scale
        assert value(matrix, linear, weights.astype(float)) - value(matrix, linear, exact) + bound <= 1e-6 * scale


@pytest.mark.parametrize("size", problems.SIZES)
def test_optimality_conditions(solved, size):
    """On the simplex; no entry's gradient below the mean; at the mean where there is weight. In cosines, as solved."""
    for matrix, _, linear, weights, _ in zip(*solved[size], strict=True):
        weights, matrix = weights.astype(float), matrix.astype(float)
        assert np.all(weights >= 0)
        np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
        norms = np.sqrt(np.maximum(np.diag(matrix), harmonic(matrix) / size + np.ptp(linear)))
        unit = np.min(norms)
        x, gradient = weights * norms / unit, matrix @ weights + linear
        surplus, length = (gradient - gradient @ weights) / norms / unit, 1 + np.linalg.norm(x)
        assert np.min(surplus) >= -2e-6 * length
        assert np.max(np.abs(x * surplus)) <= 2e-6 * length**2


@pytest.mark.parametrize("size", problems.SIZES)
def test_as_good_as_quadprog(solved, size):
    quadprog = pytest.importorskip("quadprog")
    for _, matrix, linear, weights, _ in zip(*solved[size], strict=True):
        norms = np.sqrt(np.diag(matrix))
        norms = np.maximum(norms, np.min(norms, where=norms > 0, initial=np.max(norms) or 1))
        unit = np.min(norms)
        # It wants a positive definite matrix, and leaves the simplex a little.
        constraints = np.column_stack([unit / norms, np.eye(size)])
        ridged, scaled_linear = (
            matrix / norms[:, None] / norms + 1e-8 * np.eye(size),
            linear.astype(float) / norms / unit,
        )
        x = quadprog.solve_qp(ridged, -scaled_linear, constraints, np.eye(size + 1)[0], meq=1)[0]
        theirs = np.maximum(x, 0) / norms
        excess = value(matrix, linear, weights.astype(float)) - value(matrix, linear, theirs / np.sum(theirs))
        assert excess <= 1e-6 * (harmonic(matrix) + np.ptp(linear))


def test_float64():
    matrices = problems.gramians(8, dtype="float64", count=40, kinds=("generic", "norms over 1e6", "near-duplicates"))
    linear = np.zeros((40, 8))
    for matrix, weights in zip(matrices, problems.in_float64(BATCH, matrices, linear), strict=True):
        assert weights.dtype == np.float64
        assert conditional_gap(matrix, linear[0], weights) <= 1e-10 * harmonic(matrix)


def test_two_tasks_in_closed_form():
    for matrix in problems.gramians(2, seed=1, count=50, kinds=("generic", "norms over 1e3", "opposite pairs")):
        (a, b), (_, c) = matrix.astype(float)
        first = np.clip((c - b) / (a + c - 2 * b), 0, 1)
        weights = SOLVE(matrix)
        # The distance from opposite gradients to each other is at least their norms.
        np.testing.assert_allclose(weights, [first, 1 - first], atol=1e-5)


def test_orthogonal_gradients_have_inverse_squared_norms():
    diagonal = np.array([1.0, 2.0, 4e6, 1e12])
    expected = (1 / diagonal) / np.sum(1 / diagonal)
    np.testing.assert_allclose(SOLVE(np.diag(diagonal)), expected, rtol=1e-4, atol=1e-9)


def test_one_task_and_none():
    for number in 0.0, 1e-30, 3.0:
        np.testing.assert_array_equal(SOLVE(np.full((1, 1), number)), [1.0])
    np.testing.assert_array_equal(SOLVE(np.eye(2), mask=np.zeros(2, bool)), [0.0, 0.0])


def test_zero_and_tiny_rows_take_the_weight():
    np.testing.assert_allclose(SOLVE(np.zeros((3, 3))), np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(SOLVE(np.diag([1.0, 0.0, 1e6])), [0.0, 1.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(SOLVE(np.diag([1.0, 1e-30, 1e30])), [0.0, 1.0, 0.0], atol=1e-6)
    # With a linear term it may be dear.
    weights = SOLVE(np.diag([1.0, 0.0]), np.array([0.0, 0.5]))
    np.testing.assert_allclose(weights, [0.5, 0.5], atol=1e-5)


def test_linear_term_without_a_matrix_finds_the_least_entry():
    for linear in [3.0, -1.0, 2.0], [3e20, -1e20, 2e20], [3e-20, -1e-20, 2e-20]:
        np.testing.assert_allclose(SOLVE(np.zeros((3, 3)), np.array(linear)), [0.0, 1.0, 0.0], atol=1e-6)
