"""A dict of functions, one for each task, on batches of their own sizes and shapes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.autodiff.models import assert_close, network, normal_layers, squared_error

pytestmark = pytest.mark.unoptimized

PARAMS = normal_layers(0, [5, 16, 3])


def absolute_error(params, batch):
    """Of one number per example, which has two axes of inputs."""
    x, y = batch
    return 3 * jnp.mean(jnp.abs(network(params, x)[..., 0] - y))


FUNCTIONS = {"cls": squared_error, "reg": {"far": absolute_error, "near": squared_error}}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BATCH = {
    "cls": (normal(1, 12, 5), normal(2, 12, 3)),
    "reg": {"far": (normal(3, 4, 2, 5), normal(4, 4, 2)), "near": (normal(5, 6, 5), normal(6, 6, 3))},
}
BAD = BATCH | {"reg": BATCH["reg"] | {"far": (np.full((4, 2, 5), np.nan, np.float32), np.zeros((4, 2), np.float32))}}
ABSENT = {"cls": True, "reg": {"far": False, "near": True}}
ABSENT = jax.tree.map(np.array, ABSENT)


def all_losses(params, batch):
    return jax.tree.map(lambda function, part: function(params, part), FUNCTIONS, batch)


METHODS = {
    "dwa": scalarization.dwa(steps_per_epoch=100),
    "upgrad": aggregation.upgrad(),
    "excess_mtl": aggregation.excess_mtl(),
    "graddrop": aggregation.graddrop(key=0),
    "m_config": aggregation.m_config(),
    "moco": aggregation.moco(),
}


@pytest.mark.parametrize(
    ("name", "microbatches"), [*((name, None) for name in METHODS), ("dwa", 2), ("excess_mtl", 2), ("m_config", 2)]
)
@pytest.mark.by_default("dwa-None")
def test_a_step_is_that_of_one_function_of_all_losses(name, microbatches):
    method = METHODS[name]
    expected_of = mtl.value_and_grad(all_losses, method)
    state = jax.jit(expected_of.init)(PARAMS, BATCH)
    expected = jax.jit(expected_of)(PARAMS, state, BATCH)
    for rows in None, *(["stream"] if getattr(method, "rowwise", None) else []):
        step = mtl.value_and_grad(FUNCTIONS, method, rows=rows, microbatches=microbatches)
        jax.tree.map(np.testing.assert_array_equal, jax.jit(step.init)(PARAMS, BATCH), state)
        assert_close(jax.jit(step)(PARAMS, state, BATCH), expected)


@pytest.mark.slow
def test_outside_of_jit():
    method = aggregation.excess_mtl()
    expected_of = mtl.value_and_grad(all_losses, method)
    given = PARAMS, expected_of.init(PARAMS, BATCH), BATCH
    for rows in None, "stream":
        assert_close(mtl.value_and_grad(FUNCTIONS, method, rows=rows)(*given), expected_of(*given))


OPTIONS = [("dwa", {"microbatches": 2}), ("dwa", {"shared": [True, False]}), ("upgrad", {"decide_on": [True, False]})]
OPTIONS += [("excess_mtl", {"rows": "stream"}), ("moco", {"microbatches": 2})]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in METHODS), *OPTIONS], ids=str)
@pytest.mark.by_default("dwa-{}", "dwa-*shared*")
def test_an_absent_task_may_have_any_loss_and_gradient(name, options):
    method = METHODS[name]
    grad_fn = mtl.value_and_grad(FUNCTIONS, method, **options)
    state, step = jax.jit(grad_fn.init)(PARAMS, BATCH), jax.jit(grad_fn)
    (_, expected_state), expected = step(PARAMS, state, BATCH, mask=ABSENT)
    (losses, new_state), gradient = step(PARAMS, state, BAD, mask=ABSENT)
    assert np.isnan(losses["reg"]["far"])
    assert_close((new_state, gradient), (expected_state, expected), rtol=1e-6)


@pytest.mark.parametrize("keyword", ["shared", "decide_on"])
@pytest.mark.parametrize("method", [METHODS["dwa"], METHODS["upgrad"]], ids=["dwa", "upgrad"])
@pytest.mark.slow
def test_shared_and_decisive_parameters(method, keyword):
    options = {keyword: [True, False], "return_weights": True}
    expected_of = mtl.value_and_grad(all_losses, method, **options)
    given = PARAMS, jax.jit(expected_of.init)(PARAMS, BATCH), BATCH
    assert_close(jax.jit(mtl.value_and_grad(FUNCTIONS, method, **options))(*given), jax.jit(expected_of)(*given))


@pytest.mark.slow
def test_counts_keywords_and_auxiliary_outputs():
    """In a list: losses, weights and auxiliary outputs come in one."""

    def counted(params, batch, *, scale):
        x, y = batch
        errors = jnp.sum((network(params, x) - y) ** 2, axis=-1)
        there = y[:, 0] > 0
        return mtl.Counted(scale * jnp.sum(errors, where=there), jnp.sum(there)), jnp.sum(there)

    def plain(params, batch, *, scale):
        return scale * squared_error(params, batch), batch[0][0]

    method = mtl.amortize(scalarization.geometric_mean())
    batch = [BATCH["cls"], BATCH["reg"]["near"]]
    grad_fn = partial(mtl.value_and_grad, [counted, plain], method, has_aux=True, return_weights=True)
    state = jax.jit(grad_fn().init)(PARAMS, batch, scale=2.0)

    def step(refresh=None, **options):
        return jax.jit(partial(grad_fn(**options), scale=2.0, refresh=refresh))(PARAMS, state, batch)

    (losses, new_state, weights, (count, first)), gradient = step()
    assert losses[0].count == count == np.sum(batch[0][1][:, 0] > 0)
    np.testing.assert_array_equal(first, batch[1][0][0])
    assert len(weights) == 2
    again = step(microbatches=2)
    assert_close((again[0][:3], again[1]), ((losses, new_state, weights), gradient))
    for refresh in True, np.array(True):
        assert_close(step(refresh)[1], gradient)


@pytest.mark.slow
def test_rows_and_their_products():
    losses, jacobian = jax.jit(mtl.value_and_jac(FUNCTIONS))(PARAMS, BATCH)
    expected = jax.jit(mtl.value_and_jac(all_losses))(PARAMS, BATCH)
    assert_close((losses, jacobian), expected)
    _, products = jax.jit(mtl.value_and_gramian(FUNCTIONS))(PARAMS, BATCH)
    assert_close(products, jax.jit(mtl.gramian.gramian)(jacobian))
    of_last = mtl.value_and_jac(jax.tree.map(lambda f: lambda batch, params: f(params, batch), FUNCTIONS), -1)
    assert_close(jax.jit(of_last)(BATCH, PARAMS)[1], jacobian)
    with pytest.raises(ValueError, match="rows: expected"):
        mtl.value_and_gramian(FUNCTIONS, rows="two_pass")


def test_a_task_is_computed_forth_and_back_once():
    """So that all of them cost one gradient: also with the weights of an aggregator, and parameters that are shared."""
    passes = []

    @jax.custom_vjp
    def counted(x):
        return x

    counted.defvjp(lambda x: (x, None), lambda _, g: (jax.debug.callback(lambda: passes.append(1)), (g,))[1])
    functions = dict.fromkeys("abc", lambda params, x: jnp.sum((jnp.sum(counted(params["w"])) * x) ** 2))
    ones = lambda *shape: np.ones(shape, np.float32)
    params, batch = {"w": ones(3)}, {"a": ones(3), "b": ones(2, 3), "c": ones(3)}
    for method, n in (
        (scalarization.dwa(steps_per_epoch=100), 3),
        (aggregation.upgrad(), 3),
        (aggregation.m_config(), 1),
    ):
        step = mtl.value_and_grad(functions, method)
        del passes[:]
        jax.block_until_ready(jax.jit(step)(params, jax.jit(step.init)(params, batch), batch))
        jax.effects_barrier()
        assert len(passes) == n


def test_micro_batches_of_every_size():
    step = mtl.value_and_grad(FUNCTIONS, METHODS["dwa"], microbatches=3)
    with pytest.raises(ValueError, match=r"microbatches: .* divisible by 3, found shape .4, 2, 5. of args.*'far'"):
        step(PARAMS, jax.jit(step.init)(PARAMS, BATCH), BATCH)
