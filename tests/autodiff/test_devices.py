"""Training steps on eight simulated devices give what one gives, and what the devices have whole counts once."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.catalogue import AGGREGATORS, SCALARIZERS

pytestmark = pytest.mark.unoptimized

RNG = np.random.default_rng(0)
PARAMS = {"w": RNG.normal(size=(16, 5)).astype(np.float32), "scale": RNG.normal(size=5).astype(np.float32)}
BATCH = RNG.normal(size=(24, 16)).astype(np.float32), RNG.normal(size=(24, 5)).astype(np.float32)
SPECS = {"w": PartitionSpec("x"), "scale": PartitionSpec()}
SAME = {"rtol": 1e-4, "atol": 1e-6}  # sums over the batch in another order


def losses(params, x, y):
    errors = (jnp.tanh(x @ params["w"]) * params["scale"][None] - y) ** 2
    return jnp.mean(errors, axis=0)[:3] * jnp.array([1.0, 5.0, 2.0])


def losses_of_parts(params, x, y):
    """Fully sharded data parallelism: large parameters are gathered where they are used, small ones are whole."""
    w = jax.lax.all_gather(params["w"], "x", tiled=True)
    return jax.lax.pmean(losses(params | {"w": w}, x, y), "x")


def on_eight_devices(function, state=None, **options):
    """A step, or without a state what returns values and a matrix, under ``shard_map``."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    batch, outputs = (PartitionSpec("x"),) * 2, PartitionSpec()
    if state is None:
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(SPECS, *batch), out_specs=outputs, **options))

    def spec(path, leaf):
        like_w = getattr(path[-1], "key", None) == "w"
        return PartitionSpec(*[None] * (leaf.ndim - 2), "x") if like_w else PartitionSpec()

    states = jax.tree_util.tree_map_with_path(spec, state)
    in_specs, out_specs = (SPECS, states, *batch), ((outputs, states), SPECS)
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options))


METHODS = {
    "upgrad": aggregation.upgrad,
    "cagrad": aggregation.cagrad,
    "excess_mtl": aggregation.excess_mtl,
    "db_mtl": aggregation.db_mtl,
    "db_mtl-averages": partial(aggregation.db_mtl, 0.9),
    "m_config": aggregation.m_config,
    "lr_annealing": aggregation.lr_annealing,
}
ROWS = {
    "upgrad": ["vmap", 1, "two_pass"],
    "cagrad": ["vmap", 1, "two_pass"],
    "db_mtl": ["vmap", 1, "two_pass", "stream"],
}
CASES = [(name, rows) for name in METHODS for rows in ROWS.get(name, ["vmap", 1, "stream"])]


@pytest.mark.parametrize(("name", "rows"), CASES)
@pytest.mark.by_default("upgrad-vmap", "upgrad-two_pass", "excess_mtl-stream")
def test_a_whole_parameter_counts_once(name, rows):
    one = mtl.value_and_grad(losses, METHODS[name](), rows=rows)
    parts = mtl.value_and_grad(losses_of_parts, METHODS[name](axis_name="x"), rows=rows)
    state = jax.jit(one.init)(PARAMS, *BATCH)
    expected, found = jax.jit(one)(PARAMS, state, *BATCH), on_eight_devices(parts, state)(PARAMS, state, *BATCH)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **SAME)


@pytest.mark.parametrize(("name", "rows"), [("upgrad", "vmap"), ("upgrad", "two_pass"), ("excess_mtl", "stream")])
def test_what_types_do_not_tell_is_refused(name, rows):
    parts = mtl.value_and_grad(losses_of_parts, METHODS[name](axis_name="x"), rows=rows)
    state = jax.eval_shape(mtl.value_and_grad(losses, METHODS[name]()).init, PARAMS, *BATCH)
    with pytest.raises(ValueError, match=r"axis_name: expected .*check_vma=True.*parameter \['scale'\], if whole"):
        jax.eval_shape(on_eight_devices(parts, state, check_vma=False), PARAMS, state, *BATCH)


@pytest.mark.parametrize("rows", ["vmap", "two_pass"])
def test_the_gramian_is_that_of_all_parts(rows):
    expected = jax.jit(mtl.value_and_gramian(losses))(PARAMS, *BATCH)
    found = on_eight_devices(mtl.value_and_gramian(losses_of_parts, rows=rows))(PARAMS, *BATCH)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **SAME)


# Each device its own training, by types that tell (``check_vma=True``, the default).

OWN = {key: RNG.normal(size=(8, *shape)).astype(np.float32) for key, shape in {"w": (16, 5), "scale": (5,)}.items()}
MANY_BATCHES = tuple(np.stack([part * factor for factor in np.linspace(0.5, 1, 8, dtype=np.float32)]) for part in BATCH)


def on_their_own(method, **options):
    """Two steps of many trainings, as a function of one."""
    grad_fn = mtl.value_and_grad(losses, method, hooks=True, **options)

    def train(params, *batch):
        (_, state), gradient = grad_fn(params, grad_fn.init(params, *batch), *batch)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return grad_fn(params, state, *batch)[1]

    return train


