"""A whole training step on eight devices gives what one gives, and sends no more than its rows' plain gradients do."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.collectives import n_moved, n_operations, of_parameters
from tests.conformance.helpers import PARAMS

pytestmark = pytest.mark.unoptimized

SAME = {"rtol": 1e-5, "atol": 1e-5}  # sums over the batch in another order
RNG = np.random.default_rng(0)
START = jax.tree.map(lambda p: RNG.normal(size=p.shape).astype(np.float32), PARAMS)
BATCH = *RNG.normal(size=(3, 32, 8)).astype(np.float32), RNG.normal(size=(32, 4)).astype(np.float32)
EVERYWHERE = PartitionSpec()


class Way(NamedTuple):
    """How parameters and data lie on a mesh of the axes x, or x and y."""

    mesh: tuple[int, ...]
    w: PartitionSpec = EVERYWHERE
    b: PartitionSpec = EVERYWHERE

    @property
    def axes(self):
        return ("x", "y")[: len(self.mesh)]

    @property
    def specs(self):
        return {"dense": {"w": self.w, "b": self.b}, "scale": EVERYWHERE}


WAYS = {
    "data": Way((8,)),
    "parts": Way((8,), w=PartitionSpec(None, "x"), b=PartitionSpec("x")),
    "both": Way((4, 2), w=PartitionSpec("y", "x"), b=PartitionSpec(("x", "y"))),
}


def losses(params, *targets_and_x):
    *targets, x = targets_and_x
    hidden = jnp.tanh(x @ params["dense"]["w"])[:, :8] * params["scale"] + params["dense"]["b"][None]
    return jnp.stack([jnp.mean((hidden - y) ** 2) for y in targets])


class OnDevices:
    """The losses, and steps with them, where parameters and data are on eight devices."""

    def __init__(self, way, kind):
        self.way, self.kind = WAYS[way], kind
        types = (AxisType.Explicit if kind == "Explicit" else AxisType.Auto,) * len(self.way.mesh)
        self.mesh = jax.make_mesh(self.way.mesh, self.way.axes, types)
        self.spread = PartitionSpec(self.way.axes)
        self.shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.way.specs)
        self.params = jax.device_put(START, self.shardings)
        self.batch = jax.device_put(BATCH, NamedSharding(self.mesh, self.spread))

    def losses(self, params, *batch):
        """Parameters are brought to every device where they are used, as in fully sharded data parallelism."""
        if self.kind == "shard_map":
            params = jax.tree.map(all_of, params, self.way.specs)
            return jax.lax.pmean(losses(params, *batch), self.way.axes)
        if self.kind == "Free":
            return losses(params, *batch)
        on_all = NamedSharding(self.mesh, EVERYWHERE)
        gather = jax.sharding.reshard if self.kind == "Explicit" else jax.lax.with_sharding_constraint
        return losses(gather(params, on_all), *batch)

    def compile(self, step, state, outputs):
        """A step of parameters, a state and a batch, whose gradient and state lie as parameters and state do."""
        where = jax.tree.map(lambda x: x.sharding.spec, state)
        if self.kind == "shard_map":
            in_specs = self.way.specs, where, *len(BATCH) * (self.spread,)
            step = jax.shard_map(step, mesh=self.mesh, in_specs=in_specs, out_specs=outputs(where, self.way.specs))
            return jax.jit(step).lower(self.params, state, *self.batch).compile()
        lie_there = lambda specs: jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        step = jax.jit(step, out_shardings=lie_there(outputs(where, self.way.specs)))
        return step.lower(self.params, state, *self.batch).compile()

    def compiled_step(self, method, rows):
        grad_fn = mtl.value_and_grad(self.losses, method, rows=rows, hooks=True)
        outside = losses if self.kind == "shard_map" else self.losses  # the state is made where no axis is mapped
        state = mtl.value_and_grad(outside, method, hooks=True).init(self.params, *self.batch)
        return self.compile(grad_fn, state, lambda state, grads: ((EVERYWHERE, state), grads)), state

    @functools.cached_property
    def sent_by_the_sum(self):
        """What the plain gradient of the sum of the losses sends."""
        gradient = jax.grad(lambda params, *batch: jnp.sum(self.losses(params, *batch)))
        plain = lambda params, state, *batch: gradient(params, *batch)
        return of_parameters(self.compile(plain, (), lambda state, grads: grads).as_text(), 3)


def all_of(part, spec):
    """A parameter from its parts on all devices."""
    for i, axes in enumerate(spec):
        part = part if axes is None else jax.lax.all_gather(part, axes, axis=i, tiled=True)
    return part


@functools.cache
def on_devices(way, kind):
    return OnDevices(way, kind)


FAMILIES = {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}
CASES = {f"{family}.{case.name}": case for family in FAMILIES for case in FAMILIES[family] if "-" not in case.name}


def make(name, **options):
    method = CASES[name].make(**options)
    return mtl.learn(method, optax.sgd(0.1)) if method.learned else method


@functools.cache
def on_one_device(name, rows):
    grad_fn = mtl.value_and_grad(losses, make(name), rows=rows, hooks=True)
    step = lambda params, *batch: grad_fn(params, grad_fn.init(params, *batch), *batch)
    return jax.device_get(jax.jit(step)(START, *BATCH))


def check(name, way, kind, rows, n_rows):
    """The numbers of one device, by no more operations and numbers sent than the rows' plain gradients take."""
    there = on_devices(way, kind)
    options = {"axis_name": there.way.axes} if kind == "shard_map" and CASES[name].sharded else {}
    step, state = there.compiled_step(make(name, **options), rows)
    found = step(there.params, state, *there.batch)
    chex.assert_trees_all_close(jax.device_get(found), on_one_device(name, rows), **SAME)
    (_, new_state), gradient = found
    pairs = zip(*map(jax.tree.leaves, ((new_state, gradient), (state, there.params))), strict=True)
    for leaf, before in pairs:
        assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)
    sent, plain = of_parameters(step.as_text(), 3), there.sent_by_the_sum
    assert n_operations(sent) <= n_rows * n_operations(plain), sent
    assert n_moved(sent) <= n_rows * n_moved(plain), sent


