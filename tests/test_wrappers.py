"""``learn`` trains as one optimizer would; ``skip_nonfinite`` keeps states clean."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.catalogue import following

pytestmark = pytest.mark.unoptimized


def smooth_losses(params):
    """Three positive losses of one vector, of different curvature and scale."""
    targets = np.array([[1.0, -1.0], [0.0, 2.0], [3.0, 0.5]], np.float32)
    return np.array([0.5, 2.0, 20.0], np.float32) * (0.1 + jnp.sum((params[None] - targets) ** 2, axis=1))


FAMO, DWA = scalarization.famo(), scalarization.dwa()
NEEDS = {
    "skip_nonfinite": mtl.skip_nonfinite(FAMO),
    "skip_zero": mtl.skip_zero(FAMO),
    "amortize": mtl.amortize(FAMO),
    "checked": mtl.checked(FAMO),
    "prioritize": mtl.prioritize(FAMO, 2.0),
    "regularize": mtl.regularize(FAMO, {0: 1.0}),
    "transform_weights": mtl.transform_weights(FAMO, optax.scale(2.0)),
    "nested": mtl.nested(scalarization.sum(), {"a": FAMO, "b": scalarization.sum()}),
    "nested outside": mtl.nested(FAMO, {"a": scalarization.sum()}),
    "chain": mtl.chain(FAMO, aggregation.mgda()),
    "transform_rows": mtl.transform_rows(mtl.chain(FAMO, aggregation.mgda()), optax.scale(2.0)),
    "cr_mogm": aggregation.cr_mogm(mtl.chain(FAMO, aggregation.mgda())),
    "switch": mtl.switch((scalarization.sum(), FAMO))(0),
}


@pytest.mark.parametrize("name", NEEDS)
def test_the_hooks_that_a_method_needs_are_needed_around_it(name):
    assert NEEDS[name].needs == ("observe",)
    with pytest.raises(ValueError, match=r"^hooks: expected True"):
        mtl.value_and_grad(smooth_losses, NEEDS[name])


def test_several_methods_need_what_each_does():
    assert mtl.chain(FAMO, mtl.chain(DWA, aggregation.mgda())).needs == mtl.switch((DWA, FAMO))(0).needs
    assert mtl.switch((DWA, FAMO))(0).needs == ("observe", "end_epoch")
    assert mtl.freeze(FAMO, FAMO.init(2), jnp.ones(2)).needs == mtl.skip_nonfinite(scalarization.sum()).needs == ()


@pytest.mark.parametrize("factory", [scalarization.uw, scalarization.imtl_l])
@pytest.mark.parametrize(("optimizer", "tolerance"), [(optax.sgd(1e-2), 1e-6), (optax.adam(1e-2), 1e-5)])
def test_learn_and_joint_training_agree_over_200_steps(factory, optimizer, tolerance):
    """Tolerances: one update rule in two programs, 200 float32 roundings apart."""
    method = factory()
    learned = mtl.learn(method, optimizer)

    def joint_step(carry, _):
        trained, opt_state = carry
        scalar = lambda trained: method.apply(trained[1], smooth_losses(trained[0]))
        grads, _ = jax.grad(scalar, has_aux=True)(trained)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        return (trained, opt_state), trained

    def learn_step(carry, _):
        params, state, opt_state = carry
        scalar = lambda params: learned.apply(state, smooth_losses(params))
        grads, state = jax.grad(scalar, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, state, opt_state), (params, state.inner)

    params = np.array([0.3, -0.7], np.float32)

    @jax.jit
    def paths():
        joint = (params, method.init(3))
        _, joint_path = jax.lax.scan(joint_step, (joint, optimizer.init(joint)), length=200)
        _, learn_path = jax.lax.scan(learn_step, (params, learned.init(3), optimizer.init(params)), length=200)
        return joint_path, learn_path

    joint_path, learn_path = jax.device_get(paths())
    chex.assert_trees_all_close(learn_path, joint_path, rtol=tolerance, atol=tolerance)
    assert np.abs(joint_path[0][-1] - params).max() > 0.1  # something was learned


def test_learn_gives_optimizers_the_value_the_gradient_and_the_function():
    def update(updates, state, params, *, value, grad, value_fn, **extra_args):
        del extra_args
        return jax.tree.map(jnp.negative, updates), (value, grad["log_var"], value_fn(params))

    asks = optax.GradientTransformationExtraArgs(lambda params: (jnp.zeros(()), jnp.zeros(2), jnp.zeros(())), update)
    method = mtl.learn(scalarization.uw(), asks)
    scalar, state = jax.jit(lambda: method.apply(method.init(2), np.array([1.0, 4.0], np.float32)))()
    value, grad, again = state.opt_state
    assert value == again == scalar == 2.5
    np.testing.assert_array_equal(grad, [0.0, -1.5])


def test_learn_works_with_a_line_search_and_with_injected_hyperparameters():
    for optimizer in optax.lbfgs(), optax.inject_hyperparams(optax.adam)(learning_rate=0.1), optax.polyak_sgd():
        method = mtl.learn(scalarization.uw(), optimizer)
        state, losses = jax.jit(lambda method=method: method.init(2))(), np.array([1.0, 4.0], np.float32)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(method.apply, state, losses)[1])
        first, _ = method.apply(state, losses)
        step = jax.jit(jax.grad(method.apply, argnums=1, has_aux=True))  # inside somebody's gradient, as always
        for _ in range(20):
            weights, state = step(state, losses)
        last, _ = method.apply(state, losses)
        assert last < first
        assert weights[0] > weights[1]


def test_learn_keeps_an_absent_tasks_field_and_moments():
    method = mtl.learn(scalarization.uw(), optax.adam(0.1))
    _, state = method.apply(method.init(2), np.array([3.0, 5.0], np.float32))
    _, new = method.apply(state, np.array([3.0, np.nan], np.float32), mask=np.array([True, False]))
    new, state = jax.device_get((new, state))
    moments = lambda state: (state.opt_state[0].mu["log_var"], state.opt_state[0].nu["log_var"], state.inner.log_var)
    for after, before in zip(moments(new), moments(state), strict=True):
        assert after[1] == before[1]
        assert after[0] != before[0]


def test_learn_under_a_mask_is_learn_on_the_present_tasks_whatever_the_optimizer_remembers():
    """As many memories as tasks: a leaf of that length need not have one entry per task."""
    method = mtl.learn(scalarization.uw(), optax.lbfgs(0.1, memory_size=4, linesearch=None))
    masked, alone = method.init(4), method.init(3)
    mask, present = np.array([True, True, True, False]), slice(3)
    for seed in range(6):
        values = np.random.default_rng(seed).uniform(0.5, 3.0, 4).astype(np.float32)
        masked = method.apply(masked, values, mask=mask)[1]
        alone = method.apply(alone, values[present])[1]
    np.testing.assert_allclose(masked.inner.log_var[present], alone.inner.log_var, rtol=1e-4, atol=1e-5)


def test_learn_needs_learned_fields():
    for wrong in scalarization.mean(), aggregation.mean(), mtl.learn(scalarization.uw(), optax.sgd(0.1)):
        with pytest.raises(ValueError, match="method: expected a Scalarizer with learned fields"):
            mtl.learn(wrong, optax.sgd(0.1))


def test_learn_goes_inside_skip_nonfinite():
    with pytest.raises(ValueError, match=r"method: expected .* skip_nonfinite\(learn\(method, optimizer\)\)"):
        mtl.skip_nonfinite(scalarization.uw())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_loss_leaves_the_state_and_shows_in_the_output(bad):
    method = mtl.skip_nonfinite(scalarization.dwa(steps_per_epoch=2))
    good = method.apply(method.init(3), np.array([1.0, 2.0, 3.0], np.float32))[1]
    scalar, state = method.apply(good, np.array([1.0, bad, 3.0], np.float32))
    assert not np.isfinite(scalar)
    chex.assert_trees_all_equal(state.inner, good.inner)
    np.testing.assert_array_equal(state.nonfinite, [0, 1, 0])
    assert state.skipped == 1
    assert np.isfinite(method.apply(state, np.ones(3, np.float32))[0])


def test_without_the_guard_a_bad_loss_poisons():
    method = scalarization.dwa(steps_per_epoch=1)
    state = method.apply(method.init(2), np.array([1.0, np.nan], np.float32))[1]
    ones = np.ones(2, np.float32)
    assert not np.isfinite(method.apply(method.apply(state, ones)[1], ones)[0])


@pytest.mark.parametrize(
    ("method", "losses"),
    [
        (scalarization.mean(), lambda p: p**2),  # the loss overflows, its gradient does not
        (mtl.learn(scalarization.uw(), optax.adam(0.1)), lambda p: p * 1e10),  # the moments overflow, the loss does not
    ],
)
def test_a_skipped_call_gives_a_gradient_that_is_not_finite(method, losses):
    guarded = mtl.skip_nonfinite(method)
    grad = jax.jit(jax.grad(lambda p: guarded.apply(guarded.init(2), losses(p)), has_aux=True))
    grads, state = grad(np.full(2, 1e20, np.float32))
    assert np.all(np.isnan(grads))
    assert state.skipped == 1


def wrap_in_learn(method):
    return mtl.learn(method._replace(learned=("level",)), optax.sgd(0.0))


@pytest.mark.parametrize("wrap", [lambda method: method, mtl.skip_nonfinite, wrap_in_learn])
def test_hooks_reach_the_method(wrap):
    method = wrap(following())
    level = lambda state: optax.tree.get(state, "level")
    state = method.init(2)
    observed = method.observe(state, np.array([3.0, 5.0], np.float32))
    np.testing.assert_array_equal(level(observed), [2.0, 3.0])
    counted = mtl.Counted(np.array([6.0, np.nan], np.float32), np.array([2, 0], np.int32))
    np.testing.assert_array_equal(level(method.observe(state, counted)), [2.0, 1.0])
    np.testing.assert_array_equal(level(method.end_epoch(observed)), [1.0, 1.5])


def test_a_bad_loss_does_not_reach_observe_under_the_guard():
    method = mtl.skip_nonfinite(following())
    state = method.init(2)
    chex.assert_trees_all_equal(method.observe(state, np.array([1.0, np.nan], np.float32)), state)


def test_an_optimizer_that_starts_at_infinity_is_not_skipped():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(accumulation_size=5))
    method = mtl.skip_nonfinite(mtl.learn(scalarization.uw(), optimizer))
    state = method.init(2)
    for _ in range(12):
        scalar, state = method.apply(state, np.array([1.0, 4.0], np.float32))
    assert state.skipped == 0
    assert np.isfinite(scalar)
    assert state.inner.inner.log_var[1] > 0.5


def jacobian(bad=0.0):
    """Two tasks' gradients; ``bad`` is added to one entry of the second."""
    return {
        "w": np.array([[1.0, 2.0], [3.0, 4.0 + bad]], np.float32),
        "b": np.array([0.5, -0.25], np.float32),
    }


