"""The shared formulas, at the edges where the obvious ones fail."""

import jax
import numpy as np
import pytest

from mtlbalance import numerics

ALL = np.ones(3, bool)
SOME = np.array([True, False, True])
HUGE = np.finfo(np.float32).max

# One program for each shape, where a formula in the open is a dozen small ones.
ratio, softmax, normalize, shares = map(
    jax.jit, (numerics.ratio, numerics.softmax, numerics.normalize, numerics.shares)
)
unit, unit_jacobian = jax.jit(numerics.unit), jax.jit(jax.jacobian(numerics.unit))
cosines, squared_length, scale_of = map(jax.jit, (numerics.cosines, numerics.squared_length, numerics.scale))
regularized, project_simplex = jax.jit(numerics.regularized), jax.jit(numerics.project_simplex)


def test_ratio():
    new, old = np.float32([6.0, 5.0, 0.0, 1e30, -1e30]), np.float32([2.0, 0.0, 0.0, 1e-30, 1e-30])
    np.testing.assert_allclose(ratio(new, old), [3.0, 1.0, 1.0, HUGE, -HUGE])


def test_softmax_of_infinite_logits():
    infinite = softmax(np.float32([np.inf, 0.0, np.inf]), ALL)
    np.testing.assert_array_equal(infinite, [0.5, 0.0, 0.5])
    np.testing.assert_array_equal(softmax(np.float32([np.inf, np.nan, -np.inf]), SOME), [1.0, 0.0, 0.0])


