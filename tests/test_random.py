"""Random weights of both families: seeds, keys, and the distribution."""

import chex
import jax
import numpy as np
import pytest

from mtlbalance import aggregation, scalarization


def weights(method, state):
    return jax.jit(jax.grad(method.apply, argnums=1, has_aux=True))(state, np.ones(3, np.float32))


def test_weights_are_new_at_every_call_and_lie_on_the_simplex():
    method = scalarization.random(key=0)
    first, state = jax.device_get(weights(method, method.init(3)))
    second, _ = jax.device_get(weights(method, state))
    assert not np.allclose(first, second)
    for drawn in first, second:
        np.testing.assert_allclose(drawn.sum(), 1.0, rtol=1e-6)
        assert np.all(drawn > 0)


@pytest.mark.parametrize("factory", [scalarization.random, aggregation.random])
def test_a_seed_a_key_and_its_data_are_the_same(factory):
    init = lambda key: factory(key).init(3 if factory is scalarization.random else (3, 2))
    seed = init(7)
    for key in jax.random.key(7), jax.random.key_data(jax.random.key(7)), np.int32(7):
        chex.assert_trees_all_equal(init(key), seed)
    assert not np.array_equal(init(8).key, seed.key)
    np.testing.assert_array_equal(init(2**40).key, jax.random.key_data(jax.random.key(2**40)))
    other_generator = jax.random.key(7, impl="rbg")
    np.testing.assert_array_equal(init(other_generator).key, jax.random.key_data(other_generator))


def test_seeds_are_swept_by_building_inside_vmap():
    def run(seed):
        method = scalarization.random(seed)
        return weights(method, method.init(3))[0]

    mapped = jax.jit(jax.vmap(run))(np.arange(4))
    np.testing.assert_allclose(mapped, jax.jit(lambda: [run(seed) for seed in range(4)])(), rtol=1e-6)


def test_weights_are_softmax_of_normals():
    """Log-ratios of two weights are differences of two normals: mean 0, variance 2, within four standard errors."""
    method = aggregation.random(key=0)
    draw = lambda state, _: method.gramian_weighting.apply(state, np.eye(3, dtype=np.float32))[::-1]
    _, drawn = jax.lax.scan(draw, method.init((3, 2)), length=4000)
    drawn = np.asarray(drawn)
    log_ratio = np.log(drawn[:, 0] / drawn[:, 2])
    assert abs(log_ratio.mean()) < 4 * np.sqrt(2 / 4000)
    assert abs(log_ratio.var() - 2) < 4 * 2 * np.sqrt(2 / 4000)


@pytest.mark.parametrize("build", [scalarization.random, lambda key: scalarization.relobralo(key=key)])
@pytest.mark.parametrize("wrong", [None, 0.5, "seed"])
def test_a_key_of_another_type_raises(build, wrong):
    with pytest.raises(TypeError, match=f"key: expected an int or a key, found {type(wrong).__name__}"):
        build(wrong)
