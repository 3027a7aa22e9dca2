"""Properties that methods have on any Jacobian: conflicts, order of the tasks, scales, stationarity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlbalance import aggregation
from tests.aggregation.problems import METHODS, PARAMS, TASKS, examples, jacobian, problems, solve

pytestmark = pytest.mark.unoptimized

# Where gradients depend on each other these jump: pseudoinverses, angles to what a projection left of nothing, and the
# direction of a combination that vanishes.
JUMPING = "imtl_g", "config", "gradvac", "cagrad c=1", "cagrad c=2"
# A first call that is unlike the second one: the columns are scaled, which changes neither rank nor stationarity.
COLUMNS = np.linspace(0.5, 1.5, PARAMS, dtype=np.float32)
POSITIVE = st.floats(0.1, 1)


def gains(problem, gradient):
    """Products of the gradient with the tasks' directions; 0 for a zero gradient."""
    rows = problem.rows[problem.mask].astype(float)
    norms = np.linalg.norm(rows, axis=1)
    return rows @ gradient / np.where(norms > 0, norms, 1)


@functools.cache
def clear_problems(decades, independent):
    """Without the kinds made Pareto-stationary: rounding decides which directions are left there."""
    return problems(("free", "non-weak"), decades=decades, independent=independent)


def drawn(data, name, decades=0.0):
    return data.draw(clear_problems(decades, independent=name in JUMPING))


@pytest.mark.parametrize("name", ["upgrad exact", "dual_proj exact", "nash_mtl", "fairgrad", "fairgrad alpha=2"])
@examples
@given(problem=problems(decades=3.0))
def test_conflicts_with_no_gradient(name, problem):
    """But for the Gramian's rounding, 1e-7 times what the sum of squares is made of, with some room."""
    _, gradient, length = solve(name, problem.rows, problem.mask)
    assert np.min(gains(problem, gradient)) >= -1e-5 * length


@examples
@given(problem=problems(decades=3.0))
def test_the_shortest_combination_conflicts_with_no_gradient(problem):
    """But for the rounding of the weights, 1e-7 of 1, times the longest gradient."""
    _, gradient, _ = solve("mgda", problem.rows, problem.mask)
    longest = np.max(np.linalg.norm(problem.rows[problem.mask], axis=1))
    assert np.min(gains(problem, gradient)) >= -1e-5 * longest


@pytest.mark.parametrize("name", ["cagrad c=1", "cagrad c=2"])
@examples
@given(problem=problems(["non-weak"], decades=3.0) | problems(["free"], decades=1.0, independent=True))
def test_cagrad_conflicts_with_no_gradient_from_c_1_on(name, problem):
    """Where no combination vanishes; up to rounding, as above. And it stays in its ball around the mean gradient."""
    _, gradient, length = solve(name, problem.rows, problem.mask)
    assert np.min(gains(problem, gradient)) >= -1e-5 * length
    mean, c = np.mean(problem.rows[problem.mask].astype(float), axis=0), float(name[-1])
    np.testing.assert_allclose(np.linalg.norm(gradient - mean), c * np.linalg.norm(mean), atol=1e-5 * length)


@examples
@given(problem=problems(["free"], decades=1.0, independent=True))
def test_config_and_imtl_g_have_equal_projections(problem):
    """On independent gradients; IMTL-G's have the sign of its weights' total before it is made 1."""
    for name in "config", "imtl_g":
        _, gradient, length = solve(name, problem.rows, problem.mask)
        projections = gains(problem, gradient)
        np.testing.assert_allclose(projections, np.mean(projections), atol=1e-5 * length, err_msg=name)
        assert name == "imtl_g" or np.mean(projections) > 0


@examples
@given(problem=problems(["non-weak"], decades=3.0) | problems(["free"], decades=3.0, independent=True))
def test_secondary_tasks_progress_by_their_share(problem):
    weights, gradient, length = solve("pcd", problem.rows, problem.mask)
    primary = np.linalg.norm(problem.rows[0].astype(float))
    np.testing.assert_allclose(np.linalg.norm(gradient), primary, rtol=1e-5)  # rounding
    # Before it got the primary gradient's length, that one's direction had weight 1.
    factor = weights[0] * primary
    assert np.min(gains(problem, gradient)[1:], initial=np.inf) >= 0.3 * factor - 1e-5 * length


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("constant", "random", "pcgrad", "gradvac")])
@examples
@given(data=st.data())
def test_the_order_of_the_tasks_does_not_matter(name, data):
    rows, mask, _ = drawn(data, name)
    has_first = "pcd", "lr_annealing", "match_norm", "bloop", "cosine_gate"  # the primary task is primary
    first = 1 if name.startswith(has_first) else 0
    order = [*range(first), *data.draw(st.permutations(range(first, TASKS)))]
    _, gradient, length = solve(name, rows, mask, before=rows * COLUMNS)
    _, permuted, _ = solve(name, rows[order], mask[order], before=rows[order] * COLUMNS)
    # Rounding, 1e-7, times the condition number of the Gramian, up to 100.
    np.testing.assert_allclose(permuted, gradient, atol=2e-5 * length)


