"""Methods where their formulas have no answer: combinations that vanish, contradictions, cosines of 1, long steps."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation
from mtlbalance.numerics import project_simplex
from tests.aggregation.problems import with_new

pytestmark = pytest.mark.unoptimized


@partial(jax.jit, static_argnums=0)
def first_gradient(make, rows, *hyperparameters):
    method = make(*hyperparameters)
    return method.apply(method.init(rows.shape), rows)[0]


def gradient_of(make, rows, *hyperparameters):
    """Compiled once for all hyperparameters: they are traced."""
    return np.asarray(first_gradient(make, np.asarray(rows, float), *hyperparameters))


@pytest.fixture(params=[False, True], ids=["float32", "float64"])
def precision(request):
    with jax.enable_x64(request.param):
        yield 1e-12 if request.param else 1e-5


@pytest.mark.parametrize(
    ("rows", "c", "expected"),
    [
        ([[1, 0.2], [0.3, 1], [0, 0]], 0.4, [1.3 / 3, 0.4]),  # the mean, as a gradient of zero forbids nothing
        ([[1, 0, 0], [-1, 0, 0], [0.3, 1, 0]], 0.5, [0, 1 / 3, 0]),
        ([[1, 0], [-2, 0]], 2.0, [0, 0]),
        ([[2, 1], [-1, 1], [-1, -2]], 1.5, [0, 0]),  # no direction helps: they surround the origin
    ],
)
def test_cagrad_where_its_combination_vanishes(rows, c, expected, precision):
    np.testing.assert_allclose(gradient_of(aggregation.cagrad, rows, c), expected, atol=precision)


def test_cagrad_conflicts_with_none_of_random_gradients_in_a_plane(precision):
    for seed in range(8):
        rows = np.random.default_rng(seed).normal(size=(4, 2))
        for c in 1.5, 2.0:
            gradient = gradient_of(aggregation.cagrad, rows, c)
            assert np.min(rows @ gradient) >= -10 * precision, (seed, c)


def test_cagrad_arrives_with_a_hinge_that_is_met():
    """The third loss is 0 and has no gradient; the others' minimum is between theirs."""
    losses = lambda x: jnp.stack([jnp.sum((x - 1) ** 2), jnp.sum((x - 2) ** 2), jnp.maximum(-1 - x[0], 0)])
    method = aggregation.cagrad()
    step = lambda x, _: (x - 0.1 * method.apply(method.init((3, 2)), jax.jacrev(losses)(x))[0], None)
    x = np.asarray(jax.jit(lambda: jax.lax.scan(step, jnp.zeros(2), length=200)[0])())
    assert 0.99 <= np.min(x) <= np.max(x) <= 2.01


@pytest.mark.parametrize("tau", [1e-5, 1e-3, 0.02, 0.5])
def test_pcd_drops_what_contradicts(tau, precision):
    """Collinear gradients of both signs leave the primary one."""
    for seed in range(30):
        rng = np.random.default_rng(seed)
        rows = np.outer(rng.normal(size=8), rng.normal(size=1000))
        error = gradient_of(aggregation.pcd, rows, tau) - rows[0]
        assert np.linalg.norm(error) <= 10 * precision * np.linalg.norm(rows[0]), seed


def test_a_state_that_is_spoilt_shows():
    rows = np.float32([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    for method in aggregation.pcd(), aggregation.gradvac(), aggregation.excess_mtl(), aggregation.modo():
        for bad in np.nan, 1e30:
            _, state = method.apply(method.init((2, 3)), with_new(rows, (0, 0), bad))
            is_spoilt = not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(jax.device_get(state)))
            assert is_spoilt == np.all(np.isnan(method.apply(state, rows)[0])), (method, bad)
            assert is_spoilt or bad == 1e30


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "upgrad", "cagrad", "pcd", "imtl_g", "config", "db_mtl"])
def test_a_gradient_whose_square_underflows_beside_one_whose_product_does_not(name):
    """It is 1e-21 beside 1e-16, and counts as zero: nothing is divided by its square."""
    rows = np.array([[1e-16, 2e-16], [-1e-21, 1e-22], [1e-16, -3e-16]])
    gradient = gradient_of(getattr(aggregation, name), rows)
    assert np.all(np.isfinite(gradient))
    assert np.linalg.norm(gradient) <= 2.001 * np.sum(np.linalg.norm(rows, axis=1))


def gradvac_inputs():
    """Kinds whose targets come near to 1 or -1; then ratios to the sum of the lengths were 1e34, 1e9, 1e2, 5e8."""
    rng = np.random.default_rng(0)
    rank_one, v = np.outer(rng.normal(size=8), rng.normal(size=50)), rng.normal(size=50)
    signs = (-1.0) ** np.arange(16)
    return {
        "rank one": ((8, 50), lambda: rank_one),
        "rank one anew": ((8, 50), lambda: np.outer(rng.normal(size=8), rng.normal(size=50))),
        "near-opposite": ((16, 50), lambda: signs[:, None] * v + 0.01 * rng.normal(size=(16, 50))),
        "near-duplicates": ((40, 50), lambda: v + 0.1 * rng.normal(size=(40, 50))),
        "one parameter": ((3, 1), lambda: rng.normal(size=(3, 1))),
    }


@jax.jit
def run_of_gradvac(stacked):
    method = aggregation.gradvac()
    step = lambda state, rows: method.apply(state, rows)[::-1]
    return jax.lax.scan(step, method.init(stacked.shape[1:]), stacked)


