"""ExcessMTL that keeps a part of the squared gradients: which part, what it gives, where it lies, what it costs."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation
from mtlbalance.strides import keep, kept_shape
from tests.autodiff.models import normal_batch, normal_layers, squared_errors

pytestmark = pytest.mark.unoptimized

FULL, EVERY_64TH = aggregation.excess_mtl(0.1), aggregation.excess_mtl(0.1, accumulate=64)
PARAMS = {
    "w": jax.ShapeDtypeStruct((256, 256), jnp.float32),
    "b": jax.ShapeDtypeStruct((2048,), jnp.float32),
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


def rows(seed, m=3, params=PARAMS):
    """Gradients that shrink from call to call, each task's at its own rate."""
    rng = np.random.default_rng(seed)
    size = lambda p: np.exp(-0.2 * seed * np.arange(m)).reshape(m, *[1] * len(p.shape))
    return jax.tree.map(lambda p: np.float32(size(p) * rng.normal(size=(m, *p.shape))), params)


# Which coordinates.

kept_of = jax.jit(keep, static_argnums=1)

SHAPES = {
    (4096, 11008): (512, 1376),
    (50257, 768): (50257, 12),  # a length that cannot be halved
    (32, 4096, 4096): (8, 1024, 1024),
    (3, 3, 64, 128): (3, 3, 8, 16),
    (1_000_003,): (15_625,),
    (768,): (12,),
    (128, 10): (8, 10),  # small: more than one in 64
    (10,): (10,),
    (0, 64): (0, 8),
    (): (),
}


def test_how_many_are_kept_follows_from_the_shape():
    assert {shape: kept_shape(shape, 64) for shape in SHAPES} == SHAPES
    assert kept_shape((4096, 11008), 1) == (4096, 11008)


def test_every_row_and_every_column_has_its_part():
    numbers = np.arange(128 * 256, dtype=np.float32).reshape(128, 256)
    kept = np.asarray(kept_of(numbers, (16, 32)), int)  # blocks of 8 by 8
    assert (np.bincount(kept.ravel() // 256, minlength=128) == 4).all()
    assert (np.bincount(kept.ravel() % 256, minlength=256) == 2).all()
    blocks = kept // 256 // 8, kept % 256 // 8
    np.testing.assert_array_equal(blocks, np.indices((16, 32)))  # one of each block


@pytest.mark.parametrize("shape", [(100,), (333,), (35, 66), (3, 40, 33), (0, 64)])
def test_the_coordinates_by_loops(shape):
    """Also where lengths are no multiples: a rest at the end is left out."""
    x, kept = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape), kept_shape(shape, 16)
    expected = np.zeros(kept, np.float32)
    for block in np.ndindex(kept):
        sizes = [n // k for n, k in zip(shape, kept, strict=True)]
        places = min(8, max(sizes)) if len(shape) > 1 else 1
        place = [
            sum(block) % places * size // places if size > places else sum(block) % places % size for size in sizes
        ]
        expected[block] = x[tuple(i * size + at for i, size, at in zip(block, sizes, place, strict=True))]
    np.testing.assert_array_equal(kept_of(x, kept), expected)


def test_they_are_the_same_at_every_call():
    state, expected = EVERY_64TH.init((3, PARAMS)), 0.0
    for i in range(2):
        _, state = EVERY_64TH.apply(state, rows(i))
        expected += np.stack([kept_of(w, (32, 32)) for w in rows(i)["w"] ** 2])
    np.testing.assert_allclose(state.squared_gradients["w"], expected, rtol=1e-6)
    chex.assert_trees_all_equal(
        jax.tree.map(np.shape, state.squared_gradients), {"w": (3, 32, 32), "b": (3, 32), "scale": (3,)}
    )


# What it gives.


def test_the_full_form_is_the_default():
    states = [method.init((3, PARAMS)) for method in (FULL, aggregation.excess_mtl(0.1, accumulate="full"))]
    states.append(aggregation.excess_mtl(0.1, accumulate=1).init((3, PARAMS)))
    for state in states:
        chex.assert_trees_all_equal_shapes_and_dtypes(state, states[0])
    assert states[0].squared_gradients["w"].shape == (3, 256, 256)
    assert aggregation.excess_mtl(accumulate=1).jacobian_shaped == FULL.jacobian_shaped == ("squared_gradients",)


def excesses(method, sequence, params=PARAMS):
    state, found = method.init((3, params)), []
    for x in sequence:
        row = lambda i, x=x: jax.tree.map(lambda leaf: leaf[i], x)
        for i in range(3):
            state, excess = method.rowwise.visit(state, i, row(i))
            found.append(excess)
    return np.array(found).reshape(-1, 3)


def test_the_excess_of_a_first_call_is_that_of_all_coordinates():
    """However few are kept and whatever they are: so is the baseline."""
    sparse = jax.tree.map(lambda x: x * (np.arange(x.size).reshape(x.shape) % 77 == 1), rows(0))
    for x in rows(0), sparse:
        np.testing.assert_allclose(excesses(EVERY_64TH, [x]), excesses(FULL, [x]), rtol=1e-5)


def test_the_excess_is_exact_where_all_coordinates_shrink_alike():
    """Each by its own size: what is estimated is how much of the first excess is left."""
    sequence = [jax.tree.map(lambda x, i=i: x / np.float32(i + 1), rows(0)) for i in range(4)]
    np.testing.assert_allclose(excesses(EVERY_64TH, sequence), excesses(FULL, sequence), rtol=1e-4)


def test_weights_are_close_to_those_of_the_full_form():
    """Independent coordinates, some 1,000 of 66,000 kept: what is left of the excess is known to a few percent."""
    sequence = [rows(i) for i in range(6)]
    np.testing.assert_allclose(excesses(EVERY_64TH, sequence), excesses(FULL, sequence), rtol=0.08)
    found = {method: method.init((3, PARAMS)) for method in (EVERY_64TH, FULL)}
    for x in sequence:
        found = {method: method.apply(state, x)[1] for method, state in found.items()}
    weights = [np.exp(state.log_weights) for state in found.values()]
    np.testing.assert_allclose(*weights, atol=0.002)
    assert np.ptp(weights[1]) > 0.05


def test_what_is_kept_stands_for_its_own_parameter():
    """And for as many coordinates of it as are left out: one in 64 of the large one, all of the small one."""
    params = {"large": jax.ShapeDtypeStruct((512, 512), jnp.float32), "small": jax.ShapeDtypeStruct((8,), jnp.float32)}
    ones = jax.tree.map(lambda p: np.ones((3, *p.shape), np.float32), params)
    quiet = ones | {"small": 1000 * ones["small"]}
    sequence = [ones, quiet]
    np.testing.assert_allclose(excesses(EVERY_64TH, sequence, params), excesses(FULL, sequence, params), rtol=1e-4)


# Where it lies.

SPECS = {"w": PartitionSpec("y", "x"), "b": PartitionSpec("x"), "scale": PartitionSpec()}
MESHES = {kind: jax.make_mesh((4, 2), ("x", "y"), 2 * (getattr(AxisType, kind),)) for kind in ("Auto", "Explicit")}


def on(mesh, tree, *lead):
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*lead, *spec)))
    return jax.tree.map(put, tree, SPECS)


