"""What single Gramian methods promise: their lengths and closed forms, two tasks, states, bounds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation
from tests.aggregation.problems import METHODS, jacobian, padded, solve, with_new


@partial(jax.jit, static_argnums=0)
def gradient_of(method, rows, mask=None):
    return method.apply(method.init(rows.shape), rows, mask=mask)[0]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def two_tasks(seed):
    """Independent gradients whose norms differ by up to 1e3, and their norms."""
    rows, mask, _ = jacobian("free", 2, 2, seed, decades=3.0)
    return rows, mask, np.linalg.norm(rows[:2].astype(float), axis=1)


# Two tasks. The equations are solved to 1e-5: rounding, 1e-7, times the condition number of the cosines, up to 100.


@pytest.mark.parametrize("name", ["nash_mtl", "imtl_g", "config", "fairgrad"])
def test_two_tasks_are_bisected(name):
    for seed in range(10):
        rows, mask, norms = two_tasks(seed)
        parts = solve(name, rows, mask).weights * norms
        np.testing.assert_allclose(parts / np.mean(parts), 1, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_config_stops_between_opposite_gradients(seed):
    row = normal(seed, 5)
    np.testing.assert_array_equal(gradient_of(aggregation.config(), np.stack([row, -3 * row])), np.zeros(5))


@pytest.mark.parametrize("n_rows", [1, 2, 4])
@pytest.mark.by_default("2")
def test_config_and_imtl_g_stop_between_opposite_gradients(n_rows):
    for seed in range(5):
        some = normal(seed, n_rows, 9)
        rows = np.concatenate([some, -some])
        np.testing.assert_array_equal(gradient_of(aggregation.imtl_g(), rows), np.zeros(9))
        np.testing.assert_array_equal(gradient_of(aggregation.config(), rows), np.zeros(9))


def test_config_goes_on_between_nearly_opposite_gradients():
    """At 4e-3 from opposite the common direction is what is left: it is found to the Gramian's rounding."""
    rows = np.float32([[1.0, 2e-3], [-1.0, 2e-3]])
    gradient = gradient_of(aggregation.config(), rows)
    np.testing.assert_allclose(gradient, [0.0, 4e-3], atol=1e-4)


def test_lengths_of_the_bisectors():
    for seed in range(10):
        rows, mask, _ = two_tasks(seed)
        result = {
            name: solve(name, rows, mask) for name in METHODS if name.startswith(("nash", "imtl", "config", "fair"))
        }
        length = {name: np.linalg.norm(x.gradient) for name, x in result.items()}
        assert length["nash_mtl"] == pytest.approx(1, rel=1e-5)
        assert length["nash_mtl unbounded"] == pytest.approx(np.sqrt(2), rel=1e-5)
        assert length["fairgrad"] == pytest.approx(np.sqrt(2), rel=1e-5)
        assert np.sum(result["imtl_g"].weights) == pytest.approx(1, rel=1e-5)
        direction = result["config"].gradient / length["config"]
        assert length["config"] == pytest.approx(np.sum(rows[:2] @ direction), rel=1e-5)


def test_upgrad_is_half_of_pcgrad_for_two_tasks():
    for seed in range(10):
        rows, mask, _ = two_tasks(seed)
        twice, pcgrad = 2 * solve("upgrad exact", rows, mask).gradient, solve("pcgrad", rows, mask)
        np.testing.assert_allclose(pcgrad.gradient, twice, atol=1e-5 * pcgrad.length)


# UPGrad and DualProj.


@pytest.mark.parametrize("name", ["upgrad", "dual_proj"])
def test_regularization_matters_where_norms_differ(name):
    """Measured with eight tasks: it moves the gradient by up to 1e-3, 1e-2 and 0.1 of the Jacobian's norm."""
    for decades, typical, most in (0.0, 1e-3, 2e-3), (1.0, 2e-3, 2e-2), (3.0, 5e-2, 0.2):  # twice what it does
        moved = []
        for seed in range(50):
            rows, mask, _ = jacobian("free", 8, 8, seed, decades)
            exact = solve(f"{name} exact", rows, mask).gradient
            moved.append(np.linalg.norm(solve(name, rows, mask).gradient - exact) / np.linalg.norm(rows))
        assert np.median(moved) < typical
        assert 1e-4 < np.max(moved) < most
    assert np.median(moved) > 1e-3  # over 1e3 it is no rounding error


