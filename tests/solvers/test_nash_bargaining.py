"""The bargaining solution: the residual of its equations in float64."""

import jax
import numpy as np
import pytest

from mtlbalance.solvers import nash_bargaining
from tests.solvers import problems

SOLVE = jax.jit(nash_bargaining)
BATCH = jax.jit(jax.vmap(nash_bargaining))


def gains(gramian, weights):
    """Every task's weighted gain, 1 at the solution, and the sum of its terms' magnitudes."""
    gramian, weights = gramian.astype(float), weights.astype(float)
    live = np.diag(gramian) > 0
    return weights[live] * (gramian @ weights)[live], weights[live] * (np.abs(gramian) @ weights)[live]


@pytest.fixture(scope="module")
def solved():
    results = {}
    for width, sizes in problems.PADDED.items():
        for size in sizes:
            matrices = problems.gramians(size)
            padded, _, mask = problems.padded(matrices, matrices[:, 0], width)
            weights = np.asarray(BATCH(padded, mask))
            assert not weights[:, size:].any()
            results[size] = matrices, weights[:, :size]
    return results


@pytest.mark.parametrize("size", problems.SIZES)
def test_every_gain_is_1(solved, size):
    """Within 1e-5 times the magnitudes it is the sum of, which is the larger where gradients cancel: a Gramian's last
    digit changes the gain by as much. Opposite and stationary gradients leave no solution, but finite weights."""
    for matrix, weights in zip(*solved[size], strict=True):
        assert np.all(np.isfinite(weights))
        np.testing.assert_array_equal(weights > 0, np.diag(matrix) > 0)
        gain, magnitude = gains(matrix, weights)
        assert np.all(np.abs(gain - 1) <= 1e-5 * np.maximum(1, magnitude))


@pytest.mark.parametrize("size", problems.SIZES)
def test_every_gain_is_1_without_cancellation(size):
    """Outright. A gain adds up magnitudes of about m at most; 50 numbers leave 40 gradients more dependent: 4 m."""
    kinds = "generic", "norms over 1e3", "norms over 1e6", "near-duplicates", "zero rows"
    matrices = problems.gramians(size, seed=3, count=60, kinds=kinds)
    width = next(width for width, sizes in problems.PADDED.items() if size in sizes)
    padded, _, mask = problems.padded(matrices, matrices[:, 0], width)
    for matrix, weights in zip(matrices, np.asarray(BATCH(padded, mask))[:, :size], strict=True):
        gain, magnitude = gains(matrix, weights)
        assert np.max(magnitude, initial=0) <= (4 * size if size == 40 else size + 1)
        # A few 1e-7 of each of the magnitudes.
        np.testing.assert_allclose(gain, 1, atol=1e-6 * size)


def test_every_gain_of_forty_is_1_without_a_mask():
    (matrix,) = problems.gramians(40, seed=3, count=1, kinds=("generic",))
    gain, _ = gains(matrix, np.asarray(SOLVE(matrix)))
    np.testing.assert_allclose(gain, 1, atol=4e-5)


def test_as_cvxpy_finds_it():
    cvxpy = pytest.importorskip("cvxpy")
    for size in 2, 3, 5, 11:
        for matrix in problems.gramians(size, seed=2, count=4, kinds=("generic", "norms over 1e3")):
            norms, cosines = problems.norms_and_cosines(matrix)
            root = np.linalg.cholesky(cosines + 1e-13 * np.eye(size))
            scaled = cvxpy.Variable(size)
            product = cvxpy.sum_squares(root.T @ scaled) / 2 - cvxpy.sum(cvxpy.log(scaled))
            cvxpy.Problem(cvxpy.Minimize(product)).solve(solver="CLARABEL")
            np.testing.assert_allclose(SOLVE(matrix), scaled.value / norms, rtol=2e-4)


def test_two_tasks_have_inverse_norms():
    """Whatever the angle, so that both unit gradients count the same: the weights are 1 / (|g| sqrt(1 + cosine))."""
    for matrix in problems.gramians(2, seed=1, count=50, kinds=("generic", "norms over 1e6", "near-duplicates")):
        norms, cosines = problems.norms_and_cosines(matrix)
        expected = 1 / (norms * np.sqrt(1 + cosines[0, 1]))
        np.testing.assert_allclose(SOLVE(matrix), expected, rtol=1e-5)


def test_one_task_and_none():
    np.testing.assert_allclose(SOLVE(np.full((1, 1), 4.0)), [0.5], rtol=1e-6)
    np.testing.assert_array_equal(SOLVE(np.zeros((2, 2))), [0.0, 0.0])
    np.testing.assert_array_equal(SOLVE(np.eye(2), np.zeros(2, bool)), [0.0, 0.0])


def test_float64():
    matrices = problems.gramians(8, dtype="float64", count=40, kinds=("generic", "norms over 1e6", "near-duplicates"))
    for matrix, weights in zip(matrices, problems.in_float64(BATCH, matrices), strict=True):
        gain, magnitude = gains(matrix, weights)
        assert np.all(np.abs(gain - 1) <= 1e-14 * magnitude)
