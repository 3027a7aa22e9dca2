"""UW and IMTL-L: their starts and their optima. Their values are in tests/golden."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import scalarization

LOSSES = jnp.array([0.25, 4.0, 100.0])


@pytest.mark.parametrize(
    ("method", "field", "optimum"),
    [(scalarization.uw, "log_var", jnp.log(LOSSES)), (scalarization.imtl_l, "log_scale", -jnp.log(LOSSES))],
)
def test_learned_fields_reach_their_optimum(method, field, optimum):
    learned = mtl.learn(method(), optax.adam(0.05))
    state, _ = jax.lax.scan(lambda state, _: learned.apply(state, LOSSES)[::-1], learned.init(3), length=2000)
    np.testing.assert_allclose(getattr(state.inner, field), optimum, atol=1e-3)


@pytest.mark.parametrize("start", [0.5, [0.5, 1.0, -1.0], {"a": 0.5, "b": 1.0, "c": -1.0}])
def test_starts(start):
    expected = [0.5, 0.5, 0.5] if start == 0.5 else [0.5, 1.0, -1.0]
    np.testing.assert_array_equal(scalarization.uw(start).init(3).log_var, jnp.array(expected))
    np.testing.assert_array_equal(scalarization.imtl_l(start).init(3).log_scale, jnp.array(expected))


def test_a_start_of_another_length_raises():
    with pytest.raises(ValueError, match=r"initial_log_var: expected a scalar or one number per task, shape \(3,\)"):
        scalarization.uw([0.0, 1.0]).init(3)
