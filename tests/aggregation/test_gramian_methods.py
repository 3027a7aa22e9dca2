"""What the Gramian methods promise of any Jacobian: conflicts, permutations, scales, two tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation

SIZES = [(2, 5), (3, 10), (5, 9), (8, 20), (3, 2), (6, 4)]  # the last two have more tasks than parameters
METHODS = {
    "upgrad": aggregation.upgrad,
    "dual_proj": aggregation.dual_proj,
    "mgda": aggregation.mgda,
    "nash_mtl": aggregation.nash_mtl,
    "fairgrad": aggregation.fairgrad,
    "imtl_g": aggregation.imtl_g,
    "config": aggregation.config,
    "aligned_mtl": aggregation.aligned_mtl,
}


def gradient_of(method, rows):
    return method.apply(method.init(rows.shape), rows)[0]


def jacobian(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(
    "method",
    [aggregation.upgrad(reg_eps=0.0), aggregation.dual_proj(reg_eps=0.0), aggregation.mgda()],
    ids=["upgrad", "dual_proj", "mgda"],
)
def test_conflicts_with_no_gradient(method, shape):
    for seed in range(5):
        rows = jacobian(shape, seed)
        gradient = gradient_of(method, rows)
        # Where more tasks than parameters leave no direction it is zero up to rounding of the squares, 1e-7.
        np.testing.assert_array_less(-1e-3 * jnp.linalg.norm(rows, axis=1), rows @ gradient)


@pytest.mark.parametrize("build", METHODS.values(), ids=METHODS.keys())
def test_the_order_of_the_tasks_does_not_matter(build):
    rows = jacobian((5, 20))
    gradient = gradient_of(build(), rows)
    for seed in range(3):
        order = jax.random.permutation(jax.random.key(seed), 5)
        permuted = gradient_of(build(), rows[order])
        np.testing.assert_allclose(permuted, gradient, atol=2e-5 * jnp.linalg.norm(rows))


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1e5, 1e10])
@pytest.mark.parametrize("name", METHODS)
def test_the_scale_of_all_gradients_does_not_matter(name, scale):
    """The gradient follows the scale, but for those whose length is their own."""
    rows = jacobian((4, 20))
    method = METHODS[name]()
    expected, scaled = gradient_of(method, rows), gradient_of(method, scale * rows)
    follows = {"nash_mtl": 1.0, "fairgrad": 1.0}.get(name, scale)
    np.testing.assert_allclose(scaled / follows, expected, atol=2e-5 * jnp.linalg.norm(expected))


@pytest.mark.parametrize("seed", range(5))
def test_bargaining_has_the_directions_of_the_bisector_for_two_tasks(seed):
    rows = jacobian((2, 6), seed) * jnp.array([[1.0], [30.0]])
    bisector = jnp.sum(rows / jnp.linalg.norm(rows, axis=1, keepdims=True), axis=0)
    bisector = bisector / jnp.linalg.norm(bisector)
    for name in "nash_mtl", "imtl_g", "config", "fairgrad":
        gradient = gradient_of(METHODS[name](), rows)
        np.testing.assert_allclose(gradient / jnp.linalg.norm(gradient), bisector, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_is_twice_upgrad_for_two_tasks(seed):
    rows = jacobian((2, 6), seed)
    twice = 2 * gradient_of(aggregation.upgrad(reg_eps=0.0), rows)
    np.testing.assert_allclose(gradient_of(aggregation.pcgrad(), rows), twice, atol=1e-4 * jnp.linalg.norm(rows))


def test_gradvac_starts_as_pcgrad_and_turns_towards_its_targets():
    rows = jnp.array([[1.0, 0.0], [0.6, 0.8]])
    method = aggregation.gradvac(beta=1.0)
    gradient, state = method.apply(method.init(rows.shape), rows)
    np.testing.assert_allclose(gradient, rows.sum(0), rtol=1e-6)  # nothing conflicts
    np.testing.assert_allclose(state.targets, [[0.0, 0.6], [0.6, 0.0]], atol=1e-6)
    # The next gradients are at right angles: each is turned until its cosine to the other is 0.6.
    gradient, _ = method.apply(state, jnp.eye(2))
    np.testing.assert_allclose(gradient, [1.75, 1.75], rtol=1e-5)


def test_krum_leaves_out_the_odd_one_and_absent_tasks():
    rows = jnp.array([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1], [1.0, -0.1], [-50.0, 9.0]])
    method = aggregation.krum(n_byzantine=1, n_selected=3)
    weights, state = method.weighting.apply(method.init(rows.shape), rows)
    assert weights[4] == 0
    np.testing.assert_allclose(jnp.sort(weights), [0, 0, 1 / 3, 1 / 3, 1 / 3], rtol=1e-6)
    mask = jnp.array([False, True, False, False, True])
    weights, _ = method.weighting.apply(state, rows, mask=mask)
    np.testing.assert_allclose(weights, [0, 0.5, 0, 0, 0.5])
    with pytest.raises(ValueError, match="number of tasks: expected at least 4 with this n_byzantine, found 3"):
        method.init((3, 2))


def test_norm_of_nash_mtl():
    rows = jacobian((4, 20))
    for max_norm, norm in [(0.0, 2.0), (1.0, 1.0), (3.0, 2.0)]:
        gradient = gradient_of(aggregation.nash_mtl(max_norm), rows)
        np.testing.assert_allclose(jnp.linalg.norm(gradient), norm, rtol=1e-4)


def test_modo_and_sdmgrad_stay_on_the_simplex():
    for method in aggregation.modo(gamma=5.0), aggregation.sdmgrad():
        weighting = method.gramian_weighting
        state = weighting.init(4)
        for seed in range(5):
            weights, state = weighting.apply(state, jacobian((4, 4), seed))
            assert jnp.all(weights >= 0)
            np.testing.assert_allclose(jnp.sum(weights), 1, rtol=1e-5)


def test_cr_mogm_is_a_running_average():
    method = aggregation.cr_mogm(aggregation.mgda(), alpha=0.75)
    weighting, inner = method.gramian_weighting, aggregation.mgda().gramian_weighting
    state, average = weighting.init(3), None
    for seed in range(4):
        rows = jacobian((3, 8), seed)
        own, _ = inner.apply(inner.init(3), rows @ rows.T)
        average = own if average is None else 0.75 * average + 0.25 * own
        weights, state = weighting.apply(state, rows @ rows.T)
        np.testing.assert_allclose(weights, average, rtol=1e-5)
    with pytest.raises(TypeError, match="method: expected an Aggregator, found"):
        aggregation.cr_mogm("mgda")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: aggregation.upgrad(reg_eps=-1.0), "reg_eps: expected a finite number of at least 0"),
        (lambda: aggregation.dual_proj(jnp.ones(3)).init((2, 4)), "pref_vector: expected one number per task"),
        (lambda: aggregation.nash_mtl(-1.0), "max_norm: expected a number of at least 0"),
        (lambda: aggregation.fairgrad(0.0), "alpha: expected a finite number above 0"),
        (lambda: aggregation.aligned_mtl(scale_mode="mean"), "scale_mode: expected one of"),
        (lambda: aggregation.gradvac(beta=1.5), "beta: expected a number from 0 to 1"),
        (lambda: aggregation.modo(gamma=0.0), "gamma: expected a finite number above 0"),
        (lambda: aggregation.sdmgrad(momentum=1.0), "momentum: expected a number of at least 0 and below 1"),
        (lambda: aggregation.sdmgrad(n_iter=0), "n_iter: expected an int of at least 1"),
        (lambda: aggregation.cr_mogm(aggregation.mean(), alpha=2.0), "alpha: expected a number from 0 to 1"),
        (lambda: aggregation.krum(-1), "n_byzantine: expected an int of at least 0"),
    ],
)
def test_bounds(build, message):
    with pytest.raises(ValueError, match=message):
        build()