@pytest.mark.parametrize("name", CASES)
@pytest.mark.by_default("aggregation.mgda")
def test_every_method_on_split_parameters_and_data(name):
    check(name, "both", "Auto", rows=None, n_rows=3 if isinstance(CASES[name].make(), mtl.Aggregator) else 1)


ROWS = {  # and how many backward passes that is; with the transposed ones
    "scalarization.dwa": {None: 1},
    "aggregation.upgrad": {"vmap": 3, 1: 3, "two_pass": 7},
    "aggregation.excess_mtl": {"vmap": 3, "stream": 4},
    "aggregation.m_config": {"stream": 1},
}
KINDS = ["data-Auto", "parts-Auto", "both-Explicit", "data-shard_map", "both-shard_map"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "rows"), [(name, rows) for name in ROWS for rows in ROWS[name]])
@pytest.mark.by_default("aggregation.excess_mtl-stream-both-Explicit")
def test_every_way_to_the_rows(name, rows, kind):
    check(name, *kind.split("-"), rows=rows, n_rows=ROWS[name][rows])


@pytest.mark.parametrize("way", ["parts", "both"])
@pytest.mark.parametrize(("name", "rows"), [(name, rows) for name in ROWS for rows in ROWS[name] if rows != "vmap"])
@pytest.mark.slow
def test_one_row_at_a_time_where_the_program_does_not_say_where_parameters_are_whole(name, rows, way):
    """With all rows at once XLA sends the examples to where the parameters lie, as the guide says."""
    check(name, way, "Free", rows=rows, n_rows=ROWS[name][rows])
