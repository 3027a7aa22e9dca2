"""Weights that are used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.autodiff.models import normal_batch, normal_layers, squared_errors

pytestmark = pytest.mark.unoptimized

PARAMS = normal_layers(0, [5, 16, 3])
BATCHES = normal_batch(1, 6, 32, n_in=5, n_out=3)
BATCH = jax.tree.map(lambda x: x[0], BATCHES)
YES, NO = np.array(True), np.array(False)


def init(method, params=PARAMS):
    return jax.jit(lambda params: method.init(3 if isinstance(method, mtl.Scalarizer) else (3, params)))(params)


def train(method, params, every):
    """Six steps; the weights of each, and how they were refreshed: as an argument from the loop's own counter."""
    grad_fn = mtl.value_and_grad(squared_errors, method, return_weights=True)

    def step(carry, i_batch):
        i, batch = i_batch
        params, state = carry
        (_, state, weights), gradient = grad_fn(params, state, batch, refresh=i % every == 0)
        return (jax.tree.map(lambda x, g: x - 0.1 * g, params, gradient), state), weights

    return jax.lax.scan(step, (params, init(method, params)), (jnp.arange(6), BATCHES))


@pytest.mark.parametrize(
    "method",
    [aggregation.imtl_g(), aggregation.excess_mtl(0.1), scalarization.uw_so()],
    ids=["imtl_g", "excess_mtl", "uw_so"],
)
def test_between_refreshes_the_weights_stay(method):
    method = mtl.amortize(method)
    (_, state), weights = jax.device_get(jax.jit(train, static_argnums=(0, 2))(method, PARAMS, 3))
    np.testing.assert_array_equal(weights[1:3], weights[:1].repeat(2, axis=0))
    np.testing.assert_array_equal(weights[4:], weights[3:4].repeat(2, axis=0))
    assert np.max(np.abs(weights[3] - weights[0])) > 1e-4
    np.testing.assert_array_equal(state.last_weights, weights[-1])


def test_two_ways_stay_apart_under_vmap():
    """Over seeds, as the argument is not mapped over: one of the two is computed, not both."""
    method = mtl.amortize(aggregation.imtl_g())
    seeds = [normal_layers(seed, [5, 16, 3]) for seed in range(4)]
    together = jax.tree.map(lambda *x: np.stack(x), *seeds)
    run = lambda params: train(method, params, 3)
    compiled, run = jax.jit(jax.vmap(run)).lower(together).compile(), jax.jit(run)
    assert " conditional(" in compiled.as_text()
    (trained, _), weights = jax.device_get(compiled(together))
    for i, params in enumerate(seeds):
        (alone, _), expected = run(params)
        np.testing.assert_allclose(weights[i], expected, rtol=2e-4)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-4, atol=1e-5), trained, alone)


def trunk_of(params, batch):
    return jnp.tanh(batch[0] @ params["w"] + params["b"][None])


