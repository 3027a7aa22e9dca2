"""``nested``: groups of losses under methods of their own, and one method over the groups."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

LOSSES = {
    "bc": {"left": np.float32(3.0), "right": np.float32(0.5)},
    "pde": np.array([1.0, 2.0, 4.0], np.float32),
}
SUMS = {"bc": scalarization.sum(), "pde": scalarization.sum()}
MASK = {"bc": {"left": True, "right": False}, "pde": np.array([True, True, False])}
PARAMS = {"w": np.array([0.5, -1.0, 2.0], np.float32)}
OUTER = {
    "mgda": aggregation.mgda(),
    "upgrad": aggregation.upgrad(),
    "db_mtl": aggregation.db_mtl(),
    "lr_annealing": aggregation.lr_annealing("pde"),
}


def losses_fn(params):
    distances = jnp.square(params["w"] - np.array([1.0, 2.0, 3.0]))
    return {
        "bc": {"left": distances[0] + 0.1, "right": jnp.sum(params["w"] ** 2) / 9 + 0.1},
        "pde": 3 * distances + 0.2,
    }


@partial(jax.jit, static_argnums=0)
def weights_and_state(method, state, losses, mask=None):
    return jax.grad(method.apply, argnums=1, has_aux=True)(state, losses, mask=mask)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "some"])
def test_sums_of_sums_are_the_sum(mask):
    method, bare = mtl.nested(scalarization.sum(), SUMS), scalarization.sum()
    weights, state = weights_and_state(method, method.init(LOSSES), LOSSES, mask)
    expected, bare_state = weights_and_state(bare, bare.init(LOSSES), LOSSES, mask)
    chex.assert_trees_all_equal(weights, expected)
    chex.assert_trees_all_equal(state.seen, bare_state.seen)


def test_each_group_has_its_method():
    """Fixed weights by name in one, learned ones in the other; what is over them follows the groups' scalars."""
    group = {"bc": scalarization.constant({"left": 2.0, "right": 10.0}), "pde": scalarization.uw_so()}
    method = mtl.nested(scalarization.famo(), group)
    famo, pde = scalarization.famo(), scalarization.uw_so()
    value_and_weights = lambda method, *given: jax.value_and_grad(method.apply, argnums=1, has_aux=True)(*given)

    @jax.jit
    def call(states, scale):
        """Scalar and weights of the method, those expected, and all states after."""
        state, famo_state, pde_state = states
        losses = jax.tree.map(lambda x: scale * x, LOSSES)
        (scalar, state), weights = value_and_weights(method, state, losses)
        (of_pde, pde_state), inside = value_and_weights(pde, pde_state, losses["pde"])
        scalars = jnp.stack([scale * 11.0, of_pde])
        (expected, famo_state), outside = value_and_weights(famo, famo_state, scalars)
        losses = jax.tree.map(lambda x: 0.9 * x, losses)
        after = jnp.stack([0.9 * scale * 11.0, pde.apply(pde_state, losses["pde"])[0]])
        states = method.observe(state, losses), famo.observe(famo_state, after), pde_state
        return (scalar, weights), (expected, outside, inside), states

    states = jax.jit(lambda: (method.init(LOSSES), famo.init(2), pde.init(3)))()
    for scale in 1.0, 0.7, 0.5:
        (scalar, weights), (expected, outside, inside), states = jax.device_get(call(states, scale))
        np.testing.assert_allclose(scalar, expected, rtol=1e-6)
        np.testing.assert_allclose(weights["bc"]["right"], 10 * outside[0], rtol=1e-6)
        np.testing.assert_allclose(weights["pde"], outside[1] * inside, rtol=1e-6)
        chex.assert_trees_all_close(states[0].outer, states[1], rtol=1e-5)


