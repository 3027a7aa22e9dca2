"""Eight simulated devices give what one does, and the state lies where the parameters lie."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance.states import like_jacobian, read_field
from tests.collectives import collectives_of, n_operations, of_tasks
from tests.conformance.helpers import PARAMS, SAME

pytestmark = pytest.mark.unoptimized

SPECS = {"dense": {"w": PartitionSpec("y", "x"), "b": PartitionSpec(("x", "y"))}, "scale": PartitionSpec()}
AXES = ("x", "y")
SPLIT = {"dense": {"w": PartitionSpec("y", "x"), "b": PartitionSpec("x")}, "scale": PartitionSpec()}
OTHERS = {"dense": {"w": PartitionSpec("x"), "b": PartitionSpec()}, "scale": PartitionSpec()}  # the tasks have y
MESHES = {kind: jax.make_mesh((4, 2), AXES, 2 * (getattr(AxisType, kind),)) for kind in ("Auto", "Explicit")}


def rows_spec(spec):
    return PartitionSpec(None, *spec)


def on(mesh, tree, specs):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


@pytest.fixture(params=[pytest.param("Auto", marks=pytest.mark.one_of_a_kind("boundary")), "Explicit"])
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
    return built.init(params=on(mesh, jax.tree.map(lambda p: np.ones(p.shape, np.float32), PARAMS), SPECS))


@functools.cache
def n_sums_of_a_gramian(mesh):
    """One for the parameters that are split over the same axes; for those split twice XLA adds up axis by axis."""
    rows = jax.tree.map(lambda p: np.ones((3, *p.shape), np.float32), PARAMS)
    jacobian = on(mesh, rows, jax.tree.map(rows_spec, SPECS))
    return len(collectives_of(jax.jit(mtl.gramian.gramian).lower(jacobian).compile().as_text()))


def assert_sends_numbers_of_tasks_only(built, mesh, compiled):
    """Sums of m x m, m or single numbers: no part of a parameter, and those that all need a Gramian once."""
    sent = collectives_of(compiled.as_text())
    assert {one.kind for one in sent} <= ({"all-reduce"} if not built.is_scalarizer else set())
    assert all(of_tasks(shape, 3) for one in sent for shape in one.shapes), sent
    if not built.is_scalarizer and built.method.gramian_weighting and "skip" not in built.case.name:
        assert n_operations(sent) <= n_sums_of_a_gramian(mesh)


def test_a_gramian_of_parameters_split_over_one_axis_is_one_sum():
    """However many they are."""
    for kind in AxisType.Auto, AxisType.Explicit:
        mesh = jax.make_mesh((8,), ("x",), (kind,))
        jacobian = {"v": jnp.ones((3, 4, 16)), "w": jnp.ones((3, 16, 4)), "b": jnp.ones((3, 8)), "scale": jnp.ones(3)}
        specs = {"v": PartitionSpec(None, None, "x"), "w": PartitionSpec(None, "x"), "b": PartitionSpec(None, "x")}
        jacobian = on(mesh, jacobian, specs | {"scale": PartitionSpec()})
        (only,) = collectives_of(jax.jit(mtl.gramian.gramian).lower(jacobian).compile().as_text())
        assert (only.kind, only.times, {*only.shapes}) == ("all-reduce", 1, {(3, 3)})


@pytest.mark.one_of_a_kind("engine")
def test_eight_devices_give_what_one_gives(built, mesh):
    """With a state that lies with the parameters and stays there, from one program that gathers nothing."""
    state, sharded = built.init(), sharded_init(built, mesh)
    before = jax.tree.map(lambda leaf: leaf.sharding, sharded)
    assert all(sharding.mesh == mesh for sharding in jax.tree.leaves(before))
    for name in like_jacobian(built.method.jacobian_shaped):
        memory = read_field(sharded, name)
        expected = jax.tree.map(lambda spec: NamedSharding(mesh, rows_spec(spec)), SPECS)
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, memory), expected)
    placed = [place(built, mesh, built.sample(i)) for i in range(3)]
    step = jax.jit(built.apply, donate_argnums=0).lower(sharded, placed[0]).compile()
    outputs, states = [], []
    for x in placed:
        output, sharded = step(sharded, x)  # raises for what is of another type, or lies elsewhere, than at first
        outputs.append(output)
        states.append(jax.device_get(sharded))
    assert_sends_numbers_of_tasks_only(built, mesh, step)
    assert_lies_as(sharded, before)
    if not built.is_scalarizer:
        assert_lies_as(output, jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS))
    for i in range(3):
        output, state = built.apply(state, built.sample(i))
        chex.assert_trees_all_close(jax.device_get(outputs[i]), jax.device_get(output), **SAME)
        chex.assert_trees_all_close(states[i], jax.device_get(state), **SAME)


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: built.method.jacobian_shaped)
def test_a_split_state_is_scanned_saved_and_restored_to_where_it_lay(aggregator, tmp_path):
    """Straight there, by a template that ``init`` makes, and the training goes on to the same numbers."""
    ocp = pytest.importorskip("orbax.checkpoint")
    mesh, rows = MESHES["Explicit"], jax.tree.map(lambda spec: PartitionSpec(None, None, *spec), SPECS)
    start, xs = sharded_init(aggregator, mesh), on(mesh, aggregator.stack(2), rows)
    scan = (
        jax.jit(lambda state, xs: jax.lax.scan(lambda *given: aggregator.apply(*given)[::-1], state, xs)[0])
        .lower(start, xs)
        .compile()
    )
    state = scan(start, xs)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        template = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), start)
        restored = checkpointer.restore(tmp_path / "state", template)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, start)
    assert_lies_as(state, shardings)
    assert_lies_as(restored, shardings)
    chex.assert_trees_all_equal(scan(restored, xs), scan(state, xs))


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: built.method.jacobian_shaped)
def test_init_inside_jit_follows_an_explicit_sharding(aggregator):
    mesh = MESHES["Explicit"]
    params = on(mesh, jax.tree.map(lambda p: np.ones(p.shape, np.float32), PARAMS), SPECS)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda params: aggregator.init(params=params))(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, aggregator.init())
    memory = read_field(state, aggregator.method.jacobian_shaped[0])
    expected = jax.tree.map(lambda spec: NamedSharding(mesh, rows_spec(spec)), SPECS)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf.sharding, memory), expected)


def mapped(aggregator, weighs=False, check_vma=True):
    """A call of the method or its weighting under ``shard_map``, and the first state.

    One parameter is split over both axes, one over one of them, and one is whole on every device.
    """
    method = aggregator.case.make(axis_name=AXES) if aggregator.case.sharded else aggregator.method
    specs = jax.tree_util.tree_leaves_with_path(SPLIT)
    state = aggregator.init(method)

    def spec(path, leaf):
        """The Jacobian's or the parameters' where a field is shaped like them, on every device elsewhere."""
        for (where, found), param in zip(specs, jax.tree.leaves(PARAMS), strict=True):
            if path[-len(where) :] == where:
                return rows_spec(found) if leaf.ndim > param.ndim else found
        return PartitionSpec()

    state_specs = jax.tree_util.tree_map_with_path(spec, state)
    in_specs = state_specs, jax.tree.map(rows_spec, SPLIT), PartitionSpec()
    out_specs = PartitionSpec() if weighs else SPLIT, state_specs

    @jax.jit
    @jax.shard_map(mesh=MESHES["Auto"], in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)
    def call(state, x, values):
        return (method.weighting if weighs else method).apply(state, x, values=values)

    return call, state


@pytest.mark.cases(lambda built: built.method.weighting)
def test_shard_map_gives_every_device_the_same_weights(aggregator):
    """Which ``shard_map`` refuses to trace where a sum over the axes has been left out."""
    weigh, state = mapped(aggregator, weighs=True)
    x = aggregator.sample(0)
    weights, new_state = jax.eval_shape(weigh, state, x, aggregator.losses(x))
    assert weights.shape == (3,)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: not built.case.local_draws)
def test_shard_map_reduces_over_the_axes_of_the_parameters(aggregator):
    """What is whole counts once, and what is split over one axis once along the other."""
    step, sharded = mapped(aggregator)
    state = aggregator.init()
    for i in range(3):
        x, values = aggregator.sample(i), aggregator.losses(aggregator.sample(i))
        gradient, state = aggregator.method.apply(state, x, values=values)
        sharded_gradient, sharded = step(sharded, x, values)
        same = {"rtol": 1e-4, "atol": 1e-5} if aggregator.case.amplifies_rounding else SAME
        chex.assert_trees_all_close(jax.device_get(sharded_gradient), jax.device_get(gradient), **same)
        chex.assert_trees_all_close(jax.device_get(sharded), jax.device_get(state), **same)


@pytest.mark.cases(lambda built: built.case.local_draws)
def test_shard_map_draws_once_for_what_is_whole(aggregator):
    """As one device does; for the parts of what is split each device draws anew."""
    (step, sharded), x = mapped(aggregator), aggregator.sample(0)
    found, expected = step(sharded, x, None)[0], aggregator.method.apply(aggregator.init(), x)[0]
    assert found["scale"] == expected["scale"]
    assert any(jnp.any(a != b) for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True))


@pytest.mark.cases(lambda built: built.case.sharded)
def test_shard_map_whose_types_do_not_tell_what_is_whole_is_refused(aggregator):
    """Every device would count it: cagrad's gradient was .42 off, and nothing said so."""
    step, state = mapped(aggregator, check_vma=False)
    x = aggregator.sample(0)
    due = r"axis_name: expected .*check_vma=True.*, found 'x' under check_vma=False.*, where parameter \['dense'\]"
    with pytest.raises(ValueError, match=due):
        jax.eval_shape(step, state, x, aggregator.losses(x))


