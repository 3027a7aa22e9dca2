"""Alpha-fair weights: the residual of their equations in float64, for alpha on both sides of 1."""

import jax
import numpy as np
import pytest

from mtlbalance.solvers import alpha_fair, nash_bargaining
from tests.solvers import problems

SOLVE = jax.jit(alpha_fair)
BATCH = jax.jit(jax.vmap(alpha_fair, in_axes=(0, None, 0)))


def residuals(gramian, weights, alpha):
    """Largest error of an equation relative to its right side, over the condition of its left one."""
    gramian, weights = gramian.astype(float), weights.astype(float)
    live = np.diag(gramian) > 0
    gramian, weights = gramian[live][:, live], weights[live]
    goal = weights ** (-1 / alpha)
    condition = np.maximum(1, np.abs(gramian) @ weights / goal)
    return np.max(np.abs(gramian @ weights / goal - 1) / condition, initial=0)


# For alpha beyond [1/2, 2].
HARDEST = "norms over 1e6", "opposite pairs", "Pareto-stationary, norms over 1e6"


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 5.0])
def test_equations(alpha):
    """Within 1e-5, or 1e-4 where alpha is not 1, of the condition of the sums. Where a combination of rows vanishes
    nothing solves the equations, but there too the ridge leaves no more."""
    kinds = [kind for kind in problems.KINDS if 0.5 <= alpha <= 2 or kind not in HARDEST]
    for width, sizes in problems.PADDED.items():
        for size in sizes:
            matrices = problems.gramians(size, kinds=kinds)
            padded, _, mask = problems.padded(matrices, matrices[:, 0], width)
            weights = np.asarray(BATCH(padded, alpha, mask))
            assert not weights[:, size:].any()
            for matrix, found in zip(matrices, weights[:, :size], strict=True):
                assert np.all(np.isfinite(found))
                np.testing.assert_array_equal(found > 0, np.diag(matrix) > 0)
                assert residuals(matrix, found, alpha) <= (1e-5 if alpha == 1 else 1e-4)


@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_beyond_the_bounds_weights_are_finite(alpha):
    for size in 3, 11:
        matrices = problems.gramians(size, kinds=HARDEST)
        padded, _, mask = problems.padded(matrices, matrices[:, 0], 11)
        weights = np.asarray(BATCH(padded, alpha, mask))
        assert np.all(np.isfinite(weights))
        assert np.all(weights >= 0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_as_scipy_solves_them(alpha):
    optimize = pytest.importorskip("scipy.optimize")
    for size in 2, 3, 5, 11:
        for matrix in problems.gramians(size, seed=2, count=10, kinds=("generic", "norms over 1e3")):
            start = np.asarray(SOLVE(matrix, alpha), float)
            double = matrix.astype(float)
            # From here, or it stops early: the equation in the logarithms of the weights.
            equation = lambda x, double=double: np.log(np.maximum(double @ np.exp(x), 1e-300)) + x / alpha
            exact = np.exp(optimize.root(equation, np.log(start), tol=1e-13).x)
            np.testing.assert_allclose(start, exact, rtol=2e-4 if alpha < 1 else 2e-5)


def test_orthogonal_gradients_in_closed_form():
    norms = np.array([1e-3, 1.0, 2e3])
    for alpha in 0.5, 1.0, 2.0, 5.0:
        expected = norms ** (-2 / (1 + 1 / alpha))
        np.testing.assert_allclose(SOLVE(np.diag(norms**2), alpha), expected, rtol=1e-5)


def test_alpha_1_is_the_bargaining_solution():
    bargaining = jax.jit(nash_bargaining)
    for matrix in problems.gramians(5, count=9):
        np.testing.assert_array_equal(SOLVE(matrix, 1.0), bargaining(matrix))


def test_float64():
    matrices = problems.gramians(8, dtype="float64", count=40, kinds=("generic", "norms over 1e6", "near-duplicates"))
    mask = np.ones((40, 8), bool)
    weights = problems.in_float64(lambda matrix, mask: BATCH(matrix, 2.0, mask), matrices, mask)
    for matrix, found in zip(matrices, weights, strict=True):
        assert residuals(matrix, found, 2.0) <= 1e-13
