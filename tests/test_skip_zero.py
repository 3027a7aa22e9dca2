"""``skip_zero``: a task without loss or gradient counts as absent, on every path and in every form of a step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

ROWS = {
    "w": np.array([[1.0, 2.0], [0.0, 0.0], [3.0, -1.0]], np.float32),
    "b": np.array([0.5, 0.0, -0.25], np.float32),
}
PARAMS = {"w": np.zeros(2, np.float32), "b": np.float32(0)}
OTHERS = np.array([True, False, True])


@pytest.mark.parametrize("make", [scalarization.famo, scalarization.uw_so, scalarization.geometric_mean])
def test_a_loss_of_zero_is_absent(make):
    bare, method = make(), mtl.skip_zero(make())
    losses = np.array([2.0, 0.0, 5.0], np.float32)
    apply = lambda method, **given: jax.grad(method.apply, argnums=1, has_aux=True)(method.init(3), losses, **given)
    (weights, state), (expected, inner) = jax.device_get(jax.jit(lambda: (apply(method), apply(bare, mask=OTHERS)))())
    np.testing.assert_array_equal(weights, expected)
    chex.assert_trees_all_equal(state.inner, inner)
    np.testing.assert_array_equal(state.zeros, [0, 1, 0])
    assert np.all(weights[OTHERS] > 0)


def test_what_was_zero_is_not_observed():
    """FAMO would take the loss before the last one for that before the step."""
    method, bare = mtl.skip_zero(scalarization.famo()), scalarization.famo()
    losses = lambda *numbers: np.array(numbers, np.float32)
    _, state = method.apply(method.init(3), losses(2.0, 9.0, 5.0))
    _, state = method.apply(state, losses(2.0, 0.0, 5.0))
    observed = method.observe(state, losses(1.5, 1.0, 4.0))
    chex.assert_trees_all_equal(observed.inner, bare.observe(state.inner, losses(1.5, 1.0, 4.0), mask=OTHERS))
    met = method.observe(method.apply(state, losses(2.0, 1.0, 5.0))[1], losses(1.5, 0.0, 4.0))
    assert met.inner.count[1] == 0


@pytest.mark.parametrize(
    "make", [aggregation.mgda, aggregation.excess_mtl, aggregation.db_mtl, lambda: aggregation.db_mtl(beta=0.5)]
)
def test_a_gradient_of_zero_is_absent_on_every_path(make):
    bare, method = make(), mtl.skip_zero(make())
    start = jax.jit(lambda: method.init((3, PARAMS)))()
    gradient, state = method.apply(start, ROWS)
    expected, inner = bare.apply(start.inner, ROWS, mask=OTHERS)
    chex.assert_trees_all_close((gradient, state.inner), (expected, inner), rtol=1e-6)
    np.testing.assert_array_equal(state.zeros, [0, 1, 0])
    states = []
    if method.weighting is not None:
        states.append(method.weighting.apply(start, ROWS)[1])
    if method.gramian_weighting is not None:
        products = sum(x.reshape(3, -1) @ x.reshape(3, -1).T for x in jax.tree.leaves(ROWS))
        states.append(method.gramian_weighting.apply(start, products)[1])
    if method.rowwise is not None:
        visited, statistics = start, []
        for i in range(3):
            visited, statistic = method.rowwise.visit(visited, i, jax.tree.map(lambda x, i=i: x[i], ROWS))
            statistics.append(statistic)
        statistics = jax.tree.map(lambda *leaves: np.stack(leaves), *statistics)
        states.append((method.rowwise.weigh or method.rowwise.finish)(visited, statistics)[1])
    for other in states:
        chex.assert_trees_all_close(other, state, rtol=1e-6)


def test_a_loss_of_zero_is_absent_whatever_its_gradient():
    method, rows = mtl.skip_zero(aggregation.mgda()), np.array([[3.0, 0.0], [0.0, 1.0]], np.float32)
    gradient, state = method.apply(method.init((2, 2)), rows, values=np.array([0.0, 1.0], np.float32))
    np.testing.assert_allclose(gradient, rows[1], rtol=1e-6)
    np.testing.assert_array_equal(state.zeros, [1, 0])


def test_nothing_to_do_leaves_all_but_the_counts():
    for method in mtl.skip_zero(scalarization.famo()), mtl.skip_zero(aggregation.excess_mtl()):
        is_scalarizer = isinstance(method, mtl.Scalarizer)
        start = method.init(2) if is_scalarizer else method.init((2, 3))
        output, state = method.apply(start, np.zeros(2 if is_scalarizer else (2, 3), np.float32))
        np.testing.assert_array_equal(output, np.zeros_like(output))
        chex.assert_trees_all_equal(state.inner, start.inner)
        np.testing.assert_array_equal(state.zeros, [1, 1])


@pytest.mark.parametrize("rows", ["vmap", "two_pass", "stream"])
def test_a_training_arrives_with_a_hinge_that_is_met(rows):
    """In each form of a step, with named, counted and absent losses."""

    def losses_fn(x, labels):
        near = mtl.Counted(labels * jnp.sum((x - 1) ** 2), labels)
        return {"far": jnp.sum((x - 2) ** 2), "hinge": jnp.maximum(-1 - x[0], 0), "near": near}

    method = mtl.skip_zero(aggregation.db_mtl() if rows == "stream" else aggregation.mgda())
    grad_fn = mtl.value_and_grad(losses_fn, method, rows=rows)

    def step(carry, labels):
        x, state = carry
        (_, state), gradient = grad_fn(x, state, labels)
        return (x - 0.05 * gradient, state), None

    x, labels = np.zeros(2, np.float32), np.tile(np.array([3.0, 0.0, 1.0], np.float32), 60)
    (x, state), _ = jax.device_get(jax.jit(lambda: jax.lax.scan(step, (x, grad_fn.init(x, labels[0])), labels))())
    assert 0.95 <= np.min(x) <= np.max(x) <= 2.0
    np.testing.assert_array_equal(state.zeros[:2], [0, 180])


def test_around_the_other_wrappers():
    amortized = mtl.skip_zero(mtl.amortize(aggregation.db_mtl()))
    _, state = amortized.apply(amortized.init((3, 2)), np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], np.float32))
    _, new = amortized.apply(state, np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], np.float32))
    assert amortized.last_weights(new)[1] == amortized.last_weights(state)[1] > 0
    guarded = mtl.skip_nonfinite(mtl.skip_zero(aggregation.mgda()))
    gradient, state = guarded.apply(guarded.init((2, 2)), np.array([[np.nan, 0.0], [0.0, 0.0]], np.float32))
    assert np.all(np.isnan(gradient))
    np.testing.assert_array_equal(state.nonfinite, [1, 0])


def test_what_it_refuses():
    with pytest.raises(ValueError, match="method: expected one that takes in all rows at every call"):
        mtl.skip_zero(aggregation.m_config())
    with pytest.raises(ValueError, match=r"method: expected .* skip_zero\(learn\(method, optimizer\)\)"):
        mtl.skip_zero(scalarization.uw())
    with pytest.raises(TypeError, match="method: expected a Scalarizer or an Aggregator"):
        mtl.skip_zero(optax.sgd(0.1))