# The tasks themselves on several devices.


def split_by_tasks(mesh, tree, *rest):
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("y", *rest))), tree)


def calls_of_four_tasks(built, mesh, mask):
    """What takes something of each task: functions, their arguments, and these with the tasks on several devices."""
    method, x = built.method_for(np.arange(4)), built.sample(0, n_tasks=4)
    state = built.init(method, 4)
    if built.is_scalarizer:

        def step(state, x, mask):
            scalar = lambda x: method.apply(state, x, mask=mask)
            (scalar, new_state), gradient = jax.value_and_grad(scalar, has_aux=True)(x)
            return scalar, gradient, built.hooks(new_state, x, mask, method)

        def counted(state, x, mask):
            return method.apply(state, mtl.Counted(x, np.ones(4, np.float32)), mask=mask)

        split = split_by_tasks(mesh, x)
        return [step, counted], (state, x, mask), (method.init(split), split, split_by_tasks(mesh, mask))

    given, gramian = {"values": built.losses(x), "mask": mask}, mtl.gramian.gramian(x)
    rows = jax.tree.map(lambda leaf, spec: split_by_tasks(mesh, leaf, *spec), x, OTHERS)
    calls = [lambda state, x, gramian, given: method.apply(state, x, **given)]
    if method.weighting:
        calls.append(lambda state, x, gramian, given: method.weighting.apply(state, x, **given))
    if method.gramian_weighting:
        calls.append(lambda state, x, gramian, given: method.gramian_weighting.apply(state, gramian, **given))
    placed = built.init(method, 4, on(mesh, jax.tree.map(lambda p: np.ones(p.shape, np.float32), PARAMS), OTHERS))
    split = placed, rows, split_by_tasks(mesh, gramian, "x"), split_by_tasks(mesh, given)
    return calls, (state, x, gramian, given), split


THREE_OF_FOUR = np.array([True, True, False, True])


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.parametrize("mask", [pytest.param(None, id="all", marks=pytest.mark.slow), THREE_OF_FOUR])
def test_tasks_may_lie_on_several_devices_of_an_explicit_mesh(built, mask):
    """While tracing: there JAX would raise."""
    functions, arguments, split = calls_of_four_tasks(built, MESHES["Explicit"], mask)
    for function in functions:
        found, expected = (jax.eval_shape(function, *given) for given in (split, arguments))
        chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


@pytest.mark.parametrize("kind", [pytest.param("Auto", marks=pytest.mark.slow), "Explicit"])
@pytest.mark.one_of_a_kind("engine")
def test_tasks_on_several_devices_give_what_they_give_on_one(built, kind):
    functions, arguments, split = calls_of_four_tasks(built, MESHES[kind], THREE_OF_FOUR)
    all_of_them = jax.jit(lambda *given: [function(*given) for function in functions])
    found, expected = (jax.device_get(all_of_them(*given)) for given in (split, arguments))
    chex.assert_trees_all_close(found, expected, **SAME)
