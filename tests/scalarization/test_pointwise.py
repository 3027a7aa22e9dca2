"""Weights of points: chunks of time, mini-batches of a fixed pool, under task weights. Their values: tests/golden."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.aggregation.problems import with_new

pytestmark = pytest.mark.unoptimized

OF_A_POOL = {
    "residual_attention": scalarization.residual_attention(0.9, 0.1),
    "vrba": scalarization.vrba(0.9, 0.1),
    "brdr": scalarization.brdr(0.9, 0.5),
    "self_adaptive": mtl.learn(scalarization.self_adaptive(), optax.sgd(0.1)),
}
POINTWISE = OF_A_POOL | {"causal": scalarization.causal(0.5, n_chunks=3)}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 2.0, size=shape).astype(np.float32)


@partial(jax.jit, static_argnums=0)
def scalar_and_weights(method, state, losses, mask=None):
    return jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, losses, mask=mask)


# Chunks of time.


def causal_by_hand(losses, n_chunks, tol):
    chunks = [chunk for chunk in np.array_split(losses, n_chunks) if chunk.size]
    means = np.array([chunk.mean() for chunk in chunks])
    weights = np.exp(-tol * np.concatenate([[0], np.cumsum(means)[:-1]]))
    return np.mean(weights * means), np.min(weights)


@pytest.mark.parametrize(("n_points", "n_chunks"), [(12, 4), (13, 4), (11, 4), (3, 5), (1, 32)])
def test_points_are_cut_as_numpy_splits_an_array(n_points, n_chunks):
    losses, method = draw(n_points), scalarization.causal(0.7, n_chunks)
    for mask in np.ones(n_points, bool), np.arange(n_points) % 3 != 1:
        scalar, state = method.apply(method.init(n_points), losses, mask=mask)
        np.testing.assert_allclose((scalar, state.min_weight), causal_by_hand(losses[mask], n_chunks, 0.7), rtol=1e-6)


def test_time_is_the_first_of_several_axes():
    losses, method = draw(4, 3), scalarization.causal(0.7, n_chunks=4)
    scalar, _ = method.apply(method.init(losses.shape), losses)
    np.testing.assert_allclose(scalar, causal_by_hand(losses.ravel(), 4, 0.7)[0], rtol=1e-6)


def test_a_later_chunk_that_is_far_larger_leaves_the_weights_their_digits():
    losses, method = np.float32([0.5, 1e9, 1.0]), scalarization.causal(n_chunks=3)
    (_, _), weights = scalar_and_weights(method, method.init(3), losses)
    np.testing.assert_allclose(3 * np.asarray(weights), [1.0, np.exp(-0.5), 0.0], rtol=1e-6)


@pytest.mark.parametrize("n_chunks", [1, 2, 4])
def test_without_causality_losses_at_the_end_of_the_range_have_their_mean(n_chunks):
    """Their sum, in a chunk or over the chunks, is beyond it."""
    method, losses = scalarization.causal((0.0, 1.0), n_chunks), np.full(4, 3e38, np.float32)
    (scalar, state), weights = scalar_and_weights(method, method.init(4), losses)
    np.testing.assert_allclose((scalar, state.min_weight), (3e38, 1), rtol=1e-6)
    np.testing.assert_allclose(weights, 0.25, rtol=1e-6)


def test_tol_rises_once_all_weights_are_above_the_threshold():
    method = scalarization.causal([0.1, 1.0, 10.0], n_chunks=2, threshold=0.9)
    losses = np.array([2.0, 0.5, 0.5, 0.01, 0.5, 0.001], np.float32)  # of either point
    found, state = [], method.init(2)
    for loss in losses:
        scalar, state = method.apply(state, np.full(2, loss))
        found.append((int(state.stage), float(scalar) / loss))
    tols = np.array([0.1, 0.1, 1.0, 1.0, 10.0, 10.0])
    np.testing.assert_array_equal([stage for stage, _ in found], [0, 1, 1, 2, 2, 2])
    np.testing.assert_allclose([mean for _, mean in found], (1 + np.exp(-tols * losses)) / 2, rtol=1e-6)


def test_an_equation_without_points_has_no_say():
    """With the others its losses would have changed the weights, and its chunks the scalar."""
    losses, bare = draw(3, 6), scalarization.causal(n_chunks=3)
    method = scalarization.causal(n_chunks=3, n_components=3)
    mask = np.ones((3, 6), bool)
    mask[1], mask[2, 1:] = False, False
    scalar, _ = method.apply(method.init((3, 6)), losses, mask=mask)
    alone, _ = bare.apply(bare.init(6), losses[0])
    np.testing.assert_allclose(scalar, float(alone) + losses[2, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scalarization.causal([]), r"tol: expected a number, or some that increase, found \[\]"),
        (lambda: scalarization.causal((1.0, 1.0)), "tol: expected a number, or some that increase"),
        (lambda: scalarization.causal((1.0, -1.0)), "tol: expected a finite number of at least 0, found -1.0"),
        (lambda: scalarization.causal(n_components=2).init((3, 4)), r"n_components: .* found 2 for shape \(3, 4\)"),
        (lambda: scalarization.causal(n_components=2).init(5), r"n_components: .* found 2 for shape \(5,\)"),
        (lambda: scalarization.causal().init({"u": draw(4), "v": draw(4)}), "n_components: .* found 1 for {'u': 4"),
        (lambda: scalarization.causal().init({"late": draw(4), "early": draw(2)}), "n_components: .* found 1 for {'e"),
        (
            lambda: scalarization.causal(n_components=2).init({"u": draw(4), "v": draw(2)}),
            "n_components: expected as many as the losses have names, whose arrays are of one length",
        ),
    ],
)
def test_what_is_not_one_array_of_times_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# A fixed pool.


@pytest.mark.parametrize("name", OF_A_POOL)
def test_a_mini_batch_by_mask_is_the_same_method_on_its_points(name):
    """As official codes gather the weights of the points that were drawn, and scatter them back."""
    method, n_points, n_drawn = OF_A_POOL[name], 6, 2
    state = jax.device_get(method.init(n_points))
    is_of_points = lambda x: x.shape[:1] == (n_points,)
    rng = np.random.default_rng(1)
    for i in range(4):
        losses, drawn = draw(n_points, seed=i), np.sort(rng.choice(n_points, n_drawn, replace=False))
        mask = np.isin(np.arange(n_points), drawn)
        gathered = jax.tree.map(lambda x, drawn=drawn: x[drawn] if is_of_points(x) else x, state)
        (scalar, after), weights = jax.device_get(scalar_and_weights(method, gathered, losses[drawn]))
        scattered = jax.tree.map(
            lambda x, new, drawn=drawn: with_new(x, drawn, new) if is_of_points(x) else new, state, after
        )
        (by_mask, state), weights_by_mask = jax.device_get(
            scalar_and_weights(method, state, np.where(mask, losses, np.float32(np.nan)), mask)
        )
        np.testing.assert_allclose(by_mask, scalar, rtol=1e-6)
        np.testing.assert_allclose(weights_by_mask[drawn], weights, rtol=1e-6)
        chex.assert_trees_all_close(state, scattered, rtol=1e-6)


@pytest.mark.by_default("causal", "self_adaptive")
@pytest.mark.parametrize("name", POINTWISE)
def test_any_shape_is_its_points_in_order(name):
    """Axes, names, a group of others: the same numbers, wherever the method stands."""
    method, losses = POINTWISE[name], draw(3, 4)
    flat, grid = losses.ravel(), method.init(losses)
    assert jax.tree.leaves(grid)[0].shape == losses.shape
    state = method.init(flat)
    grouped = mtl.nested(scalarization.sum(), {"bc": scalarization.mean(), "pde": method})
    pool = lambda losses: {"bc": np.zeros(2, np.float32), "pde": losses}
    grouped_state = grouped.init(pool(losses))
    for i in range(3):
        losses = draw(3, 4, seed=i)
        (scalar, state), weights = scalar_and_weights(method, state, losses.ravel())
        (of_grid, grid), of_points = scalar_and_weights(method, grid, losses)
        (of_group, grouped_state), in_group = scalar_and_weights(grouped, grouped_state, pool(losses))
        np.testing.assert_allclose([of_grid, of_group], scalar, rtol=1e-6)
        np.testing.assert_allclose(np.ravel(of_points), weights, rtol=1e-6)
        np.testing.assert_allclose(np.ravel(in_group["pde"]), weights, rtol=1e-6)
    chex.assert_trees_all_close(grouped_state.inner["pde"], state, rtol=1e-6)


@pytest.mark.parametrize("name", POINTWISE)
def test_residuals_of_zero_leave_the_method_able_to_go_on(name):
    method = POINTWISE[name]
    state = method.init(3)
    for losses in np.float32([[0.0, 0.0, 0.0], [0.0, 1e-30, 0.0], [1.0, 2.0, 0.0]]):
        (scalar, state), weights = scalar_and_weights(method, state, losses)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((scalar, weights, state)))
    assert scalar > 0


@pytest.mark.parametrize("shape", [(2, 3), {"pde": (2, 2), "bc": (3,)}], ids=["axes", "names"])
def test_self_adaptive_points_start_where_they_are_told(shape):
    """Of the shape of the losses; from there each climbs by itself."""
    is_shape = lambda x: isinstance(x, tuple)
    starts, losses = (
        jax.tree.map(lambda shape, seed=seed: draw(*shape, seed=seed), shape, is_leaf=is_shape) for seed in (1, 2)
    )
    method = mtl.learn(scalarization.self_adaptive(starts), optax.sgd(0.5))
    (scalar, state), weights = scalar_and_weights(method, method.init(losses), losses)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    np.testing.assert_allclose(scalar, np.sum(flat(starts) ** 2 * flat(losses)), rtol=1e-6)
    np.testing.assert_allclose(flat(weights), flat(starts) ** 2, rtol=1e-6)
    np.testing.assert_allclose(np.ravel(state.inner.multipliers), flat(starts) * (1 + flat(losses)), rtol=1e-6)


def test_self_adaptive_points_of_one_group_start_where_they_are_told():
    starts, losses = draw(3, seed=1), {"bc": np.zeros(2, np.float32), "pde": draw(3, seed=2)}
    learned = mtl.learn(scalarization.self_adaptive(starts), optax.sgd(0.5))
    method = mtl.nested(scalarization.sum(), {"bc": scalarization.mean(), "pde": learned})
    (_, state), weights = scalar_and_weights(method, method.init(losses), losses)
    np.testing.assert_allclose(weights["pde"], starts**2, rtol=1e-6)
    np.testing.assert_allclose(state.inner["pde"].inner.multipliers, starts * (1 + losses["pde"]), rtol=1e-6)


def test_in_brdr_a_point_that_comes_later_is_no_slower_than_the_others():
    """Their averages are without the bias of the start: what stays as it is has the rate 1 from its first call on."""
    method, losses = scalarization.brdr(0.9, 0.0), np.float32([2.0, 0.5])
    state = method.init(2)
    for mask in [True, False], [True, False], [True, True]:
        _, state = method.apply(state, losses, mask=np.array(mask))
    np.testing.assert_allclose(state.weights, [1.0, 1.0], rtol=1e-6)


def test_in_brdr_the_sum_of_the_means_of_groups_is_a_matter_of_scaling():
    """As the paper's loss: the rates, and their mean, are over all points."""
    pde, bc, method = draw(4, 6), draw(4, 2, seed=1), scalarization.brdr(0.9, 0.5)
    one = two = method.init(8)
    for of_pde, of_bc in zip(pde, bc, strict=True):
        (_, one), _ = scalar_and_weights(method, one, np.concatenate([of_pde, of_bc]))
        (scalar, two), _ = scalar_and_weights(method, two, np.concatenate([of_pde * 8 / 6, of_bc * 8 / 2]))
        np.testing.assert_allclose(two.weights, one.weights, rtol=1e-5)
        weights = np.asarray(one.weights)
        np.testing.assert_allclose(scalar, np.mean(weights[:6] * of_pde) + np.mean(weights[6:] * of_bc), rtol=1e-5)


