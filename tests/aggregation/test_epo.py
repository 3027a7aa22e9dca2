"""EPO's weights by hand, and at the edges: zero and negative losses, one task, programs without a solution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation

pytestmark = pytest.mark.unoptimized


@partial(jax.jit, static_argnames="relax")
def compiled(rows, losses, preference, **others):
    """Once for all preferences: they are traced."""
    weighting = aggregation.epo(preference, **others).weighting
    return weighting.apply(weighting.init(rows.shape), rows, values=losses)[0]


def weights_of(rows, losses, preference=(1.0, 1.0), **others):
    return np.asarray(compiled(*map(np.float32, (rows, losses, preference)), **others))


OPPOSED = np.array([[2.0, 0.0], [-1.0, 1.0]])


def test_of_two_tasks_the_larger_preferred_loss_falls_alone():
    np.testing.assert_allclose(weights_of(OPPOSED, [3.0, 1.0]), [1, 0], atol=1e-6)
    np.testing.assert_allclose(weights_of(OPPOSED, [1.0, 3.0]), [0, 1], atol=1e-6)
    np.testing.assert_allclose(weights_of(OPPOSED, [3.0, 1.0], preference=[1.0, 9.0]), [0, 1], atol=1e-6)


def test_as_preferred_all_losses_fall():
    """The fastest fall of their sum with which none rises: G is [[4, -2], [-2, 2]]."""
    np.testing.assert_allclose(weights_of(OPPOSED, [2.0, 2.0]), [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(weights_of(OPPOSED, [3.0, 1.0], eps=10.0, relax=True), [0.5, 0.5], atol=1e-6)


def test_a_preferred_point_of_the_front_is_where_it_stops():
    rows = np.array([[1.0, 0.0], [-2.0, 0.0]])
    np.testing.assert_allclose(weights_of(rows, [2.0, 2.0]) @ rows, 0, atol=1e-6)
    assert np.linalg.norm(weights_of(rows, [2.0, 1.0]) @ rows) > 0.9  # another point of it is not


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_neither_the_losses_scale_counts_nor_the_gradients(factor):
    rows, losses = np.random.default_rng(0).normal(size=(4, 6)), np.array([0.3, 2.0, 1.0, 0.5])
    preference = np.array([1.0, 0.5, 2.0, 1.0])
    expected = weights_of(rows, losses, preference)
    np.testing.assert_allclose(weights_of(factor * rows, losses, preference), expected, atol=1e-5)
    np.testing.assert_allclose(weights_of(rows, factor * losses, preference), expected, atol=1e-5)
    large = weights_of(rows, factor**4 * losses, 1e15 * preference)  # their product is beyond float32
    np.testing.assert_allclose(large, weights_of(rows, losses, 1e15 * preference), atol=1e-5)
    assert np.all(np.isnan(weights_of(rows, np.append(losses[1:], np.inf), preference)))


def test_zero_and_negative_losses():
    """Of a loss of zero the logarithm is a large number, with which the others fall; below zero it is none."""
    np.testing.assert_allclose(weights_of(OPPOSED, [1.0, 0.0]), [1, 0], atol=1e-6)
    np.testing.assert_allclose(weights_of(OPPOSED, [0.0, 0.0]), [0.5, 0.5], atol=1e-6)
    assert np.all(np.isnan(weights_of(OPPOSED, [1.0, -1.0])))
    np.testing.assert_array_equal(weights_of([[3.0]], [2.0], preference=[0.7]), [1.0])


def test_where_a_constraint_has_no_solution_it_is_dropped():
    """Near the preference: none rises, though mu may; a program of the official code that has none stops it."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(400, 3, 3)).astype(np.float32)
    losses = np.exp(3e-3 * rng.normal(size=(400, 3))).astype(np.float32)

    def fall(relax, rows, losses):
        weighting = aggregation.epo(jnp.ones(3), eps=0.1, relax=relax).weighting
        weights, _ = weighting.apply(weighting.init((3, 3)), rows, values=losses)
        return weights, jnp.dot(jnp.dot(rows, rows.T), weights)

    (weights, falls), (relaxed, _) = (
        jax.device_get(jax.jit(jax.vmap(partial(fall, relax)))(rows, losses)) for relax in (False, True)
    )
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=1e-5)
    assert np.min(falls) > -1e-5
    same = np.max(np.abs(weights - relaxed), axis=1) < 1e-5
    assert 0.1 < np.mean(same) < 0.9


def test_preferences_are_above_zero():
    for wrong in [1.0, 0.0], [1.0, -1.0], [1.0, np.inf]:
        with pytest.raises(ValueError, match="preference: expected a finite number above 0 for each task"):
            aggregation.epo(wrong).init((2, 3))
    with pytest.raises(ValueError, match="preference: expected one number per task, shape"):
        aggregation.epo([1.0, 2.0, 3.0]).init((2, 3))
    with pytest.raises(TypeError, match="values"):
        method = aggregation.epo([1.0, 2.0])
        method.apply(method.init((2, 3)), np.ones((2, 3), np.float32))
