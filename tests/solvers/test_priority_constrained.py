"""Priority-constrained descent: judged in float64 by optimality conditions."""

import jax
import numpy as np
import pytest
from scipy.optimize import nnls

from mtlbalance.solvers import priority_constrained
from tests.solvers import problems

SOLVE = jax.jit(priority_constrained)
BATCH = jax.jit(jax.vmap(priority_constrained, in_axes=(0, None, 0)))
TAUS = 0.0, 0.02, 0.5
# Of the shortest mean of directions: below it constraints are taken to contradict each other.
VANISHES = (10 * np.finfo(np.float32).eps) ** 0.5


def worst(gramian, weights, tau):
    """Largest violation of a constraint or of complementarity, as lengths, over the length of what is added up."""
    norms, cosines = problems.norms_and_cosines(gramian)
    parts = norms * weights.astype(float)
    slack = (cosines @ parts - tau * norms)[1:]
    size = np.sum(np.abs(parts)) + tau * np.max(norms)
    tight = np.minimum(parts[1:], slack)
    return max(np.max(np.where(norms[1:] > 0, np.abs(tight), 0), initial=0) / size if size else 0, -np.min(parts))


def shortest_mean(gramian):
    """The least length of a weighted mean of the other tasks' directions."""
    norms, cosines = problems.norms_and_cosines(gramian)
    rows = root(cosines)[1:][norms[1:] > 0]
    if not len(rows):
        return 1
    # With a row for the total of the weights; whatever total comes out, they are proportional to the mean's.
    weights, _ = nnls(np.vstack([rows.T, np.ones(len(rows))]), np.append(np.zeros(len(gramian)), 1))
    return np.linalg.norm(weights @ rows) / np.sum(weights)