def test_normalize():
    np.testing.assert_allclose(normalize(np.float32([1.0, 9.0, 3.0]), SOME, 2), [0.5, 0.0, 1.5])
    np.testing.assert_allclose(normalize(np.full(3, 3e38, np.float32), ALL), np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(normalize(np.float32([3e38, 0.0, 1e38]), ALL), [0.75, 0.0, 0.25], rtol=1e-6)
    np.testing.assert_allclose(normalize(np.full(3, 1e-37, np.float32), ALL), np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(normalize(np.zeros(3, np.float32), SOME), [0.5, 0.0, 0.5])


def test_shares():
    scores = np.float32([1.0, np.nan, 3.0])
    np.testing.assert_allclose(shares(scores, SOME, ALL), [1 / 6, 1 / 3, 1 / 2], rtol=1e-6)
    np.testing.assert_allclose(shares(scores, SOME, SOME), [0.25, 0.0, 0.75], rtol=1e-6)
    np.testing.assert_allclose(shares(scores, ~ALL, ALL), np.full(3, 1 / 3), rtol=1e-6)


def test_exponentiated_step_keeps_the_total_of_who_moves():
    log_weights = np.log(np.float32([0.2, 0.5, 0.3]))
    new = np.exp(jax.jit(numerics.exponentiated_step)(log_weights, np.float32([1.0, 7.0, 0.0]), SOME))
    shared = np.array([0.2 * np.e, 0.3])
    np.testing.assert_allclose(new, [0.5 * shared[0] / shared.sum(), 0.5, 0.5 * shared[1] / shared.sum()], rtol=1e-6)


def test_exponentiated_step_keeps_its_digits_after_a_large_step():
    log_weights = np.log(np.float32([0.2, 0.5, 0.3]))
    # Compiled with the product inside, as in a method: there it could be fused into the subtraction.
    step = jax.jit(lambda rate, losses: numerics.exponentiated_step(log_weights, rate * losses, ALL))
    for rate in 0.1, 0.3, 0.7:
        np.testing.assert_allclose(step(rate, np.full(3, 1.1e30, np.float32)), log_weights, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_unit_and_its_gradient_at_any_scale(scale):
    vector = scale * np.float32([3.0, 0.0, 4.0])
    np.testing.assert_allclose(unit(vector), [0.6, 0.0, 0.8], rtol=1e-6)
    # The derivative is the projection across the vector, over its norm.
    along = np.float32([0.6, 0.0, 0.8])
    jacobian = unit_jacobian(vector) * scale
    np.testing.assert_allclose(jacobian, (np.eye(3) - np.outer(along, along)) / 5, atol=1e-6)


def test_unit_of_the_largest_numbers():
    np.testing.assert_allclose(unit(np.float32([3e38, 0.0, 1e38])), np.array([3, 0, 1]) / np.sqrt(10), rtol=1e-6)


def test_unit_along_an_axis_and_of_zero():
    np.testing.assert_allclose(unit_jacobian(np.float32([2.0, 0.0])), [[0.0, 0.0], [0.0, 0.5]])
    np.testing.assert_array_equal(unit(np.zeros(2, np.float32)), [0.0, 0.0])
    assert np.all(np.isfinite(unit_jacobian(np.zeros(2, np.float32))))


def test_reverse_gradient():
    value, gradient = jax.jit(jax.value_and_grad(lambda x: numerics.reverse_gradient(x) ** 2))(3.0)
    assert (value, gradient) == (9.0, -6.0)


def test_cosines_of_zero_and_absent_gradients():
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    moving, norms, found = cosines(rows @ rows.T, np.array([True, True, True, False]))
    np.testing.assert_array_equal(moving, [True, False, True, False])
    np.testing.assert_allclose(norms, [5, 1, 2, 1])
    expected = np.zeros((4, 4))
    expected[np.ix_([0, 2], [0, 2])] = [[1, 0.8], [0.8, 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.isnan(cosines(np.full((2, 2), np.nan, np.float32))[2]).all()  # not taken for a zero gradient


@pytest.mark.parametrize("factor", [1e-20, 1.0, 1e20])
def test_squared_length_is_zero_where_it_is_rounding(factor):
    def length(angle):
        rows = np.array([[1.0, 0.0], [-3 * np.cos(angle), 3 * np.sin(angle)]])
        return squared_length(np.float32(factor * rows @ rows.T), np.float32([3.0, 1.0]))

    assert length(0.0) == 0
    # Over the 6 that are added the sum is half the angle: it counts above the root of ten roundings, 1.1e-3.
    assert length(1e-3) == 0
    np.testing.assert_allclose(length(3e-2), 9 * factor * 3e-2**2, rtol=1e-2)


def test_least_squares_of_a_dependent_matrix_is_the_shortest():
    rows = np.random.default_rng(0).normal(size=(5, 3))
    matrix, vector = rows @ rows.T, np.arange(5.0)
    decomposition = jax.jit(numerics.eigh_psd)(np.float32(matrix))
    assert decomposition[2].tolist() == [False, False, True, True, True]
    expected = np.linalg.pinv(matrix, rcond=1e-6) @ vector
    solution = jax.jit(numerics.solve_psd)(decomposition, np.float32(vector))
    np.testing.assert_allclose(solution, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_regularized_gramians():
    gramian = np.diag(np.float32([3.0, 1.0]))
    np.testing.assert_allclose(regularized(gramian, 0.1, 0.0), np.diag([0.85, 0.35]), rtol=1e-6)
    np.testing.assert_allclose(regularized(gramian, 0.1, 4.0), np.diag([0.85, 0.35]), rtol=1e-6)
    np.testing.assert_allclose(regularized(gramian, 0.1, 4.1), 0.1 * np.eye(2), rtol=1e-6)
    np.testing.assert_allclose(regularized(0 * gramian, 0.1, 0.0), 0.1 * np.eye(2), rtol=1e-6)
    np.testing.assert_allclose(regularized(1e37 * gramian, 0.0, 0.0), np.diag([0.75, 0.25]), rtol=1e-6)


def test_projection_on_the_simplex_of_the_tasks_present():
    mask = np.array([True, True, False, True])
    projected = project_simplex(np.float32([0.9, 0.5, 9.0, -3.0]), mask)
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
    np.testing.assert_array_equal(project_simplex(np.float32(vector), np.ones(4, bool)), expected)


def test_scale_can_be_divided_by():
    np.testing.assert_array_equal(scale_of(np.float32([-3.0, 2.0])), 3.0)
    np.testing.assert_array_equal(scale_of(np.zeros(2, np.float32)), 1.0)
    divide = jax.jit(lambda x: x / numerics.scale(x))
    for largest in HUGE, 1e-37:
        divided = np.asarray(divide(np.float32([0.0, -largest])))
        # The largest numbers' inverse would be flushed to zero: they are divided by an eighth of them.
        assert 1 <= -divided[1] <= 8
    assert np.isnan(scale_of(np.float32([1.0, np.nan])))
    np.testing.assert_array_equal(jax.jit(jax.grad(numerics.scale))(np.float32([1.0, 2.0])), [0.0, 0.0])


def test_finite():
    replaced = numerics.finite(np.float32([np.inf, -np.inf, 3.0, np.nan]))
    np.testing.assert_array_equal(replaced, [HUGE, -HUGE, 3.0, np.nan])


def test_squared_length_of_nothing():
    np.testing.assert_array_equal(squared_length(np.zeros((2, 2), np.float32), np.ones(2, np.float32)), 0.0)
    np.testing.assert_array_equal(squared_length(np.eye(2, dtype=np.float32), np.zeros(2, np.float32)), 0.0)
