"""Constant weights of both families: arrays, names, and weights that are mapped over."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

WEIGHTS = np.float32([[0.5, 2.0, 1.0], [1.0, -1.0, 0.0]])


def test_weights_are_swept_by_vmap():
    losses, rows = np.float32([1.0, 2.0, 4.0]), np.arange(6, dtype=np.float32).reshape(3, 2)

    def run(weights):
        scalarizer, aggregator = scalarization.constant(weights), aggregation.constant(weights)
        return scalarizer.apply(scalarizer.init(3), losses)[0], aggregator.apply(aggregator.init((3, 2)), rows)[0]

    scalars, gradients = jax.jit(jax.vmap(run))(WEIGHTS)
    np.testing.assert_allclose(scalars, WEIGHTS @ losses, rtol=1e-6)
    np.testing.assert_allclose(gradients, WEIGHTS @ rows, rtol=1e-6)


def test_named_weights_follow_the_names():
    names = {"b": 0.5, "a": 2.0}
    method = scalarization.constant(names)
    losses = {"a": np.float32(1.0), "b": np.float32(10.0)}
    assert method.apply(method.init(losses), losses)[0] == 7.0
    aggregator = aggregation.constant(names)
    state, rows = aggregator.init((2, 1)), np.float32([[1.0], [10.0]])
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
    method, mask = aggregation.constant(WEIGHTS[0]), np.array([True, False, True])
    for weighting, statistic in (method.weighting, WEIGHTS.T), (method.gramian_weighting, WEIGHTS.T @ WEIGHTS):
        weights, _ = weighting.apply(method.init((3, 2)), statistic, mask=mask)
        np.testing.assert_array_equal(weights, [0.5, 0.0, 1.0])


@pytest.mark.parametrize("rows", ["vmap", 1, "two_pass"])
def test_an_aggregators_weights_are_differentiated(rows):
    """Through ``apply``, through its weightings, and through a step, as a scalarizer's are."""
    params, losses_fn = np.ones(1, np.float32), lambda params: 3.0 * jnp.stack([params.sum(), params.sum()])

    def of_step(weights, factory, wrapper=lambda method: method, **given):
        method = wrapper(factory.constant(weights))
        grad_fn = mtl.value_and_grad(losses_fn, method, **given)
        return grad_fn(params, grad_fn.init(params))[1].sum()

    def of_apply(weights):
        method = aggregation.constant(weights)
        return method.apply(method.init((2, params)), np.full((2, 1), 3.0, np.float32))[0].sum()

    wrappers = mtl.skip_nonfinite, mtl.skip_zero, mtl.amortize, partial(mtl.chain, scalarization.sum())

    @jax.jit
    def gradients(weights):
        of_method = jax.grad(of_step)
        steps = [of_method(weights, scalarization), of_method(weights, aggregation, rows=rows)]
        steps += [of_method(weights, aggregation, wrapper, rows=rows) for wrapper in wrappers]
        return [*steps, jax.grad(of_apply)(weights)]

    for gradient in gradients(np.float32([0.5, 2.0])):
        np.testing.assert_array_equal(gradient, [3.0, 3.0])


def test_the_weights_are_differentiated_where_a_task_is_absent():
    mask = np.array([True, False, True])

    def total(weights):
        method = aggregation.constant(weights)
        return method.apply(method.init((3, 1)), np.float32([[1.0], [np.nan], [4.0]]), mask=mask)[0].sum()

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(WEIGHTS[0]), [1.0, 0.0, 4.0])
