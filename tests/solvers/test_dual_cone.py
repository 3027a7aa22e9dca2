"""Projection on the dual cone: judged in float64 by optimality conditions and a certified bound, not by v."""

import jax
import numpy as np
import pytest

from mtlbalance.solvers import dual_cone
from tests.solvers import problems

SOLVE = jax.jit(dual_cone)
BATCH = jax.jit(jax.vmap(dual_cone))


def with_lower(size):
    """Bounds of one entry, as UPGrad's, of all, as DualProj's, and of both signs."""
    gramians = problems.gramians(size)
    rng = np.random.default_rng(size)
    lower = np.stack(
        [
            [np.eye(size)[rng.integers(size)], rng.uniform(0, 1, size), rng.normal(size=size)][i % 3]
            for i in range(len(gramians))
        ]
    )
    return gramians, lower.astype(np.float32)


@pytest.fixture(scope="module")
def solved():
    """By size: Gramians, lower bounds, solutions, and float64 solutions of the convex part."""
    results = {}
    for width, sizes in problems.PADDED.items():
        for size in sizes:
            gramians, lower = with_lower(size)
            v = np.asarray(BATCH(*problems.padded(gramians, lower, width)))
            assert not v[:, size:].any()
            parts = np.stack([problems.convex(gramian) for gramian in gramians])
            exact = problems.in_float64(BATCH, *problems.padded(parts, lower, 40))
            results[size] = gramians, lower, v[:, :size], exact[:, :size]
    return results


def in_cosines(gramian, lower, *solutions):
    """Cosines, the bound and solutions as multiples of unit rows, over the bound's norm; zero rows left out."""
    norms, cosines = problems.norms_and_cosines(gramian)
    there = norms > 0
    scaled = norms * lower
    size = np.linalg.norm(scaled)
    scaled, *solutions = ((norms * x.astype(float) / (size or 1))[there] for x in (lower, *solutions))
    return cosines[there][:, there], scaled, *solutions


def certified_gap(cosines, lower, x):
    """How far the value may be above the least one of all solutions a thousand times as long: the dual's value."""
    multipliers = cosines @ x
    slack = 1e3 * np.linalg.norm(x) * np.sum(np.maximum(-multipliers, 0))
    return 2 * (multipliers @ (x - lower) + slack)


@pytest.mark.parametrize("size", problems.SIZES)
def test_value_within_a_certified_gap(solved, size):
    """Within 1e-5 of the bound's own value, and what rounding of the matrix does to a long solution's."""
    for gramian, lower, v, exact in zip(*solved[size], strict=True):
        assert np.all(v >= lower)
        cosines, lower, x, exact = in_cosines(gramian, lower, v, exact)
        bound = certified_gap(cosines, lower, exact)
        assert bound <= 1e-8 * (1 + exact @ exact)
        assert x @ cosines @ x - exact @ cosines @ exact + bound <= 1e-5 + 1e-6 * exact @ exact


@pytest.mark.parametrize("size", problems.SIZES)
def test_optimality_conditions(solved, size):
    """No direction that conflicts; none but tight ones contribute. Rounding grows with the length of v."""
    for gramian, lower, v, _ in zip(*solved[size], strict=True):
        cosines, lower, x = in_cosines(gramian, lower, v)
        multipliers, length = cosines @ x, 1 + np.linalg.norm(x)
        assert np.min(multipliers, initial=0) >= -5e-6 * length
        assert np.max(np.abs(multipliers * (x - lower)), initial=0) <= 1e-5 * length**2


@pytest.mark.parametrize("size", problems.SIZES)
def test_as_good_as_quadprog(solved, size):
    quadprog = pytest.importorskip("quadprog")
    for gramian, lower, v, _ in zip(*solved[size], strict=True):
        cosines, lower, x = in_cosines(gramian, lower, v)
        if not len(x):
            continue
        # It wants a positive definite matrix, and leaves the bound a little.
        exact = quadprog.solve_qp(cosines + 1e-8 * np.eye(len(x)), np.zeros(len(x)), np.eye(len(x)), lower)[0]
        exact = np.maximum(exact, lower)
        assert x @ cosines @ x - exact @ cosines @ exact <= 1e-5 + 1e-6 * exact @ exact


