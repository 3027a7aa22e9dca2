"""The Gramian and the weighted sum, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtlbalance.gramian import combine, gramian, gramian_of_tasks, total

pytestmark = pytest.mark.unoptimized

RNG = np.random.default_rng(0)
TREE = {"w": RNG.normal(size=(4, 5, 6)), "b": RNG.normal(size=(4, 3)), "s": RNG.normal(size=4)}
MATRIX = np.concatenate([leaf.reshape(4, -1) for leaf in TREE.values()], axis=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)])
def test_gramian_and_combination_of_a_tree_are_those_of_its_matrix(dtype, tolerance):
    """Within the rounding of the inputs to ``dtype``."""
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), TREE)
    weights = np.array([0.1, -2.0, 3.0, 0.5])
    both = jax.jit(lambda weights, tree: (gramian(tree), combine(weights, tree)))
    products, combined = jax.device_get(both(np.float32(weights), tree))
    assert products.dtype == jnp.float32
    np.testing.assert_allclose(products, MATRIX @ MATRIX.T, atol=tolerance * np.sum(MATRIX**2))
    for name, leaf in combined.items():
        assert leaf.dtype == dtype
        expected = np.tensordot(weights, TREE[name], 1)
        np.testing.assert_allclose(leaf.astype("float32"), expected, atol=10 * tolerance)


def test_total_is_the_sum_of_all_entries():
    np.testing.assert_allclose(jax.jit(total)(jax.tree.map(np.float32, TREE)), MATRIX.sum(), rtol=1e-5)
    assert total({}) == 0.0


def test_float16_products_do_not_overflow():
    assert np.asarray(jax.jit(gramian)(np.full((2, 100), 300.0, np.float16)))[0, 1] == 9e6


WIDE = RNG.normal(size=(3, 5, 20_011))  # in five chunks of five dots on a CPU, with a rest


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_gramian_of_a_wide_leaf(dtype, tolerance):
    rows = WIDE.reshape(3, -1)
    products = np.asarray(jax.jit(gramian)(WIDE.astype(jnp.dtype(dtype))))
    assert products.dtype == jnp.float32
    np.testing.assert_allclose(products, rows @ rows.T, atol=tolerance * np.sum(rows**2))
    np.testing.assert_array_equal(products, products.T)
    batch = np.stack([WIDE, 2 * WIDE]).astype(jnp.dtype(dtype))
    of_batch = np.asarray(jax.jit(jax.vmap(gramian))(batch))
    np.testing.assert_allclose(of_batch[1], 4 * products, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 5, 4), WIDE.shape], ids=str)
def test_products_with_the_gradients_of_another_batch(shape):
    one, other = (RNG.normal(size=shape) for _ in range(2))
    products = jax.jit(gramian)({"a": np.float32(one)}, {"a": np.float32(other)})
    expected = one.reshape(3, -1) @ other.reshape(3, -1).T
    np.testing.assert_allclose(products, expected, atol=1e-6 * np.sum(one**2))
    with pytest.raises(ValueError, match=r"other\['a'\]: expected shape \(3, 5, 4\), found shape \(3, 5\)"):
        gramian({"a": np.ones((3, 5, 4), np.float32)}, {"a": np.ones((3, 5), np.float32)})


def test_gradient_of_the_gramian_of_a_wide_leaf():
    rows = np.float32(WIDE)
    gradient = jax.jit(jax.grad(lambda rows: jnp.sum(jnp.diag(gramian(rows)))))(rows)
    np.testing.assert_allclose(gradient, 2 * rows, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_wide_leaf_on_several_devices_is_not_gathered(kind):
    mesh = jax.make_mesh((8,), ("x",), (getattr(AxisType, kind),))
    rows = np.float32(RNG.normal(size=(3, 80_000)))
    sharded = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, "x")))
    compiled = jax.jit(gramian).lower(sharded).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(compiled(sharded), rows @ rows.T, atol=1e-6 * np.sum(rows**2))


def test_a_wide_leaf_under_shard_map():
    mesh, rows = jax.make_mesh((2,), ("x",), (AxisType.Auto,)), np.float32(RNG.normal(size=(3, 80_000)))
    in_parts = jax.shard_map(
        lambda x: gramian(x, axis_name="x"), mesh=mesh, in_specs=PartitionSpec(None, "x"), out_specs=PartitionSpec()
    )
    np.testing.assert_allclose(jax.jit(in_parts)(rows), rows @ rows.T, atol=1e-6 * np.sum(rows**2))


def test_tasks_on_several_devices_of_an_explicit_mesh():
    mesh, rows = jax.make_mesh((2, 4), ("y", "x"), 2 * (AxisType.Explicit,)), np.float32(RNG.normal(size=(4, 8)))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    np.testing.assert_allclose(gramian(put(rows, "y", "x")), rows @ rows.T, rtol=1e-5)
    combined = combine(put(np.float32([1, 2, 3, 4]), "y"), put(rows, "y", "x"))
    np.testing.assert_allclose(combined, np.float32([1, 2, 3, 4]) @ rows, rtol=1e-5)
    assert jax.typeof(combined).sharding.spec == PartitionSpec("x")


def test_without_leaves_or_with_other_lengths_raises():
    other_lengths = {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 3), np.float32)}
    for wrong in {}, other_lengths, np.float32(1.0), np.ones((0, 3), np.float32):
        with pytest.raises(ValueError, match="jacobian: expected leaves that share a leading task axis"):
            gramian(wrong)
    with pytest.raises(ValueError, match=r"jacobian: expected leaves with a leading axis of \(2,\)"):
        combine(np.ones(2, np.float32), np.ones((3, 2), np.float32))


@pytest.mark.parametrize("m", [3, 12])
def test_absent_rows_of_a_wide_leaf_may_be_anything(m):
    """They are left out where rows are read, and nothing comes through to the sum, the Gramian or a derivative."""
    jacobian = np.cos(np.arange(m * 10_000)).reshape(m, 10_000).astype(np.float32)
    jacobian[1] = np.nan
    weights, mask = np.linspace(0.1, 1, m, dtype=np.float32), np.arange(m) != 1
    zeroed = np.nan_to_num(jacobian)
    of_all = jax.jit(lambda jacobian: (combine(weights, jacobian), gramian(jacobian)))

    @jax.jit
    def of_tasks(jacobian):
        combined, pull = jax.vjp(lambda jacobian: combine(weights, jacobian, mask), jacobian)
        return combined, gramian_of_tasks(jacobian, m, mask=mask), pull(jnp.ones_like(combined))[0]

    combined, products, derivative = of_tasks(jacobian)
    expected, of_zeroed = of_all(zeroed)
    np.testing.assert_allclose(combined, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(products, of_zeroed, rtol=1e-5, atol=1e-2)
    np.testing.assert_allclose(derivative, np.broadcast_to(np.where(mask, weights, 0)[:, None], jacobian.shape))