def test_a_group_without_losses_is_absent():
    method = mtl.nested(scalarization.geometric_mean(), SUMS)
    mask = {"bc": {"left": False, "right": False}, "pde": np.ones(3, bool)}
    scalar, state = jax.jit(lambda mask: method.apply(method.init(LOSSES), LOSSES, mask=mask))(mask)
    np.testing.assert_allclose(scalar, 7.0, rtol=1e-6)
    np.testing.assert_array_equal(state.outer.seen, [0, 1])


def test_a_training_in_one_program_learns():
    method = mtl.nested(mtl.learn(scalarization.uw(), optax.adam(0.05)), SUMS)
    grad_fn, adam = mtl.value_and_grad(losses_fn, method), optax.adam(0.1)

    def step(carry, _):
        params, state, opt_state = carry
        (losses, state), grads = grad_fn(params, state)
        updates, opt_state = adam.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), method.end_epoch(state), opt_state), losses

    start = lambda: (PARAMS, grad_fn.init(PARAMS), adam.init(PARAMS))
    (_, state, _), losses = jax.device_get(jax.jit(lambda: jax.lax.scan(step, start(), length=100))())
    assert all(x[-1] < x[0] for x in jax.tree.leaves(jax.tree.map(lambda x: x.reshape(100, -1).sum(1), losses["pde"])))
    assert np.all(state.outer.inner.log_var != 0)


@pytest.mark.parametrize("name", OUTER)
def test_an_aggregator_sees_the_groups(name):
    """As of a function that returns the groups' scalars, in which the inner methods stand."""
    inner = {"bc": scalarization.sum(), "pde": scalarization.geometric_mean()}
    method, outer = mtl.nested(OUTER[name], inner), OUTER[name]

    def groups_fn(params):
        losses = losses_fn(params)
        return {group: inner[group].apply(inner[group].init(losses[group]), losses[group])[0] for group in inner}

    def step(losses_fn, method, **options):
        grad_fn = mtl.value_and_grad(losses_fn, method, **options)
        (_, state), gradient = jax.jit(lambda: grad_fn(PARAMS, grad_fn.init(PARAMS)))()
        return gradient, state

    gradient, state = step(losses_fn, method)
    expected, outer_state = step(groups_fn, outer)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4)
    chex.assert_trees_all_close(state.outer, outer_state, rtol=1e-4)
    if outer.gramian_weighting is not None:
        chex.assert_trees_all_close(step(losses_fn, method, rows="two_pass")[0], expected, rtol=1e-4)


@pytest.mark.parametrize("wrap", [mtl.skip_nonfinite, mtl.skip_zero, mtl.amortize])
def test_wrappers_stand_around_it(wrap):
    method, bare = wrap(mtl.nested(scalarization.famo(), SUMS)), mtl.nested(scalarization.famo(), SUMS)
    weights, _ = weights_and_state(method, method.init(LOSSES), LOSSES)
    chex.assert_trees_all_close(weights, weights_and_state(bare, bare.init(LOSSES), LOSSES)[0], rtol=1e-6)


def test_guards_inside_hear_of_a_steps_gradient():
    """The losses are finite, and the gradient of a root at zero is not."""
    guarded = {"bc": mtl.skip_nonfinite(scalarization.uw_so()), "pde": scalarization.sum()}
    method = mtl.nested(mtl.skip_nonfinite(scalarization.famo()), guarded)
    grad_fn = mtl.value_and_grad(
        lambda x: {"bc": jnp.stack([jnp.sqrt(x), x + 1]), "pde": x[None] + 2}, method, hooks=True
    )
    start, step = jax.jit(grad_fn.init)(np.float32(1.0)), jax.jit(grad_fn)
    _, state = step(np.float32(0.0), start)[0]
    assert state.inner["bc"].skipped == state.outer.skipped == 1
    chex.assert_trees_all_equal(
        (state.inner["bc"].inner, state.outer.inner), (start.inner["bc"].inner, start.outer.inner)
    )
    _, state = step(np.float32(4.0), state)[0]
    assert state.inner["bc"].skipped == state.outer.skipped == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: mtl.nested(scalarization.sum(), {"bc": scalarization.sum()}),
            ValueError,
            r"\['bc', 'pde'\].*\['bc'\]",
        ),
        (lambda: mtl.nested(scalarization.sum(), {}), ValueError, "inner: expected a dict"),
        (lambda: mtl.nested(scalarization.sum(), {"bc": aggregation.sum()}), TypeError, r"inner\['bc'\]: .*Scalarizer"),
        (lambda: mtl.nested(scalarization.uw(), SUMS), ValueError, "outer: .*learn"),
        (
            lambda: mtl.nested(scalarization.sum(), SUMS | {"bc": scalarization.uw()}),
            ValueError,
            r"inner\['bc'\]: .*learn",
        ),
        (lambda: mtl.nested(aggregation.excess_mtl(), SUMS), ValueError, "outer: .*remembers no gradients"),
        (lambda: mtl.nested(aggregation.graddrop(0), SUMS), ValueError, "outer: .*makes weights"),
    ],
)
def test_errors_name_what_is_wrong(make, error, message):
    with pytest.raises(error, match=message):
        make().init(LOSSES)


