"""Linear programs over the simplex, judged in float64: by what is missed, and by HiGHS (through SciPy)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from mtlbalance.solvers import simplex_lp
from tests.solvers import problems

SOLVE = jax.jit(simplex_lp)
BATCH = jax.jit(jax.vmap(simplex_lp))
# Where the rows leave more than a point: else rounding decides what satisfies them.
KINDS = ("generic", "norms over 1e3", "zero rows")


def programs(size, dtype="float32"):
    """Of EPO's two kinds: the fall of all tasks or of one combination, under some bounds, that gradients can meet."""
    gramians = problems.gramians(size, kinds=KINDS, count=60, dtype=dtype)
    rng = np.random.default_rng(size)
    along = np.einsum("nij,nj->ni", gramians, rng.normal(size=(len(gramians), size)))
    objective = np.where(rng.random((len(gramians), 1)) < 0.5, gramians.sum(axis=1), along)
    bounds = np.where(rng.random(along.shape) < 0.5, 0, np.where(along > 0, -np.inf, along))
    return objective.astype(dtype), gramians, bounds.astype(dtype)


def padded(objective, matrices, lower, width):
    more = width - objective.shape[1]
    matrices = np.pad(matrices, [(0, 0), (0, more), (0, more)], constant_values=np.nan)
    lower = np.pad(lower, [(0, 0), (0, more)], constant_values=-np.inf)
    mask = np.pad(np.ones(objective.shape, bool), [(0, 0), (0, more)])
    return np.pad(objective, [(0, 0), (0, more)], constant_values=np.nan), matrices, lower, mask


def best(objective, matrix, lower):
    """HiGHS's, in units in which its absolute tolerances are small."""
    norms = np.sqrt(np.diag(matrix))
    rows, asks = np.where(norms > 0, norms, 1), lower > -np.inf
    unit = np.max(norms) or 1
    a, b = -matrix / rows[:, None] / unit, -np.where(asks, lower, 0) / rows / unit
    found = linprog(
        -objective / (np.max(np.abs(objective)) or 1), a[asks], b[asks], np.ones((1, len(norms))), [1], method="highs"
    )
    assert found.status == 0
    return found.x


@pytest.mark.parametrize("size", problems.SIZES)
def test_value_and_what_is_missed(size):
    """In lengths of the weighted gradients; 1e-5 of them is a hundred roundings, for as many changes of the basis."""
    given = programs(size)
    width = min(width for width in problems.PADDED if width >= size)
    weights, feasible = (np.asarray(x) for x in BATCH(*padded(*given, width)))
    assert np.all(feasible)
    assert not weights[:, size:].any()
    for objective, matrix, lower, found in zip(*(x.astype(float) for x in given), weights[:, :size], strict=True):
        assert np.all(found >= 0)
        np.testing.assert_allclose(np.sum(found), 1, rtol=1e-6)
        norms = np.sqrt(np.diag(matrix))
        asks = (lower > -np.inf) & (norms > 0)
        missed = (lower - matrix @ found)[asks]
        assert np.all(missed <= 1e-5 * (norms[asks] * np.max(norms * found) + np.abs(lower[asks])))
        highs = best(objective, matrix, lower)
        assert objective @ (highs - found) <= 1e-5 * np.abs(objective) @ (highs + found)


def test_float64():
    given = programs(8, "float64")
    weights, feasible = (np.asarray(x) for x in problems.in_float64(both, *given))
    assert weights.dtype == np.float64
    assert np.all(feasible == 1)
    for objective, matrix, lower, found in zip(*given, weights, strict=True):
        highs = best(objective, matrix, lower)
        assert objective @ (highs - found) <= 1e-8 * np.abs(objective) @ (highs + found)


@jax.jit
def both(*given):
    weights, feasible = jax.vmap(simplex_lp)(*given)
    return jnp.stack([weights, jnp.broadcast_to(feasible[:, None], weights.shape).astype(weights.dtype)])


def test_what_no_weights_satisfy_is_told():
    """Of two opposite gradients one loss rises; of the rows that can be met none is missed."""
    matrix = np.array([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    weights, feasible = SOLVE(np.ones(3), matrix, np.array([0.1, 0.1, -np.inf]))
    assert not feasible
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
    weights, feasible = SOLVE(np.ones(3), matrix, np.array([-0.1, -0.1, 0.5]))
    assert feasible
    assert np.all(matrix @ weights >= np.array([-0.1, -0.1, 0.5]) - 1e-6)


def test_without_rows_the_largest_entry_takes_all():
    weights, feasible = SOLVE(np.array([1.0, 3.0, 2.0]), np.eye(3), np.full(3, -np.inf))
    np.testing.assert_array_equal(weights, [0, 1, 0])
    assert feasible
    weights, _ = SOLVE(np.zeros(3), np.zeros((3, 3)), np.zeros(3), np.array([False, True, True]))
    np.testing.assert_array_equal(weights, [0, 1, 0])


def test_more_rows_than_weights():
    """The first must have half, the second a third; the rest goes where it counts."""
    rows = np.concatenate([np.eye(2), np.ones((1, 2))])
    weights, feasible = SOLVE(np.array([0.0, 1.0]), rows, np.array([0.5, 1 / 3, 0.9]))
    np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-6)
    assert feasible
