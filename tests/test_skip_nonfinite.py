"""``skip_nonfinite`` counts what is not finite wherever it shows: in a step's gradient, in weights, in an output."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, base, scalarization, states

pytestmark = pytest.mark.unoptimized


def losses_fn(params, scale):
    """The first loss is as usual; the second, a zero times a root at zero, has a gradient that is NaN at zero."""
    return jnp.stack([jnp.sum((params - 1) ** 2), scale * jnp.sum(jnp.sqrt(params - params)) + jnp.sum(params**2)])


def own_loss(params, scale):
    """The same for one task, whose data are its factor."""
    return jnp.sum((params - 1) ** 2) + jnp.sum(jnp.sqrt(jnp.where(scale > 0, (params - params) * scale, 1)))


ABSENT = np.array([True, False])
GUARDED = {
    "mean": lambda guard: guard(scalarization.mean()),
    "dwa": lambda guard: guard(scalarization.dwa(steps_per_epoch=1)),
    "learn": lambda guard: guard(mtl.learn(scalarization.uw(), optax.adam(0.1))),
    "inside amortize": lambda guard: mtl.amortize(guard(scalarization.dwa(steps_per_epoch=1))),
    "inside skip_zero": lambda guard: mtl.skip_zero(guard(scalarization.dwa(steps_per_epoch=1))),
}


@pytest.mark.parametrize("make", GUARDED.values(), ids=GUARDED.keys())
def test_a_step_whose_gradient_alone_is_not_finite_is_counted_and_skipped(make):
    """A scalarizer sees losses only; an absent task's gradient comes through the pass that it shares."""
    grad_fn = jax.jit(mtl.value_and_grad(losses_fn, make(mtl.skip_nonfinite)))
    params = np.float32([0.5, 2.0])
    before = jax.jit(grad_fn.init)(params, 0.0)
    for n_skipped, mask in enumerate([ABSENT, None], 1):
        (losses, state), gradient = grad_fn(params, before, 1.0, mask=mask)
        chex.assert_tree_all_finite(losses)
        assert np.all(np.isnan(gradient))
        guard = state if hasattr(state, "skipped") else state.inner
        assert guard.skipped == n_skipped
        np.testing.assert_array_equal(guard.nonfinite, [0, 0])  # nobody knows whose it was
        chex.assert_trees_all_equal(guard.inner, (before if guard is state else before.inner).inner)
        before = state


@pytest.mark.parametrize(("rows", "is_finite"), [("vmap", True), ("stream", False)])
def test_a_guarded_aggregator_counts_what_comes_through_the_last_pass(rows, is_finite):
    """Each task has its own data: no row that is present has a NaN, but the pass with the weights goes through all."""
    method = mtl.skip_nonfinite(aggregation.excess_mtl())
    grad_fn = mtl.value_and_grad(own_loss, method, task_axis=0, rows=rows)
    params, data = np.float32([0.5, 2.0]), np.float32([0.0, 1.0])
    before = jax.jit(grad_fn.init)(params, data)
    (_, state), gradient = jax.device_get(jax.jit(grad_fn)(params, before, data, mask=ABSENT))
    assert np.all(np.isfinite(gradient)) == is_finite
    assert state.skipped == (not is_finite)
    np.testing.assert_array_equal(state.nonfinite, [0, 0])
    np.testing.assert_array_equal(state.inner.seen, [is_finite, 0])


def test_a_chain_tells_both_its_guards():
    parts = scalarization.dwa(steps_per_epoch=1), aggregation.upgrad()
    method = mtl.chain(*map(mtl.skip_nonfinite, parts))
    state = method.init((2, 2))
    new = method.apply(state, np.eye(2, dtype=np.float32), values=np.ones(2, np.float32))[1]
    kept = method.after_gradient(state, new, False)
    for part, old in zip(kept, state, strict=True):
        chex.assert_trees_all_equal(part.inner, old.inner)
        assert part.skipped == 1
    chex.assert_trees_all_equal(method.after_gradient(state, new, True), new)


def test_a_step_without_a_refresh_counts_too():
    method = mtl.skip_nonfinite(mtl.amortize(scalarization.sum()))
    grad_fn = mtl.value_and_grad(losses_fn, method)
    params = np.float32([0.5, 2.0])
    state = grad_fn.init(params, 0.0)
    assert grad_fn(params, state, 1.0, refresh=False)[0][1].skipped == 1
    assert grad_fn(params, state, 1.0, refresh=True)[0][1].skipped == 1  # once


def test_an_output_that_is_not_finite_is_counted_where_all_that_comes_in_is():
    """On every path: the gradient of a combination, weights, and what ends a visit of all rows."""
    rows = np.float32([[1.0, 2.0], [3.0, 4.0]])
    for method in mtl.skip_nonfinite(overflowing()), mtl.skip_nonfinite(aggregation.moco(normalize=True)):
        start, given = method.init((2, 2)), {"values": np.float32([1.0, -1.0])}
        ends = [method.apply(start, rows, **given)[1]]
        ends += [method.weighting.apply(start, rows, **given)[1]] if method.weighting else []
        ends += [method.gramian_weighting.apply(start, rows @ rows.T, **given)[1]] if method.gramian_weighting else []
        for state in ends:
            assert state.skipped == 1
            np.testing.assert_array_equal(state.inner.seen, [0, 0])


def overflowing():
    """Weights that are infinite for Gramians that are not."""

    def weigh(state, gramian, values, mask):
        return jnp.diagonal(gramian) * 1e30 * 1e30, states.count_seen(state, mask)

    return base.aggregator(states.init_seen, gramian_weighting=weigh)
