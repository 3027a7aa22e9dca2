"""Inverse-Dirichlet weighting and MGDA of normalised gradients at their edges. Their values are in tests/golden."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.aggregation.problems import with_new

pytestmark = pytest.mark.unoptimized

KINDS = "l2", "loss", "loss+"
ROWS = np.float32([[3.0, 0.0, 1.0], [-1.0, 2.0, 0.5], [0.0, 40.0, 10.0]])
LOSSES = np.float32([0.5, 2.0, 30.0])


@partial(jax.jit, static_argnums=0)
def first_weights(method, rows, losses, mask):
    return method.weighting.apply(method.init(rows.shape), rows, values=losses, mask=mask)[0]


def weights_of(method, rows=ROWS, losses=LOSSES, mask=None):
    return np.asarray(first_weights(method, np.float32(rows), losses, mask))


@partial(jax.jit, static_argnums=0)
def gradient_of(method, rows, losses):
    return method.apply(method.init(rows.shape), rows, values=losses)[0]


# MGDA.


@pytest.mark.parametrize("normalize", KINDS)
def test_normalized_mgda_with_a_mask_and_by_names(normalize):
    method, tasks = aggregation.mgda(normalize), np.array([0, 2])
    masked = weights_of(method, losses=with_new(LOSSES, 1, np.nan), mask=np.array([True, False, True]))
    np.testing.assert_allclose(masked[tasks], weights_of(method, ROWS[tasks], LOSSES[tasks]), rtol=1e-5)
    assert masked[1] == 0
    names = dict(zip("abc", LOSSES, strict=True))
    np.testing.assert_array_equal(weights_of(method, losses=names), weights_of(method))
    counted = {name: mtl.Counted(4 * loss, np.int32(4)) for name, loss in names.items()}
    np.testing.assert_allclose(weights_of(method, losses=counted), weights_of(method), rtol=1e-6)


def test_mgda_by_loss_is_that_of_the_logarithms():
    """Their gradients are divided by the losses, before and after."""
    in_log_space = mtl.chain(scalarization.scale_invariant(), aggregation.mgda())
    apply = lambda method: gradient_of(method, ROWS, LOSSES)
    np.testing.assert_allclose(apply(aggregation.mgda("loss", combine_normalized=True)), apply(in_log_space), rtol=1e-5)
    np.testing.assert_allclose(apply(aggregation.mgda("loss")), weights_of(aggregation.mgda("loss")) @ ROWS, rtol=1e-5)


def test_normalized_gradients_have_no_unit():
    combined = aggregation.mgda("l2", combine_normalized=True)
    scales = np.float32([1e-6, 1.0, 1e6])
    of_scaled = weights_of(combined, ROWS * scales[:, None])
    np.testing.assert_allclose(of_scaled * scales, weights_of(combined), rtol=1e-4)


@pytest.mark.parametrize("normalize", KINDS)
@pytest.mark.parametrize("combine_normalized", [False, True])
def test_normalized_mgda_stays_finite(normalize, combine_normalized):
    method = aggregation.mgda(normalize, combine_normalized)
    rows = {"zero": 0 * ROWS, "one zero": with_new(ROWS, 0, 0), "opposite": np.stack([ROWS[0], -ROWS[0], ROWS[0]])}
    losses = {"zero": [0.0, 0.0, 0.0], "wide": [1e-30, 1.0, 1e30], "one zero": [0.0, 1.0, 2.0]}
    scales = np.float32([1e-10, 1.0, 1e10])
    for given in map(np.float32, losses.values()):
        for x in [*rows.values(), *(scale * ROWS for scale in scales)]:
            chex.assert_tree_all_finite((gradient_of(method, x, given), weights_of(method, x, given)))


def test_mgda_by_loss_of_losses_that_mean_nothing():
    """Zero counts as 1; a negative, infinite or missing number shows."""
    method = aggregation.mgda("loss")
    np.testing.assert_array_equal(
        weights_of(method, losses=np.float32([0.0, 2.0, 3.0])), weights_of(method, losses=np.float32([1.0, 2.0, 3.0]))
    )
    for wrong in -1.0, np.inf, np.nan:
        assert np.all(np.isnan(weights_of(method, losses=with_new(LOSSES, 1, wrong))))


def test_normalized_mgda_stops_at_a_gradient_of_zero_and_goes_on_without_it():
    rows, method = with_new(ROWS, 0, 0), aggregation.mgda("l2")
    np.testing.assert_allclose(weights_of(method, rows), [1, 0, 0], atol=1e-6)
    expected = weights_of(method, rows[1:], None) @ rows[1:]
    np.testing.assert_allclose(gradient_of(mtl.skip_zero(method), rows, None), expected, rtol=1e-5)


def test_mgda_bounds():
    with pytest.raises(ValueError, match=r"normalize: expected 'l2', 'loss', 'loss\+' or None, found 'l1'"):
        aggregation.mgda("l1")
    with pytest.raises(ValueError, match=r"normalize: expected .*where combine_normalized is given, found None"):
        aggregation.mgda(combine_normalized=True)
    for normalize in "loss", "loss+":
        with pytest.raises(TypeError, match="values: expected the losses, as in values=losses, found None"):
            weights_of(aggregation.mgda(normalize), losses=None)


# Inverse-Dirichlet weighting.


def test_inverse_dirichlet_of_entries_that_are_all_the_same():
    """Their task keeps its weight, whatever they are; so do all tasks of one parameter."""
    method = aggregation.inverse_dirichlet(1.0)
    rows = np.array([[3.0, -3.0], [1e3 / 3, 1e3 / 3], [0.0, 0.0], [1.0, -1.0]])
    np.testing.assert_allclose(weights_of(method, rows, None), [1, 1, 1, 3], rtol=1e-6)
    np.testing.assert_array_equal(weights_of(method, [[3.0], [1.0]], None), 1)
    for n in 7, 100_003:  # whose means are not exact
        rows = np.stack([np.full(n, 0.1), np.arange(n) - n / 2])
        np.testing.assert_array_equal(weights_of(method, rows, None), 1)


def test_inverse_dirichlet_reference_goes_by_name_and_may_be_absent():
    method, rows = aggregation.inverse_dirichlet(1.0, "res"), np.array([[8.0, 0.0], [1.0, 3.0]])
    losses = {"bc": np.float32(1.0), "res": np.float32(2.0)}
    np.testing.assert_allclose(weights_of(method, rows, losses), [0.25, 1])
    np.testing.assert_allclose(weights_of(method, rows, losses, mask={"bc": True, "res": False}), [1, 0])
    with pytest.raises(ValueError, match=r"reference: expected one of the losses' names \['a', 'b'\], found 'res'"):
        weights_of(method, rows, {"a": np.float32(1.0), "b": np.float32(2.0)})
    with pytest.raises(ValueError, match=r"reference: .*below the number of tasks 2, found 2"):
        aggregation.inverse_dirichlet(reference=2).init((2, 3))
    with pytest.raises(ValueError, match=r"alpha: expected a number from 0 to 1, found 1\.5"):
        aggregation.inverse_dirichlet(1.5)


def test_inverse_dirichlet_by_the_engine():
    """With a name, in a training step, amortized as the official code does it every few steps."""
    losses_fn = lambda x: {"bc": jnp.sum((x - 1) ** 2), "res": 10 * jnp.sum(x**2 * jnp.array([1.0, 2.0, 3.0]))}
    method = mtl.amortize(aggregation.inverse_dirichlet(1.0, "res"))
    grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True)

    @jax.jit
    def two_steps(x):
        (_, state, weights), _ = grad_fn(x, grad_fn.init(x))
        (_, _, same), _ = grad_fn(x / 2, state, refresh=False)
        return weights, same, jax.jacrev(losses_fn)(x)

    weights, same, rows = jax.device_get(two_steps(np.float32([1.0, 2.0, -1.0])))
    np.testing.assert_allclose(weights["bc"], np.std(rows["res"]) / np.std(rows["bc"]), rtol=1e-5)
    chex.assert_trees_all_equal(same, weights)
