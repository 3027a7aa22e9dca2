"""Which rows are taken where none are asked for, and that all are the same on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from mtlbalance.autodiff.options import cheapest_rows
from mtlbalance.autodiff.point import Evaluated, Point, Pullback
from tests.autodiff.models import normal_batch, normal_layers, squared_error, squared_errors

pytestmark = pytest.mark.unoptimized

MIB = 2**20


@pytest.mark.parametrize(
    ("possible", "m", "parameters", "kept", "own_data", "expected"),
    [
        # Megabytes of the parameters, and what the backward pass keeps, as a multiple.
        (["vmap", "two_pass"], 2, 2, 1.0, False, "vmap"),
        (["vmap", "two_pass"], 3, 2, 2.0, False, 1),
        (["vmap", "two_pass"], 3, 2, 1.4, False, "two_pass"),
        (["vmap", "two_pass"], 32, 8, 2.0, False, 1),
        (["vmap", "two_pass"], 33, 8, 2.0, False, "two_pass"),
        (["vmap", "stream"], 3, 2, 2.0, False, "stream"),
        (["vmap", "stream"], 2, 2, 2.0, False, "vmap"),
        (["vmap"], 3, 2, 1.0, False, 1),
        (["vmap"], 3, 2, 1.0, True, "vmap"),
        (["vmap", "stream"], 3, 2, 1.0, True, "stream"),
    ],
)
def test_default(possible, m, parameters, kept, own_data, expected):
    params = np.empty(parameters * MIB // 4, np.float32)
    evaluated = Evaluated(None, None, np.empty(m, np.float32), None)
    pullback = Pullback(None, None, None, int(kept * parameters * MIB))
    point = Point(evaluated, lambda read: (evaluated, read(pullback)))
    assert cheapest_rows(possible, own_data, point, params) == expected


def test_what_feeds_weights_is_multiplied_in_full_precision():
    """The transposed pass of two; the other is the model's own."""
    params, batch = normal_layers(0, [5, 16, 3]), normal_batch(1, 8, n_in=5, n_out=3)
    text = str(jax.make_jaxpr(mtl.value_and_gramian(squared_errors, rows="two_pass"))(params, batch))
    assert text.count("Precision.HIGHEST") >= 4
    assert "Precision.HIGHEST" not in str(jax.make_jaxpr(jax.grad(lambda p: squared_errors(p, batch).sum()))(params))


@pytest.mark.parametrize("keywords", [{}, {"task_axis": 0}, {"microbatches": 1}], ids=str)
@pytest.mark.by_default("{}")
def test_a_method_that_needs_one_row_takes_one_backward_pass(keywords):
    """Of eight tasks; also where they have their own data, and a micro-batch is the batch."""
    passes = []

    @jax.custom_vjp
    def counted(x):
        return x

    def backward(_, cotangent):
        jax.debug.callback(lambda _: passes.append(1), jnp.sum(cotangent))  # of rows at once each is a call
        return (cotangent,)

    counted.defvjp(lambda x: (x, None), backward)
    params = normal_layers(0, [5, 16, 1 if "task_axis" in keywords else 8])
    batch = normal_batch(1, 8, 4, n_in=5, n_out=1) if "task_axis" in keywords else normal_batch(1, 8, n_in=5, n_out=8)
    losses_fn = squared_error if "task_axis" in keywords else squared_errors
    method = aggregation.m_config()
    step = jax.jit(mtl.value_and_grad(lambda p, batch: losses_fn(jax.tree.map(counted, p), batch), method, **keywords))
    one_pass = len(jax.tree.leaves(params))
    (_, state), _ = step(params, jax.jit(lambda: method.init((8, params)))(), batch)
    jax.effects_barrier()
    assert len(passes) == one_pass
    np.testing.assert_array_equal(state.turns, [1, 0, 0, 0, 0, 0, 0, 0])


MESHES = {kind: jax.make_mesh((4, 2), ("x", "y"), 2 * (getattr(AxisType, kind),)) for kind in ("Auto", "Explicit")}
METHODS = {
    "upgrad": aggregation.upgrad(),
    "excess_mtl": aggregation.excess_mtl(),
    "dwa": scalarization.dwa(steps_per_epoch=100),
}


@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.by_default("upgrad-Explicit")
def test_eight_devices_take_the_step_that_one_takes(method, kind):
    """The batch split over them; on the Auto mesh the parameters too."""
    mesh = MESHES[kind]
    params, batch = normal_layers(0, [8, 16, 4]), normal_batch(1, 32, n_in=8, n_out=4)
    place = lambda tree, *axes: jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*axes)))
    there = place(params) if kind == "Explicit" else place(params, "y")
    spread = place(batch, "x")
    init = lambda params: method.init(4) if isinstance(method, mtl.Scalarizer) else method.init((4, params))
    possible = ["vmap", 1]
    possible += ["two_pass"] if getattr(method, "gramian_weighting", None) else []
    possible += ["stream"] if getattr(method, "rowwise", None) else []
    keywords = [*({"rows": rows} for rows in possible), {"microbatches": 4}]
    expected = jax.jit(mtl.value_and_grad(squared_errors, method))(params, init(params), batch)
    for given in keywords if isinstance(method, mtl.Aggregator) else keywords[-2:]:
        found = jax.jit(mtl.value_and_grad(squared_errors, method, **given))(there, init(there), spread)
        compare = lambda x, y: np.testing.assert_allclose(jax.device_get(x), y, rtol=1e-4, atol=1e-5)
        jax.tree.map(compare, found, expected)


def test_micro_batches_of_sharded_parameters_on_an_explicit_mesh():
    mesh = jax.make_mesh((8,), ("d",), (AxisType.Explicit,))
    sharded, everywhere = NamedSharding(mesh, PartitionSpec("d")), NamedSharding(mesh, PartitionSpec())
    params, x = np.arange(16, dtype=np.float32), np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    losses = lambda params, x: jnp.stack([jnp.mean((x @ jax.reshard(params, everywhere) - i) ** 2) for i in range(2)])
    method = scalarization.sum()
    state = jax.jit(method.init, static_argnums=0)(2)
    step = jax.jit(mtl.value_and_grad(losses, method, microbatches=2))
    _, found = step(jax.device_put(params, sharded), state, jax.device_put(x, everywhere))
    _, expected = jax.jit(mtl.value_and_grad(losses_on_one, method))(params, state, x)
    np.testing.assert_allclose(jax.device_get(found), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="microbatches: expected at most as many as each device has examples"):
        split = jax.device_put(x, sharded)
        mtl.value_and_grad(losses_on_one, method, microbatches=16)(jax.device_put(params, everywhere), state, split)


def losses_on_one(params, x):
    return jnp.stack([jnp.mean((x @ params - i) ** 2) for i in range(2)])


def test_own_data_on_eight_devices():
    """The tasks split over them."""
    mesh = MESHES["Auto"]
    params, batch = normal_layers(0, [8, 16, 4]), normal_batch(1, 4, 8, n_in=8, n_out=4)
    method = aggregation.imtl_g()
    step = jax.jit(mtl.value_and_grad(squared_error, method, task_axis=0))
    state = jax.jit(lambda: method.init((4, params)))()
    expected = step(params, state, batch)
    spread = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec("x"))), batch)
    found = step(params, state, spread)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(jax.device_get(x), y, rtol=1e-5, atol=1e-6), found, expected)
