"""A trunk and heads: the gradients of the shared part through the features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, base, scalarization
from mtlbalance.gramian import combine
from mtlbalance.states import SeenState, count_seen
from tests.autodiff.models import assert_close, network, normal_batch, normal_layers

pytestmark = pytest.mark.unoptimized

NAMES = "count", "depth", "label"
TRUNK = normal_layers(0, [5, 16, 8])
HEADS = {name: normal_layers(i + 1, [8, 4, 1]) for i, name in enumerate(NAMES)}
BATCH = normal_batch(9, 32, n_in=5, n_out=3)
MASK = (True, False)


def trunk(params, batch):
    return {"low": jnp.tanh(network(params, batch[0])), "high": network(params, batch[0]) ** 2}


def head(i, params, features, batch):
    return 2.0**i * jnp.mean((network(params, features["low"] + features["high"])[:, 0] - batch[1][:, i]) ** 2)


HEAD_FNS = {name: (lambda *args, i=i: head(i, *args)) for i, name in enumerate(NAMES)}


def losses(params, batch):
    features = trunk(params[0], batch)
    return {name: HEAD_FNS[name](params[1][name], features, batch) for name in NAMES}


def graddrop_like():
    """An aggregator without weights: the entry of the largest magnitude."""

    def init(m, params, dtype):
        return SeenState(jnp.zeros(m, jnp.int32))

    def apply(state, jacobian, values, mask):
        pick = lambda x: jnp.take_along_axis(x, jnp.argmax(jnp.abs(x), axis=0, keepdims=True), axis=0)[0]
        return jax.tree.map(pick, jacobian), count_seen(state, mask)

    return base.aggregator(init, apply=apply)


METHODS = {
    "imtl_g": aggregation.imtl_g(),
    "excess_mtl": aggregation.excess_mtl(),
    "without weights": graddrop_like(),
    "dwa": scalarization.dwa(steps_per_epoch=100),
    "geometric_mean": scalarization.geometric_mean(),
}


@partial(jax.jit, static_argnums=0)
def init(method, params):
    return method.init(3) if isinstance(method, mtl.Scalarizer) else method.init((3, params))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.by_default("imtl_g")
def test_step_is_that_of_one_function_with_a_mask(method):
    params = TRUNK, HEADS
    state = init(method, mtl.subset(params, MASK))
    expected = jax.jit(mtl.value_and_grad(losses, method, shared=MASK, rows="vmap"))(params, state, BATCH)
    possible = ["vmap", 1]
    possible += ["two_pass"] if getattr(method, "gramian_weighting", None) else []
    possible += ["stream"] if getattr(method, "rowwise", None) else []
    for keywords in [*({"rows": rows} for rows in possible), {"microbatches": 4}]:
        step = mtl.value_and_grad((trunk, HEAD_FNS), method, **keywords)
        assert_close(jax.jit(step)(params, state, BATCH), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.by_default("excess_mtl", "dwa")
def test_at_the_features(method):
    """The method sees the Jacobian of the features; its gradient is pulled back from there."""

    @jax.jit
    def by_hand(trunk_params, head_params, batch):
        features, pull_back = jax.vjp(lambda params: trunk(params, batch), trunk_params)
        of_features = lambda features: jnp.stack([HEAD_FNS[n](head_params[n], features, batch) for n in NAMES])
        values, jacobian, state = of_features(features), jax.jacrev(of_features)(features), init(method, features)
        if isinstance(method, mtl.Scalarizer):
            weights, _ = jax.grad(lambda values: method.apply(state, values), has_aux=True)(values)
            gradient = combine(weights, jacobian)
        else:
            gradient, _ = method.apply(state, jacobian, values=values)
        of_heads = jax.grad(lambda params: sum(losses((trunk_params, params), batch).values()))(head_params)
        return state, values, (*pull_back(gradient), of_heads)

    state, values, expected = by_hand(TRUNK, HEADS, BATCH)
    step = mtl.value_and_grad((trunk, HEAD_FNS), method, at="features")
    (found, _), gradient = jax.jit(step)((TRUNK, HEADS), state, BATCH)
    assert_close(gradient, expected)
    assert_close(found, dict(zip(NAMES, np.asarray(values), strict=True)))


def test_the_trunk_is_run_once_and_heads_are_differentiated_for_their_own_loss():
    """The step of eight heads is less than two of the sum's; eight times through all heads would be eight."""
    method = aggregation.mgda()
    heads = {str(i): HEAD_FNS["count"] for i in range(8)}
    params = TRUNK, dict.fromkeys(heads, HEADS["count"])
    state = jax.eval_shape(lambda: method.init((8, trunk(TRUNK, BATCH))))
    step = jax.jit(mtl.value_and_grad((trunk, heads), method, at="features"))
    flops = step.lower(params, state, BATCH).compile().cost_analysis()["flops"]
    plain = jax.jit(
        jax.grad(lambda params: sum(f(params[1][n], trunk(params[0], BATCH), BATCH) for n, f in heads.items()))
    )
    assert flops < 2 * plain.lower(params).compile().cost_analysis()["flops"]


