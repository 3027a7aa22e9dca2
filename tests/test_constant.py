"""Constant weights of both families: arrays, names, and weights that are mapped over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation, scalarization

WEIGHTS = jnp.array([[0.5, 2.0, 1.0], [1.0, -1.0, 0.0]])


def test_weights_are_swept_by_vmap():
    losses, rows = jnp.array([1.0, 2.0, 4.0]), jnp.arange(6.0).reshape(3, 2)

    def run(weights):
        scalarizer, aggregator = scalarization.constant(weights), aggregation.constant(weights)
        return scalarizer.apply(scalarizer.init(3), losses)[0], aggregator.apply(aggregator.init((3, 2)), rows)[0]

    scalars, gradients = jax.vmap(run)(WEIGHTS)
    np.testing.assert_allclose(scalars, WEIGHTS @ losses, rtol=1e-6)
    np.testing.assert_allclose(gradients, WEIGHTS @ rows, rtol=1e-6)


def test_named_weights_follow_the_names():
    names = {"b": 0.5, "a": 2.0}
    method = scalarization.constant(names)
    losses = {"a": jnp.array(1.0), "b": jnp.array(10.0)}
    assert method.apply(method.init(losses), losses)[0] == 7.0
    aggregator = aggregation.constant(names)
    state, rows = aggregator.init((2, 1)), jnp.array([[1.0], [10.0]])
    np.testing.assert_array_equal(aggregator.apply(state, rows, values=losses)[0], [7.0])
    with pytest.raises(ValueError, match=r"weights: expected values= with .* found \['a', 'b'\] and no names"):
        aggregator.apply(state, rows)  # nobody says which row is whose


def test_another_number_of_weights_raises_at_init():
    for init in lambda: scalarization.constant(WEIGHTS[0]).init(2), lambda: aggregation.constant([1.0]).init((2, 3)):
        with pytest.raises(ValueError, match=r"weights: expected one number per task, shape \(2,\), found shape"):
            init()
    with pytest.raises(ValueError, match="weights: expected one number per task"):
        scalarization.constant(1.0).init(3)  # no broadcast


def test_an_absent_task_has_no_weight():
    """Whatever the method gives it: the builder sees to that."""
    method, mask = aggregation.constant(WEIGHTS[0]), jnp.array([True, False, True])
    for weighting, statistic in (method.weighting, jnp.ones((3, 2))), (method.gramian_weighting, jnp.ones((3, 3))):
        weights, _ = weighting.apply(method.init((3, 2)), statistic, mask=mask)
        np.testing.assert_array_equal(weights, [0.5, 0.0, 1.0])