def test_regularization_gives_up_on_short_gradients():
    """Two conflicting tasks: what is added to their weights, 1/2, is over their squares plus 1e-4 of the trace."""
    rows = np.array([[1000.0, 0.0], [-0.9, 0.436]])
    gramian = rows @ rows.T
    lifts = {}
    for name, eps in ("upgrad", 1e-4), ("upgrad exact", 0.0):
        lifts[name] = -gramian[0, 1] / (np.diag(gramian) + eps * np.trace(gramian)) / 2
        problem = padded(rows)
        weights = solve(name, problem.rows, problem.mask).weights
        np.testing.assert_allclose(weights, 0.5 + lifts[name], rtol=1e-5)
    # A hundredth of what the short gradient needs: the result is 0.45 of the Jacobian's norm from the exact one.
    moved = (lifts["upgrad"] - lifts["upgrad exact"]) @ rows / np.linalg.norm(rows)
    assert np.linalg.norm(moved) == pytest.approx(0.4455, abs=1e-4)


# PCD.


def test_pcd_in_closed_form():
    """Two tasks: g_1 and what the share of g_2 lacks, over the roots of their mean squares; then as long as g_1."""
    method, tau, beta = aggregation.pcd(tau=0.3, beta=0.5), 0.3, 0.5
    lacking = 0
    for seed in range(10):
        first, second = (two_tasks(seed + shift)[0][:2] for shift in (0, 100))
        _, state = method.apply(method.init(first.shape), first)
        gradient, _ = method.apply(state, second)
        squares = [np.sum(x.astype(float) ** 2, axis=1) for x in (first, second)]
        mean = (beta * squares[0] + squares[1]) * (1 - beta) / (1 - beta**2)
        one, two = second.astype(float) / np.sqrt(mean)[:, None]
        multiplier = max(tau - one @ two / (two @ two), 0)
        lacking += multiplier > 0
        step = one + multiplier * two
        expected = np.sqrt(squares[1][0]) * step / np.linalg.norm(step)
        # Rounding of what is added up, with some room.
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.linalg.norm(expected) * (1 + multiplier))
    assert 0 < lacking < 10


def test_pcd_without_a_step():
    method = aggregation.pcd(tau=0.3)
    # Contradicting tasks are left to themselves.
    rows = np.float32([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [0.0, -3.0, -3.0]])
    np.testing.assert_allclose(gradient_of(method, rows), rows[0], rtol=1e-6)
    # Nothing is done for the others where the primary task has arrived.
    np.testing.assert_array_equal(gradient_of(method, with_new(rows, 0, 0)), np.zeros(3))


def test_the_first_task_present_is_the_primary_one():
    method = aggregation.pcd(tau=[0.9, 0.3])
    rows = np.float32([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [2.0, -1.0, 0.0]])
    masked = gradient_of(method, rows, np.array([False, True, True]))
    # The solver's exactness, and rounding.
    np.testing.assert_allclose(masked, gradient_of(aggregation.pcd(tau=[0.3]), rows[1:]), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(masked), np.sqrt(2.0), rtol=1e-6)


# The others.


def test_db_mtl_makes_all_gradients_as_long_as_the_longest():
    rows, mask, _ = jacobian("free", 4, 4, seed=0, decades=3.0)
    rows[2] = 0
    weights = solve("db_mtl", rows, mask).weights
    norms = np.linalg.norm(rows[:4].astype(float), axis=1)
    np.testing.assert_allclose(weights * norms, np.max(norms) * np.array([1, 1, 0, 1]), rtol=1e-6)
    assert weights[2] == 0


def test_gradvac_starts_as_pcgrad_and_turns_towards_its_targets():
    rows = np.float32([[1.0, 0.0], [0.6, 0.8]])
    method = aggregation.gradvac(beta=1.0)
    gradient, state = method.apply(method.init(rows.shape), rows)
    np.testing.assert_allclose(gradient, rows.sum(0), rtol=1e-6)  # nothing conflicts
    np.testing.assert_allclose(state.targets, [[0.0, 0.6], [0.6, 0.0]], atol=1e-6)
    # The next gradients are at right angles: each is turned until its cosine to the other is 0.6.
    gradient, _ = method.apply(state, np.eye(2, dtype=np.float32))
    np.testing.assert_allclose(gradient, [1.75, 1.75], rtol=1e-5)


