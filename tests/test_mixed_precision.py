"""The loss scale of the example: what it does to a gradient in float16, and that a method does not see it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixed_precision import LossScale, lost_entries, task_losses, update_scale
from quickstart import draw_pairs, init_params, load_images, predict

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.slow

SCALE = jnp.array(2.0**16)


@pytest.fixture(scope="module")
def problem():
    digits, _ = load_images()
    params = init_params(jax.random.key(0), width=16)
    batch = draw_pairs(jax.random.key(1), digits, 32)
    # As far from the true sums as a network that is trained.
    return params, batch | {"sum": predict(params, batch["image"])["sum"] + jax.random.normal(jax.random.key(2), (32,))}


@pytest.mark.parametrize("rows", ["vmap", 1, "two_pass", "stream"])
def test_a_method_sees_the_true_losses_and_gradients(problem, rows):
    """In float32, where nothing is lost by the scale, nor saved."""
    params, batch = problem
    method = aggregation.excess_mtl() if rows == "stream" else aggregation.upgrad()
    grad_fn = jax.jit(mtl.value_and_grad(partial(task_losses, dtype=jnp.float32), method, rows=rows))
    scaled, plain = (grad_fn(params, method.init((3, params)), batch, scale=scale) for scale in (SCALE, jnp.array(1.0)))
    chex.assert_trees_all_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_a_scalarizer_too(problem):
    params, batch = problem
    method = scalarization.dwa()
    grad_fn = jax.jit(mtl.value_and_grad(partial(task_losses, dtype=jnp.float32), method))
    scaled, plain = (grad_fn(params, method.init(3), batch, scale=scale) for scale in (SCALE, jnp.array(1.0)))
    chex.assert_trees_all_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_it_saves_in_float16_what_would_become_zero(problem):
    params, batch = problem
    assert lost_entries(params, batch, jnp.array(1.0), jnp.float16)["sum"] > 0.2
    assert max(lost_entries(params, batch, SCALE, jnp.float16).values()) < 0.001

    losses_fn = lambda scale, dtype: partial(task_losses, scale=scale, dtype=dtype)
    sum_of = lambda tree: jnp.concatenate([leaf[2].ravel() for leaf in jax.tree.leaves(tree)])
    row = lambda scale, dtype: np.asarray(sum_of(mtl.value_and_jac(losses_fn(scale, dtype))(params, batch)[1]))
    expected = row(jnp.array(1.0), jnp.float32)
    distance = lambda found: np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert distance(row(SCALE, jnp.float16)) < 0.01
    assert distance(row(jnp.array(1.0), jnp.float16)) > 0.5


def test_the_scale_falls_at_once_and_rises_after_many_good_steps():
    state = LossScale(jnp.array(8.0), jnp.array(0))
    for finite, expected in [(False, (4, 0)), (True, (4, 1)), (True, (4, 2)), (True, (8, 0)), (False, (4, 0))]:
        state = update_scale(state, finite, patience=3)
        assert (state.factor, state.good_steps) == expected