# Under task weights.

PARAMS = np.float32([0.3, -0.2])
TIMES = np.linspace(0.0, 1.0, 7, dtype=np.float32)


def residuals(params):
    return {"pde": jnp.cos(3 * TIMES * params[0]) - params[1] - TIMES, "bc": params[None] - 0.5}


@jax.jit
def pointwise_losses(params):
    return jax.tree.map(jnp.square, residuals(params))


@pytest.mark.by_default("causal-mgda")
@pytest.mark.parametrize("outer", [aggregation.mgda(), aggregation.lr_annealing("pde")], ids=["mgda", "lr_annealing"])
@pytest.mark.parametrize("name", ["causal", "vrba"])
def test_an_aggregator_over_them_sees_the_gradients_of_their_scalars(outer, name):
    """The weights of points are constants; and it is what the same comes to with the scalars as the losses."""
    point_weights, means = POINTWISE[name], scalarization.mean()
    nested = mtl.nested(outer, {"bc": means, "pde": point_weights})

    def scalars(params, state):
        losses = pointwise_losses(params)
        scalar, state = point_weights.apply(state, losses["pde"])
        return {"bc": jnp.mean(losses["bc"]), "pde": scalar}, state

    grad_fn = mtl.value_and_grad(pointwise_losses, nested)
    of_scalars = mtl.value_and_grad(scalars, outer, has_aux=True)
    state, inner_state, params = grad_fn.init(PARAMS), point_weights.init(7), PARAMS
    outer_state = of_scalars.init(PARAMS, inner_state)

    @jax.jit
    def both(params, state, outer_state, inner_state):
        return grad_fn(params, state), of_scalars(params, outer_state, inner_state)

    for _ in range(3):
        of_points, of_their_scalars = both(params, state, outer_state, inner_state)
        (_, state), gradient = of_points
        (_, outer_state, inner_state), expected = of_their_scalars
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
        params = params - np.float32(0.1) * np.asarray(gradient)
    chex.assert_trees_all_close(state.inner["pde"], inner_state, rtol=1e-5)