PARAMS = {"w": np.zeros(2, np.float32), "b": np.float32(0)}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25, 1e19])  # squares of the last two overflow, alone or in sum
def test_a_bad_gradient_leaves_the_small_state_and_its_own_row(bad):
    method = mtl.skip_nonfinite(aggregation.excess_mtl())
    bare = aggregation.excess_mtl()
    good = method.apply(method.init((2, PARAMS)), jacobian())[1]
    gradient, state = method.apply(good, jacobian(bad))
    state, good = jax.device_get((state, good))
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(gradient))
    small = lambda state: state._replace(squared_gradients=None)
    chex.assert_trees_all_equal(small(state.inner), small(good.inner))
    squares, before = state.inner.squared_gradients, good.inner.squared_gradients
    np.testing.assert_array_equal(squares["w"][1], before["w"][1])
    np.testing.assert_array_equal(squares["w"][0], 2 * before["w"][0])  # the good row took its gradient in
    np.testing.assert_array_equal(state.nonfinite, [0, 1])
    assert state.skipped == 1
    recovered, _ = method.apply(state, jacobian())
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(recovered))
    unguarded = good.inner  # what the guard is for
    for _ in range(4):
        unguarded = bare.apply(unguarded, jacobian(bad))[1]
    assert not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(unguarded))


