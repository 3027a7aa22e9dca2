"""Weights that are used again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.autodiff.models import layers, normal_batch, squared_errors

pytestmark = pytest.mark.unoptimized

PARAMS = layers(jax.random.key(0), [5, 16, 3])
BATCHES = normal_batch(1, 6, 32, n_in=5, n_out=3)


def train(method, state, params, every):
    """Six steps; the weights of each, and how they were refreshed: as an argument from the loop's own counter."""
    grad_fn = mtl.value_and_grad(squared_errors, method, return_weights=True)

    def step(carry, i_batch):
        i, batch = i_batch
        params, state = carry
        (_, state, weights), gradient = grad_fn(params, state, batch, refresh=i % every == 0)
        return (jax.tree.map(lambda x, g: x - 0.1 * g, params, gradient), state), weights

    return jax.lax.scan(step, (params, state), (jnp.arange(6), BATCHES))


@pytest.mark.parametrize(
    "method",
    [aggregation.imtl_g(), aggregation.excess_mtl(0.1), scalarization.uw_so()],
    ids=["imtl_g", "excess_mtl", "uw_so"],
)
def test_between_refreshes_the_weights_stay(method):
    method = mtl.amortize(method)
    state = method.init(3) if isinstance(method, mtl.Scalarizer) else method.init((3, PARAMS))
    (_, state), weights = jax.jit(train, static_argnums=(0, 3))(method, state, PARAMS, 3)
    np.testing.assert_array_equal(weights[1:3], weights[:1].repeat(2, axis=0))
    np.testing.assert_array_equal(weights[4:], weights[3:4].repeat(2, axis=0))
    assert jnp.max(jnp.abs(weights[3] - weights[0])) > 1e-4
    np.testing.assert_array_equal(state.last_weights, weights[-1])


def test_two_ways_stay_apart_under_vmap():
    """Over seeds, as the argument is not mapped over: one of the two is computed, not both."""
    method = mtl.amortize(aggregation.imtl_g())
    seeds = jax.vmap(lambda key: layers(key, [5, 16, 3]))(jax.random.split(jax.random.key(3), 4))
    run = lambda params: train(method, method.init((3, params)), params, 3)
    compiled, run = jax.jit(jax.vmap(run)).lower(seeds).compile(), jax.jit(run)
    assert " conditional(" in compiled.as_text()
    (trained, _), weights = compiled(seeds)
    for i in range(4):
        (alone, _), expected = run(jax.tree.map(lambda x, i=i: x[i], seeds))
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
    params, batch = PARAMS, jax.tree.map(lambda x: x[0], BATCHES)
    if isinstance(losses_fn, tuple):
        heads = [{"w": PARAMS[1]["w"][:, i], "b": PARAMS[1]["b"][i]} for i in range(3)]
        params = PARAMS[0], heads
    plain, constant = aggregation.imtl_g(), aggregation.constant(jnp.array([0.5, 2.0, 1.0]))
    method = mtl.amortize(plain)
    step = jax.jit(mtl.value_and_grad(losses_fn, method, **keywords))
    plain_step = jax.jit(mtl.value_and_grad(losses_fn, plain, **keywords))
    constant_step = jax.jit(mtl.value_and_grad(losses_fn, constant, **keywords))
    state = method.init((3, params))
    (_, after), anew = step(params, state, batch, refresh=jnp.array(True))
    (_, inner), expected = plain_step(params, state.inner, batch)
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (after.inner, anew), (inner, expected))
    last = after._replace(last_weights=jnp.array([0.5, 2.0, 1.0]))
    (_, same), again = step(params, last, batch, refresh=jnp.array(False))
    _, expected = constant_step(params, constant.init((3, params)), batch)
    jax.tree.map(close, (same, again), (last, expected))


def test_without_a_refresh_a_step_is_one_backward_pass():
    method = mtl.amortize(aggregation.upgrad())
    batch = jax.tree.map(lambda x: x[0], BATCHES)
    step = jax.jit(mtl.value_and_grad(squared_errors, method), static_argnames="refresh")
    plain = jax.jit(jax.value_and_grad(lambda params, batch: jnp.sum(squared_errors(params, batch))))
    cost = lambda lowered: lowered.compile().cost_analysis()["flops"]
    state = method.init((3, PARAMS))
    plain_cost = cost(plain.lower(PARAMS, batch))
    assert cost(step.lower(PARAMS, state, batch, refresh=False)) < 1.05 * plain_cost
    assert cost(step.lower(PARAMS, state, batch, refresh=True)) > 1.5 * plain_cost


