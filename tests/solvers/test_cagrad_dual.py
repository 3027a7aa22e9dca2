"""The dual of conflict-averse descent: judged by its value in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance.solvers import cagrad_dual, simplex_qp
from tests.solvers import problems

SOLVE = jax.jit(cagrad_dual)
BATCH = jax.jit(jax.vmap(cagrad_dual, in_axes=(0, None, 0)))
KINDS = list(problems.KINDS)
VANISHING = "opposite pairs", "rank-deficient", "Pareto-stationary", "Pareto-stationary, norms over 1e6"


def value(gramian, weights, c):
    """The value, and its unit: the magnitude of its terms, or of a step along the smallest gradient if larger."""
    gramian, weights = gramian.astype(float), weights.astype(float)
    mean = np.mean(gramian, axis=1)
    radius = c * np.sqrt(max(np.mean(mean), 0))
    length = np.sqrt(max(weights @ gramian @ weights, 0))
    norms = np.sqrt(np.diag(gramian))
    smallest = np.min(norms, where=norms > 0, initial=np.max(norms, initial=0))
    magnitude = weights @ np.abs(mean) + radius * length
    return mean @ weights + radius * length, max(magnitude, (1 + c) / c * radius * smallest)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None, 0))
def least_value(gramian, c, mask):
    """No weights have less, up to float64's rounding, and some at most 1e-6 units more: by duality.

    The least gain ``min_i g_i @ (g_0 + y)`` is a bound for every y no longer than ``c |g_0|``: here for ``g_w`` times
    ``c |g_0| / t``, with weights that minimize ``g_w @ g_0 + c |g_0| |g_w|^2 / 2t``, and t found by halving.
    """
    gramian, n = jnp.where(mask[:, None] & mask[None], gramian, 0), jnp.sum(mask)
    mean, norms = jnp.sum(gramian, axis=1) / n, jnp.sqrt(jnp.diag(gramian))
    radius = c * jnp.sqrt(jnp.maximum(jnp.sum(mean) / n, 0))

    def products(log_t):
        """Of all gradients with g_w; and whether it is longer than t."""
        weights = simplex_qp(gramian * radius / jnp.exp(log_t), mean, mask)
        return gramian @ weights, weights @ gramian @ weights > jnp.exp(2 * log_t)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        longer = products(middle)[1]
        return jnp.where(longer, middle, low), jnp.where(longer, high, middle)

    largest = jnp.max(norms)
    smallest = jnp.min(norms, where=norms > 0, initial=largest)
    tiny = jnp.log(jnp.where(largest == 0, 1, 1e-6 * smallest))
    _, log_t = jax.lax.fori_loop(0, 30, halve, (tiny, jnp.maximum(tiny, jnp.log(largest))))
    return jnp.min(mean + radius / jnp.exp(log_t) * products(log_t)[0], where=mask, initial=jnp.inf)


def tolerance(kind, c):
    """In units of the value, two to four times what is found.

    Where a combination vanishes, as many do with c from 1 up, the rounding of the Gramian leaves its length uncertain
    by the root, 3.5e-4. With a small c and norms over 1e6 a value may be 1e-4 of its terms, whose rounding is then that
    much larger. Else it is 3e-7, and the bound may be 1e-6 too low.
    """
    if c >= 1 and kind in VANISHING:
        return 1e-3 if "1e6" in kind else 5e-4
    return 5e-5 if kind == "norms over 1e6" and c < 0.5 else 2e-6


@pytest.mark.parametrize("size", problems.SIZES)
@pytest.mark.by_default("2", "11")
def test_value_is_the_least(size):
    """Judged on what is convex of the matrix, by a bound of all values, in units of the terms."""
    width = next(width for width, sizes in problems.PADDED.items() if size in sizes)
    matrices = problems.gramians(size)
    parts = np.stack([problems.convex(matrix) for matrix in matrices])
    padded, _, mask = problems.padded(matrices, matrices[:, 0], width)
    convex, _, _ = problems.padded(parts, parts[:, 0], width)
    for c in 0.1, 0.5, 1.0, 5.0:
        weights = np.asarray(BATCH(padded, c, mask))
        assert not weights[:, size:].any()
        assert np.all(weights >= 0)
        np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=1e-6)
        least = problems.in_float64(lambda part, mask, c=c: least_value(part, c, mask), convex, mask)
        for i, (part, found) in enumerate(zip(parts, weights[:, :size], strict=True)):
            reached, unit = value(part, found, c)
            kind = KINDS[i % len(KINDS)]
            assert reached - least[i] <= tolerance(kind, c) * unit, (kind, c)


@pytest.mark.slow
def test_float64():
    matrices = problems.gramians(8, dtype="float64", count=40, kinds=("generic", "norms over 1e3", "near-duplicates"))
    given, _, mask = problems.padded(matrices, matrices[:, 0], 11)
    weights = problems.in_float64(lambda matrix, mask: BATCH(matrix, 0.5, mask), given, mask)
    least = problems.in_float64(lambda matrix, mask: least_value(matrix, 0.5, mask), given, mask)
    for matrix, found, bound in zip(matrices, weights[:, :8], least, strict=True):
        reached, unit = value(matrix, found, 0.5)
        # To which the bound is known: the width of the last interval of log t.
        assert reached - bound <= 2e-8 * unit


@pytest.mark.parametrize("c", [0.5, 2.0])
def test_as_good_as_cvxpy(c):
    """But for norms over 1e6: its solver is exact to 1e-8 of the largest."""
    cvxpy = pytest.importorskip("cvxpy")
    kinds = [kind for kind in KINDS if "1e6" not in kind]
    for size in 2, 3, 5, 11:
        for kind, matrix in zip(kinds, problems.gramians(size, seed=2, count=len(kinds), kinds=kinds), strict=True):
            part = problems.convex(matrix) / np.max(np.diag(matrix))
            values, vectors = np.linalg.eigh(part)
            rows = vectors * np.sqrt(np.maximum(values, 0))
            mean = np.mean(rows, axis=0)
            weights = cvxpy.Variable(size, nonneg=True)
            objective = (rows @ mean) @ weights + c * np.linalg.norm(mean) * cvxpy.norm(rows.T @ weights)
            problem = cvxpy.Problem(cvxpy.Minimize(objective), [cvxpy.sum(weights) == 1])
            problem.solve(solver="CLARABEL")
            found, unit = value(part, np.asarray(SOLVE(matrix, c)), c)
            assert found <= problem.value + max(tolerance(kind, c), 1e-5) * unit, (kind, size)


@pytest.mark.slow
def test_where_full_corrections_go_round_in_circles():
    """Of the interior point: full second-order terms came back to the same points, in turn."""
    norms, cosines = np.array([6e6, 120, 5e4]), np.array([[1, -0.17, -0.07], [-0.17, 1, -0.08], [-0.07, -0.08, 1]])
    matrix = (cosines * norms[:, None] * norms).astype(np.float32)
    given, _, mask = problems.padded(matrix[None], matrix[:1], 11)
    least = problems.in_float64(lambda part, mask: least_value(part, 0.1, mask), given, mask)[0]
    reached, unit = value(matrix, np.asarray(BATCH(given, 0.1, mask))[0, :3], 0.1)
    assert reached - least <= 2e-6 * unit


def test_opposite_gradients_cancel():
    rows = np.array([[1.0, 0], [-2, 0], [0, 1]])
    weights = np.asarray(SOLVE(rows @ rows.T, 1.0))
    np.testing.assert_allclose(weights @ rows, [0, 0], atol=1e-4)


def test_a_zero_gradient_takes_the_weight():
    np.testing.assert_allclose(SOLVE(np.diag([1.0, 0.0, 4.0]), 0.5), [0, 1, 0], atol=1e-4)
    np.testing.assert_allclose(SOLVE(np.zeros((3, 3)), 0.5), np.full(3, 1 / 3), rtol=1e-5)


def test_without_a_ball_the_least_component_along_the_mean_has_all_weight():
    np.testing.assert_allclose(SOLVE(np.diag([4.0, 1.0, 9.0]), 0.0), [0, 1, 0], atol=1e-5)


def test_one_task_and_none():
    np.testing.assert_allclose(SOLVE(np.full((1, 1), 4.0), 0.5), [1.0], rtol=1e-6)
    np.testing.assert_array_equal(SOLVE(np.eye(2), 0.5, np.zeros(2, bool)), [0.0, 0.0])
