"""What makes a method a pair of pure functions: purity, transformations, stable states, compilation."""

import re
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance.losses import broadcast_to_rows
from tests.checkpoints import FORMATS, numbered
from tests.conformance.helpers import PARAMS, SAME, assert_path_agrees
from tests.events import compilations, recorded, traces

pytestmark = pytest.mark.unoptimized


def outputs_and_state(built, state, xs):
    """A plain Python loop over the leading axis of ``xs``."""
    outputs = []
    for i in range(jax.tree.leaves(xs)[0].shape[0]):
        output, state = built.step(state, built.restrict(xs, i))
        outputs.append(output)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *outputs), state


def test_inputs_stay_and_the_same_call_gives_the_same_answer(built):
    state, x = built.init(), built.sample(0)
    before = jax.tree.map(np.array, (state, x))
    first, second = built.apply(state, x), built.apply(state, x)
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_equal((state, x), before)


@pytest.mark.one_of_a_kind("boundary")
def test_jit_gives_what_eager_gives(built):
    state, x = built.step(built.init(), built.sample(0))[1], built.sample(1)
    jitted = built.step(state, x)
    with jax.disable_jit():
        eager = built.step(state, x)
    chex.assert_trees_all_close(jitted, eager, **SAME)


@pytest.mark.every_method
def test_scan_gives_what_a_loop_gives(built):
    xs = built.stack(5)
    scan = partial(jax.lax.scan, lambda state, x: built.step(state, x)[::-1])
    state, outputs = scan(built.init(), xs)
    chex.assert_trees_all_close((outputs, state), outputs_and_state(built, built.init(), xs), **SAME)


@pytest.mark.cases(lambda built: not built.case.hyperparameters)
def test_vmap_over_states_and_inputs_gives_what_a_loop_gives(built):
    xs = built.stack(3)
    states = [built.apply(built.init(), built.sample(9 + i))[1] for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    mapped = jax.jit(jax.vmap(built.apply))(stacked, xs)
    for i, state in enumerate(states):
        single = built.apply(state, built.restrict(xs, i))
        chex.assert_trees_all_close(built.restrict(mapped, i), single, **SAME)


def kind_of(values):
    return np.int32 if all(isinstance(value, int) for value in values) else np.float32


@pytest.mark.every_method
@pytest.mark.cases(lambda built: built.case.hyperparameters)
def test_hyperparameters_may_be_traced(built):
    def states(given):
        method = built.case.make(**given)
        return built.init(method), built.step(built.init(method), built.sample(0), method=method)[1]

    given = {name: kind_of(values)(values[1]) for name, values in built.case.hyperparameters.items()}
    before, after = jax.eval_shape(states, given)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)


@pytest.mark.cases(lambda built: built.case.hyperparameters)
def test_vmap_over_hyperparameters_gives_what_a_loop_gives(built):
    """With states and inputs. Each hyperparameter has its values in turn, the others the second of theirs."""
    swept, xs = built.case.hyperparameters, built.stack(5)
    usual = {name: values[1] for name, values in swept.items()}
    settings = [usual | {name: value} for name, values in swept.items() for value in values]
    for setting in settings:
        built.case.make(**setting)  # within its bounds, which a traced one does not show

    def run(given, xs):
        method = built.case.make(**given)

        def step(state, inputs):
            i, x = inputs
            output, state = built.step(state, x, method=method, ends_epoch=False)
            ends_epoch = partial(jnp.where, i % 2 == 1)
            return jax.tree.map(ends_epoch, method.end_epoch(state), state), output

        return jax.lax.scan(step, built.init(method), (jnp.arange(5), xs))

    given = {name: np.array([setting[name] for setting in settings], kind_of(swept[name])) for name in swept}
    copies = jax.tree.map(lambda x: np.broadcast_to(x, (len(settings), *x.shape)), xs)
    mapped = jax.device_get(jax.jit(jax.vmap(run))(given, copies))
    one_by_one = jax.jit(run)  # traced, so that one program serves for all
    rounding = 1e-4 if built.case.amplifies_rounding else 1e-5
    same = partial(chex.assert_trees_all_close, rtol=rounding, atol=rounding)
    for i in range(len(settings)):
        same(built.restrict(mapped, i), one_by_one(built.restrict(given, i), xs))
    same(built.restrict(mapped, 0), jax.jit(partial(run, settings[0]))(xs))
    for name, values in swept.items():
        results = [built.restrict(mapped, settings.index(usual | {name: value})) for value in values]
        assert any(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, results[:2]), strict=True)), name


