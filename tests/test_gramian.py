"""The Gramian and the weighted sum, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance.gramian import combine, gramian, total

RNG = np.random.default_rng(0)
TREE = {"w": RNG.normal(size=(4, 5, 6)), "b": RNG.normal(size=(4, 3)), "s": RNG.normal(size=4)}
MATRIX = np.concatenate([leaf.reshape(4, -1) for leaf in TREE.values()], axis=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2), ("float16", 2e-3)])
def test_gramian_and_combination_of_a_tree_are_those_of_its_matrix(dtype, tolerance):
    """Within the rounding of the inputs to ``dtype``."""
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), TREE)
    products = gramian(tree)
    assert products.dtype == jnp.float32
    np.testing.assert_allclose(products, MATRIX @ MATRIX.T, atol=tolerance * np.sum(MATRIX**2))
    weights = np.array([0.1, -2.0, 3.0, 0.5])
    combined = combine(jnp.asarray(weights, jnp.float32), tree)
    for name, leaf in combined.items():
        assert leaf.dtype == dtype
        expected = np.tensordot(weights, TREE[name], 1)
        np.testing.assert_allclose(leaf.astype("float32"), expected, atol=10 * tolerance)


def test_total_is_the_sum_of_all_entries():
    tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), TREE)
    np.testing.assert_allclose(total(tree), MATRIX.sum(), rtol=1e-5)
    assert total({}) == 0.0


def test_float16_products_do_not_overflow():
    assert gramian(jnp.full((2, 100), 300.0, jnp.float16))[0, 1] == 9e6


def test_without_leaves_or_with_other_lengths_raises():
    for wrong in {}, {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))}, jnp.ones(()):
        with pytest.raises(ValueError, match="jacobian: expected leaves that share a leading task axis"):
            gramian(wrong)
    with pytest.raises(ValueError, match=r"jacobian: expected leaves with a leading axis of \(2,\)"):
        combine(jnp.ones(2), jnp.ones((3, 2)))