def root(matrix):
    """Rows whose inner products are the entries."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0))


@pytest.fixture(scope="module", params=problems.SIZES)
def solved(request):
    """Of one size the Gramians with their shortest means, and by tau all their weights."""
    size = request.param
    width = next(width for width, sizes in problems.PADDED.items() if size in sizes)
    matrices = problems.gramians(size)
    padded, _, mask = problems.padded(matrices, matrices[:, 0], width)
    weights = {tau: np.asarray(BATCH(padded, tau, mask)) for tau in TAUS}
    return matrices, [shortest_mean(matrix) for matrix in matrices], weights


@pytest.mark.parametrize("tau", TAUS)
def test_optimality_conditions(solved, tau):
    """Within 1e-6 of the length of what is added up; 2e-5 where the Gramian is singular but for rounding.

    Unless the constraints contradict each other, so that all are dropped. Zero shares never do: no step reaches them.
    """
    matrices, means, weights = solved
    size = matrices.shape[1]
    assert not weights[tau][:, size:].any()
    np.testing.assert_array_equal(weights[tau][:, 0], 1)
    in_between = 0
    for matrix, mean, found in zip(matrices, means, weights[tau][:, :size], strict=True):
        assert np.all(np.isfinite(found))
        dropped = tau > 0 and not found[1:].any()
        # A factor of 2 either way for how the solver comes to its mean; few problems fall between.
        if tau > 0 and mean < VANISHES / 2:
            assert dropped
        elif tau > 0 and mean < VANISHES * 2:
            in_between += 1
            assert dropped or worst(matrix, found, tau) <= 2e-5
        else:
            assert worst(matrix, found, tau) <= (2e-5 if mean < VANISHES else 1e-6)
    assert in_between <= 1


def test_constraints_contradict_each_other_often_enough(solved):
    """Or the exemption above is not tested: opposite and dependent directions, of more than two other tasks."""
    matrices, means, _ = solved
    if matrices.shape[1] > 3:
        assert 20 <= np.sum(np.array(means) < VANISHES) <= 30


def test_float64():
    matrices = problems.gramians(8, dtype="float64", count=40, kinds=("generic", "norms over 1e6", "near-duplicates"))
    mask = np.ones((40, 8), bool)
    weights = problems.in_float64(lambda matrix, mask: BATCH(matrix, 0.5, mask), matrices, mask)
    for matrix, found in zip(matrices, weights, strict=True):
        assert worst(matrix, found, 0.5) <= 1e-14


@pytest.mark.parametrize("tau", TAUS)
def test_as_near_as_quadprog(solved, tau):
    """All that do not contradict each other by much: beyond that it too depends on rounding."""
    quadprog = pytest.importorskip("quadprog")
    matrices, means, weights = solved
    size = matrices.shape[1]
    for matrix, mean, found in zip(matrices, means, weights[tau][:, :size], strict=True):
        if mean < 2 * VANISHES:
            continue
        norms, cosines = problems.norms_and_cosines(matrix)
        rows, unit, others = root(cosines), np.max(norms) or 1, np.flatnonzero(norms[1:]) + 1
        primary, parts = norms[0] / unit * rows[0], norms / unit * found
        step = primary
        if len(others):
            step = quadprog.solve_qp(np.eye(size), primary, rows[others].T, tau * norms[others] / unit)[0]
        # The distance's square is what the rounding of the matrix leaves determined, to some of what is added up.
        distance, least = np.sum((parts @ rows - primary) ** 2), np.sum((step - primary) ** 2)
        assert abs(distance - least) <= 2e-6 * (np.sum(parts) ** 2 + tau**2)


def test_one_violated_constraint_in_closed_form():
    # Without conflict nothing changes; else the least multiple that reaches tau.
    np.testing.assert_array_equal(SOLVE(np.array([[1.0, 1.0], [1.0, 4.0]]), 0.02), [1.0, 0.0])
    np.testing.assert_allclose(SOLVE(np.array([[1.0, -1.0], [-1.0, 4.0]]), 0.02), [1.0, 0.27], rtol=1e-6)
    np.testing.assert_allclose(SOLVE(np.array([[0.0, 0.0], [0.0, 4.0]]), 0.5), [1.0, 0.5], rtol=1e-6)


def test_each_task_may_have_its_share():
    weights = SOLVE(np.diag([1.0, 4.0, 9.0]), np.array([0.1, 0.3]))
    np.testing.assert_allclose(weights, [1.0, 0.1, 0.3], rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_contradicting_constraints_are_dropped(factor):
    rows = np.array([[1.0, 0, 0], [0, 2, 1], [0, -2, -1]])
    np.testing.assert_array_equal(SOLVE(factor * rows @ rows.T, 0.02), [1.0, 0.0, 0.0])
    # Zero shares do not contradict.
    rows[0] = [0, 1, 1]
    weights = np.asarray(SOLVE(factor * rows @ rows.T, 0.0), float)
    np.testing.assert_allclose(rows[1:] @ (weights @ rows), [0, 0], atol=1e-5)


@pytest.mark.parametrize("pair", [(0.0, 0.0), (0.02, 0.0), (0.0, 0.5)])
def test_opposite_gradients_without_shares_leave_the_others_theirs(pair):
    """Two opposite gradients: what is left for the third is across them. With a share for either all are dropped."""
    rows = np.array([[1.0, 2.0, -1.0], [3.0, 0.0, 0.0], [-0.5, 0.0, 0.0], [1.0, 0.0, 2.0]])
    weights = np.asarray(SOLVE(rows @ rows.T, np.array([*pair, 0.4])), float)
    # Across the pair the third is (0, 0, 2): its progress of 0.4 * 5 needs d = (0, 2, 1).
    expected = rows[0] if any(pair) else [0.0, 2.0, 1.0]
    np.testing.assert_allclose(weights @ rows, expected, atol=1e-5)


def test_shares_of_absent_tasks_and_of_zero_gradients_demand_nothing():
    rows = np.random.default_rng(0).normal(size=(60, 5, 5))
    # Gradients so nearly opposite that the solver stops before their multipliers are long enough.
    rows[:, 2] = 1e-4 * rows[:, 2] - rows[:, 1]
    rows[:, 4] = 0
    matrices = rows @ rows.swapaxes(1, 2)
    mask = np.ones((60, 5), bool)
    mask[:, 3] = False
    of_others = BATCH(matrices, np.array([0.0, 0.0, 0.7, 0.7]), mask)
    np.testing.assert_array_equal(of_others, BATCH(matrices, np.zeros(4), mask))
    assert np.all(np.isfinite(of_others))


def test_one_task_and_none():
    np.testing.assert_array_equal(SOLVE(np.full((1, 1), 4.0), 0.02), [1.0])
    np.testing.assert_array_equal(SOLVE(np.zeros((3, 3)), 0.02), [1.0, 0.0, 0.0])
    np.testing.assert_array_equal(SOLVE(np.eye(2), 0.02, np.array([False, False])), [0.0, 0.0])


def test_the_first_task_present_is_the_primary_one():
    matrix = np.array([[9.0, 2.0, 3.0], [2.0, 1.0, -1.0], [3.0, -1.0, 4.0]])
    weights = SOLVE(matrix, 0.02, np.array([False, True, True]))
    np.testing.assert_allclose(weights, [0, *SOLVE(matrix[1:, 1:], 0.02)], rtol=1e-6)