@pytest.mark.parametrize("bad", [np.nan, 1e25, 1e19])
@pytest.mark.by_default("nan")
def test_all_guarded_paths_agree_on_a_bad_gradient(bad):
    for method in mtl.skip_nonfinite(aggregation.excess_mtl()), mtl.skip_nonfinite(aggregation.mean()):
        start = method.apply(method.init((2, PARAMS)), jacobian())[1]
        x = jacobian(bad)
        _, state = method.apply(start, x)
        states = [method.weighting.apply(start, x)]
        if method.gramian_weighting is not None:
            states.append(method.gramian_weighting.apply(start, mtl.gramian.gramian(x)))
        if method.rowwise is not None:
            visited, statistics = start, []
            for i in range(2):
                visited, statistic = method.rowwise.visit(visited, i, jax.tree.map(lambda leaf, i=i: leaf[i], x))
                statistics.append(statistic)
            statistics = jax.tree.map(lambda *leaves: np.stack(leaves), *statistics)
            states.append(method.rowwise.weigh(visited, statistics))
        for weights, path_state in states:
            assert np.all(np.isnan(weights))
            chex.assert_trees_all_equal(path_state, state)


def test_a_bad_gradient_is_dropped_by_apply_if_finite_after_the_guard():
    guarded = mtl.aggregate(mtl.skip_nonfinite(aggregation.excess_mtl()), n_tasks=2)
    optimizer = optax.chain(guarded, optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=3))
    state, update = jax.jit(optimizer.init)(PARAMS), jax.jit(optimizer.update)
    updates, state = update(jacobian(np.nan), state, PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(np.zeros_like, PARAMS))
    updates, state = update(jacobian(), state, PARAMS)
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(updates))