HEADS = [
    lambda params, features, batch, i=i: 1.5**i * jnp.mean((features @ params["w"] + params["b"] - batch[1][:, i]) ** 2)
    for i in range(3)
]
FORMS = {
    "shared": (squared_errors, {"shared": [True, False]}),
    "microbatches": (squared_errors, {"microbatches": 4}),
    "microbatches, shared": (squared_errors, {"microbatches": 4, "shared": [True, False]}),
    "decide_on": (squared_errors, {"decide_on": [False, True]}),
    "heads": ((trunk_of, HEADS), {}),
    "features": ((trunk_of, HEADS), {"at": "features"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.by_default("microbatches, shared", "features")
def test_in_every_form(form):
    """Anew it is the plain method's step; again, the gradient that the last weights make."""
    losses_fn, keywords = FORMS[form]
    params = PARAMS
    if isinstance(losses_fn, tuple):
        heads = [{"w": w, "b": b} for w, b in zip(PARAMS[1]["w"].T, PARAMS[1]["b"], strict=True)]
        params = PARAMS[0], heads
    weights = np.array([0.5, 2.0, 1.0], np.float32)
    plain, constant = aggregation.imtl_g(), aggregation.constant(weights)
    method = mtl.amortize(plain)
    step = jax.jit(mtl.value_and_grad(losses_fn, method, **keywords))
    plain_step = jax.jit(mtl.value_and_grad(losses_fn, plain, **keywords))
    constant_step = jax.jit(mtl.value_and_grad(losses_fn, constant, **keywords))
    state = init(method, params)
    (_, after), anew = step(params, state, BATCH, refresh=YES)
    (_, inner), expected = plain_step(params, state.inner, BATCH)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (after.inner, anew), (inner, expected))
    last = after._replace(last_weights=weights)
    (_, same), again = step(params, last, BATCH, refresh=NO)
    _, expected = constant_step(params, init(constant, params), BATCH)
    jax.tree.map(close, (same, again), (last, expected))


def test_without_a_refresh_a_step_is_one_backward_pass():
    method = mtl.amortize(aggregation.upgrad())
    step = jax.jit(mtl.value_and_grad(squared_errors, method), static_argnames="refresh")
    plain = jax.jit(jax.value_and_grad(lambda params, batch: jnp.sum(squared_errors(params, batch))))
    cost = lambda lowered: lowered.compile().cost_analysis()["flops"]
    state = jax.eval_shape(lambda: init(method))
    plain_cost = cost(plain.lower(PARAMS, BATCH))
    assert cost(step.lower(PARAMS, state, BATCH, refresh=False)) < 1.05 * plain_cost
    assert cost(step.lower(PARAMS, state, BATCH, refresh=True)) > 1.5 * plain_cost


def test_absent_tasks_keep_their_last_weight_and_have_none():
    method = mtl.amortize(aggregation.upgrad())
    compiled = jax.jit(mtl.value_and_grad(squared_errors, method, return_weights=True))
    step = lambda state, **given: jax.device_get(compiled(PARAMS, state, BATCH, **given)[0][1:])
    state, first = step(init(method))
    mask = np.array([True, False, True])
    state, weights = step(state, mask=mask, refresh=YES)
    assert weights[1] == 0 and state.last_weights[1] == first[1] > 0
    _, weights = step(state, mask=mask, refresh=NO)
    np.testing.assert_array_equal(weights, np.where(mask, state.last_weights, 0))
    _, weights = step(state, refresh=NO)
    np.testing.assert_array_equal(weights, state.last_weights)


def test_skip_nonfinite_goes_outside():
    method = mtl.skip_nonfinite(mtl.amortize(aggregation.upgrad()))
    step = jax.jit(mtl.value_and_grad(squared_errors, method))
    (_, state), _ = step(PARAMS, init(method), BATCH, refresh=YES)
    x, y = BATCH
    bad = np.concatenate([np.full_like(x[:1], np.nan), x[1:]]), y
    (_, after), _ = step(PARAMS, state, bad, refresh=YES)
    np.testing.assert_array_equal(after.inner.last_weights, state.inner.last_weights)
    assert after.skipped == 1


NESTED = {
    "cr_mogm(amortize)": lambda: aggregation.cr_mogm(mtl.amortize(aggregation.mgda())),
    "amortize(cr_mogm)": lambda: mtl.amortize(aggregation.cr_mogm(aggregation.mgda())),
    "skip(cr_mogm(amortize))": lambda: mtl.skip_nonfinite(aggregation.cr_mogm(mtl.amortize(aggregation.mgda()))),
    "amortize(amortize)": lambda: mtl.amortize(mtl.amortize(aggregation.mgda())),
    "amortize(chain)": lambda: mtl.amortize(mtl.chain(scalarization.scale_invariant(), aggregation.mgda())),
}


@pytest.mark.parametrize("nested", NESTED)
def test_a_step_without_a_refresh_has_the_weights_that_the_last_refresh_showed(nested):
    """Those of the outermost wrapper, and before the first refresh equal ones."""
    method, params, scales = NESTED[nested](), np.ones(2, np.float32), np.array([[1, 1], [1, 9]], np.float32)
    grad_fn = mtl.value_and_grad(lambda p, s: s * np.array([1, 2], np.float32) * p, method, return_weights=True)
    compiled = jax.jit(grad_fn, static_argnames="refresh")
    step = lambda *args, **refresh: jax.device_get(compiled(*args, **refresh))
    state = jax.jit(method.init, static_argnums=0)((2, 2))
    (_, _, weights), _ = step(params, state, scales[0], refresh=False)
    np.testing.assert_array_equal(weights, [0.5, 0.5])
    shown = []
    for scale in scales:
        (_, state, weights), _ = step(params, state, scale, refresh=True)
        shown.append(weights)
    assert np.abs(shown[1] - shown[0]).max() > 0.01
    (_, same, again), gradient = step(params, state, scale, refresh=False)
    np.testing.assert_allclose(again, shown[1], rtol=1e-6)  # XLA may compute what is shown and what is kept twice
    jax.tree.map(np.testing.assert_array_equal, same, state)
    np.testing.assert_allclose(gradient, again * [1.0, 18.0], rtol=1e-6)
    if nested.startswith("cr_mogm"):
        np.testing.assert_allclose(again, [0.8197, 0.1803], atol=1e-4)


def test_a_chain_around_weights_that_are_kept_is_refused():
    """Its own weights are others, and it keeps none."""
    method = mtl.chain(scalarization.scale_invariant(), mtl.amortize(aggregation.mgda()))
    step = mtl.value_and_grad(lambda params: np.array([1, 2], np.float32) * params, method)
    with pytest.raises(ValueError, match=r"refresh: .*mtl.amortize\(method\), outside of mtl.chain"):
        step(np.ones(2, np.float32), jax.jit(method.init, static_argnums=0)((2, 2)), refresh=False)


def test_errors():
    plain, amortized = aggregation.upgrad(), mtl.amortize(aggregation.upgrad())
    with pytest.raises(ValueError, match=r"refresh: expected a method .* mtl.amortize"):
        jax.eval_shape(lambda: mtl.value_and_grad(squared_errors, plain)(PARAMS, init(plain), BATCH, refresh=True))
    grad_fn = mtl.value_and_grad(squared_errors, amortized)
    for refresh in 1, jnp.array([True]), "yes":
        with pytest.raises(TypeError, match="refresh: expected one boolean"):
            jax.eval_shape(lambda refresh=refresh: grad_fn(PARAMS, init(amortized), BATCH, refresh=refresh))
    with pytest.raises(ValueError, match="learned"):
        mtl.amortize(scalarization.uw())
    with pytest.raises(TypeError, match="expected a Scalarizer or an Aggregator"):
        mtl.amortize(lambda losses: losses)