def test_losses_without_names_have_no_groups():
    method, expected = mtl.nested(scalarization.sum(), SUMS), r"expected losses with names, the first of which are .*bc"
    for given in 5, np.ones(5, np.float32):
        with pytest.raises(ValueError, match=f"losses: {expected}.* grad_fn.init"):
            method.init(given)
    with pytest.raises(ValueError, match=f"values: {expected}"):
        method.apply(jax.eval_shape(lambda: method.init(LOSSES)), np.ones(5, np.float32))


def test_a_state_for_other_groups_is_refused_and_the_right_one_is_not():
    """Both have as many losses: what a state should be like depends on their names too."""
    method = mtl.nested(scalarization.sum(), {"bc": scalarization.dwa(), "pde": scalarization.sum()})
    few, many = ({"bc": np.ones(n, np.float32), "pde": np.ones(4 - n, np.float32)} for n in (1, 3))
    apply = lambda of, losses: jax.eval_shape(lambda: method.apply(method.init(of), losses))
    apply(few, few)
    with pytest.raises(ValueError, match=r"state.inner\['bc'\].*expected shape \(1,\)"):
        apply(many, few)
    apply(many, many)


def test_narrow_gradients_are_added_up_in_float32():
    """In float16 one over a small loss, times a gradient, is infinite; and the Gramian is not."""
    losses = {"bc": {"left": 1e-6, "right": 2e-6}, "pde": np.ones(1, np.float32)}
    inner = {"bc": scalarization.scale_invariant(), "pde": scalarization.sum()}
    method = mtl.nested(aggregation.mgda(), inner)
    rows = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, -3.0]], np.float16)
    losses_fn = lambda params: jax.tree.map(lambda x: x * jnp.sum(params), losses)

    @jax.jit
    def on_both_paths(rows):
        state = mtl.value_and_grad(losses_fn, method).init(np.ones(2, np.float32))
        found, _ = method.weighting.apply(state, rows, values=losses)
        return found, method.gramian_weighting.apply(state, mtl.gramian.gramian(rows), values=losses)[0]

    found, expected = on_both_paths(rows)
    assert np.all(np.isfinite(found))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# A training step.


def pointwise_fn(n_points):
    """Residuals at many points, and two losses."""
    points = np.linspace(0, 1, n_points, dtype=np.float32)

    def losses_fn(params, shift=0.0):
        at_points = jnp.square(jnp.tanh(jnp.outer(points, params["w"]) - shift).sum(1) - jnp.sin(points))
        return {"bc": jnp.square(params["w"][:2] - 1.0), "pde": at_points}

    return losses_fn


POINTWISE = {"bc": scalarization.sum(), "pde": scalarization.causal(0.1, n_chunks=4)}


