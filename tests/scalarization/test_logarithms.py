"""GLS and SI where a loss is zero, or worse. Their values are in tests/golden."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, diagnostics, scalarization

pytestmark = pytest.mark.unoptimized


@partial(jax.jit, static_argnums=0)
def first_step(method, losses):
    return jax.value_and_grad(method.apply, argnums=1, has_aux=True)(method.init(losses), losses)


def value_and_weights(method, losses):
    (scalar, _), weights = jax.device_get(first_step(method, np.float32(losses)))
    return scalar, weights


def test_a_zero_loss():
    for zero in 0.0, -0.0, 1e-40:
        scalar, weights = value_and_weights(scalarization.geometric_mean(), [zero, 2.0, 3.0])
        assert scalar == 0
        np.testing.assert_array_equal(weights, np.zeros(3))
        scalar, weights = value_and_weights(scalarization.scale_invariant(), [zero, 2.0, 4.0])
        np.testing.assert_allclose(scalar, np.log(np.finfo(np.float32).tiny) + np.log(8.0), rtol=1e-6)
        np.testing.assert_array_equal(weights, [0.0, 0.5, 0.25])


@pytest.mark.parametrize("bad", [-1.0, np.nan])
@pytest.mark.parametrize("method", [scalarization.geometric_mean(), scalarization.scale_invariant()])
def test_a_zero_loss_does_not_hide_a_bad_one(method, bad):
    scalar, weights = value_and_weights(method, [0.0, 1.0, bad])
    assert np.isnan(scalar)
    assert np.isnan(weights[2])


def test_uw_o_of_zero_and_of_a_number_whose_inverse_overflows():
    scalar, weights = value_and_weights(scalarization.uw_o(), [0.0, 1e-39, 2.0])
    assert weights[0] == 0
    assert np.all(np.isfinite(weights))
    assert np.isfinite(scalar)


def test_uw_so_of_zeros():
    _, weights = value_and_weights(scalarization.uw_so(), [0.0, -0.0, 2.0])
    np.testing.assert_array_equal(weights, [0.5, 0.5, 0.0])


WARM_UP = scalarization.stch(1.0, n_warmup_epochs=1)


@pytest.mark.parametrize(
    "method", [scalarization.scale_invariant(), WARM_UP, scalarization.uw_o(), scalarization.famo()]
)
def test_a_step_shows_a_negative_loss_and_the_guards_drop_it(method):
    """A Gaussian's negative log-likelihood would be climbed: the gradient is NaN, and is not taken."""
    guarded = mtl.skip_nonfinite(method)
    losses_fn = lambda params: jnp.stack([jnp.sum(params**2), params[0] ** 2 - 0.36])
    grad_fn = mtl.value_and_grad(losses_fn, guarded, return_weights=True, hooks=True)
    optimizer = optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=3)

    @jax.jit
    def step(params):
        (_, state, weights), gradient = grad_fn(params, grad_fn.init(params))
        return state, weights, gradient, optimizer.update(gradient, optimizer.init(params))[0]

    for start, taken in [(0.0, False), (1.0, True)]:
        state, weights, gradient, updates = jax.device_get(step(np.float32([start, 1.0])))
        assert np.all(np.isfinite(gradient)) == np.all(np.isfinite(weights)) == np.any(updates != 0) == taken
        assert state.skipped == (not taken)


def test_a_chain_forgets_a_negative_loss():
    """DB-MTL's averages of the logarithms' gradients: what is no number does not get in, on any path."""
    method = mtl.chain(scalarization.scale_invariant(), aggregation.db_mtl(beta=0.5))
    rows, sane = np.float32([[1.0, 2.0], [3.0, -1.0]]), np.float32([0.5, 2.0])
    state = jax.device_get(method.apply(method.init((2, 2)), rows, values=sane)[1])
    given = {"values": np.float32([0.5, -0.36])}
    gradient, after = jax.device_get(method.apply(state, rows, **given))
    visited = state
    statistics = []
    for i in range(2):
        visited, statistic = method.rowwise.visit(visited, i, rows[i], **given)
        statistics.append(statistic)
    by_rows = jax.device_get(method.rowwise.finish(visited, np.stack(statistics), **given))
    assert np.all(np.isnan(gradient)) & np.all(np.isnan(by_rows[0]))
    for new in after, by_rows[1]:
        averages = new.aggregator.averages
        np.testing.assert_array_equal(averages[1], state.aggregator.averages[1])
        assert np.any(averages[0] != state.aggregator.averages[0])
        np.testing.assert_array_equal(new.aggregator.seen, state.aggregator.seen)
    assert np.all(np.isfinite(method.apply(after, rows, values=sane)[0]))


effective_weights = jax.jit(diagnostics.effective_weights, static_argnums=0)


def test_where_a_loss_changes_its_sign_its_weight_is_not_negative():
    """NaN where the method takes a power of the ratio, positive where it takes a coefficient of variation."""
    before, after = np.float32([1.0, 2.0]), np.float32([1.0, -0.36])
    for alpha in 0.5, 1.0, 2.0:
        method = scalarization.lbtw(alpha=alpha)
        _, state = method.apply(method.init(2), before)
        assert np.all(np.isnan(effective_weights(method, state, after)))
    for method in scalarization.cov_weighting(), scalarization.softadapt(window=2, variant="loss_weighted"):
        state = method.init(2)
        for losses in before, np.float32(0.9) * before, after, after, after:
            assert np.all(np.asarray(effective_weights(method, state, losses)) > 0)
            _, state = method.apply(state, losses)
