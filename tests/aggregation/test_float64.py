"""Methods with a solver in float64, on rows of rank one and two, opposite and zero ones, judged by their problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from mtlbalance import aggregation

pytestmark = pytest.mark.unoptimized

SHARE, M, N = 0.1, 5, 1000
# The rows of a Gramian of a thousand numbers: rounding leaves eigenvalues below zero where they should be zero.
TOLERANCE = 1e-6


def jacobians():
    rng = np.random.default_rng(0)
    v, plane, free = rng.normal(size=N), rng.normal(size=(2, N)), rng.normal(size=(M, N))
    free *= np.array([[1], [10], [0.1], [1], [3]])
    angles = np.array([0.1, 0.5, 0.9, 1.2, 1.4])
    yield "rank one", np.outer(rng.uniform(0.5, 2, M), v)
    yield "rank one, both signs", np.outer([1, -2, 0.5, -1, 3], v)
    yield "rank two", np.stack([np.cos(angles), np.sin(angles)], 1) @ plane
    yield "rank two, all round", rng.normal(size=(M, 2)) @ plane
    yield "opposite", np.concatenate([free[:3], -free[:2]])
    yield "opposite, of other lengths", np.concatenate([free[:3], -free[:2] / 7])
    yield "zero rows", free * np.array([[1], [0], [1], [0], [1]])
    yield "one gradient", free * np.array([[0], [0], [1], [0], [0]])
    yield "zero", np.zeros((M, N))


KINDS = dict(jacobians())
# Some positive combination vanishes: no direction helps all.
SURROUND = "rank one, both signs", "rank two, all round", "opposite", "opposite, of other lengths"


@pytest.fixture(params=KINDS)
def kind(request):
    with jax.enable_x64(True):
        yield request.param


@pytest.fixture
def rows(kind):
    return KINDS[kind]


def weights_of(method, rows):
    """Compiled once for all problems; the weights are added up by the judge."""
    weights, _ = method.gramian_weighting.apply(method.init((M, 2)), jnp.asarray(rows @ rows.T))
    assert weights.dtype == np.float64
    assert np.all(np.isfinite(weights))
    return np.asarray(weights)


def gains(rows, gradient):
    """Products with the directions, relative to the longest gradient."""
    norms = np.linalg.norm(rows, axis=1)
    longest = np.max(norms)
    return rows @ gradient / np.where(norms > 0, norms, 1) / np.where(longest > 0, longest, 1)


def projected(rows, vector):
    """On the cone of the directions that conflict with no row: Moreau's decomposition."""
    size = np.max(np.linalg.norm(rows, axis=1))
    return vector if size == 0 else vector + rows.T @ nnls(rows.T / size, -vector / size, maxiter=1000)[0]


def assert_close(found, expected, rows):
    assert np.linalg.norm(found - expected) <= TOLERANCE * np.max(np.linalg.norm(rows, axis=1))


def test_mgda_is_the_shortest(rows):
    """g_i . g >= |g|^2 for all i, which no other combination has."""
    weights = weights_of(aggregation.mgda(), rows)
    gradient = weights @ rows
    assert np.sum(weights) == pytest.approx(1)
    assert np.min(weights) >= 0
    largest = np.max(np.sum(rows**2, axis=1))
    assert np.min(rows @ gradient) >= gradient @ gradient - TOLERANCE * largest


def test_projections_are_those_of_the_gradients(rows):
    exact = {"reg_eps": 0.0}
    assert_close(weights_of(aggregation.dual_proj(**exact), rows) @ rows, projected(rows, np.mean(rows, axis=0)), rows)
    expected = np.mean([projected(rows, row) for row in rows], axis=0)
    assert_close(weights_of(aggregation.upgrad(**exact), rows) @ rows, expected, rows)


@pytest.mark.parametrize("c", [0.4, 1.0, 2.0])
def test_cagrad_gains_most_in_its_ball(rows, c):
    """The least gain is at most the dual's value, whatever the weights there.

    The solver's value is within 1e-5 of the least one, and so the gain within the root of that.
    """
    gradient, mean = weights_of(aggregation.cagrad(c), rows) @ rows, np.mean(rows, axis=0)
    radius, longest = c * np.linalg.norm(mean), np.max(np.linalg.norm(rows, axis=1))
    assert np.linalg.norm(gradient - mean) <= radius + 1e-4 * longest
    dual = lambda w: (w @ rows) @ mean + radius * np.linalg.norm(w @ rows)
    shortest = weights_of(aggregation.mgda(), rows)
    bounds = [dual(shortest), *(dual(one) for one in np.eye(M))]
    distance = np.linalg.norm(gradient - mean)
    if distance > 1e-6 * longest:  # in the span of g - g_0 are the dual's own weights
        w = np.clip(nnls(rows.T, (gradient - mean) / distance, maxiter=1000)[0], 0, None)
        bounds += [dual(w / np.sum(w))] if np.sum(w) > 0 else []
    assert np.min(rows @ gradient) >= np.min(bounds) - 3e-3 * longest * np.linalg.norm(mean)


@pytest.mark.parametrize("make", [lambda: aggregation.nash_mtl(max_norm=0.0), aggregation.fairgrad])
def test_bargaining_solves_its_equations(rows, kind, make):
    """G w = 1 / w, but for zero gradients; where it has no solution, what cannot be solved cancels."""
    weights, nonzero = weights_of(make(), rows), np.any(rows != 0, axis=1)
    np.testing.assert_array_equal(weights[~nonzero], 0)
    gain = rows @ (weights @ rows)
    if kind in SURROUND:
        assert np.min(gain) >= -TOLERANCE * np.sum(weights * np.sum(rows**2, axis=1))
    else:
        np.testing.assert_allclose((gain * weights)[nonzero], 1, rtol=1e-5)


def test_pcd_gives_shares_or_drops_them(rows):
    norms = np.linalg.norm(rows, axis=1)
    weights = weights_of(aggregation.pcd(SHARE), rows)
    gradient = weights @ rows
    if norms[0] == 0:
        np.testing.assert_array_equal(gradient, 0)
        return
    assert np.linalg.norm(gradient) == pytest.approx(norms[0], rel=1e-6)
    directions = (rows / np.where(norms > 0, norms, 1)[:, None])[1:][norms[1:] > 0]
    # Farkas: the shares contradict each other if some combination of their inequalities says 0 >= 1.
    inequalities = np.vstack([directions.T, np.full(len(directions), SHARE)])
    contradict = len(directions) and nnls(inequalities, np.append(np.zeros(N), 1.0), maxiter=1000)[1] < 1e-6
    if contradict:
        assert_close(gradient, rows[0], rows)
    else:  # before it got the main gradient's length, that one's direction had weight 1
        step = gradient / (weights[0] * norms[0])
        assert np.min(directions @ step, initial=np.inf) >= SHARE - TOLERANCE