def test_krum_leaves_out_the_odd_one_and_absent_tasks():
    rows = np.float32([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1], [1.0, -0.1], [-50.0, 9.0]])
    method = aggregation.krum(n_byzantine=1, n_selected=3)
    weights, state = method.weighting.apply(method.init(rows.shape), rows)
    assert np.asarray(weights)[4] == 0
    np.testing.assert_allclose(np.sort(weights), [0, 0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    mask = np.array([False, True, False, False, True])
    weights, _ = method.weighting.apply(state, rows, mask=mask)
    np.testing.assert_allclose(weights, [0, 0.5, 0, 0, 0.5])
    with pytest.raises(ValueError, match="number of tasks: expected at least 4 with this n_byzantine, found 3"):
        method.init((3, 2))


def test_krum_has_as_many_neighbours_as_the_tasks_present_alone_would():
    mask = np.array([True, True, True, False, True, True, True])
    method = aggregation.krum(n_byzantine=1)
    for seed in range(10):
        rows = normal(seed, 7, 3)
        masked, _ = method.weighting.apply(method.init((7, 3)), rows, mask=mask)
        alone, _ = method.weighting.apply(method.init((6, 3)), rows[mask])
        np.testing.assert_array_equal(np.asarray(masked)[mask], alone)


def test_norm_of_nash_mtl():
    """The root of the number of tasks, unless it is bounded."""
    rows = jacobian("free", 4, 4, seed=0).rows[:4]

    def length(bound):
        method = aggregation.nash_mtl(bound)
        return jnp.linalg.norm(method.apply(method.init(rows.shape), rows)[0])

    lengths = jax.jit(jax.vmap(length))(np.float32([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(lengths, [2.0, 1.0, 2.0], rtol=1e-5)


def test_modo_and_sdmgrad_stay_on_the_simplex():
    for method in aggregation.modo(lr=5.0), aggregation.sdmgrad():
        weighting = method.gramian_weighting
        state = weighting.init(4)
        for seed in range(5):
            weights, state = weighting.apply(state, normal(seed, 4, 4))
            weights = np.asarray(weights)
            assert np.all(weights >= 0)
            np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-5)


def test_cr_mogm_is_a_running_average():
    method = aggregation.cr_mogm(aggregation.mgda(), alpha=0.75)
    weighting, inner = method.gramian_weighting, aggregation.mgda().gramian_weighting
    state, average = weighting.init(3), None
    for seed in range(4):
        rows = jacobian("free", 3, 3, seed).rows[:3]
        own, _ = inner.apply(inner.init(3), rows @ rows.T)
        average = own if average is None else 0.75 * average + 0.25 * own
        weights, state = weighting.apply(state, rows @ rows.T)
        np.testing.assert_allclose(weights, average, rtol=1e-5)
    with pytest.raises(TypeError, match="method: expected an Aggregator, found"):
        aggregation.cr_mogm("mgda")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: aggregation.upgrad(reg_eps=-1.0), "reg_eps: expected a finite number of at least 0"),
        (lambda: aggregation.dual_proj(np.ones(3)).init((2, 4)), "pref_vector: expected one number per task"),
        (lambda: aggregation.nash_mtl(-1.0), "max_norm: expected a number of at least 0"),
        (lambda: aggregation.fairgrad(0.0), "alpha: expected a finite number above 0"),
        (lambda: aggregation.aligned_mtl(scale_mode="mean"), "scale_mode: expected one of"),
        (lambda: aggregation.gradvac(beta=1.5), "beta: expected a number from 0 to 1"),
        (lambda: aggregation.modo(lr=0.0), "lr: expected a finite number above 0"),
        (lambda: aggregation.sdmgrad(momentum=1.0), "momentum: expected a number of at least 0 and below 1"),
        (lambda: aggregation.sdmgrad(n_iter=0), "n_iter: expected an int of at least 1"),
        (lambda: aggregation.cr_mogm(aggregation.mean(), alpha=2.0), "alpha: expected a number from 0 to 1"),
        (lambda: aggregation.krum(-1), "n_byzantine: expected an int of at least 0"),
        (lambda: aggregation.krum(0, 0), "n_selected: expected an int of at least 1"),
        (lambda: aggregation.krum(0, 5).init((4, 2)), "number of tasks: expected at least 5 with this n_selected"),
        (lambda: aggregation.cagrad(c=-0.1), "c: expected a finite number of at least 0"),
        (lambda: aggregation.cagrad(rescale=3), "rescale: expected 0, 1 or 2, found 3"),
        (lambda: aggregation.pcd(beta=1.0), "beta: expected a number of at least 0 and below 1"),
        (lambda: aggregation.pcd(eps=-1e-8), "eps: expected a finite number of at least 0"),
        (lambda: aggregation.pcd(tau=1.5).init((3, 4)), "tau: expected a number from 0 to 1"),
        (lambda: aggregation.pcd(tau=jnp.array([0.1, -0.1])).init((3, 4)), "tau: expected a number from 0 to 1"),
        (lambda: aggregation.pcd(tau=np.ones(3)).init((3, 4)), "tau: expected a scalar or one number per"),
    ],
)
def test_bounds(build, message):
    with pytest.raises(ValueError, match=message):
        build()