def test_a_step_keeps_a_row_for_each_group_and_none_for_each_point():
    """As one of a function that returns the groups' scalars: a row of each point would be twice as much or more."""
    params, losses_fn = {"w": np.ones(1000, np.float32)}, pointwise_fn(100)

    def groups_fn(params):
        losses = losses_fn(params)
        return {name: method.apply(method.init(losses[name]), losses[name])[0] for name, method in POINTWISE.items()}

    def kept(losses_fn, method):
        grad_fn = mtl.value_and_grad(losses_fn, method, rows="vmap")
        compiled = jax.jit(grad_fn).lower(params, jax.eval_shape(grad_fn.init, params)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    outer = aggregation.mgda()
    assert kept(losses_fn, mtl.nested(outer, POINTWISE)) <= 1.2 * kept(groups_fn, outer)


@pytest.mark.parametrize("outer", [scalarization.famo(), aggregation.grad_norm_weights()], ids=["famo", "grad_norm"])
def test_the_outer_weights_alone_are_taken_again(outer):
    """As those of tasks are, every thousand steps, while the weights of points follow every step."""
    method, losses_fn = mtl.nested(mtl.amortize(outer), POINTWISE), pointwise_fn(8)
    grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True, hooks=True)
    step = jax.jit(grad_fn)
    (_, state, _), _ = jax.device_get(step(PARAMS, jax.jit(grad_fn.init)(PARAMS), 0.0, refresh=np.array(True)))
    (losses, again, weights), grads = jax.device_get(step(PARAMS, state, 0.5, refresh=np.array(False)))
    chex.assert_trees_all_equal(again.outer.last_weights, state.outer.last_weights)
    inside, pde = weights_and_state(POINTWISE["pde"], state.inner["pde"], losses["pde"])
    chex.assert_trees_all_close(again.inner["pde"], pde, rtol=1e-6)
    np.testing.assert_allclose(weights["pde"], state.outer.last_weights[1] * np.asarray(inside), rtol=1e-5)
    np.testing.assert_allclose(weights["bc"], np.full(2, state.outer.last_weights[0]), rtol=1e-6)
    of_weighted = lambda params: sum(jnp.sum(weights[k] * x) for k, x in losses_fn(params, 0.5).items())
    chex.assert_trees_all_close(grads, jax.jit(jax.grad(of_weighted))(PARAMS), rtol=1e-4)
    (_, anew, _), _ = step(PARAMS, state, 0.5, refresh=np.array(True))
    assert not np.allclose(anew.outer.last_weights, state.outer.last_weights, rtol=1e-3)


def test_a_step_of_scalarizers_may_be_differentiated_in_turn():
    """As without groups: their weights are functions of the losses."""
    method = mtl.nested(
        scalarization.geometric_mean(), {"bc": scalarization.mean(), "pde": scalarization.geometric_mean()}
    )
    grad_fn, state = mtl.value_and_grad(losses_fn, method), method.init(LOSSES)
    found = jax.jit(jax.jacrev(lambda w: grad_fn({"w": w}, state)[1]["w"]))(PARAMS["w"])
    expected = jax.jit(jax.hessian(lambda w: method.apply(state, losses_fn({"w": w}))[0]))(PARAMS["w"])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_frozen_are_the_groups_last_weights_and_those_inside_for_these_losses():
    method, losses_fn = mtl.nested(mtl.amortize(aggregation.grad_norm_weights()), POINTWISE), pointwise_fn(8)
    grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True)

    @jax.jit
    def kept_and_frozen():
        (_, state, _), _ = grad_fn(PARAMS, grad_fn.init(PARAMS), refresh=True)
        (losses, _, weights), _ = grad_fn(PARAMS, state, 0.5, refresh=False)
        frozen = mtl.freeze(method, state, losses)
        return weights, jax.grad(frozen.apply, argnums=1, has_aux=True)(frozen.init(losses), losses)[0], state

    weights, found, state = kept_and_frozen()
    chex.assert_trees_all_close(found, weights, rtol=1e-6)
    with pytest.raises(ValueError, match="method: expected an aggregator that keeps its weights"):
        mtl.freeze(method, state)
