"""Accumulation: sums and counts over micro-batches, one decision for all of them."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.autodiff.models import assert_close, network, normal_batch, normal_layers, squared_errors
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.pages import read

pytestmark = pytest.mark.unoptimized

PARAMS = normal_layers(0, [5, 16, 3])
X, Y = normal_batch(1, 64, n_in=5, n_out=3)
LABELS = np.argsort(np.random.default_rng(2).uniform(size=(64, 3)), axis=0) < [[64, 4, 13]]


NAMES = "dense", "rare", "sparse"


def counted_losses(params, batch):
    x, y, there = batch
    errors = jnp.where(there, (network(params, x) - y) ** 2, 0)
    return {name: mtl.Counted(jnp.sum(errors[:, i]), jnp.sum(there[:, i])) for i, name in enumerate(NAMES)}


def uncounted_losses(params, batch):
    return squared_errors(params, batch[:2])


@partial(jax.jit, static_argnums=0)
def init(method):
    return method.init(3) if isinstance(method, mtl.Scalarizer) else method.init((3, PARAMS))


def like_state(method):
    return jax.eval_shape(partial(init, method))


METHODS = {
    "dwa": scalarization.dwa(steps_per_epoch=100),
    "learn-uw": mtl.learn(scalarization.uw(), optax.sgd(0.1)),
    "geometric_mean": scalarization.geometric_mean(),
    "imtl_g": aggregation.imtl_g(),
    "excess_mtl": aggregation.excess_mtl(),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.by_default("geometric_mean")
def test_as_the_whole_batch(method):
    """In each way to compute rows, with four labels in 64 for one task; and with the rarest task absent."""
    state = init(method)
    batches = (X, Y, LABELS), (X, Y, LABELS & np.array([[True, False, True]]))
    possible = [None, 1]
    if isinstance(method, mtl.Aggregator):
        possible.append("stream" if method.rowwise else "two_pass")
    whole = jax.jit(mtl.value_and_grad(counted_losses, method, return_weights=True))
    expected = [whole(PARAMS, state, batch) for batch in batches]
    for microbatches, rows in (1, None), (2, None), *((8, rows) for rows in possible):
        step = mtl.value_and_grad(counted_losses, method, return_weights=True, microbatches=microbatches, rows=rows)
        step = jax.jit(step)
        assert_close([step(PARAMS, state, batch) for batch in batches], expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.by_default("geometric_mean", "excess_mtl")
def test_losses_without_counts_are_averaged(method):
    given = PARAMS, init(method), (X, Y, LABELS)
    expected = jax.jit(mtl.value_and_grad(uncounted_losses, method))(*given)
    assert_close(jax.jit(mtl.value_and_grad(uncounted_losses, method, microbatches=8))(*given), expected)


@pytest.mark.slow
def test_with_shared_parameters_and_heads():
    method = aggregation.imtl_g()
    for keyword in "shared", "decide_on":
        mask = {keyword: [True, False]}
        given = PARAMS, init(method), (X, Y, LABELS)  # the state is for any parameters
        expected = jax.jit(mtl.value_and_grad(counted_losses, method, **mask))(*given)
        assert_close(jax.jit(mtl.value_and_grad(counted_losses, method, microbatches=4, **mask))(*given), expected)


def test_low_precision_is_accumulated_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, X, Y))
    method = scalarization.sum()
    step = mtl.value_and_grad(lambda params, x, y: squared_errors(params, (x, y)), method, microbatches=64)
    _, gradient = jax.jit(step)(half[0], init(method), *half[1:])
    one = lambda params, x, y: jnp.sum(squared_errors(params, (x[None], y[None])))
    one_by_one = jax.jit(jax.vmap(jax.grad(one), (None, 0, 0)))(*half)
    for leaf, parts in zip(jax.tree.leaves(gradient), jax.tree.leaves(one_by_one), strict=True):
        assert leaf.dtype == jnp.bfloat16
        mean = np.mean(np.asarray(parts).astype(np.float32), axis=0)
        np.testing.assert_allclose(np.asarray(leaf).astype(np.float32), mean, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int8])
def test_narrow_counts_are_added_up_in_wider_ones(dtype):
    """Eight times as many as the dtype has room for."""
    most = {"float16": 40000, "int8": 100}[jnp.dtype(dtype).name]
    losses = lambda params, x: mtl.Counted(params * jnp.ones(2), jnp.full(2, most, dtype))
    grad_fn = mtl.value_and_grad(losses, scalarization.sum(), microbatches=8)
    step = jax.jit(lambda params, x: grad_fn(params, grad_fn.init(params, x), x))
    (losses, _), gradient = step(np.float32(1), np.ones(8, np.float32))
    np.testing.assert_array_equal(losses.count, [8 * most] * 2)
    np.testing.assert_allclose(gradient, 2 / most, rtol=1e-6)


def test_auxiliary_outputs_are_stacked():
    losses_fn = lambda params, batch: (counted_losses(params, batch), jnp.sum(batch[2]))
    method = scalarization.mean()
    step = mtl.value_and_grad(losses_fn, method, has_aux=True, microbatches=8)
    (losses, _, aux), _ = jax.device_get(jax.jit(step)(PARAMS, init(method), (X, Y, LABELS)))
    assert aux.shape == (8,)
    assert aux.sum() == LABELS.sum() == losses["rare"].count + losses["dense"].count + losses["sparse"].count


def passes_in_the_table():
    """The last but one column of the table of methods, by name."""
    return dict(re.findall(r"^\| `(\w+\.\w+)\(.*\| ([12]) \|[^|]*\|$", read("methods/index.md"), flags=re.MULTILINE))


CASES = {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}
# All other aggregators take one, for one reason.
SOME = ["aggregation.imtl_g", "aggregation.excess_mtl", "aggregation.modo", "aggregation.m_config"]


@pytest.mark.parametrize("name", [name for name in passes_in_the_table() if name.startswith("scalarization")] + SOME)
@pytest.mark.by_default("scalarization.mean", "scalarization.geometric_mean", "aggregation.*")
def test_passes_are_as_in_the_readme(name):
    """One where the weights are known before the losses, or come from rows; then the model is compiled in once."""
    passes, (family, name) = passes_in_the_table()[name], name.split(".")
    case = next(case for case in CASES[family] if case.name == name)
    method = case.make(tasks={name: i for i, name in enumerate(NAMES)}) if case.per_task else case.make()
    if method.learned:
        method = mtl.learn(method, optax.sgd(0.1))
    step = mtl.value_and_grad(counted_losses, method, microbatches=4, hooks=True)
    compiled = jax.jit(step).lower(PARAMS, like_state(method), (X, Y, LABELS)).compile()
    assert len(re.findall(r"= \S+ tanh\(", compiled.as_text())) == int(passes)


@pytest.mark.parametrize(("damping", "passes"), [(0.0, 1), (0.5, 2)])
def test_multipliers_from_before_the_call_take_one_pass(damping, passes):
    """Unless damping makes the weights depend on the losses."""
    bounds = {"rare": 0.1, "dense": None, "sparse": None}
    method = scalarization.lagrangian(bounds, damping=damping, simultaneous=True)
    step = jax.jit(mtl.value_and_grad(counted_losses, method, microbatches=4))
    text = step.lower(PARAMS, like_state(method), (X, Y, LABELS)).compile().as_text()
    assert len(re.findall(r"= \S+ tanh\(", text)) == passes


def test_last_weights_take_one_pass():
    method = mtl.amortize(scalarization.geometric_mean())
    step = jax.jit(mtl.value_and_grad(counted_losses, method, microbatches=4), static_argnames="refresh")
    given = PARAMS, like_state(method), (X, Y, LABELS)
    for refresh, passes in (True, 2), (False, 1):
        text = step.lower(*given, refresh=refresh).compile().as_text()
        assert len(re.findall(r"= \S+ tanh\(", text)) == passes


def test_errors():
    method = scalarization.mean()
    with pytest.raises(ValueError, match="microbatches: expected an int of at least 1"):
        mtl.value_and_grad(counted_losses, method, microbatches=0)
    step = mtl.value_and_grad(counted_losses, method, microbatches=7)
    with pytest.raises(ValueError, match=r"microbatches: expected .*divisible by 7"):
        step(PARAMS, init(method), (X, Y, LABELS))
    with pytest.raises(ValueError, match="microbatches: expected the batch as positional arguments"):
        mtl.value_and_grad(counted_losses, method, microbatches=2)(PARAMS, init(method), batch=(X, Y, LABELS))
    step = mtl.value_and_grad(lambda params, batch, scale: counted_losses(params, batch), method, microbatches=2)
    with pytest.raises(ValueError, match="microbatches: expected a batch on axis 0 of every positional argument"):
        step(PARAMS, init(method), (X, Y, LABELS), 2.0)
