"""The loss scale of the example: what it does to a gradient in float16, and that a method does not see it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import mixed_precision
import numpy as np
import pytest
from digits import draw_pairs, init_params, load_images, predict
from mixed_precision import LossScale, lost_entries, task_losses, update_scale
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = [
    pytest.mark.by_default("test_a_scalarizer_too", "test_the_scale_falls_at_once_and_rises_after_many_good_steps"),
    pytest.mark.usefixtures("users_broadcast"),
]

SCALE, ONE = np.float32(2.0**16), np.float32(1.0)


@pytest.fixture(scope="module")
def problem():
    @jax.jit
    def drawn(digits):
        params = init_params(jax.random.key(0), width=16)
        batch = draw_pairs(jax.random.key(1), digits, 32)
        # As far from the true sums as a network that is trained.
        sums = predict(params, batch["image"])["sum"] + jax.random.normal(jax.random.key(2), (32,))
        return params, batch | {"sum": sums}

    return drawn(load_images()[0])


@pytest.mark.parametrize("rows", ["vmap", 1, "two_pass", "stream"])
def test_a_method_sees_the_true_losses_and_gradients(problem, rows):
    """In float32, where nothing is lost by the scale, nor saved."""
    params, batch = problem
    method = aggregation.excess_mtl() if rows == "stream" else aggregation.upgrad()
    grad_fn = jax.jit(mtl.value_and_grad(partial(task_losses, dtype=jnp.float32), method, rows=rows))
    scaled, plain = (grad_fn(params, method.init((3, params)), batch, scale=scale) for scale in (SCALE, ONE))
    chex.assert_trees_all_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_a_scalarizer_too(problem):
    params, batch = problem
    method = scalarization.dwa(steps_per_epoch=100)
    grad_fn = jax.jit(mtl.value_and_grad(partial(task_losses, dtype=jnp.float32), method))
    scaled, plain = (grad_fn(params, method.init(3), batch, scale=scale) for scale in (SCALE, ONE))
    chex.assert_trees_all_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_counted_losses(problem):
    """Their counts are integers, which have no gradient to scale."""
    params, batch = problem
    method = aggregation.mgda()

    def losses_fn(params, batch, *, scale):
        outputs = predict(mixed_precision.scale_gradient(params, 1 / scale), batch["image"])
        errors = (outputs["sum"] - batch["sum"]) ** 2
        first = mtl.Counted(jnp.sum(errors, where=batch["left"] < 5), jnp.sum(batch["left"] < 5))
        return mixed_precision.scale_gradient({"all": jnp.mean(errors), "first": first}, scale)

    grad_fn = jax.jit(mtl.value_and_grad(losses_fn, method, microbatches=2))
    scaled, plain = (grad_fn(params, method.init((2, params)), batch, scale=scale) for scale in (SCALE, ONE))
    chex.assert_trees_all_close(scaled, plain, rtol=1e-5, atol=1e-7)


def test_a_step_that_overflows_halves_the_scale_and_changes_nothing(problem):
    """In one epoch the scale cannot grow, so that it counts the steps that were skipped."""
    params = jax.tree.map(lambda p: 4 * p, jax.device_get(problem[0]))  # far too large, and so are its first gradients
    digits, _ = load_images()
    params, factor, skipped = mixed_precision.train(jnp.float16, True, params, digits, 1, jax.random.key(0), tqdm())
    chex.assert_tree_all_finite(params)
    assert skipped > 0
    assert factor == 2.0 ** (16 - skipped)


def test_it_saves_in_float16_what_would_become_zero(problem):
    params, batch = problem
    assert lost_entries(params, batch, ONE, jnp.float16)["sum"] > 0.2
    assert max(lost_entries(params, batch, SCALE, jnp.float16).values()) < 0.001

    @partial(jax.jit, static_argnums=1)
    def jacobian(scale, dtype):
        return mtl.value_and_jac(partial(task_losses, scale=scale, dtype=dtype))(params, batch)[1]

    def row(scale, dtype):
        return np.concatenate([leaf[2].ravel() for leaf in jax.tree.leaves(jax.device_get(jacobian(scale, dtype)))])

    expected = row(ONE, jnp.float32)
    distance = lambda found: np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert distance(row(SCALE, jnp.float16)) < 0.01
    assert distance(row(ONE, jnp.float16)) > 0.5


def test_the_scale_falls_at_once_and_rises_after_many_good_steps():
    state, update = LossScale(np.float32(8), np.int32(198)), jax.jit(update_scale)
    for finite, expected in [(True, (8, 199)), (True, (16, 0)), (True, (16, 1)), (False, (8, 0)), (True, (8, 1))]:
        state = jax.device_get(update(state, finite))
        assert (state.factor, state.good_steps) == expected