# MoDo's and MoCo's steps are in the gradients' units; GradNorm's optimizer adds 1e-8 to lengths of gradients.
@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("modo", "moco", "gradnorm")])
@examples
@given(data=st.data(), exponent=st.integers(-10, 10))
def test_the_scale_of_all_gradients_does_not_matter(name, data, exponent):
    """The gradient follows it, with the powers of the equations that Nash-MTL and FairGrad solve."""
    rows, mask, _ = drawn(data, name)
    scale = np.float32(10.0**exponent)
    expected = solve(name, rows, mask, before=rows * COLUMNS)
    scaled = solve(name, rows * scale, mask, before=rows * scale * COLUMNS)
    power = {
        "gradient_shares": 0,
        "nash_mtl": 0,
        "nash_mtl unbounded": 0,
        "fairgrad": 0,
        "fairgrad alpha=2": -1 / 3,
    }.get(name, 1)
    # As above: the scaled Jacobian is rounded anew.
    np.testing.assert_allclose(scaled.gradient / float(scale) ** power, expected.gradient, atol=2e-5 * expected.length)


@pytest.mark.parametrize("name", ["mean", "sum", "constant", "random", "upgrad exact", "config", "pcgrad", "gradvac"])
@examples
@given(data=st.data(), a=POSITIVE, b=POSITIVE, scales=st.lists(st.tuples(POSITIVE, POSITIVE), min_size=8, max_size=8))
def test_a_task_counts_as_much_as_its_gradient_is_long(name, data, a, b, scales):
    """Linear under scaling: with row i times c_i > 0 the gradient is a linear function of c. The draws are the same."""
    rows, mask, _ = drawn(data, name, decades=1.0)
    c, d = np.array(scales, np.float32).T[..., None]
    first, second, both = (solve(name, x * rows, mask) for x in (c, d, a * c + b * d))
    # Rounding of what is added up, as above.
    np.testing.assert_allclose(
        both.gradient, a * first.gradient + b * second.gradient, atol=2e-5 * max(both.length, first.length)
    )


@pytest.mark.parametrize(
    "name", ["mean", "sum", "constant", "random", "upgrad", "upgrad exact", "dual_proj", "dual_proj exact"]
)
@examples
@given(problem=problems(["strictly weak", "non-weak"], decades=3.0))
def test_zero_only_where_strongly_stationary(name, problem):
    """Where some direction helps a task and harms none, the gradient reaches along it by what its weights bring in.

    The projections' weights are at least the preference, 1/m.
    """
    weights, gradient, _ = solve(name, problem.rows, problem.mask)
    helped = problem.rows[problem.mask].astype(float) @ problem.direction
    m = len(helped)
    least = {"sum": 1, "constant": 0.5, "random": np.min(weights)}.get(name, 1 / m)
    assert np.sum(helped) > 0.1
    assert np.min(weights) > 0
    assert gradient @ problem.direction >= 0.99 * least * np.sum(helped)


@pytest.mark.parametrize("name", ["mgda", "upgrad exact", "dual_proj exact"])
@examples
@given(problem=problems(["strong"]))
def test_zero_where_strongly_stationary(name, problem):
    """Up to the root of the Gramian's rounding, 1e-7."""
    _, gradient, length = solve(name, problem.rows, problem.mask)
    assert np.linalg.norm(gradient) <= 1e-3 * length


@examples
@given(problem=problems(["strictly weak"]))
def test_mgda_is_zero_where_some_tasks_are_stationary(problem):
    """Up to the root of the solver's exactness, 1e-5."""
    _, gradient, _ = solve("mgda", problem.rows, problem.mask)
    assert np.linalg.norm(gradient) <= 3e-3 * np.max(np.linalg.norm(problem.rows[problem.mask], axis=1))


def test_cagrad_conflicts_with_no_gradient_where_a_combination_vanishes():
    for seed in range(20):
        problem = jacobian("strong", 4, 3, seed)
        _, gradient, _ = solve("cagrad c=2", problem.rows, problem.mask)
        mean = np.mean(problem.rows[problem.mask].astype(float), axis=0)
        assert np.min(gains(problem, gradient)) >= -1e-2 * np.linalg.norm(mean)
        assert np.linalg.norm(gradient - mean) <= 2.01 * np.linalg.norm(mean)


@functools.cache
def gradients_over_keys(name):
    """Gradients over 4096 seeds, after a first call in which GradVac finds its targets."""

    def gradient(seed, rows):
        method = getattr(aggregation, name)(key=seed)
        _, state = method.apply(method.init(rows.shape), rows * jnp.linspace(2, 0, rows.shape[1])[None])
        return method.apply(state, rows)[0]

    return jax.jit(jax.vmap(gradient, in_axes=(0, None)))


@pytest.mark.parametrize("order", [(1, 2, 3, 0), (3, 2, 1, 0), (1, 0, 2, 3)])
@pytest.mark.parametrize("name", ["pcgrad", "gradvac"])
def test_the_order_of_the_tasks_does_not_matter_on_average(name, order):
    """Means and second moments of the gradient: within five standard errors of what 4096 draws leave uncertain."""
    rows = jacobian("strong", 4, 3, seed=1).rows[:4]
    moments = []
    for start, x in (0, rows), (4096, rows[list(order)]):
        gradients = np.asarray(gradients_over_keys(name)(start + np.arange(4096), x), float)
        moments.append(np.concatenate([gradients, *(gradients[:, [i]] * gradients for i in range(PARAMS))], axis=1))
    one, other = moments
    assert np.max(np.std(one, axis=0)) > 0.01 * np.max(np.abs(one))  # the draws do matter
    error = np.sqrt((np.var(one, axis=0) + np.var(other, axis=0)) / 4096)
    np.testing.assert_array_less(np.abs(np.mean(one, axis=0) - np.mean(other, axis=0)), 5 * error + 1e-6)