@pytest.mark.one_of_a_kind("boundary")
def test_many_bare_calls_trace_once(built):
    # As many tasks as no other check has: a factory returns the same method again, with its programs.
    method, x = built.method_for(np.arange(6)), built.sample(0, n_tasks=6)
    state = built.init(method, n_tasks=6)
    given = {} if built.is_scalarizer else {"values": built.losses(x)}
    with recorded() as events:
        _, state = method.apply(state, x, **given)
    assert traces(events) > 0
    assert compilations(events) == 1
    with recorded() as events:
        for _ in range(5):
            _, state = method.apply(state, x, **given)
    assert traces(events) == compilations(events) == 0


@pytest.mark.every_method
def test_state_keeps_structure_shapes_and_strong_dtypes(built):
    def check(new):
        chex.assert_trees_all_equal_structs(new, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(new))

    state = built.init()
    for dtype in jnp.float32, jnp.bfloat16:
        check(jax.eval_shape(built.apply, state, built.sample(0, dtype=dtype))[1])
    check(jax.eval_shape(built.apply, state, built.sample(0), jnp.array([True, False, True]))[1])
    check(jax.eval_shape(built.method.end_epoch, state))
    check(jax.eval_shape(built.method.observe, state, jnp.ones(3)))
    check(jax.eval_shape(built.init))


@pytest.mark.every_method
def test_first_leaf_has_one_entry_per_task(built):
    method = built.method_for(jnp.arange(5))
    assert jax.tree.leaves(jax.eval_shape(lambda: built.init(method, n_tasks=5)))[0].shape == (5,)


@pytest.mark.every_method
def test_no_two_leaves_share_a_buffer(built):
    """Nor with the hyperparameters or the key of the method, which would be in both states."""
    leaves = [leaf for leaf in jax.tree.leaves((built.init(), built.init())) if leaf.size]
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@pytest.mark.one_of_a_kind("boundary")
def test_a_donated_state_leaves_init_and_method_usable(built):
    step = jax.jit(built.apply, donate_argnums=0)
    _, once = step(built.init(), built.sample(0))
    output, again = step(built.init(), built.sample(0))
    chex.assert_trees_all_equal(once, again)
    chex.assert_tree_all_finite(output)


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_inputs_are_computed_in_float32(built, dtype):
    x = built.sample(0, dtype=dtype)
    state = built.apply(built.init(), built.sample(1))[1]
    output, new_state = built.apply(state, x)
    widened, wide_state = built.apply(state, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x))
    chex.assert_trees_all_close(new_state, wide_state, **SAME)
    if built.is_scalarizer:
        assert output.dtype == jnp.float32
        chex.assert_trees_all_close(output, widened, **SAME)
    else:
        chex.assert_trees_all_equal_dtypes(output, x)
        one_rounding = float(jnp.finfo(dtype).eps)
        as_float = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), output)
        chex.assert_trees_all_close(as_float, widened, rtol=one_rounding, atol=one_rounding)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: built.method.gramian_weighting)
def test_half_precision_gramians_are_computed_in_float32(aggregator, dtype):
    weighting = aggregator.method.gramian_weighting
    x = aggregator.sample(0)
    products, values = mtl.gramian.gramian(x).astype(dtype), aggregator.losses(x)
    weights, _ = weighting.apply(weighting.init(3), products, values=values)
    widened, _ = weighting.apply(weighting.init(3), products.astype(jnp.float32), values=values)
    assert weights.dtype == jnp.float32
    chex.assert_trees_all_close(weights, widened, **SAME)


def test_half_precision_does_not_overflow_inside(built):
    x = jax.tree.map(lambda leaf: jnp.full_like(leaf, 300.0), built.sample(0, dtype=jnp.float16))
    state = built.init()
    for _ in range(2):  # 300 squared is beyond float16
        output, state = built.apply(state, x)
    chex.assert_tree_all_finite((output, state))


