"""GLS and SI where a loss is zero, or worse. Their values are in tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import scalarization


def value_and_weights(method, losses):
    (scalar, _), weights = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(method.init(losses), losses)
    return scalar, weights


def test_a_zero_loss():
    for zero in 0.0, -0.0, 1e-40:
        scalar, weights = value_and_weights(scalarization.geometric_mean(), jnp.array([zero, 2.0, 3.0]))
        assert scalar == 0
        np.testing.assert_array_equal(weights, np.zeros(3))
        scalar, weights = value_and_weights(scalarization.scale_invariant(), jnp.array([zero, 2.0, 4.0]))
        np.testing.assert_allclose(scalar, np.log(np.finfo(np.float32).tiny) + np.log(8.0), rtol=1e-6)
        np.testing.assert_array_equal(weights, [0.0, 0.5, 0.25])


@pytest.mark.parametrize("bad", [-1.0, jnp.nan])
@pytest.mark.parametrize("method", [scalarization.geometric_mean(), scalarization.scale_invariant()])
def test_a_zero_loss_does_not_hide_a_bad_one(method, bad):
    assert jnp.isnan(value_and_weights(method, jnp.array([0.0, 1.0, bad]))[0])


def test_uw_o_of_zero_and_of_a_number_whose_inverse_overflows():
    scalar, weights = value_and_weights(scalarization.uw_o(), jnp.array([0.0, 1e-39, 2.0]))
    assert weights[0] == 0
    assert jnp.all(jnp.isfinite(weights))
    assert jnp.isfinite(scalar)


def test_uw_so_of_zeros():
    _, weights = value_and_weights(scalarization.uw_so(), jnp.array([0.0, -0.0, 2.0]))
    np.testing.assert_array_equal(weights, [0.5, 0.5, 0.0])
