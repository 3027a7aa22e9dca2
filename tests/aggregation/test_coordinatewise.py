"""GradDrop and the trimmed mean, which act on each coordinate alone: properties on any Jacobian."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from mtlbalance import aggregation
from tests.aggregation.problems import PARAMS, TASKS, examples, jacobian, padded, problems, with_new

pytestmark = pytest.mark.unoptimized

TRIMMED = 2
ROUNDING = 1e-6  # of a sum of up to eight terms, relative to their size
seeds = st.integers(0, 2**31 - 1)


@functools.cache
def built(name, argument):
    method = getattr(aggregation, name)(argument)
    return method.apply, method.init((TASKS, PARAMS))


def trimmed_mean(rows, mask=None, trim_number=TRIMMED):
    apply, state = built("trimmed_mean", trim_number)
    return np.array(apply(state, rows, mask=mask)[0])


@jax.jit
def graddrop(seed, leak, rows, mask, losses=None):
    method = aggregation.graddrop(seed, leak)
    return method.apply(method.init(rows.shape), rows, values=losses, mask=mask)[0]


def whole(problem):
    """The rows of the tasks present, in float64."""
    return problem.rows[problem.mask].astype(float)


def assert_near(actual, expected, rows):
    assert np.all(np.abs(actual - expected) <= ROUNDING * np.sum(np.abs(rows), axis=0))


# The trimmed mean.


@examples
@given(problem=problems(decades=3.0))
def test_trimmed_mean_is_that_of_the_tasks_present(problem):
    """With fewer than five, as many are trimmed as leave one or two."""
    rows = np.sort(whole(problem), axis=0)
    n_trimmed = min(TRIMMED, (len(rows) - 1) // 2)
    kept = rows[n_trimmed : len(rows) - n_trimmed]
    found = trimmed_mean(problem.rows, problem.mask)
    assert_near(found, kept.mean(0), kept)
    slack = ROUNDING * np.abs(kept).sum(0)
    assert np.all((kept[0] - slack <= found) & (found <= kept[-1] + slack))


@examples
@given(problem=problems(decades=3.0), seed=seeds, scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_trimmed_mean_follows_permutations_scales_and_shifts(problem, seed, scale, shift):
    found, order = trimmed_mean(problem.rows, problem.mask), np.random.default_rng(seed).permutation(TASKS)
    np.testing.assert_array_equal(trimmed_mean(problem.rows[order], problem.mask[order]), found)
    scaled, shifted = np.float32(scale) * problem.rows, problem.rows + np.float32(shift)
    assert_near(trimmed_mean(scaled, problem.mask), scale * found, scale * whole(problem))
    assert_near(trimmed_mean(shifted, problem.mask), found + shift, np.abs(whole(problem)) + abs(shift))


@examples
@given(problem=problems(decades=3.0))
def test_without_trimming_it_is_the_mean_and_with_all_the_median(problem):
    rows = whole(problem)
    assert_near(trimmed_mean(problem.rows, problem.mask, trim_number=0), rows.mean(0), rows)
    most = (TASKS - 1) // 2
    assert_near(trimmed_mean(problem.rows, problem.mask, trim_number=most), np.median(rows, axis=0), rows)


BAD = {
    "large": [3e38, 1e30],
    "small": [-3e38, -1e30],
    "both": [1e30, -1e30],
    "infinite": [np.inf, -np.inf],
    "infinite on one side": [np.inf, np.inf],
    "NaN": [np.nan, np.nan],
    "NaN and infinite": [np.nan, -np.inf],
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@examples
@given(m=st.integers(2 * TRIMMED + 1, TASKS), seed=seeds)
def test_a_few_bad_rows_do_no_harm(bad, m, seed):
    """The rest decides: between its extremes, and as numpy's sort has it, which also takes NaN for the largest."""
    problem = jacobian("free", m, m, seed)
    rows = problem.rows.copy()
    rows[np.random.default_rng(seed).permutation(m)[: len(bad)]] = np.float32(bad)[:, None]
    good = rows[:m][np.abs(rows[:m, 0]) < 1e10].astype(float)
    found = trimmed_mean(rows, problem.mask)
    assert_near(found, np.sort(rows[:m], axis=0)[TRIMMED : m - TRIMMED].astype(float).mean(0), good)
    slack = ROUNDING * np.abs(good).sum(0)
    assert np.all((good.min(0) - slack <= found) & (found <= good.max(0) + slack))


def test_one_bad_row_too_many_shows():
    rows = np.tile(np.arange(8, dtype=np.float32)[:, None], PARAMS)
    for bad in np.nan, np.inf, -np.inf:
        np.testing.assert_array_equal(trimmed_mean(with_new(rows, slice(3), bad)), bad)