@pytest.mark.parametrize("made_for", [pytest.param("float32", marks=pytest.mark.one_of_a_kind("boundary")), "float64"])
def test_float64_mode(built, made_for):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, made_for), PARAMS)
        losses = jax.ShapeDtypeStruct((3,), made_for)
        method = built.case.make()
        state = method.init(losses) if built.is_scalarizer else built.init(method, params=params)
        for dtype in jnp.dtype("float64"), jnp.dtype("float32"):
            apply = partial(built.apply, method=method)
            output, new_state = jax.eval_shape(apply, state, built.sample(0, dtype=dtype))
            chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
            assert {leaf.dtype for leaf in jax.tree.leaves(output)} == {dtype}
        floats = {x.dtype for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)}
        assert floats <= {jnp.dtype(made_for)}


@pytest.mark.one_of_a_kind("boundary")
def test_float64_of_numpy_is_float32_without_a_warning(built):
    """As in JAX, where 64 bits are not enabled."""
    params = jax.tree.map(lambda p: np.zeros(p.shape), PARAMS)
    state = built.method.init(np.zeros(3)) if built.is_scalarizer else built.init(params=params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, built.init())


@pytest.mark.one_of_a_kind("boundary")
def test_exports_for_cpu_cuda_and_tpu_without_callbacks(built):
    args = jax.eval_shape(lambda: (built.init(), built.sample(0)))
    exported = jax.export.export(jax.jit(built.step), platforms=["cpu", "cuda", "tpu"])(*args)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert not re.search(r"custom_call @\S*callback", exported.mlir_module())


@pytest.mark.one_of_a_kind("boundary")
def test_new_state_is_cut_from_the_inputs_gradient(built):
    def state_total(x):
        new_state = built.apply(built.init(), x)[1]
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(new_state) if jnp.issubdtype(leaf.dtype, jnp.floating))

    total = jax.grad(lambda x: jnp.asarray(state_total(x), jnp.float32))
    gradient = jax.jit(total)(built.sample(0))
    chex.assert_trees_all_equal(gradient, jax.tree.map(jnp.zeros_like, gradient))


def test_scalar_is_linear_in_the_losses_unless_it_is_said_not_to_be(scalarizer):
    """Linear: the weights are constants of differentiation."""
    state, x = scalarizer.method.apply(scalarizer.init(), scalarizer.sample(1))[1], scalarizer.sample(0)
    scalar = lambda x: scalarizer.method.apply(state, x)[0]
    both = jax.jit(lambda x: (jax.grad(scalar)(x), jax.hessian(scalar)(x)))
    gradient, hessian = jax.device_get(both(x))
    assert np.any(gradient != 0)
    assert np.any(hessian != 0) == scalarizer.case.nonlinear


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: built.method.weighting)
def test_aggregators_weights_are_constants_of_differentiation(aggregator):
    state = aggregator.apply(aggregator.init(), aggregator.sample(1))[1]
    x = aggregator.sample(0)
    weights, _ = aggregator.method.weighting.apply(state, x, values=aggregator.losses(x))
    total = lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(aggregator.apply(state, x)[0]))
    expected = jax.tree.map(lambda leaf: jnp.broadcast_to(broadcast_to_rows(weights, leaf), leaf.shape), x)
    chex.assert_trees_all_close(jax.jit(jax.grad(total))(x), expected, **SAME)


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: built.method.weighting)
def test_weighting_is_the_aggregator(aggregator):
    state = jax.eval_shape(aggregator.init)
    chex.assert_trees_all_equal_structs(jax.eval_shape(lambda: aggregator.method.weighting.init((3, PARAMS))), state)
    agrees_over_four_calls(aggregator, "weighting")


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: built.method.gramian_weighting)
def test_gramian_weighting_is_the_aggregator(aggregator):
    agrees_over_four_calls(aggregator, "gramian_weighting")


@pytest.mark.cases(lambda built: built.method.rowwise)
def test_row_by_row_is_the_aggregator(aggregator):
    agrees_over_four_calls(aggregator, "rowwise")


def agrees_over_four_calls(aggregator, path):
    state = aggregator.init()
    for i in range(4):
        state = assert_path_agrees(aggregator, path, state, aggregator.sample(i))


@pytest.mark.one_of_a_kind("engine")
@pytest.mark.parametrize("form", FORMATS)
def test_a_state_comes_back_from_a_file(built, form, tmp_path):
    """With a target and without; that a run then goes on to the same numbers is shown across processes."""
    (save, load), like = FORMATS[form], jax.eval_shape(built.init)
    state = numbered(like)
    save(tmp_path / "state", state)
    for restored in load(tmp_path / "state", like), mtl.restore(load(tmp_path / "state"), like=like):
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
        chex.assert_trees_all_equal(restored, state)
