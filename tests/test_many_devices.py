"""What the guide says of many devices: by which recipes they give the numbers of one, and by which they do not."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

N = 8
MESH = jax.make_mesh((N,), ("data",), (AxisType.Auto,))
RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(6, 4)).astype(np.float32), "heads": RNG.normal(size=(4, 3)).astype(np.float32)}
# The devices' data is not alike, as where each reads its own files, and they have more or fewer labels.
SPREAD = np.repeat(np.linspace(0.5, 2, N, dtype=np.float32), 4)[:, None]
X = SPREAD * RNG.normal(size=(4, 4 * N, 6)).astype(np.float32)
Y = RNG.normal(size=(4, 4 * N, 3)).astype(np.float32) / SPREAD
LABELLED = RNG.random((4, 4 * N, 3)) < SPREAD / 2
BATCHES = X, Y, LABELLED
SAME = {"rtol": 1e-5, "atol": 1e-6}
METHODS = {
    "uw": lambda: mtl.learn(scalarization.uw(), optax.sgd(0.1)),
    "dwa": partial(scalarization.dwa, steps_per_epoch=1),
    "famo": scalarization.famo,
    "upgrad": aggregation.upgrad,
    "gradnorm": aggregation.gradnorm,
    "excess_mtl": aggregation.excess_mtl,
}


def squared_errors(params, x, y):
    return (jnp.tanh(x @ params["w"]) @ params["heads"] - y) ** 2 * jnp.array([[1.0, 5.0, 2.0]])


def means(params, x, y, labelled):
    """Of all examples."""
    del labelled
    return jnp.mean(squared_errors(params, x, y), axis=0)


def counted(params, x, y, labelled):
    """Of those with a label, of which the devices have more or fewer."""
    return mtl.Counted(jnp.sum(squared_errors(params, x, y), axis=0, where=labelled), jnp.sum(labelled, axis=0))


LOSSES = {"means": means, "counted": counted}
OVER_DEVICES = {"means": jax.lax.pmean, "counted": jax.lax.psum}


def train(step, method):
    """Four steps of gradient descent, as one function of the parameters and all batches."""

    def run(params, *batches):
        def one(carry, batch):
            gradient, state = step(method, *carry, *batch)
            params = jax.tree.map(lambda p, g: p - 0.05 * g, carry[0], gradient)
            return (params, state), None

        shape = 3 if isinstance(method, mtl.Scalarizer) else (3, params)
        return jax.lax.scan(one, (params, method.init(shape)), batches)[0]

    return run


def by_value_and_grad(losses_fn, method, params, state, *batch):
    (_, state), gradient = mtl.value_and_grad(losses_fn, method, hooks=True)(params, state, *batch)
    return gradient, state


def of_all_devices(losses):
    """The same losses of the examples on all devices."""
    over_devices = lambda part: OVER_DEVICES[losses](part, "data")  # jax 0.8 has no gradient of sums and counts at once
    return lambda *args: jax.tree.map(over_devices, LOSSES[losses](*args))


def on_one(losses, method):
    return jax.jit(train(partial(by_value_and_grad, LOSSES[losses]), method))(PARAMS, *BATCHES)


def by_shard_map(losses, method):
    run, spread = train(partial(by_value_and_grad, of_all_devices(losses)), method), PartitionSpec(None, "data")
    in_specs, out_specs = (PartitionSpec(), spread, spread, spread), PartitionSpec()
    return jax.jit(jax.shard_map(run, mesh=MESH, in_specs=in_specs, out_specs=out_specs))(PARAMS, *BATCHES)


def pmapped(step, method):
    """What every device has at the end, along a first axis."""
    parts = jax.tree.map(lambda x: np.reshape(x, (4, N, 4, -1)), BATCHES)
    return jax.pmap(train(step, method), "data", in_axes=(None, 1, 1, 1))(PARAMS, *parts)


def mapped_by_shards(step, method):
    """The same where types do not tell what differs between devices."""
    run, spread, end = train(step, method), PartitionSpec(None, "data"), PartitionSpec("data")
    own = lambda *given: jax.tree.map(lambda x: x[None], run(*given))
    in_specs = PartitionSpec(), spread, spread, spread
    mapped = jax.shard_map(own, mesh=MESH, in_specs=in_specs, out_specs=end, check_vma=False)
    return jax.jit(mapped)(PARAMS, *BATCHES)


def by_averages(losses, method, mapped):
    """Each device has the gradients of its own examples."""

    def step(method, params, state, *batch):
        if isinstance(method, mtl.Scalarizer):
            gradient, state = by_value_and_grad(of_all_devices(losses), method, params, state, *batch)
            return jax.lax.pmean(gradient, "data"), state
        values, jacobian = mtl.value_and_jac(of_all_devices(losses))(params, *batch)
        return method.apply(state, jax.lax.pmean(jacobian, "data"), values=values)

    return mapped(step, method)


def by_usual_recipe(losses, method):
    """Each device its own losses and weights, and then an average of the gradients."""

    def step(method, params, state, *batch):
        gradient, state = by_value_and_grad(LOSSES[losses], method, params, state, *batch)
        return jax.lax.pmean(gradient, "data"), state

    return pmapped(step, method)


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.by_default("upgrad-counted")
def test_losses_of_all_devices_under_shard_map_give_what_one_device_gives(name, losses):
    method = METHODS[name]()
    found, expected = by_shard_map(losses, method), on_one(losses, method)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **SAME)


@pytest.mark.parametrize("mapped", [pmapped, mapped_by_shards])
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.by_default("gradnorm-counted-pmapped")
def test_losses_of_all_devices_and_averaged_rows_give_what_one_device_gives(name, losses, mapped):
    method = METHODS[name]()
    found, expected = by_averages(losses, method, mapped), on_one(losses, method)
    for i in range(N):
        one = jax.tree.map(lambda x: x[i], jax.device_get(found))  # noqa: B023
        chex.assert_trees_all_close(one, jax.device_get(expected), **SAME)


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.by_default("dwa-means")
def test_the_usual_recipe_gives_something_else(name, losses):
    """And states that differ between devices, of all methods that remember losses or gradients."""
    method = METHODS[name]()
    (params, state), (expected, _) = jax.device_get((by_usual_recipe(losses, method), on_one(losses, method)))
    off = max(np.max(np.abs(x[0] - y)) for x, y in zip(*map(jax.tree.leaves, (params, expected)), strict=True))
    assert off > 1e-3
    between_devices = max(np.max(np.ptp(x, axis=0)) for x in jax.tree.leaves(state))
    assert name == "upgrad" or between_devices > 1e-3
