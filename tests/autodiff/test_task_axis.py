"""Tasks that have their own data."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.autodiff.models import normal_batch, normal_layers, squared_error

pytestmark = pytest.mark.unoptimized

PARAMS = normal_layers(0, [5, 16, 3])
BATCH = normal_batch(1, 4, 8, n_in=5, n_out=3)


def all_losses(params, batch):
    return jnp.stack([squared_error(params, jax.tree.map(lambda x, i=i: x[i], batch)) for i in range(4)])


@jax.jit
def losses_and_rows(params, batch):
    """By hand."""
    return all_losses(params, batch), jax.jacrev(all_losses)(params, batch)


def assert_close(found, expected, **kwargs):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), found, expected)


@pytest.mark.parametrize("rows", [None, "vmap", 1, 3])
@pytest.mark.by_default("None", "1")
def test_rows_are_those_of_one_hot_weights(rows):
    of_rows = mtl.value_and_jac(squared_error, rows=rows, task_axis=0)
    of_products = mtl.value_and_gramian(squared_error, rows=rows, task_axis=0)

    @jax.jit
    def found(params, batch):
        losses, jacobian = of_rows(params, batch)
        return losses, jacobian, mtl.gramian.gramian(jacobian), of_products(params, batch)[1]

    losses, jacobian, expected_products, products = found(PARAMS, BATCH)
    expected_losses, expected = losses_and_rows(PARAMS, BATCH)
    assert_close(losses, expected_losses, rtol=1e-6)
    assert_close(jacobian, expected, atol=1e-6)
    assert_close(products, expected_products, rtol=1e-6)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_task_axis_may_be_any(axis):
    moved = jax.tree.map(lambda x: np.moveaxis(x, 0, axis), BATCH)
    _, jacobian = jax.jit(mtl.value_and_jac(squared_error, task_axis=axis))(PARAMS, moved)
    assert_close(jacobian, losses_and_rows(PARAMS, BATCH)[1], atol=1e-6)


METHODS = [
    aggregation.imtl_g(),
    aggregation.excess_mtl(),
    scalarization.geometric_mean(),
    mtl.amortize(aggregation.db_mtl()),
]


@partial(jax.jit, static_argnums=0)
def init(method, params):
    return method.init(4) if isinstance(method, mtl.Scalarizer) else method.init((4, params))


@pytest.mark.parametrize("method", METHODS, ids=["imtl_g", "excess_mtl", "geometric_mean", "amortized"])
@pytest.mark.parametrize("microbatches", [None, 2])
@pytest.mark.by_default("None-imtl_g", "2-excess_mtl")
def test_step_is_that_of_a_function_of_all_losses(method, microbatches):
    state = init(method, PARAMS)
    expected = jax.jit(mtl.value_and_grad(all_losses, method))(PARAMS, state, BATCH)
    for rows in None, 3, *(["stream"] if getattr(method, "rowwise", None) else []):
        step = mtl.value_and_grad(squared_error, method, rows=rows, task_axis=0, microbatches=microbatches)
        assert_close(jax.jit(step)(PARAMS, state, BATCH), expected, rtol=1e-5, atol=1e-6)


def test_shared_and_decisive_parameters():
    method = aggregation.upgrad()
    for keyword in "shared", "decide_on":
        mask = {keyword: [True, False]}
        given = PARAMS, init(method, PARAMS), BATCH
        expected = jax.jit(mtl.value_and_grad(all_losses, method, **mask))(*given)
        step = jax.jit(mtl.value_and_grad(squared_error, method, task_axis=0, **mask))
        assert_close(step(*given), expected, rtol=1e-5, atol=1e-6)


def test_auxiliary_outputs_are_stacked_and_keyword_arguments_passed_whole():
    def loss(params, batch, *, scale):
        return scale * squared_error(params, batch), jnp.sum(batch[0])

    method = scalarization.mean()
    step = jax.jit(mtl.value_and_grad(loss, method, task_axis=0, has_aux=True))
    (losses, _, aux), _ = step(PARAMS, init(method, PARAMS), BATCH, scale=np.float32(2))
    assert_close(losses, 2 * np.asarray(losses_and_rows(PARAMS, BATCH)[0]), rtol=1e-6)
    assert_close(aux, np.sum(BATCH[0], axis=(1, 2)), rtol=1e-5)


def poisoned(batch):
    """With an input of the third task that is not a number."""
    x, y = batch
    return np.where(np.arange(4)[:, None, None] == 2, np.float32(np.nan), x), y


def which_are_finite(rows):
    return np.all(np.isfinite(np.asarray(rows).reshape(4, -1)), axis=1)


@pytest.mark.parametrize("rows", ["vmap", 1, 3])
def test_a_task_that_is_not_finite_leaves_the_other_rows_alone(rows):
    _, jacobian = jax.jit(mtl.value_and_jac(squared_error, rows=rows, task_axis=0))(PARAMS, poisoned(BATCH))
    finite = np.stack([which_are_finite(leaf) for leaf in jax.tree.leaves(jacobian)])
    np.testing.assert_array_equal(finite.all(axis=0), [True, True, False, True])


def test_streamed_rows_are_isolated_too():
    method = aggregation.excess_mtl()
    step = jax.jit(mtl.value_and_grad(squared_error, method, rows="stream", task_axis=0))
    (_, state), _ = step(PARAMS, init(method, PARAMS), poisoned(BATCH))
    for leaf in jax.tree.leaves(state.squared_gradients):
        np.testing.assert_array_equal(which_are_finite(leaf), [True, True, False, True])


@pytest.mark.parametrize("microbatches", [None, 2])
@pytest.mark.parametrize("method", [aggregation.imtl_g(), aggregation.excess_mtl()], ids=["imtl_g", "excess_mtl"])
@pytest.mark.by_default("excess_mtl-2")
def test_an_absent_task_may_have_any_row(method, microbatches):
    """Without labels its loss is 0/0; its row is known apart from the others, and left out."""
    mask = np.array([True, True, False, True])
    step = jax.jit(mtl.value_and_grad(squared_error, method, rows="vmap", task_axis=0, microbatches=microbatches))
    state = init(method, PARAMS)
    found = step(PARAMS, state, poisoned(BATCH), mask=mask)
    (_, expected_state), expected = step(PARAMS, state, BATCH, mask=mask)
    assert_close((found[0][1], found[1]), (expected_state, expected), rtol=1e-6)


@pytest.mark.slow
def test_counted_losses():
    def counted(params, batch):
        x, y, there = batch
        errors = jnp.mean((jnp.tanh(x @ params[0]["w"]) @ params[1]["w"] - y) ** 2, axis=-1)
        return mtl.Counted(jnp.sum(jnp.where(there, errors, 0)), jnp.sum(there))

    there = np.arange(8)[None] < np.array([8, 3, 0, 1])[:, None]
    method = aggregation.upgrad()
    given = PARAMS, init(method, PARAMS), (*BATCH, there)
    (losses, state), gradient = jax.jit(mtl.value_and_grad(counted, method, task_axis=0))(*given)
    np.testing.assert_array_equal(losses.count, [8, 3, 0, 1])
    np.testing.assert_array_equal(state.seen, [1, 1, 0, 1])
    for microbatches in 1, 8:
        step = mtl.value_and_grad(counted, method, task_axis=0, microbatches=microbatches)
        assert_close(jax.jit(step)(*given), ((losses, state), gradient), rtol=1e-5, atol=1e-6)


def test_errors():
    step = mtl.value_and_jac(squared_error, task_axis=0)
    with pytest.raises(ValueError, match="task_axis: expected positional arguments with as many tasks"):
        step(PARAMS, (BATCH[0], BATCH[1][:3]))
    with pytest.raises(TypeError, match="task_axis: expected an int"):
        mtl.value_and_jac(squared_error, task_axis="0")(PARAMS, BATCH)
    with pytest.raises(ValueError, match="a task axis"):
        mtl.value_and_jac(lambda params, batch, scale: 0.0, task_axis=0)(PARAMS, BATCH, 2.0)
    with pytest.raises(ValueError, match="losses_fn: expected one loss for each task, a scalar"):
        mtl.value_and_jac(lambda params, batch: batch[0][0], task_axis=0)(PARAMS, BATCH)
    with pytest.raises(ValueError, match="rows: expected"):
        mtl.value_and_gramian(squared_error, task_axis=0, rows="two_pass")
    with pytest.raises(ValueError, match="rows: expected"):
        mtl.value_and_grad(squared_error, aggregation.upgrad(), task_axis=0, rows="two_pass")
