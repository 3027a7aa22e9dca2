"""Priority-constrained descent: judged in float64 by optimality conditions."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance.solvers import priority_constrained
from tests.solvers import problems

SOLVE = jax.jit(priority_constrained)
BATCH = jax.jit(jax.vmap(priority_constrained, in_axes=(0, None, 0)))
FREE = "generic", "norms over 1e3", "norms over 1e6", "zero rows"


def worst(gramian, weights, tau):
    """Largest violation of a constraint or of complementarity, as lengths, over the length of what is added up."""
    norms, cosines = problems.norms_and_cosines(gramian)
    parts = norms * weights.astype(float)
    slack = (cosines @ parts - tau * norms)[1:]
    size = np.sum(np.abs(parts)) + tau * np.max(norms)
    tight = np.minimum(parts[1:], slack)
    return max(np.max(np.where(norms[1:] > 0, np.abs(tight), 0), initial=0) / size if size else 0, -np.min(parts))


@pytest.mark.parametrize("size", problems.SIZES)
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
def test_optimality_conditions(size, tau):
    """Within 1e-5, or 1e-4 where gradients cancel, of the length of what is added up, unless constraints contradict."""
    width = next(width for width, sizes in problems.PADDED.items() if size in sizes)
    for kinds in FREE, [kind for kind in problems.KINDS if kind not in FREE]:
        matrices = problems.gramians(size, kinds=kinds, count=63)
        padded, _, mask = problems.padded(matrices, matrices[:, 0], width)
        weights = np.asarray(BATCH(padded, tau, mask))
        assert not weights[:, size:].any()
        assert np.all(np.isfinite(weights))
        np.testing.assert_array_equal(weights[:, 0], 1)
        for matrix, found in zip(matrices, weights[:, :size], strict=True):
            dropped = not found[1:].any() and kinds != FREE and tau > 0
            assert worst(matrix, found, tau) <= (1e-5 if kinds == FREE else 1e-4) or dropped


def test_as_good_as_quadprog():
    quadprog = pytest.importorskip("quadprog")
    for size in 2, 3, 5, 11:
        for matrix in problems.gramians(size, seed=2, count=12, kinds=("generic", "norms over 1e3", "near-duplicates")):
            norms, cosines = problems.norms_and_cosines(matrix)
            rows = np.linalg.cholesky(cosines + 1e-13 * np.eye(size))
            step = quadprog.solve_qp(np.eye(size), norms[0] * rows[0], rows[1:].T, 0.1 * norms[1:])[0]
            found = (norms * np.asarray(SOLVE(jnp.asarray(matrix), 0.1), float)) @ rows
            # The distance's square is what the rounding of the matrix leaves determined.
            primary = norms[0] * rows[0]
            distance, least = np.sum((found - primary) ** 2), np.sum((step - primary) ** 2)
            np.testing.assert_allclose(distance, least, atol=1e-5 * (np.sum(primary**2) + np.sum(step**2)))


def test_one_violated_constraint_in_closed_form():
    # Without conflict nothing changes; else the least multiple that reaches tau.
    np.testing.assert_array_equal(SOLVE(jnp.array([[1.0, 1.0], [1.0, 4.0]]), 0.02), [1.0, 0.0])
    np.testing.assert_allclose(SOLVE(jnp.array([[1.0, -1.0], [-1.0, 4.0]]), 0.02), [1.0, 0.27], rtol=1e-6)
    np.testing.assert_allclose(SOLVE(jnp.array([[0.0, 0.0], [0.0, 4.0]]), 0.5), [1.0, 0.5], rtol=1e-6)


def test_each_task_may_have_its_share():
    weights = SOLVE(jnp.diag(jnp.array([1.0, 4.0, 9.0])), jnp.array([0.1, 0.3]))
    np.testing.assert_allclose(weights, [1.0, 0.1, 0.3], rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_contradicting_constraints_are_dropped(factor):
    rows = np.array([[1.0, 0, 0], [0, 2, 1], [0, -2, -1]])
    matrix = jnp.asarray(factor * rows @ rows.T, jnp.float32)
    np.testing.assert_array_equal(SOLVE(matrix, 0.02), [1.0, 0.0, 0.0])
    # Zero shares do not contradict.
    rows[0] = [0, 1, 1]
    weights = np.asarray(SOLVE(jnp.asarray(factor * rows @ rows.T, jnp.float32), 0.0), float)
    np.testing.assert_allclose(rows[1:] @ (weights @ rows), [0, 0], atol=1e-5)


def test_one_task_and_none():
    np.testing.assert_array_equal(SOLVE(jnp.full((1, 1), 4.0), 0.02), [1.0])
    np.testing.assert_array_equal(SOLVE(jnp.zeros((3, 3)), 0.02), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(SOLVE(jnp.eye(2), 0.02, jnp.array([False, False])), [0.0, 0.0])


def test_the_first_task_present_is_the_primary_one():
    matrix = jnp.array([[9.0, 2.0, 3.0], [2.0, 1.0, -1.0], [3.0, -1.0, 4.0]])
    weights = SOLVE(matrix, 0.02, jnp.array([False, True, True]))
    np.testing.assert_allclose(weights, [0, *SOLVE(matrix[1:, 1:], 0.02)], rtol=1e-6)


def test_masked_is_the_smaller_problem():
    matrix = jnp.asarray(problems.gramians(5, count=1)[0]).at[1].set(jnp.nan).at[:, 1].set(jnp.nan)
    mask, kept = jnp.array([True, False, True, True, False]), np.array([0, 2, 3])
    weights = SOLVE(matrix, 0.3, mask)
    np.testing.assert_array_equal(weights[np.array([1, 4])], 0)
    np.testing.assert_allclose(weights[kept], SOLVE(matrix[kept][:, kept], 0.3), rtol=1e-5)


def test_vmap_is_a_loop():
    matrices = jnp.asarray(problems.gramians(3, count=6, kinds=FREE))
    looped = jnp.stack([SOLVE(matrix, 0.3) for matrix in matrices])
    np.testing.assert_allclose(BATCH(matrices, 0.3, jnp.ones((6, 3), bool)), looped, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_scale_does_not_matter(factor):
    for matrix in problems.gramians(3, count=6, kinds=("generic", "norms over 1e3")):
        expected = SOLVE(jnp.asarray(matrix), 0.3)
        np.testing.assert_allclose(SOLVE(factor * jnp.asarray(matrix), 0.3), expected, rtol=1e-4, atol=1e-6)


def test_what_is_not_finite_shows():
    assert np.any(np.isnan(SOLVE(jnp.eye(3).at[1].set(jnp.nan), 0.02)))


def test_exports_without_callbacks():
    shape = jax.ShapeDtypeStruct((3, 3), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
    exported = jax.export.export(SOLVE, platforms=["cpu", "cuda", "tpu"])(*shape)
    assert not re.search(r"custom_call @\S*callback", exported.mlir_module())