@pytest.mark.parametrize("kind", MESHES)
def test_eight_devices_keep_what_one_does_and_gather_nothing(kind):
    mesh, state = MESHES[kind], EVERY_64TH.init((3, PARAMS))
    params = on(mesh, jax.tree.map(lambda p: np.ones(p.shape, np.float32), PARAMS))
    sharded = EVERY_64TH.init((3, params))
    step = jax.jit(EVERY_64TH.apply, donate_argnums=0)
    text = step.lower(sharded, on(mesh, rows(0), None)).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    if kind == "Explicit":
        with jax.set_mesh(mesh):  # what is made in the call lies on the mesh, too
            jax.eval_shape(EVERY_64TH.apply, sharded, on(mesh, rows(0), None))
    for i in range(3):
        gradient, state = EVERY_64TH.apply(state, rows(i))
        on_devices, sharded = step(sharded, on(mesh, rows(i), None))
    chex.assert_trees_all_close(jax.device_get((on_devices, sharded)), (gradient, state), rtol=1e-5, atol=1e-6)
    for name, leaf in sharded.squared_gradients.items():
        expected = NamedSharding(mesh, PartitionSpec(None, *SPECS[name]))
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)


@pytest.mark.parametrize("kind", MESHES)
def test_a_parameter_whose_kept_part_has_no_equal_shares(kind):
    """Twelve of 768 on eight devices: they are on each, and the numbers are the same."""
    mesh, x = jax.make_mesh((8,), ("x",), (getattr(AxisType, kind),)), rows(0, params=np.ones(768, np.float32))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    state = EVERY_64TH.init((3, put(np.ones(768, np.float32), "x")))
    assert state.squared_gradients.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec()), 2)
    _, state = jax.jit(EVERY_64TH.apply)(state, put(x, None, "x"))
    _, expected = EVERY_64TH.apply(EVERY_64TH.init((3, 768)), x)
    chex.assert_trees_all_close(jax.device_get(state), expected, rtol=1e-5)


def test_under_shard_map_each_device_keeps_its_part():
    method, mesh = aggregation.excess_mtl(0.1, accumulate=64, axis_name=("x", "y")), MESHES["Auto"]
    state, sharded = EVERY_64TH.init((3, PARAMS)), method.init((3, PARAMS))
    with_tasks = jax.tree.map(lambda spec: PartitionSpec(None, *spec), SPECS)
    specs = jax.tree.map(lambda _: PartitionSpec(), sharded)._replace(squared_gradients=with_tasks)
    step = jax.jit(jax.shard_map(method.apply, mesh=mesh, in_specs=(specs, with_tasks), out_specs=(SPECS, specs)))
    for i in range(2):
        gradient, state = EVERY_64TH.apply(state, rows(i))
        found, sharded = step(sharded, rows(i))
    chex.assert_trees_all_close(jax.device_get((found, sharded)), (gradient, state), rtol=1e-5, atol=1e-6)