@pytest.mark.parametrize("kind", gradvac_inputs())
def test_gradvac_stays_as_long_as_the_gradients(kind):
    shape, draw = gradvac_inputs()[kind]
    stacked = np.stack([draw() for _ in range(300 if shape[0] < 40 else 40)]).astype(np.float32)
    state, gradients = jax.device_get(run_of_gradvac(stacked))
    lengths = np.sum(np.linalg.norm(stacked, axis=2), axis=1)
    assert np.all(np.linalg.norm(gradients, axis=1) <= 2.001 * lengths)
    assert np.all(np.isfinite(state.targets))


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_gradvac_gives_a_gradient_of_zero_no_weight_but_its_own(eps):
    """However much its angles have been: a weight of 1e8, or NaN, would serve on for a gradient that is back."""
    method, rows = aggregation.gradvac(eps=eps), np.float32([[1.0, 0.2], [1.0, 0.4], [0.9, 0.1]])
    state = method.init(rows.shape)
    for _ in range(6):
        _, state = method.apply(state, rows)
    weights, state = method.weighting.apply(state, with_new(rows, 1, 0))
    assert np.asarray(weights)[1] == 1
    assert np.all(np.isfinite(np.asarray(state.targets)))
    np.testing.assert_array_equal(method.weighting.apply(state, np.zeros_like(rows))[0], 1)


def test_gradvac_without_eps_is_its_limit():
    """A target of exactly 1 turns a gradient wholly towards the other one."""
    rows, other = np.float32([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [3.0, 4.0]]])
    given = []
    for eps in 0.0, 1e-8:
        method = aggregation.gradvac(beta=1.0, eps=eps)
        _, state = method.apply(method.init((2, 2)), rows)
        assert np.all(np.asarray(state.targets)[[0, 1], [1, 0]] == 1)
        given.append(method.apply(state, other)[0])
    np.testing.assert_allclose(given[0], 2 * other[0] * 5 + 2 * other[1] / 5, rtol=1e-5)
    np.testing.assert_allclose(given[1], given[0], rtol=1e-5)


simplex_point = jax.jit(project_simplex)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4, 1e6])
def test_simplex_steps_keep_their_total_under_a_mask(scale):
    """Equal gradients exchange no weight, at whatever scale; the absent third has none."""
    rows, mask = np.full((3, 4), scale, np.float32), np.array([True, True, False])
    modo, moco, sdmgrad = aggregation.modo(), aggregation.moco(beta=1.0), aggregation.sdmgrad()
    weights, _ = modo.weighting.apply(modo.init(rows.shape), rows, mask=mask)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0])
    weights, _ = sdmgrad.weighting.apply(sdmgrad.init(rows.shape), rows, mask=mask)
    np.testing.assert_allclose(*np.asarray(weights)[:2])
    gradient, state = moco.apply(moco.init(rows.shape), rows, mask=mask)
    np.testing.assert_allclose(gradient, rows[0], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(state.weights)[:2], [0.5, 0.5])
    uneven = modo.init(rows.shape)._replace(weights=np.float32([0.7, 0.3, 0.0]))
    weights, _ = modo.weighting.apply(uneven, rows, mask=mask)
    # Drawn together by rho, if only a little: that is lost in rounding beside long gradients.
    np.testing.assert_allclose(weights, [0.698, 0.302, 0], atol=2.5e-3)
    np.testing.assert_array_equal(simplex_point(np.float32(scale**2) * np.float32([3, 3, np.nan]), mask), [0.5, 0.5, 0])


def test_imtl_g_of_dependent_gradients_whatever_their_norms():
    for seed, decades in enumerate([0, 2, 4, 5]):
        rng = np.random.default_rng(seed)
        rows = rng.normal(size=(6, 3)) @ rng.normal(size=(3, 20)) * 10 ** rng.uniform(0, decades, (6, 1))
        v = np.linalg.pinv(rows @ rows.T, rcond=1e-14, hermitian=True) @ np.linalg.norm(rows, axis=1)
        expected = v / np.sum(v) @ rows
        error = gradient_of(aggregation.imtl_g, rows) - expected
        # Of rounding, which the condition multiplies.
        assert np.linalg.norm(error) <= 1e-4 * np.linalg.norm(expected), seed


def test_imtl_g_leaves_nothing_of_its_total_to_absent_tasks():
    """Beside gradients twelve decades shorter than others, what rounding leaves for an absent task would be long."""
    method = aggregation.imtl_g()
    for seed in 6, 9, 10:
        rng = np.random.default_rng(seed)
        rows = np.float32(10 ** rng.uniform(-6, 6, (16, 1)) * rng.normal(size=(16, 5)))
        weights, _ = method.weighting.apply(method.init(rows.shape), rows, mask=rng.permutation(16) < 8)
        np.testing.assert_allclose(np.sum(np.asarray(weights)), 1, rtol=1e-5)


def test_moco_comes_back_from_a_loss_that_cannot_be_squared():
    """Under the guard, which takes it for finite, and the gradient that follows it in: NaN until that has come down."""
    method, rows = mtl.skip_nonfinite(aggregation.moco(beta=0.9, beta_sigma=0.0, normalize=True)), np.eye(2)
    _, state = method.apply(method.init(rows.shape), rows, values=np.float32([1.0, 1e21]))
    gradients = []
    for _ in range(6):
        gradient, state = method.apply(state, rows, values=np.ones(2, np.float32))
        gradients.append(gradient)
    assert np.all(np.isnan(gradients[0]))
    chex.assert_tree_all_finite((gradients[-1], state))
