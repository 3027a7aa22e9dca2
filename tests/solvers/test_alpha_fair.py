"""Alpha-fair weights: the residual of their equations in float64, for alpha on both sides of 1."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance.solvers import alpha_fair, nash_bargaining
from tests.solvers import problems

SOLVE = jax.jit(alpha_fair)
BATCH = jax.jit(jax.vmap(alpha_fair, in_axes=(0, None, 0)))
GOLDEN = jnp.array([[6.47, 3.48, -0.57], [3.48, 136.32, -4.88], [-0.57, -4.88, 0.51375]])


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
            start = SOLVE(jnp.asarray(matrix), alpha).astype(float)
            double = matrix.astype(float)
            # From here, or it stops early: the equation in the logarithms of the weights.
            equation = lambda x, double=double: np.log(np.maximum(double @ np.exp(x), 1e-300)) + x / alpha
            exact = np.exp(optimize.root(equation, np.log(start), tol=1e-13).x)
            np.testing.assert_allclose(start, exact, rtol=2e-4 if alpha < 1 else 2e-5)


def test_golden_values():
    """The official code's weights at alpha 1, and the exact ones at alpha 2."""
    np.testing.assert_allclose(SOLVE(GOLDEN, 1.0), [0.47742, 0.134243, 2.564], rtol=2e-5)
    np.testing.assert_allclose(SOLVE(GOLDEN, 2.0), [0.417085, 0.107447, 2.673753], rtol=2e-5)
    np.testing.assert_allclose(SOLVE(jnp.array([[18.0, -22], [-22, 38]]), 1.0), [0.5915, 0.4071], atol=1e-4)


def test_orthogonal_gradients_in_closed_form():
    norms = np.array([1e-3, 1.0, 2e3])
    for alpha in 0.5, 1.0, 2.0, 5.0:
        expected = norms ** (-2 / (1 + 1 / alpha))
        np.testing.assert_allclose(SOLVE(jnp.diag(jnp.asarray(norms**2, jnp.float32)), alpha), expected, rtol=1e-5)


def test_alpha_1_is_the_bargaining_solution():
    for matrix in problems.gramians(5, count=9):
        np.testing.assert_array_equal(SOLVE(jnp.asarray(matrix), 1.0), nash_bargaining(jnp.asarray(matrix)))


def test_alpha_may_be_traced():
    alphas = jnp.array([0.5, 1.0, 2.0])
    looped = jnp.stack([SOLVE(GOLDEN, alpha) for alpha in [0.5, 1.0, 2.0]])
    swept = jax.jit(jax.vmap(lambda alpha: alpha_fair(GOLDEN, alpha)))(alphas)
    np.testing.assert_allclose(swept, looped, rtol=1e-5)


def test_masked_is_the_smaller_problem():
    matrix = jnp.asarray(problems.gramians(5, count=1)[0]).at[1].set(jnp.nan).at[:, 1].set(jnp.nan)
    mask, kept = jnp.array([True, False, True, True, False]), np.array([0, 2, 3])
    weights = SOLVE(matrix, 2.0, mask)
    np.testing.assert_array_equal(weights[np.array([1, 4])], 0)
    np.testing.assert_allclose(weights[kept], SOLVE(matrix[kept][:, kept], 2.0), rtol=1e-5)
    np.testing.assert_array_equal(SOLVE(matrix, 2.0, jnp.zeros(5, bool)), 0)


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_scale_comes_out_as_a_power(factor):
    for matrix in problems.gramians(3, count=9, kinds=("generic", "norms over 1e3", "near-duplicates")):
        expected = factor ** (-1 / 1.5) * SOLVE(jnp.asarray(matrix), 2.0)
        np.testing.assert_allclose(SOLVE(factor * jnp.asarray(matrix), 2.0), expected, rtol=2e-4)


def test_float64_is_kept():
    weights = problems.in_float64(lambda matrix: alpha_fair(matrix, 2.0), np.asarray(GOLDEN))
    assert weights.dtype == np.float64
    assert residuals(np.asarray(GOLDEN), weights, 2.0) <= 1e-13


def test_what_is_not_finite_shows():
    assert np.all(np.isnan(alpha_fair(jnp.eye(3).at[1].set(jnp.nan), 2.0)))
    assert np.all(np.isnan(alpha_fair(jnp.eye(3).at[0, 1].set(jnp.nan), 2.0)))
    assert np.all(np.isnan(alpha_fair(jnp.eye(3).at[0, 0].set(jnp.inf), 2.0)))


def test_exports_without_callbacks():
    shape = jax.ShapeDtypeStruct((3, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    exported = jax.export.export(jax.jit(alpha_fair), platforms=["cpu", "cuda", "tpu"])(*shape)
    assert not re.search(r"custom_call @\S*callback", exported.mlir_module())