@pytest.mark.parametrize("kind", [kind for kind in problems.KINDS if kind != "opposite pairs"])
def test_only_near_opposite_gradients_need_long_solutions(solved, kind):
    """For every other kind of problem the value is within 1e-5 of the bound's own, without allowance for rounding."""
    for size in problems.SIZES:
        for i, (gramian, lower, v, exact) in enumerate(zip(*solved[size], strict=True)):
            if list(problems.KINDS)[i % len(problems.KINDS)] == kind:
                cosines, lower, x, exact = in_cosines(gramian, lower, v, exact)
                gap = x @ cosines @ x - exact @ cosines @ exact + certified_gap(cosines, lower, exact)
                assert gap <= 1e-5


def test_float64():
    gramians = problems.gramians(8, dtype="float64", count=40, kinds=("generic", "norms over 1e6", "near-duplicates"))
    lower = np.random.default_rng(0).uniform(size=(40, 8))
    for gramian, bound, v in zip(gramians, lower, problems.in_float64(BATCH, gramians, lower), strict=True):
        assert v.dtype == np.float64
        assert certified_gap(*in_cosines(gramian, bound, v)) <= 1e-10


def test_two_tasks_in_closed_form():
    """The second is added to the first as far as they conflict: PCGrad's projection."""
    for gramian in problems.gramians(2, seed=1, count=50, kinds=("generic", "norms over 1e6", "opposite pairs")):
        expected = [1, max(-gramian[0, 1] / gramian[1, 1], 0)]
        scales = np.sqrt(np.diag(gramian) / gramian[0, 0])
        v = np.asarray(SOLVE(gramian, np.array([1.0, 0.0])))
        np.testing.assert_allclose(v * scales, expected * scales, atol=1e-5)


def test_without_conflict_it_is_the_bound():
    gramian = np.array([[1.0, 0.5, 0.2], [0.5, 4.0, 0.1], [0.2, 0.1, 9e6]])
    lower = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(SOLVE(gramian, lower), lower, rtol=1e-6)


def test_exactly_opposite_gradients_cancel():
    for ratio in 1.0, 3.0, 1e3:
        rows = np.array([[1.0, 2.0], [-ratio, -2 * ratio]])
        v = SOLVE(rows @ rows.T, np.array([1.0, 0.0]))
        np.testing.assert_allclose(v, [1, 1 / ratio], rtol=1e-5)


def test_zeros():
    gramian = np.array([[1.0, -0.5, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(SOLVE(gramian, np.zeros(3)), np.zeros(3))
    np.testing.assert_allclose(SOLVE(gramian, np.array([1.0, 0.0, 7.0])), [1.0, 0.5, 7.0], rtol=1e-5)
    np.testing.assert_array_equal(SOLVE(np.zeros((3, 3)), np.arange(3.0)), np.arange(3.0))
    np.testing.assert_array_equal(SOLVE(np.zeros((1, 1)), np.array([2.0])), [2.0])
    np.testing.assert_allclose(SOLVE(np.full((1, 1), 3e-30), np.array([2.0])), [2.0], rtol=1e-6)
    np.testing.assert_allclose(SOLVE(np.ones((1, 1)), np.array([-2.0])), [0.0], atol=1e-6)


@pytest.mark.slow
def test_vmap_over_rows_is_a_loop():
    gramian, bounds = problems.gramians(4, seed=3, count=1)[0], np.eye(4, dtype=np.float32)
    looped = np.stack([dual_cone(gramian, bound) for bound in bounds])
    assert np.any(looped > 1e-2 + bounds)
    np.testing.assert_allclose(jax.jit(jax.vmap(dual_cone, (None, 0)))(gramian, bounds), looped, atol=1e-6)
    np.testing.assert_allclose(SOLVE(gramian, bounds[0]), looped[0], atol=1e-6)


@pytest.mark.parametrize("factor", [1e-20, 2.0**-60, 1e20])
def test_scale_does_not_matter(factor):
    lower = np.array([1.0, 0.3, 0.0], np.float32)
    for gramian in problems.gramians(3, count=3, kinds=("generic", "norms over 1e3", "near-duplicates")):
        expected = SOLVE(gramian, lower)
        np.testing.assert_allclose(SOLVE(factor * gramian, lower), expected, rtol=1e-6, atol=1e-6)
        scaled = np.asarray(SOLVE(gramian, factor * lower)) / factor
        np.testing.assert_allclose(scaled, expected, rtol=1e-6, atol=1e-6)
