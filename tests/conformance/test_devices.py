"""Eight simulated devices give what one does, and the state lies where the parameters lie."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.conformance.helpers import PARAMS, QUICK, SAME
from tests.events import compilations, recorded

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


@pytest.mark.one_of_a_kind
def test_eight_devices_give_what_one_gives(built, mesh):
    state, sharded = built.init(), sharded_init(built, mesh)
    for i in range(3):
        output, state = built.apply(state, built.sample(i))
        sharded_output, sharded = built.apply(sharded, place(built, mesh, built.sample(i)))
        chex.assert_trees_all_close(jax.device_get(sharded_output), jax.device_get(output), **SAME)
        chex.assert_trees_all_close(jax.device_get(sharded), jax.device_get(state), **SAME)
    if not built.is_scalarizer:
        expected = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
        jax.tree.map(
            lambda g, s: chex.assert_equal(g.sharding.is_equivalent_to(s, g.ndim), True), sharded_output, expected
        )


@pytest.mark.one_of_a_kind
def test_state_lies_with_the_parameters_and_compiles_once(built, mesh):
    state = sharded_init(built, mesh)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    assert all(sharding.mesh == mesh for sharding in jax.tree.leaves(before))
    for name in getattr(built.method, "jacobian_shaped", ()):
        memory = optax.tree.get(state, name)
        expected = jax.tree.map(lambda spec: NamedSharding(mesh, rows_spec(spec)), SPECS)
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, memory), expected)
    step = jax.jit(built.apply, donate_argnums=0)
    xs = [place(built, mesh, built.sample(i)) for i in range(3)]
    with recorded() as events:
        for x in xs:
            _, state = step(state, x)
    assert compilations(events) == 1
    assert "all-gather" not in step.lower(state, xs[0]).compile().as_text()
    assert_lies_as(state, before)


@pytest.mark.one_of_a_kind
@pytest.mark.cases(lambda built: built.method.jacobian_shaped)
def test_init_inside_jit_follows_an_explicit_sharding(aggregator):
    mesh = MESHES["Explicit"]
    params = on(mesh, jax.tree.map(lambda p: jnp.ones(p.shape), PARAMS), SPECS)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda params: aggregator.init(params=params))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, aggregator.init())
    memory = optax.tree.get(state, aggregator.method.jacobian_shaped[0])
    expected = jax.tree.map(lambda spec: NamedSharding(mesh, rows_spec(spec)), SPECS)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, memory), expected)


@pytest.mark.one_of_a_kind
@pytest.mark.cases(lambda built: not built.case.local_draws)
def test_shard_map_reduces_over_the_axes_of_the_parameters(aggregator):
    """Every parameter is split over both: the replicated scale is left out."""
    method = aggregator.case.make(axis_name=AXES) if aggregator.case.sharded else aggregator.method
    params, rows = PARAMS["dense"], jax.tree.map(rows_spec, SPECS["dense"])
    state, sharded = aggregator.init(params=params), aggregator.init(method, params=params)

    def spec(path, leaf):
        """The Jacobian's or the parameters' where a field is shaped like them, on every device elsewhere."""
        parameter = getattr(path[-1], "key", None)
        if parameter not in rows:
            return PartitionSpec()
        return (rows if leaf.ndim > params[parameter].ndim else SPECS["dense"])[parameter]

    state_specs = jax.tree_util.tree_map_with_path(spec, sharded)

    @partial(jax.jit, compiler_options=QUICK)
    @jax.shard_map(
        mesh=MESHES["Auto"], in_specs=(state_specs, rows, PartitionSpec()), out_specs=(SPECS["dense"], state_specs)
    )
    def step(state, x, values):
        return method.apply(state, x, values=values)

    for i in range(3):
        x, values = aggregator.sample(i)["dense"], aggregator.losses(aggregator.sample(i))
        gradient, state = aggregator.method.apply(state, x, values=values)
        sharded_gradient, sharded = step(sharded, x, values)
        chex.assert_trees_all_close(jax.device_get(sharded_gradient), jax.device_get(gradient), **SAME)
        chex.assert_trees_all_close(jax.device_get(sharded), jax.device_get(state), **SAME)