# What it costs.


def model(sizes, n_examples):
    """Parameters and a batch."""
    return normal_layers(0, sizes), normal_batch(1, n_examples, n_in=sizes[0], n_out=sizes[-1])


# The guard goes over each row once more, and keeps a part of that: half a gradient at most.
BARE, GUARDED = (lambda method: method, 0.0), (mtl.skip_nonfinite, 0.5)


@pytest.mark.parametrize(("m", "wrap", "more"), [(8, *BARE), (8, *GUARDED), (32, *BARE)], ids=["8", "8-guarded", "32"])
@pytest.mark.by_default("8")
def test_a_streamed_step_keeps_one_gradient_and_a_64th_of_all_more_than_the_plain_one(m, wrap, more):
    """The state is counted with it, and donated."""
    params, batch = jax.eval_shape(lambda: model([64, 512, 512, 512, m], n_examples=256))
    losses = partial(squared_errors, activation=jax.nn.relu)
    method = wrap(aggregation.excess_mtl(accumulate=64))
    state = jax.eval_shape(lambda: method.init((m, params)))
    n_bytes = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    def kept(step, *args, donate=()):
        compiled = jax.jit(step, donate_argnums=donate).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = kept(lambda params, batch: jax.grad(lambda p: jnp.sum(losses(p, batch)))(params), params, batch)
    step = mtl.value_and_grad(losses, method, rows="stream")
    streamed = kept(step, params, state, batch, donate=1) + n_bytes(state)
    assert streamed <= plain + (1 + more + m / 64) * n_bytes(params)


# With the rest.


def test_every_wrapper_and_every_way_of_a_step_takes_it():
    params, batch = jax.eval_shape(lambda: model([16, 32, 3], n_examples=12))
    methods = [EVERY_64TH, mtl.skip_nonfinite(EVERY_64TH), mtl.amortize(EVERY_64TH), aggregation.cr_mogm(EVERY_64TH)]
    methods += [mtl.transform_rows(EVERY_64TH, optax.scale_by_adam()), mtl.prioritize(EVERY_64TH, np.array([1, 2, 0]))]
    for method in methods:
        ways = [{}, {"rows": "vmap"}, {"microbatches": 2}, *([{"rows": "stream"}] if method.rowwise else [])]
        for options in ways:
            grad_fn = mtl.value_and_grad(squared_errors, method, **options)
            state = jax.eval_shape(grad_fn.init, params, batch)
            (_, new), _ = jax.eval_shape(grad_fn, params, state, batch, mask=np.array([True, True, False]))
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_a_task_that_comes_starts_with_zeros():
    _, state = EVERY_64TH.apply(EVERY_64TH.init((3, PARAMS)), rows(0))
    new = mtl.carry_over(EVERY_64TH, state, ["a", "b", "c"], ["a", "c", "d"], params=PARAMS)
    squares, old = (np.asarray(x.squared_gradients["w"]) for x in (new, state))
    np.testing.assert_array_equal(squares, [old[0], old[2], np.zeros_like(old[0])])


def test_errors():
    for slip in 3, 100, "half":
        with pytest.raises(ValueError, match=f"accumulate: expected 'full' or a power of two, found '?{slip}"):
            aggregation.excess_mtl(accumulate=slip)
    with pytest.raises(ValueError, match="accumulate: expected an int of at least 1, found 0"):
        aggregation.excess_mtl(accumulate=0)
    with pytest.raises(TypeError, match=r"accumulate: expected an int, found 0\.5"):
        aggregation.excess_mtl(accumulate=0.5)
    state, apply = EVERY_64TH.init((3, PARAMS)), EVERY_64TH.apply
    kept = r"jacobian \(what accumulate=64 keeps of a row\)"
    with pytest.raises(ValueError, match=rf"{kept}\['w'\]: expected shape \(32, 32\), found shape \(32, 64\)"):
        apply(state, rows(0) | {"w": np.ones((3, 256, 512), np.float32)})
    with pytest.raises(ValueError, match=rf"{kept}\['w'\]: expected shape \(32, 32\), found shape \(8,\)"):
        apply(state, rows(0) | {"w": np.ones((3, 256), np.float32)})
    with pytest.raises(ValueError, match=rf"{kept}: expected the params' tree"):
        apply(state, {"w": rows(0)["w"]})
    with pytest.raises(ValueError, match=r"jacobian.*expected"):
        jax.grad(lambda x: apply(state, x)[0]["scale"])(np.ones(3, np.float32))
    for other in aggregation.excess_mtl(accumulate=16), FULL:
        with pytest.raises(ValueError, match=r"\['b'\]: expected shape"):
            apply(other.init((3, PARAMS)), rows(0))
