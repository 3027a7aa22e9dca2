"""Eight simulated devices give what one does, and the state lies where the parameters lie."""

import chex
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtlbalance.states import like_jacobian, read_field
from tests.conformance.helpers import PARAMS, SAME
from tests.events import compilations, recorded

pytestmark = pytest.mark.unoptimized

SPECS = {"dense": {"w": PartitionSpec("y", "x"), "b": PartitionSpec(("x", "y"))}, "scale": PartitionSpec()}
AXES = ("x", "y")
MESHES = {kind: jax.make_mesh((4, 2), AXES, 2 * (getattr(AxisType, kind),)) for kind in ("Auto", "Explicit")}


def rows_spec(spec):
    return PartitionSpec(None, *spec)


def on(mesh, tree, specs):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


@pytest.fixture(params=MESHES)
def mesh(request):
    return MESHES[request.param]


def place(built, mesh, x):
    """Losses on every device, a Jacobian as its parameters."""
    return on(mesh, x, PartitionSpec() if built.is_scalarizer else jax.tree.map(rows_spec, SPECS))


def assert_lies_as(tree, shardings):
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def sharded_init(built, mesh):
    if built.is_scalarizer:
        return built.method.init(place(built, mesh, built.sample(0)))
    return built.init(params=on(mesh, jax.tree.map(lambda p: jnp.ones(p.shape), PARAMS), SPECS))


@pytest.mark.one_of_a_kind("boundary")
def test_eight_devices_give_what_one_gives(built, mesh):
    """With a state that lies with the parameters and stays there, from one program that gathers nothing."""
    state, sharded = built.init(), sharded_init(built, mesh)
    before = jax.tree.map(lambda leaf: leaf.sharding, sharded)
    assert all(sharding.mesh == mesh for sharding in jax.tree.leaves(before))
    for name in like_jacobian(built.method.jacobian_shaped):
        memory = read_field(sharded, name)
        expected = jax.tree.map(lambda spec: NamedSharding(mesh, rows_spec(spec)), SPECS)
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, memory), expected)
    step = jax.jit(built.apply, donate_argnums=0)
    placed = [place(built, mesh, built.sample(i)) for i in range(3)]
    with recorded() as events:
        outputs, states = [], []
        for x in placed:
            output, sharded = step(sharded, x)
            outputs.append(output)
            states.append(jax.device_get(sharded))
    assert compilations(events) == 1
    assert "all-gather" not in step.lower(sharded, placed[0]).compile().as_text()
    assert_lies_as(sharded, before)
    if not built.is_scalarizer:
        assert_lies_as(output, jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS))
    for i in range(3):
        output, state = built.apply(state, built.sample(i))
        chex.assert_trees_all_close(jax.device_get(outputs[i]), jax.device_get(output), **SAME)
        chex.assert_trees_all_close(states[i], jax.device_get(state), **SAME)


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: built.method.jacobian_shaped)
def test_init_inside_jit_follows_an_explicit_sharding(aggregator):
    mesh = MESHES["Explicit"]
    params = on(mesh, jax.tree.map(lambda p: jnp.ones(p.shape), PARAMS), SPECS)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda params: aggregator.init(params=params))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, aggregator.init())
    memory = read_field(state, aggregator.method.jacobian_shaped[0])
    expected = jax.tree.map(lambda spec: NamedSharding(mesh, rows_spec(spec)), SPECS)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, memory), expected)


def mapped(aggregator, weighs=False):
    """A call of the method or its weighting under ``shard_map``, and the first state.

    Every parameter is split over both axes: the replicated scale is left out.
    """
    method = aggregator.case.make(axis_name=AXES) if aggregator.case.sharded else aggregator.method
    params, rows = PARAMS["dense"], jax.tree.map(rows_spec, SPECS["dense"])
    state = aggregator.init(method, params=params)

    def spec(path, leaf):
        """The Jacobian's or the parameters' where a field is shaped like them, on every device elsewhere."""
        parameter = getattr(path[-1], "key", None)
        if parameter not in rows:
            return PartitionSpec()
        return (rows if leaf.ndim > params[parameter].ndim else SPECS["dense"])[parameter]

    state_specs = jax.tree_util.tree_map_with_path(spec, state)

    output_specs = PartitionSpec() if weighs else SPECS["dense"]

    @jax.jit
    @jax.shard_map(
        mesh=MESHES["Auto"], in_specs=(state_specs, rows, PartitionSpec()), out_specs=(output_specs, state_specs)
    )
    def call(state, x, values):
        return (method.weighting if weighs else method).apply(state, x, values=values)

    return call, state


@pytest.mark.cases(lambda built: built.method.weighting)
def test_shard_map_gives_every_device_the_same_weights(aggregator):
    """Which ``shard_map`` refuses to trace where a sum over the axes has been left out."""
    weigh, state = mapped(aggregator, weighs=True)
    x = aggregator.sample(0)
    weights, new_state = jax.eval_shape(weigh, state, x["dense"], aggregator.losses(x))
    assert weights.shape == (3,)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: not built.case.local_draws)
def test_shard_map_reduces_over_the_axes_of_the_parameters(aggregator):
    step, sharded = mapped(aggregator)
    state = aggregator.init(params=PARAMS["dense"])
    for i in range(3):
        x, values = aggregator.sample(i)["dense"], aggregator.losses(aggregator.sample(i))
        gradient, state = aggregator.method.apply(state, x, values=values)
        sharded_gradient, sharded = step(sharded, x, values)
        same = {"rtol": 1e-4, "atol": 1e-5} if aggregator.case.amplifies_rounding else SAME
        chex.assert_trees_all_close(jax.device_get(sharded_gradient), jax.device_get(gradient), **same)
        chex.assert_trees_all_close(jax.device_get(sharded), jax.device_get(state), **same)