@pytest.mark.parametrize("m", [1, 2, 13, 33, 64, 65, 70])
@pytest.mark.by_default("2", "13", "65")
def test_any_number_of_tasks_is_put_in_order(m):
    """Also beyond those whose comparisons are written out."""
    rows = np.random.default_rng(m).normal(size=(m, 50)).astype(np.float32)
    method, k = aggregation.trimmed_mean(m // 3), m // 3
    gradient = jax.jit(lambda rows: method.apply(method.init(rows.shape), rows)[0])(rows)
    assert_near(gradient, np.sort(rows, axis=0)[k : m - k].astype(float).mean(0), rows)


@pytest.mark.parametrize("m", [8, 70])
@pytest.mark.by_default("8")
def test_an_outer_derivative_goes_through_what_is_kept(m):
    rows = np.random.default_rng(m).normal(size=(m, 4)).astype(np.float32)
    rows[0, 0] = np.nan
    method = aggregation.trimmed_mean(TRIMMED)
    total = lambda rows: jnp.sum(method.apply(method.init(rows.shape), rows)[0])
    ranks = np.argsort(np.argsort(rows, axis=0), axis=0)
    kept = (ranks >= TRIMMED) & (ranks < m - TRIMMED)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(rows), kept / (m - 2 * TRIMMED), rtol=1e-6)


def test_wrong_trim_numbers_raise():
    with pytest.raises(ValueError, match="trim_number: expected an int of at least 0, found -1"):
        aggregation.trimmed_mean(-1)
    with pytest.raises(TypeError, match="trim_number: expected an int"):
        aggregation.trimmed_mean(1.0)
    with pytest.raises(ValueError, match="number of tasks: expected at least 5 with this trim_number, found 4"):
        aggregation.trimmed_mean(2).init((4, 3))


# GradDrop.


@examples
@given(problem=problems(decades=3.0), seed=seeds, leak=st.sampled_from([0.0, 0.25, 1.0]))
def test_each_coordinate_keeps_the_entries_of_one_sign(problem, seed, leak):
    rows, found = whole(problem), np.array(graddrop(seed, leak, problem.rows, problem.mask))
    positive = np.where(rows > 0, rows, leak * rows).sum(0)
    negative = np.where(rows < 0, rows, leak * rows).sum(0)
    near = lambda sums: np.abs(found - sums) <= ROUNDING * np.abs(rows).sum(0)
    assert np.all(near(positive) | near(negative))
    if leak == 1:
        assert_near(found, rows.sum(0), rows)
    agreed = np.all(rows >= 0, axis=0) | np.all(rows <= 0, axis=0)
    assert np.all(near(rows.sum(0))[agreed])


@examples
@given(seed=seeds, m=st.integers(1, TASKS), sign=st.sampled_from([-1, 1]))
def test_gradients_of_one_sign_are_added_up(seed, m, sign):
    problem = jacobian("free", m, m, seed)
    rows = sign * np.abs(problem.rows)
    assert_near(graddrop(seed, 0.0, rows, problem.mask), rows[:m].astype(float).sum(0), rows[:m])


@examples
@given(seed=seeds, m=st.integers(1, TASKS))
def test_the_draws_depend_on_neither_order_nor_absent_tasks(seed, m):
    """But for a purity that rounding moves across its draw: that of small whole numbers is not moved that far."""
    rng = np.random.default_rng(seed)
    problem, order = padded(rng.integers(-4, 5, (m, PARAMS)).astype(np.float32)), rng.permutation(TASKS)
    found = graddrop(seed, 0.0, problem.rows, problem.mask)
    np.testing.assert_array_equal(graddrop(seed, 0.0, problem.rows[order], problem.mask[order]), found)
    np.testing.assert_array_equal(graddrop(seed, 0.0, problem.rows[:m], np.ones(m, bool)), found)


def test_extreme_entries_neither_overflow_nor_vanish():
    big = np.float32(3e38)
    columns = {
        (1e30, 1e30, -1e30): (2e30, -1e30),
        (big, -1.0, 0.0): (big,),  # positive but for once in 3e38
        (-big, -big, 1.0): (-np.inf,),  # the sum itself overflows, and shows
        (1e-37, -1e-37, 0.0): (1e-37, -1e-37),
        (0.0, 0.0, 0.0): (0.0,),
    }
    found = graddrop(0, 0.0, np.float32(list(columns)).T, np.ones(3, bool))
    for value, possible in zip(np.asarray(found), columns.values(), strict=True):
        assert np.any(np.float32(possible) == value), (value, possible)
    assert np.isnan(np.asarray(graddrop(0, 0.0, np.float32([[np.nan], [1.0]]), np.ones(2, bool)))[0])