def one_on_each(train):
    """Eight trainings on eight devices."""
    mesh = jax.make_mesh((8,), ("seed",), (AxisType.Auto,))

    def own(*given):
        return jax.tree.map(lambda x: x[None], train(*jax.tree.map(lambda x: x[0], given)))

    spec = PartitionSpec("seed")
    return jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec))


@pytest.mark.slow
def test_every_method_trains_on_each_device_on_its_own():
    for case in SCALARIZERS + AGGREGATORS:
        method = case.make()
        method = mtl.learn(method, optax.sgd(0.1)) if method.learned else method
        jax.eval_shape(one_on_each(on_their_own(method)), OWN, *MANY_BATCHES)


WAYS = {
    "two_pass": (aggregation.cagrad, {"rows": "two_pass"}),
    "1": (aggregation.upgrad, {"rows": 1}),
    "stream": (aggregation.excess_mtl, {"rows": "stream"}),
    "stream-one": (aggregation.m_config, {"rows": "stream"}),
    "microbatches": (aggregation.db_mtl, {"microbatches": 2}),
    "microbatches-scalar": (scalarization.famo, {"microbatches": 2}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.by_default("microbatches")
def test_each_device_trains_as_one_of_many(way):
    make, options = WAYS[way]
    train = on_their_own(make(), **options)
    expected, found = jax.jit(jax.vmap(train))(OWN, *MANY_BATCHES), one_on_each(train)(OWN, *MANY_BATCHES)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-3, atol=1e-5)


def test_micro_batches_of_parts():
    one = mtl.value_and_grad(losses, aggregation.upgrad(), microbatches=3)
    parts = mtl.value_and_grad(losses_of_parts, aggregation.upgrad(axis_name="x"), microbatches=3)
    state = jax.jit(one.init)(PARAMS, *BATCH)
    expected, found = jax.jit(one)(PARAMS, state, *BATCH), on_eight_devices(parts, state)(PARAMS, state, *BATCH)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **SAME)


# The tasks themselves on several devices.

MESHES = {kind: jax.make_mesh((2, 4), ("tasks", "x"), 2 * (getattr(AxisType, kind),)) for kind in ("Auto", "Explicit")}
DATA = RNG.normal(size=(4, 16)).astype(np.float32)


def loss_of_one(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"]) ** 2) * jnp.sum(params["scale"] ** 2)


def losses_of_tasks(params, data):
    return jax.vmap(loss_of_one, (None, 0))(params, data)


STEPS = {
    "famo": (scalarization.famo, {}),
    "dwa-task_axis": (scalarization.dwa, {"task_axis": 0}),
    "upgrad-vmap": (aggregation.upgrad, {"rows": "vmap"}),
    "upgrad-1": (aggregation.upgrad, {"rows": 1}),
    "upgrad-two_pass": (aggregation.upgrad, {"rows": "two_pass"}),
    "upgrad-task_axis": (aggregation.upgrad, {"task_axis": 0}),
    "upgrad-task_axis-1": (aggregation.upgrad, {"task_axis": 0, "rows": 1}),
    "upgrad-task_axis-2": (aggregation.upgrad, {"task_axis": 0, "rows": 2}),
    "excess_mtl-stream": (aggregation.excess_mtl, {"rows": "stream"}),
    "excess_mtl-task_axis-stream": (aggregation.excess_mtl, {"task_axis": 0, "rows": "stream"}),
    "m_config-task_axis": (aggregation.m_config, {"task_axis": 0}),
    "graddrop-task_axis": (aggregation.graddrop, {"task_axis": 0}),
}


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.by_default("dwa-task_axis-Explicit", "upgrad-task_axis-2-Explicit", "excess_mtl-stream-Explicit")
def test_tasks_on_several_devices(name, kind):
    make, options = STEPS[name]
    put = lambda x, *spec: jax.device_put(x, NamedSharding(MESHES[kind], PartitionSpec(*spec)))
    losses_fn = loss_of_one if "task_axis" in options else losses_of_tasks
    grad_fn = mtl.value_and_grad(losses_fn, make(), hooks=True, **options)
    expected = jax.jit(grad_fn)(PARAMS, jax.jit(grad_fn.init)(PARAMS, DATA), DATA)
    params, data = jax.tree.map(put, PARAMS), put(DATA, "tasks")
    found = jax.jit(grad_fn)(params, grad_fn.init(params, data), data)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **SAME)


def test_microbatches_of_tasks_on_several_devices():
    """On an Explicit mesh the sums over all micro-batches go back to where each task's data is."""
    batches = RNG.normal(size=(4, 6, 16)).astype(np.float32)
    loss = lambda params, x: jnp.mean(jax.vmap(lambda one: loss_of_one(params, one))(x))
    grad_fn = mtl.value_and_grad(loss, aggregation.upgrad(), task_axis=0, microbatches=2)
    expected = jax.jit(grad_fn)(PARAMS, jax.jit(grad_fn.init)(PARAMS, batches), batches)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(MESHES["Explicit"], PartitionSpec(*spec)))
    params, data = jax.tree.map(put, PARAMS), put(batches, "tasks")
    found = jax.jit(grad_fn)(params, grad_fn.init(params, data), data)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), **SAME)
