"""``amortize`` and ``cr_mogm`` remember finite weights only: a NaN at a refresh is over with the next step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

ROWS = jnp.array([[1.0, 2.0, 0.0], [0.5, -1.0, 3.0]])
AGGREGATORS = "cagrad", "config", "pcd", "upgrad", "mgda", "imtl_g", "pcgrad", "excess_mtl", "db_mtl"


def wrapped(name):
    return mtl.amortize(getattr(aggregation, name)()), aggregation.cr_mogm(getattr(aggregation, name)())


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.by_default("cagrad", "excess_mtl")
def test_weights_of_what_is_not_finite_are_not_remembered(name):
    for method in wrapped(name):
        own = lambda state: (state[0] if "last_weights" in state._fields else state.weights, state.not_taken)
        _, state = method.apply(method.init((2, 3)), ROWS)
        kept, _ = own(state)
        for n, bad in enumerate([jnp.nan, jnp.inf, 1e20]):
            gradient, state = method.apply(state, ROWS.at[1, 0].set(bad))
            assert not jnp.all(jnp.isfinite(gradient))
            np.testing.assert_array_equal(own(state)[0], kept)
            assert own(state)[1] == n + 1


def test_weights_that_come_with_a_loss_that_is_not_finite_are_not_remembered():
    """Though they do not depend on it: DWA's are made of the last epochs, the mean's of nothing."""
    method = mtl.amortize(scalarization.dwa(steps_per_epoch=1))
    _, state = method.apply(method.init(2), jnp.array([1.0, jnp.nan]))
    np.testing.assert_array_equal(state.last_weights, [0.5, 0.5])
    assert state.not_taken == 1
    method = mtl.amortize(aggregation.sum())
    _, state = method.apply(method.init((2, 3)), ROWS, values=jnp.array([1.0, jnp.inf]))
    assert state.not_taken == 1
    _, state = method.apply(state, ROWS, values=jnp.array([1.0, jnp.nan]), mask=jnp.array([True, False]))
    assert state.not_taken == 1
    np.testing.assert_array_equal(state.last_weights, [1, 0.5])


def test_an_average_starts_at_the_first_weights_that_are_finite():
    method = aggregation.cr_mogm(aggregation.db_mtl())
    _, state = method.apply(method.init((2, 3)), ROWS.at[0, 0].set(jnp.nan))
    _, state = method.apply(state, ROWS)
    expected, _ = aggregation.db_mtl().weighting.apply(aggregation.db_mtl().init((2, 3)), ROWS)
    np.testing.assert_allclose(state.weights, expected)
    np.testing.assert_array_equal(state.seen, [1, 1])


def test_a_training_goes_on_after_a_nan_at_a_refresh():
    """A refresh every 20 steps, the third of which is spoilt: only that step is lost."""

    def losses_fn(x, noise):
        return jnp.stack([jnp.sum((x - 1) ** 2), 9 * jnp.sum((x + 1) ** 2) * (1 + noise)])

    method = mtl.amortize(aggregation.cagrad())
    optimizer = optax.apply_if_finite(optax.sgd(0.01), max_consecutive_errors=100)
    grad_fn = mtl.value_and_grad(losses_fn, method)

    def step(carry, i):
        x, opt_state, state = carry
        (_, state), grads = grad_fn(x, state, jnp.where(i == 40, jnp.nan, 0.0), refresh=i % 20 == 0)
        updates, opt_state = optimizer.update(grads, opt_state, x)
        return (optax.apply_updates(x, updates), opt_state, state), (x, grads)

    x = jnp.full(2, 3.0)
    start = x, optimizer.init(x), grad_fn.init(x, 0.0)
    (_, _, state), (_, grads) = jax.lax.scan(step, start, jnp.arange(60))
    assert jnp.all(jnp.isnan(grads[40]))
    assert jnp.all(jnp.isfinite(grads[41:]) & (grads[41:] != 0))
    assert state.not_taken == 1