def test_the_purity_is_the_chance_of_the_positive_entries():
    """And a function of it, where one is given; within four standard errors of 10,000 draws."""
    rows = np.tile(np.float32([[3.0], [-1.0]]), 10_000)
    for f, chance in (None, 0.75), (lambda p: p**2, 0.5625):
        method = aggregation.graddrop(7, f=f)
        drawn, _ = method.apply(method.init(rows.shape), rows)
        assert abs(np.mean(np.asarray(drawn) == 3) - chance) < 4 * np.sqrt(chance * (1 - chance) / 10_000)


def test_calls_leaves_and_seeds_draw_differently():
    rows = dict.fromkeys("ab", np.tile(np.float32([[1.0], [-1.0]]), 64))
    method = aggregation.graddrop(0)
    state = method.init((2, dict.fromkeys("ab", np.ones(64, np.float32))))
    first, state = method.apply(state, rows)
    second, _ = method.apply(state, rows)
    for one, other in (first["a"], first["b"]), (first["a"], second["a"]):
        assert not np.array_equal(one, other)
    alone = lambda seed: graddrop(seed, 0.0, rows["a"], np.ones(2, bool))
    mapped = np.asarray(jax.jit(jax.vmap(alone))(np.arange(4)))
    np.testing.assert_array_equal(mapped, [alone(seed) for seed in range(4)])
    assert len(np.unique(mapped, axis=0)) == 4


def test_a_seed_draws_the_same_in_float64():
    rows = np.array([[2.0, -1.0, 0.5], [-1.0, 2.0, -2.0]] * 2).repeat(20, axis=1)
    single = graddrop(3, 0.5, np.float32(rows), np.ones(4, bool))
    with jax.enable_x64(True):
        double = graddrop(3, 0.5, rows, np.ones(4, bool))
    assert double.dtype == jnp.float64
    np.testing.assert_array_equal(single, double)


def test_an_outer_derivative_takes_the_masks_for_constants():
    rows, leak = np.float32([[2.0, -1.0, 0.0], [-1.0, -3.0, 4.0]]), np.float32([0.25, 0.5])

    @jax.jit
    def found(rows):
        gradient, pull = jax.vjp(lambda rows: graddrop(1, leak, rows, np.ones(2, bool)), rows)
        return gradient, pull(jnp.ones(3))[0]

    gradient, derivative = jax.device_get(found(rows))
    assert gradient[0] in (2 - 0.5, -1 + 0.5)
    kept = (rows > 0) == (np.array([[gradient[0], -1, 1]]) > 0)
    moved = rows != 0
    np.testing.assert_allclose(derivative[moved], np.where(kept, 1, leak[:, None])[moved])


def test_devices_of_a_shard_map_draw_differently():
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    rows = np.tile(np.float32([[1.0], [-1.0]]), 8 * 64)
    method = aggregation.graddrop(0, axis_name="x")
    state = method.init((2, 8 * 64))
    specs = (PartitionSpec(), PartitionSpec(None, "x")), (PartitionSpec("x"), PartitionSpec())
    step = jax.jit(jax.shard_map(method.apply, mesh=mesh, in_specs=specs[0], out_specs=specs[1]))
    drawn, _ = step(state, rows)
    assert len(np.unique(np.reshape(drawn, (8, 64)), axis=0)) == 8
    assert 0.3 < np.mean(np.asarray(drawn) > 0) < 0.7


def test_leak_is_one_number_or_one_per_task_also_by_name():
    rows, mask = np.float32([[2.0, 2.0], [-1.0, -1.0]]), np.ones(2, bool)
    losses = {"a": np.float32(1.0), "b": np.float32(2.0)}
    by_name = graddrop(0, {"a": 0.5, "b": 0.5}, rows, mask, losses)
    chex.assert_trees_all_equal(by_name, graddrop(0, 0.5, rows, mask))
    aggregation.graddrop(leak={"a": jnp.bfloat16(0.5), "b": 1}).init((2, 2))  # numbers of different dtypes


def test_wrong_arguments_raise():
    for leak in -0.1, 1.5, np.array([0.5, 2.0]), jnp.array([0.5, 2.0]), np.nan:
        with pytest.raises(ValueError, match="leak: expected a number from 0 to 1"):
            aggregation.graddrop(leak=leak).init((2, 3))
    with pytest.raises(ValueError, match=r"leak: expected a scalar or one number per task, shape \(2,\)"):
        aggregation.graddrop(leak=np.ones(3)).init((2, 3))
    with pytest.raises(TypeError, match="f: expected a function of the purity, or None, found float"):
        aggregation.graddrop(f=0.5)
    method = aggregation.graddrop(f=jnp.mean)
    with pytest.raises(ValueError, match=r"f: expected a function that keeps the shape \(3,\), found shape \(\)"):
        method.apply(method.init((2, 3)), np.ones((2, 3), np.float32))
    with pytest.raises(TypeError, match="key: expected an int or a key"):
        aggregation.graddrop(key=0.5)