def test_auxiliary_outputs_keyword_arguments_and_weights():
    traced = lambda params, batch, *, gain: (jax.tree.map(lambda x: gain * x, trunk(params, batch)), "trunk's")
    heads = {n: (lambda *args, f=f, n=n, gain: (f(*args), jnp.float32(len(n)))) for n, f in HEAD_FNS.items()}
    method = aggregation.upgrad()
    grad_fn = mtl.value_and_grad((traced, heads), method, has_aux=True, return_weights=True)

    @jax.jit
    def step(params, batch):
        (found, _, weights, (of_trunk, of_heads)), _ = grad_fn(params, init(method, params[0]), batch, gain=1.0)
        assert of_trunk == "trunk's"
        return found, losses(params, batch), weights, of_heads

    found, expected, weights, of_heads = step((TRUNK, HEADS), BATCH)
    assert_close(found, expected)
    assert of_heads == {"count": 5, "depth": 5, "label": 5}
    assert weights.keys() == set(NAMES)


def test_counted_losses_and_absent_tasks():
    """Heads of absent tasks get no gradient, and the trunk nothing from them."""
    counted = dict(HEAD_FNS)
    counted["depth"] = lambda *args: mtl.Counted(HEAD_FNS["depth"](*args) + jnp.nan, np.int32(0))
    method = aggregation.upgrad()
    given = (TRUNK, HEADS), init(method, mtl.subset((TRUNK, HEADS), MASK)), BATCH
    (_, state), gradient = jax.jit(mtl.value_and_grad((trunk, counted), method))(*given)
    mask = {"count": True, "depth": False, "label": True}
    mask = jax.tree.map(np.array, mask)
    (_, expected_state), expected = jax.jit(mtl.value_and_grad((trunk, HEAD_FNS), method))(*given, mask=mask)
    assert_close((state, gradient), (expected_state, expected))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(gradient[1]["depth"])))


@pytest.mark.parametrize("at", ["parameters", "features"])
@pytest.mark.parametrize("method", [aggregation.imtl_g(), scalarization.mean()], ids=["imtl_g", "mean"])
@pytest.mark.by_default("imtl_g-features")
def test_an_absent_head_may_have_any_gradient(method, at):
    """Infinite here, of a root at zero: it is known apart from the others', and left out."""
    rooted = HEAD_FNS | {
        "depth": lambda params, features, batch: jnp.sqrt(0 * HEAD_FNS["depth"](params, features, batch))
    }
    mask = np.array([True, False, True])
    params = TRUNK, HEADS
    seen = jax.eval_shape(trunk, TRUNK, BATCH) if at == "features" else mtl.subset(params, MASK)
    state = jax.jit(lambda: init(method, seen))()
    steps = [jax.jit(mtl.value_and_grad((trunk, heads), method, at=at)) for heads in (rooted, HEAD_FNS)]
    (_, found), (_, expected) = (step(params, state, BATCH, mask=mask) for step in steps)
    assert_close(found, expected)


def test_errors():
    method = aggregation.upgrad()
    state = init(method, TRUNK)
    step = mtl.value_and_grad((trunk, HEAD_FNS), method)
    with pytest.raises(ValueError, match="params: expected a pair"):
        step({"trunk": TRUNK, "heads": HEADS}, state, BATCH)
    with pytest.raises(ValueError, match="one entry for each head"):
        step((TRUNK, {"count": HEADS["count"]}), state, BATCH)
    with pytest.raises(TypeError, match=r"features.*expected floating point numbers"):
        lengths = lambda params, batch: {**trunk(params, batch), "length": jnp.arange(32)}
        mtl.value_and_grad((lengths, HEAD_FNS), method)((TRUNK, HEADS), state, BATCH)
    with pytest.raises(ValueError, match="heads: expected one loss for each task, a scalar"):
        vector = HEAD_FNS | {"count": lambda params, features, batch: jnp.ones(2)}
        mtl.value_and_grad((trunk, vector), method)((TRUNK, HEADS), state, BATCH)
    for keywords in {"shared": MASK}, {"task_axis": 0}:
        with pytest.raises(ValueError, match="losses_fn: expected one function"):
            mtl.value_and_grad((trunk, HEAD_FNS), method, **keywords)
    for losses_fn, keywords in (losses, {}), ((trunk, HEAD_FNS), {"rows": 1}), ((trunk, HEAD_FNS), {"microbatches": 2}):
        with pytest.raises(ValueError, match="at: expected 'features' only with"):
            mtl.value_and_grad(losses_fn, method, at="features", **keywords)
    with pytest.raises(ValueError, match="at: expected 'parameters' or 'features'"):
        mtl.value_and_grad((trunk, HEAD_FNS), method, at="representation")
