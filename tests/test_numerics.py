"""The shared formulas, at the edges where the obvious ones fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import numerics

ALL = jnp.ones(3, bool)
SOME = jnp.array([True, False, True])
HUGE = jnp.finfo(jnp.float32).max


def test_ratio():
    new, old = jnp.array([6.0, 5.0, 0.0, 1e30, -1e30]), jnp.array([2.0, 0.0, 0.0, 1e-30, 1e-30])
    np.testing.assert_allclose(numerics.ratio(new, old), [3.0, 1.0, 1.0, HUGE, -HUGE])


def test_softmax_of_infinite_logits():
    infinite = numerics.softmax(jnp.array([jnp.inf, 0.0, jnp.inf]), ALL)
    np.testing.assert_array_equal(infinite, [0.5, 0.0, 0.5])
    np.testing.assert_array_equal(numerics.softmax(jnp.array([jnp.inf, jnp.nan, -jnp.inf]), SOME), [1.0, 0.0, 0.0])


def test_normalize():
    np.testing.assert_allclose(numerics.normalize(jnp.array([1.0, 9.0, 3.0]), SOME, 2), [0.5, 0.0, 1.5])
    np.testing.assert_allclose(numerics.normalize(jnp.full(3, 3e38), ALL), np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(numerics.normalize(jnp.array([3e38, 0.0, 1e38]), ALL), [0.75, 0.0, 0.25], rtol=1e-6)
    np.testing.assert_allclose(numerics.normalize(jnp.full(3, 1e-37), ALL), np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(numerics.normalize(jnp.zeros(3), SOME), [0.5, 0.0, 0.5])


def test_shares():
    scores = jnp.array([1.0, jnp.nan, 3.0])
    np.testing.assert_allclose(numerics.shares(scores, SOME, ALL), [1 / 6, 1 / 3, 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(numerics.shares(scores, SOME, SOME), [0.25, 0.0, 0.75], rtol=1e-6)
    np.testing.assert_allclose(numerics.shares(scores, ~ALL, ALL), np.full(3, 1 / 3), rtol=1e-6)


def test_exponentiated_step_keeps_the_total_of_who_moves():
    log_weights = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    new = jnp.exp(numerics.exponentiated_step(log_weights, jnp.array([1.0, 7.0, 0.0]), SOME))
    shared = np.array([0.2 * np.e, 0.3])
    np.testing.assert_allclose(new, [0.5 * shared[0] / shared.sum(), 0.5, 0.5 * shared[1] / shared.sum()], rtol=1e-6)


def test_exponentiated_step_keeps_its_digits_after_a_large_step():
    log_weights = jnp.log(jnp.array([0.2, 0.5, 0.3]))
    # Compiled with the product inside, as in a method: there it could be fused into the subtraction.
    step = jax.jit(lambda rate, losses: numerics.exponentiated_step(log_weights, rate * losses, ALL))
    for rate in 0.1, 0.3, 0.7:
        np.testing.assert_allclose(step(rate, jnp.full(3, 1.1e30)), log_weights, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_unit_and_its_gradient_at_any_scale(scale):
    vector = scale * jnp.array([3.0, 0.0, 4.0])
    np.testing.assert_allclose(numerics.unit(vector), [0.6, 0.0, 0.8], rtol=1e-6)
    # The derivative is the projection across the vector, over its norm.
    along = jnp.array([0.6, 0.0, 0.8])
    jacobian = jax.jacobian(numerics.unit)(vector) * scale
    np.testing.assert_allclose(jacobian, (jnp.eye(3) - jnp.outer(along, along)) / 5, atol=1e-6)


def test_unit_of_the_largest_numbers():
    np.testing.assert_allclose(
        numerics.unit(jnp.array([3e38, 0.0, 1e38])), np.array([3, 0, 1]) / np.sqrt(10), rtol=1e-6
    )


def test_unit_along_an_axis_and_of_zero():
    np.testing.assert_allclose(jax.jacobian(numerics.unit)(jnp.array([2.0, 0.0])), [[0.0, 0.0], [0.0, 0.5]])
    np.testing.assert_array_equal(numerics.unit(jnp.zeros(2)), [0.0, 0.0])
    assert jnp.all(jnp.isfinite(jax.jacobian(numerics.unit)(jnp.zeros(2))))


def test_reverse_gradient():
    value, gradient = jax.value_and_grad(lambda x: numerics.reverse_gradient(x) ** 2)(3.0)
    assert (value, gradient) == (9.0, -6.0)


def test_cosines_of_zero_and_absent_gradients():
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    moving, norms, cosines = numerics.cosines(jnp.asarray(rows @ rows.T), jnp.array([True, True, True, False]))
    np.testing.assert_array_equal(moving, [True, False, True, False])
    np.testing.assert_allclose(norms, [5, 1, 2, 1])
    expected = np.zeros((4, 4))
    expected[np.ix_([0, 2], [0, 2])] = [[1, 0.8], [0.8, 1]]
    np.testing.assert_allclose(cosines, expected, rtol=1e-6)
    assert jnp.isnan(numerics.cosines(jnp.full((2, 2), jnp.nan))[2]).all()  # not taken for a zero gradient


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_squared_length_is_zero_where_it_is_rounding(factor):
    def length(angle):
        rows = np.array([[1.0, 0.0], [-3 * np.cos(angle), 3 * np.sin(angle)]])
        return numerics.squared_length(jnp.asarray(factor * rows @ rows.T, jnp.float32), jnp.array([3.0, 1.0]))

    assert length(0.0) == 0
    # Over the 6 that are added the sum is half the angle: it counts above the root of ten roundings, 1.1e-3.
    assert length(1e-3) == 0
    np.testing.assert_allclose(length(3e-2), 9 * factor * 3e-2**2, rtol=1e-2)


def test_least_squares_of_a_dependent_matrix_is_the_shortest():
    rows = np.random.default_rng(0).normal(size=(5, 3))
    matrix, vector = rows @ rows.T, np.arange(5.0)
    decomposition = numerics.eigh_psd(jnp.asarray(matrix, jnp.float32))
    assert decomposition[2].tolist() == [False, False, True, True, True]
    expected = np.linalg.pinv(matrix, rcond=1e-6) @ vector
    solution = numerics.solve_psd(decomposition, jnp.asarray(vector, jnp.float32))
    np.testing.assert_allclose(solution, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_regularized_gramians():
    gramian = jnp.diag(jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(numerics.regularized(gramian, 0.1, 0.0), np.diag([0.85, 0.35]), rtol=1e-6)
    np.testing.assert_allclose(numerics.regularized(gramian, 0.1, 4.0), np.diag([0.85, 0.35]), rtol=1e-6)
    np.testing.assert_allclose(numerics.regularized(gramian, 0.1, 4.1), 0.1 * np.eye(2), rtol=1e-6)
    np.testing.assert_allclose(numerics.regularized(0 * gramian, 0.1, 0.0), 0.1 * np.eye(2), rtol=1e-6)
    np.testing.assert_allclose(numerics.regularized(1e37 * gramian, 0.0, 0.0), np.diag([0.75, 0.25]), rtol=1e-6)


def test_projection_on_the_simplex_of_the_tasks_present():
    mask = jnp.array([True, True, False, True])
    projected = numerics.project_simplex(jnp.array([0.9, 0.5, 9.0, -3.0]), mask)
    np.testing.assert_allclose(projected, [0.7, 0.3, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("vector", "expected"),
    [
        ([0.0, -3e38, -3e38, -3e38], [1, 0, 0, 0]),
        ([1e38, 2e38, 3e38, 3e38], [0, 0, 0.5, 0.5]),
        ([0.25, -9, -9, 0.25], [0.5, 0, 0, 0.5]),
    ],
)
def test_projection_on_the_simplex_of_huge_numbers(vector, expected):
    """What is far below the largest does not overflow in their sum."""
    np.testing.assert_array_equal(numerics.project_simplex(jnp.array(vector), jnp.ones(4, bool)), expected)


def test_scale_can_be_divided_by():
    np.testing.assert_array_equal(numerics.scale(jnp.array([-3.0, 2.0])), 3.0)
    np.testing.assert_array_equal(numerics.scale(jnp.zeros(2)), 1.0)
    for largest in HUGE, 1e-37:
        vector = jnp.array([0.0, -largest])
        divided = jax.jit(lambda x: x / numerics.scale(x))(vector)
        # The largest numbers' inverse would be flushed to zero: they are divided by an eighth of them.
        assert 1 <= -divided[1] <= 8
    assert jnp.isnan(numerics.scale(jnp.array([1.0, jnp.nan])))
    np.testing.assert_array_equal(jax.grad(lambda x: numerics.scale(x))(jnp.array([1.0, 2.0])), [0.0, 0.0])


def test_finite():
    replaced = numerics.finite(jnp.array([jnp.inf, -jnp.inf, 3.0, jnp.nan]))
    np.testing.assert_array_equal(replaced, [HUGE, -HUGE, 3.0, np.nan])


def test_squared_length_of_nothing():
    np.testing.assert_array_equal(numerics.squared_length(jnp.zeros((2, 2)), jnp.ones(2)), 0.0)
    np.testing.assert_array_equal(numerics.squared_length(jnp.eye(2), jnp.zeros(2)), 0.0)