def test_a_scalarizer_over_them_balances_their_scalars():
    method = mtl.nested(
        mtl.learn(scalarization.uw(), optax.sgd(0.1)), {"bc": scalarization.mean(), "pde": POINTWISE["causal"]}
    )
    losses = pointwise_losses(PARAMS)
    state = method.init(losses)
    log_var = np.float32([0.5, -1.0])
    state = state._replace(outer=state.outer._replace(inner=state.outer.inner._replace(log_var=log_var)))
    (_, new_state), weights = scalar_and_weights(method, state, losses)
    bare = POINTWISE["causal"]
    (_, _), inside = scalar_and_weights(bare, bare.init(7), losses["pde"])
    np.testing.assert_allclose(weights["pde"], np.exp(1.0) / 2 * np.asarray(inside), rtol=1e-6)
    np.testing.assert_allclose(weights["bc"], np.full((1, 2), np.exp(-0.5) / 4), rtol=1e-6)
    assert np.all(np.asarray(new_state.outer.inner.log_var) != log_var)


@pytest.mark.by_default("causal")
@pytest.mark.parametrize("name", POINTWISE)
def test_a_whole_training_is_one_program_and_its_seeds_are_mapped(name):
    """Points drawn from the pool in each step; each seed its own state."""
    method = mtl.nested(scalarization.sum(), {"bc": scalarization.mean(), "pde": POINTWISE[name]})
    grad_fn, adam = mtl.value_and_grad(pointwise_losses, method), optax.adam(0.05)

    def train(key):
        def step(carry, key):
            params, state, opt_state = carry
            mask = {"bc": jnp.ones((1, 2), bool), "pde": jax.random.bernoulli(key, 0.6, TIMES.shape)}
            (losses, state), gradient = grad_fn(params, state, mask=mask)
            updates, opt_state = adam.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), state, opt_state), jnp.mean(losses["pde"])

        start = PARAMS, grad_fn.init(PARAMS), adam.init(PARAMS)
        return jax.lax.scan(step, start, jax.random.split(key, 60))[1]

    curves = np.asarray(jax.jit(lambda: jax.vmap(train)(jax.random.split(jax.random.key(0), 2)))())
    assert np.all(curves[:, -1] < 0.5 * curves[:, 0])
    assert np.any(curves[0] != curves[1])
