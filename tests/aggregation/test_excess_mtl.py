"""ExcessMTL: its first calls, late tasks, long runs, memory. Its values are in tests/golden."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mtlbalance as mtl
from mtlbalance import aggregation

METHOD = aggregation.excess_mtl()


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def weights_over(method, jacobians):
    """The weights at every call, shape ``[calls, m]``."""
    state = method.init(jacobians.shape[1:])
    return jax.lax.scan(lambda s, j: method.weighting.apply(s, j)[::-1], state, jacobians)[1]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_first_call_leaves_the_weights_uniform(scale):
    jacobians = normal(1, 3, 50) * np.float32([[[1.0], [10.0], [0.1]]]) * np.float32(scale)
    np.testing.assert_allclose(np.asarray(weights_over(METHOD, jacobians))[0], np.full(3, 1 / 3), rtol=1e-6)


def test_warm_up_leaves_the_weights_uniform_and_takes_the_mean_as_baseline():
    jacobians = normal(5, 2, 7)
    method = aggregation.excess_mtl(n_warmup_steps=3)
    weights = np.asarray(weights_over(method, jacobians))
    np.testing.assert_allclose(weights[:3], np.full((3, 2), 0.5), rtol=1e-6)
    squares = np.cumsum(np.float64(jacobians) ** 2, axis=0)
    excess = np.sum(np.float64(jacobians) ** 2 / np.sqrt(squares + 1e-7), axis=-1)
    ratio = excess[3] / (excess[:3].mean(0) + 1e-7)
    np.testing.assert_allclose(weights[3], np.exp(ratio) / np.exp(ratio).sum(), rtol=1e-5)


def test_a_task_that_starts_late_starts_on_equal_terms():
    """Its gradient is zero for 20 calls. TorchJD gives it all the weight for ever."""
    jacobians = normal(40, 3, 200)
    jacobians[:20, 0] = 0
    weights = np.asarray(weights_over(METHOD, jacobians))
    np.testing.assert_allclose(weights[:21, 0], np.full(21, 1 / 3), rtol=1e-5)
    assert np.all(weights[21] < np.e / 3)
    assert np.all(weights[21] > 1 / (3 * np.e))
    chex.assert_tree_all_finite(weights)


def test_a_task_absent_at_first_starts_on_equal_terms():
    state = METHOD.init((3, 200))
    for i, x in enumerate(normal(22, 3, 200)):
        mask = np.array([i >= 20, True, True])
        weights, state = METHOD.weighting.apply(state, x, mask=mask)
    np.testing.assert_array_equal(state.seen, [2, 22, 22])
    weights = np.asarray(weights)
    assert np.all(weights < np.e / 3)
    assert np.all(weights > 1 / (3 * np.e))
    np.testing.assert_allclose(np.exp(state.log_weights).sum(), 1.0, rtol=1e-5)


def test_constant_gradients_keep_equal_weights_and_fall_by_the_root_of_the_call():
    jacobian = normal(3, 10)
    np.testing.assert_allclose(weights_over(METHOD, np.stack([jacobian] * 20)), np.full((20, 3), 1 / 3), rtol=1e-4)
    state, excess = METHOD.init((3, 10)), []
    for _ in range(4):
        state, statistic = METHOD.rowwise.visit(state, 0, jacobian[0])
        excess.append(statistic)
    np.testing.assert_allclose(np.array(excess) / float(excess[0]), 1 / np.sqrt(np.arange(1, 5)), rtol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 3.0])
def test_the_log_weights_are_about_twice_the_roots_of_the_sums_of_squares_over_the_baselines(rate):
    """Whatever the gradients did on the way: what the docstring says of noise. Each call adds a little less than twice
    the step of the root; the first, which moves no weight, adds the same to both tasks."""
    shrinking = np.exp(-rate * np.linspace(0, 1, 400)[:, None, None] * np.array([[[0.0], [1.0]]]))
    jacobians = np.float32(shrinking * normal(400, 2, 500))
    weights = np.asarray(weights_over(aggregation.excess_mtl(0.01), jacobians), np.float64)
    roots = np.sqrt(np.sum(np.float64(jacobians) ** 2, axis=0)).sum(axis=1) / np.abs(jacobians[0]).sum(axis=1)
    assert np.log(weights[-1, 0] / weights[-1, 1]) == pytest.approx(2 * 0.01 * (roots[0] - roots[1]), rel=0.1)


def test_the_task_whose_gradient_shrinks_faster_loses_weight():
    decay = np.stack([np.exp(-0.3 * np.arange(10)), np.ones(10)], axis=1)
    jacobians = np.float32(decay[:, :, None] * normal(1, 2, 30))
    assert np.all(np.diff(np.asarray(weights_over(METHOD, jacobians))[:, 0]) <= 0)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    permutation=st.permutations(range(4)),
    log_scales=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_weights_follow_a_permutation_ignore_scales_and_lie_on_the_simplex(seed, permutation, log_scales):
    """Scales: exact but for the 1e-7 in the root and the ratio, hence gradients of size 10 and up."""
    jacobians = np.float32(1e4 * np.random.default_rng(seed).normal(size=(6, 4, 20)))
    weights = np.asarray(weights_over(METHOD, jacobians))
    np.testing.assert_allclose(weights.sum(-1), np.ones(6), rtol=1e-5)
    np.testing.assert_allclose(weights_over(METHOD, jacobians[:, permutation]), weights[:, permutation], rtol=1e-4)
    scales = 10 ** np.float32(log_scales)[None, :, None]
    np.testing.assert_allclose(weights_over(METHOD, scales * jacobians), weights, rtol=1e-3)


@pytest.mark.slow
def test_a_million_parameters_over_400_calls_stay_on_the_simplex():
    """TorchJD 0.17 overflows on the first call of this.

    Each call's gradients are the last one's, shifted: no parameter gets one of its numbers twice, and few are drawn.
    """

    @jax.jit
    def weights_over(numbers):
        def call(state, start):
            jacobian = jax.lax.dynamic_slice_in_dim(numbers, start, 10**6, axis=1)
            return METHOD.weighting.apply(state, jacobian)[::-1]

        return jax.lax.scan(call, METHOD.init((3, 10**6)), jnp.arange(400))[1]

    weights = weights_over(normal(3, 10**6 + 400))
    chex.assert_tree_all_finite(weights)
    np.testing.assert_allclose(np.asarray(weights).sum(-1), np.ones(400), rtol=1e-5)


@pytest.mark.skipif(jax.__version_info__ < (0, 10, 2), reason="earlier compilers copy the loop's state once")
@pytest.mark.parametrize("method", [METHOD, mtl.skip_nonfinite(METHOD)], ids=["bare", "guarded"])
def test_visits_update_the_accumulator_in_place(method):
    """A loop over the rows needs temporaries of at most three rows (two without the guard), not of 16."""
    m, n = 16, 100_000

    def stream(state, direction):
        def body(i, carry):
            state, statistics = carry
            state, statistic = method.rowwise.visit(state, i, direction * (i + 1))
            return state, jax.tree.map(lambda s, x: s.at[i].set(x), statistics, statistic)

        statistic = jax.eval_shape(method.rowwise.visit, state, 0, direction)[1]
        statistics = jax.tree.map(lambda x: jnp.zeros((m, *x.shape), x.dtype), statistic)
        state, statistics = jax.lax.fori_loop(0, m, body, (state, statistics))
        return method.rowwise.weigh(state, statistics)

    step = jax.jit(stream, donate_argnums=0).lower(method.init((m, n)), np.ones(n, np.float32)).compile()
    row_bytes, small = 4 * n, 4000
    assert step.memory_analysis().temp_size_in_bytes <= 3 * row_bytes + small
    assert step.memory_analysis().alias_size_in_bytes >= m * row_bytes


def test_bounds():
    for step in 0.0, -1.0, float("nan"), float("inf"):
        with pytest.raises(ValueError, match="robust_step_size: expected a finite number above 0, found"):
            aggregation.excess_mtl(step)
    with pytest.raises(ValueError, match="n_warmup_steps: expected an int of at least 0, found -1"):
        aggregation.excess_mtl(n_warmup_steps=-1)