def test_absent_tasks_keep_their_last_weight_and_have_none():
    method = mtl.amortize(aggregation.upgrad())
    batch = jax.tree.map(lambda x: x[0], BATCHES)
    step = jax.jit(mtl.value_and_grad(squared_errors, method, return_weights=True))
    (_, state, first), _ = step(PARAMS, method.init((3, PARAMS)), batch)
    mask = jnp.array([True, False, True])
    (_, state, weights), _ = step(PARAMS, state, batch, mask=mask, refresh=jnp.array(True))
    assert weights[1] == 0 and state.last_weights[1] == first[1] > 0
    (_, _, weights), _ = step(PARAMS, state, batch, mask=mask, refresh=jnp.array(False))
    np.testing.assert_array_equal(weights, jnp.where(mask, state.last_weights, 0))
    (_, _, weights), _ = step(PARAMS, state, batch, refresh=jnp.array(False))
    np.testing.assert_array_equal(weights, state.last_weights)


def test_skip_nonfinite_goes_outside():
    method = mtl.skip_nonfinite(mtl.amortize(aggregation.upgrad()))
    batch = jax.tree.map(lambda x: x[0], BATCHES)
    step = jax.jit(mtl.value_and_grad(squared_errors, method))
    (_, state), _ = step(PARAMS, method.init((3, PARAMS)), batch, refresh=jnp.array(True))
    bad = batch[0].at[0].set(jnp.nan), batch[1]
    (_, after), _ = step(PARAMS, state, bad, refresh=jnp.array(True))
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
    method, params = NESTED[nested](), jnp.ones(2)
    step = mtl.value_and_grad(lambda p, s: s * jnp.array([1.0, 2.0]) * p, method, return_weights=True)
    state = method.init((2, 2))
    (_, _, weights), _ = step(params, state, 1.0, refresh=False)
    np.testing.assert_array_equal(weights, [0.5, 0.5])
    shown = []
    for scale in jnp.array([[1.0, 1.0], [1.0, 9.0]]):
        (_, state, weights), _ = step(params, state, scale, refresh=True)
        shown.append(weights)
    assert np.abs(shown[1] - shown[0]).max() > 0.01
    (_, same, again), gradient = step(params, state, scale, refresh=False)
    np.testing.assert_allclose(again, shown[1], rtol=1e-6)  # XLA may compute what is shown and what is kept twice
    jax.tree.map(np.testing.assert_array_equal, same, state)
    np.testing.assert_allclose(gradient, again * jnp.array([1.0, 18.0]), rtol=1e-6)
    if nested.startswith("cr_mogm"):
        np.testing.assert_allclose(again, [0.8197, 0.1803], atol=1e-4)


def test_a_chain_around_weights_that_are_kept_is_refused():
    """Its own weights are others, and it keeps none."""
    method = mtl.chain(scalarization.scale_invariant(), mtl.amortize(aggregation.mgda()))
    step = mtl.value_and_grad(lambda params: jnp.array([1.0, 2.0]) * params, method)
    with pytest.raises(ValueError, match=r"refresh: .*mtl.amortize\(method\), outside of mtl.chain"):
        step(jnp.ones(2), method.init((2, 2)), refresh=False)


def test_errors():
    plain, amortized = aggregation.upgrad(), mtl.amortize(aggregation.upgrad())
    batch = jax.tree.map(lambda x: x[0], BATCHES)
    with pytest.raises(ValueError, match=r"refresh: expected a method .* mtl.amortize"):
        mtl.value_and_grad(squared_errors, plain)(PARAMS, plain.init((3, PARAMS)), batch, refresh=True)
    for refresh in 1, jnp.array([True]), "yes":
        with pytest.raises(TypeError, match="refresh: expected one boolean"):
            state = amortized.init((3, PARAMS))
            mtl.value_and_grad(squared_errors, amortized)(PARAMS, state, batch, refresh=refresh)
    with pytest.raises(ValueError, match="learned"):
        mtl.amortize(scalarization.uw())
    with pytest.raises(TypeError, match="expected a Scalarizer or an Aggregator"):
        mtl.amortize(lambda losses: losses)
