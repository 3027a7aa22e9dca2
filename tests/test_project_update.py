"""``project_update``: no final update hurts a task to first order, whatever the optimizer before it does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation

pytestmark = pytest.mark.unoptimized

LINK = mtl.project_update(2)
OPTIMIZERS = {"adam": optax.adam(0.02), "momentum": optax.sgd(0.02, momentum=0.9), "sgd": optax.sgd(0.02)}


def relative_products(updates, jacobian):
    """Of the update with each gradient, over the product of their lengths."""
    lengths = jnp.linalg.norm(updates) * jnp.linalg.norm(jacobian, axis=1)
    products = jnp.matmul(jacobian, updates, precision="highest")
    return jnp.where(lengths == 0, 0, products / jnp.where(lengths == 0, 1, lengths))


@partial(jax.jit, static_argnums=0)
def projected(link, updates, jacobian, **given):
    return link.update(updates, link.init(updates), jacobian=jacobian, **given)[0]


@partial(jax.jit, static_argnums=(1, 2))
def largest_products(seed, optimizer, protected):
    """Of 3000 steps on noisy quadratic losses of different optima and curvatures."""
    centres, noise = jax.random.normal(jax.random.key(seed), (3, 10)), jax.random.key(seed + 100)
    curvatures = jnp.exp(jax.random.normal(jax.random.key(seed + 200), (3, 10)))
    last = (mtl.project_update(n_tasks=3),) if protected else ()
    optimizer = optax.chain(optimizer, *last)
    method = aggregation.upgrad()

    def step(carry, key):
        params, state, opt_state = carry
        jacobian = curvatures * (params[None] - centres) + 0.3 * jax.random.normal(key, (3, 10))
        gradient, state = method.apply(state, jacobian)
        given = {"jacobian": jacobian} if protected else {}
        updates, opt_state = optimizer.update(gradient, opt_state, params, **given)
        largest = jnp.max(relative_products(updates, jacobian))
        return (optax.apply_updates(params, updates), state, opt_state), largest

    params = jnp.zeros(10)
    carry = params, method.init((3, params)), optimizer.init(params)
    return jax.lax.scan(step, carry, jax.random.split(noise, 3000))[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.by_default("adam")
def test_no_final_update_hurts_a_task(name):
    for seed in range(3):
        assert np.max(largest_products(seed, OPTIMIZERS[name], True)) <= 1e-6
    if name != "sgd":
        without = np.asarray(largest_products(0, OPTIMIZERS[name], False))
        assert np.mean(without > 1e-6) > 0.02


def test_what_hurts_nobody_stays():
    jacobian, updates = np.array([[1.0, 0.1], [0.3, 2.0]], np.float32), np.array([-1.0, -1.0], np.float32)
    np.testing.assert_array_equal(projected(LINK, updates, jacobian), updates)


def test_one_protected_task_is_a_half_space():
    jacobian = {"w": np.array([[4.0, 0.0], [-1.0, 1.0]], np.float32), "b": np.array([1.0, 2.0], np.float32)}
    updates = {"w": np.array([3.0, -1.0], np.float32), "b": np.float32(-5.0)}
    losses = {"left": 1.0, "right": 2.0}
    product, square = 12.0 - 5.0, 17.0
    expected = jax.tree.map(lambda u, rows: u - product / square * rows[0], updates, jacobian)
    for link, values in (mtl.project_update(2, protect="left"), losses), (mtl.project_update(2, protect=0), None):
        found = projected(link, updates, jacobian, values=values)
        for name in updates:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    absent = projected(link, updates, jacobian, mask=np.array([False, True]))
    np.testing.assert_array_equal(absent["w"], updates["w"])


def test_an_absent_task_is_not_protected_whatever_stands_in_its_row():
    jacobian = np.array([[1.0, 0.0], [np.nan, np.inf]], np.float32)
    updates = np.array([2.0, 5.0], np.float32)
    counted = {"here": 1.0, "none": mtl.Counted(np.float32(0), np.int32(0))}
    named_mask = {"here": np.array(True), "none": np.array(False)}
    for given in (
        {"mask": np.array([True, False])},
        {"values": counted},
        {"task_losses": counted},
        {"values": {"here": 1.0, "none": 1.0}, "mask": named_mask},
    ):
        np.testing.assert_allclose(projected(LINK, updates, jacobian, **given), [0.0, 5.0], atol=1e-6)


def test_one_jacobian_serves_an_aggregator_at_the_start_of_the_chain_too():
    jacobian, params = np.array([[4.0, 0.0], [-1.0, 1.0]], np.float32), np.zeros(2, np.float32)
    optimizer = optax.chain(mtl.aggregate(aggregation.upgrad(), 2), optax.adam(0.1), mtl.project_update(2))
    update = jax.jit(lambda x: optimizer.update(x.sum(0), optimizer.init(params), params, jacobian=x)[0])
    assert np.max(jacobian @ np.asarray(update(jacobian))) <= 1e-6


def test_opposite_gradients_leave_nothing_along_them():
    jacobian = np.array([[1.0, 0.0], [-3.0, 0.0]], np.float32)
    found = projected(LINK, np.array([2.0, 5.0], np.float32), jacobian)
    np.testing.assert_allclose(found, [0.0, 5.0], atol=1e-5)


def test_complex_parameters():
    """The loss changes by the real part of gradient times update."""
    jacobian = np.array([[1 + 2j, 0.5j], [-1 + 1j, 2 + 0j]], np.complex64)
    updates = np.array([1 - 1j, 2 + 1j], np.complex64)
    found = np.asarray(projected(LINK, updates, jacobian))
    assert np.max(np.real(jacobian @ updates)) > 0.1
    assert np.max(np.real(jacobian @ found)) <= 1e-5


def test_parameters_that_are_split_over_devices():
    rng = np.random.default_rng(0)
    jacobian, updates = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 64), (64,)))
    spec, mesh = jax.sharding.PartitionSpec, jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    call = jax.shard_map(
        partial(projected, mtl.project_update(3, axis_name="x")),
        mesh=mesh,
        in_specs=(spec("x"), spec(None, "x")),
        out_specs=spec("x"),
    )
    expected = projected(mtl.project_update(3), updates, jacobian)
    np.testing.assert_allclose(jax.jit(call)(updates, jacobian), expected, atol=1e-5)


def test_narrow_gradients_are_not_rounded_into_a_wide_update():
    rng = np.random.default_rng(0)
    jacobian, updates = rng.normal(size=(3, 64)).astype(jnp.bfloat16), rng.normal(size=64).astype(np.float32)
    found = projected(mtl.project_update(3), updates, jacobian)
    assert found.dtype == np.float32
    assert np.max(jax.jit(relative_products)(found, jacobian.astype(np.float32))) <= 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "jacobian: expected the gradients of the tasks"),
        ({"jacobian": jnp.ones((3, 2))}, "jacobian: .*2"),
        ({"jacobian": jnp.ones((2, 5))}, "updates: expected shape"),
        ({"jacobian": jnp.ones((2, 2)), "mask": jnp.ones(3, bool)}, "mask: expected"),
        ({"jacobian": jnp.ones((2, 2)), "values": jnp.ones(3)}, "values: expected"),
    ],
)
def test_errors_name_what_is_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        mtl.project_update(2).update(jnp.ones(2), optax.EmptyState(), **given)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_gradients_of_any_length_are_taken_in(scale):
    found = projected(LINK, np.ones(2, np.float32), scale * np.array([[1.0, 0.0], [0.0, -1.0]], np.float32))
    np.testing.assert_allclose(found, [0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_narrow_products_do_not_vanish(dtype):
    """Those of these updates and gradients underflow in float16."""
    jacobian, updates = np.array([[1e-3, 0.0], [0.0, 1e-3]], dtype), np.array([3e-5, -1e-5], dtype)
    found = np.asarray(projected(LINK, updates, jacobian))
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(float), [0.0, -1e-5], rtol=1e-2, atol=1e-10)


def test_an_absent_gradient_may_be_anything():
    jacobian, updates = np.array([[1.0, 0.0], [np.nan, np.inf]], np.float32), np.ones(2, np.float32)
    counted = {"left": mtl.Counted(1.0, 1), "right": mtl.Counted(0.0, 0)}
    absent = {"mask": np.array([True, False])}, {"values": counted}, {"task_losses": counted}
    for link, given in [*((LINK, given) for given in absent), (mtl.project_update(2, protect=0), {})]:
        np.testing.assert_allclose(projected(link, updates, jacobian, **given), [0.0, 1.0], atol=1e-6)
    with pytest.raises(ValueError, match=r"mask: expected shape \(2,\)"):  # and is not broadcast
        link.update(updates, optax.EmptyState(), jacobian=jacobian, mask=np.array([True]))


def test_a_bare_call_on_an_explicit_mesh():
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Explicit,))
    on_mesh = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
    jacobian = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    updates, link = np.sum(jacobian, axis=0), mtl.project_update(3)
    expected = projected(link, updates, jacobian)
    given = on_mesh(updates, "devices"), on_mesh(jacobian, None, "devices")
    found, _ = link.update(given[0], optax.EmptyState(), jacobian=given[1])
    assert found.sharding.is_equivalent_to(given[0].sharding, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