def test_skip_nonfinite_takes_methods_only():
    with pytest.raises(TypeError, match="method: expected a Scalarizer or an Aggregator, found GradientTransf"):
        mtl.skip_nonfinite(optax.sgd(0.1))


def test_a_guarded_scalarizer_reduces_over_no_axis():
    """Its losses are global: the keyword is an aggregator's."""
    method = mtl.skip_nonfinite(scalarization.dwa(), axis_name="devices")
    scalar, state = method.apply(method.init(2), np.array([1.0, 2.0], np.float32))
    assert scalar == 3.0
    assert method.observe(state, np.ones(2, np.float32)).skipped == 0


@pytest.mark.parametrize("rows", ["vmap", 1])
def test_a_call_that_is_skipped_moves_nothing_of_a_method_with_turns(rows):
    """A NaN in one loss makes all rows NaN, as in a shared trunk, also the one that would have its turn then."""
    losses_fn = lambda params, factors: factors * smooth_losses(params)
    grad_fn = mtl.value_and_grad(losses_fn, mtl.skip_nonfinite(aggregation.m_config()), rows=rows)
    params, ones, run = np.array([0.3, -0.2], np.float32), np.ones(3, np.float32), jax.jit(grad_fn)
    state = straight = jax.jit(grad_fn.init)(params, ones)
    spoilt = np.array([1.0, np.nan, 1.0], np.float32), np.array([np.inf, 1.0, 1.0], np.float32)
    for i, bad in enumerate([None, spoilt[0], None, spoilt[1], None, spoilt[0], None, None]):
        (_, state), gradient = run(params + i, state, ones if bad is None else bad)
        if bad is None:
            (_, straight), expected = run(params + i, straight, ones)
            np.testing.assert_array_equal(gradient, expected)
        else:
            assert np.all(np.isnan(gradient))
        chex.assert_trees_all_equal(state.inner, straight.inner)
    assert state.skipped == 3
