"""``aggregate`` beside the rest of optax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

PARAMS = {"trunk": {"w": np.ones((3, 2), np.float32), "b": np.zeros(2, np.float32)}, "head": np.ones(4, np.float32)}


def jacobian(seed, n_tasks=3, params=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: np.float32(rng.normal(size=(n_tasks, *p.shape))), params)


def run(optimizer, n_steps=4, params=PARAMS):
    update, state, path = jax.jit(optimizer.update), jax.jit(optimizer.init)(params), []
    for i in range(n_steps):
        updates, state = update(jacobian(i), state, params)
        path.append(updates)
    return path, state


def first_update(optimizer, jacobian, params=PARAMS):
    return jax.jit(lambda x, params: optimizer.update(x, optimizer.init(params), params)[0])(jacobian, params)


def test_matrix_tree_rows_and_chain_give_the_same_update():
    method = aggregation.excess_mtl(robust_step_size=0.3)
    adam = optax.adam(1e-3)
    chained, _ = run(optax.chain(mtl.aggregate(method, n_tasks=3), adam))

    flat = lambda tree: jnp.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(tree)], axis=1)

    @jax.jit
    def all_ways(matrix_state, tree_state, rows_state, adam_state, x):
        from_matrix, matrix_state = method.apply(matrix_state, flat(x))
        from_tree, tree_state = method.apply(tree_state, x)
        visit = lambda state, i: method.rowwise.visit(state, i, jax.tree.map(lambda leaf: leaf[i], x))
        rows_state, excess = jax.lax.scan(visit, rows_state, jnp.arange(3))
        weights, rows_state = method.rowwise.weigh(rows_state, excess)
        from_rows = mtl.gramian.combine(weights, x)
        updates, adam_state = adam.update(from_tree, adam_state, PARAMS)
        return (from_matrix, from_tree, from_rows, updates), (matrix_state, tree_state, rows_state, adam_state)

    states = method.init((3, 12)), method.init((3, PARAMS)), method.init((3, PARAMS)), jax.jit(adam.init)(PARAMS)
    for i, expected in enumerate(chained):
        (from_matrix, from_tree, from_rows, updates), states = jax.device_get(all_ways(*states, jacobian(i)))
        chex.assert_trees_all_close(from_rows, from_tree, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            from_matrix, np.concatenate([g.ravel() for g in jax.tree.leaves(from_tree)]), rtol=1e-5, atol=1e-6
        )
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-8)


def test_values_and_mask_reach_the_method_and_unknown_arguments_do_not():
    guarded = mtl.skip_nonfinite(aggregation.mean())
    optimizer = optax.chain(mtl.aggregate(guarded, n_tasks=3), optax.sgd(1.0))
    x, state, update = jacobian(0), jax.jit(optimizer.init)(PARAMS), jax.jit(optimizer.update)
    mask, values = np.array([True, False, True]), np.float32([1.0, np.nan, 1.0])
    updates, _ = update(x, state, PARAMS, values=values, mask=mask, other=1)
    expected = jax.tree.map(lambda leaf: -(leaf[0] + leaf[2]) / 2, x)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    updates, _ = update(x, state, PARAMS, values=values)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(updates))


def test_map_params_sees_the_accumulator_as_parameters():
    optimizer = mtl.aggregate(aggregation.excess_mtl(), n_tasks=3)
    state = optimizer.init(PARAMS)
    marked = optax.tree.map_params(optimizer, lambda leaf: leaf + 1, state, transform_non_params=lambda leaf: leaf)
    chex.assert_trees_all_equal(
        marked, state._replace(squared_gradients=jax.tree.map(lambda s: s + 1, state.squared_gradients))
    )


def test_partition_with_an_aggregated_a_plain_and_an_empty_group():
    groups = {
        "shared": optax.chain(mtl.aggregate(aggregation.excess_mtl(), n_tasks=3), optax.sgd(1.0)),
        "heads": optax.sgd(1.0),
        "nothing": optax.chain(mtl.aggregate(aggregation.excess_mtl(), n_tasks=3), optax.sgd(1.0)),
    }
    labels = {"trunk": "shared", "head": "heads"}
    optimizer = optax.partition(groups, labels)
    x = {"trunk": jacobian(0)["trunk"], "head": np.ones(4, np.float32)}
    state, update = jax.jit(optimizer.init)(PARAMS), jax.jit(optimizer.update)
    for _ in range(2):
        updates, state = update(x, state, PARAMS)
    expected = jax.tree.map(lambda leaf: -leaf.mean(0), x["trunk"])
    chex.assert_trees_all_equal(updates["head"], -x["head"])
    chex.assert_trees_all_close(updates["trunk"], expected, rtol=1e-5, atol=1e-6)  # equal gradients, equal weights


def test_masked_and_named_chain():
    masked = optax.masked(mtl.aggregate(aggregation.mean(), n_tasks=3), {"trunk": True, "head": False})
    optimizer = optax.named_chain(("aggregate", masked), ("step", optax.sgd(1.0)))
    x = jacobian(0)["trunk"]
    updates = first_update(optimizer, {"trunk": x, "head": np.ones(4, np.float32)})
    chex.assert_trees_all_close(updates["trunk"], jax.tree.map(lambda leaf: -leaf.mean(0), x), rtol=1e-6)


def test_inject_hyperparams_under_jit():
    build = lambda robust_step_size: mtl.aggregate(aggregation.excess_mtl(robust_step_size), n_tasks=3)
    optimizer = optax.inject_hyperparams(build)(robust_step_size=0.3)
    injected, state = run(optimizer)
    plain, plain_state = run(build(0.3))
    chex.assert_trees_all_close(injected, plain, rtol=1e-5, atol=1e-6)
    state.hyperparams["robust_step_size"] = np.float32(2.0)
    changed, _ = jax.jit(optimizer.update)(jacobian(9), state, PARAMS)
    expected, _ = jax.jit(build(2.0).update)(jacobian(9), plain_state, PARAMS)
    chex.assert_trees_all_close(changed, expected, rtol=1e-5, atol=1e-6)


def test_n_tasks_must_be_static():
    build = lambda n_tasks: mtl.aggregate(aggregation.mean(), n_tasks)
    with pytest.raises(TypeError, match=r"n_tasks: expected an int .*static_args"):
        optax.inject_hyperparams(build)(n_tasks=3).init(PARAMS)
    assert optax.inject_hyperparams(build, static_args="n_tasks")(n_tasks=3).init(PARAMS)


def test_state_is_found_by_name_in_a_chain():
    optimizer = optax.chain(mtl.aggregate(aggregation.excess_mtl(), n_tasks=3), optax.adam(1e-3))
    state = optimizer.init(PARAMS)
    np.testing.assert_allclose(np.exp(optax.tree.get(state, "log_weights")), np.full(3, 1 / 3), rtol=1e-6)


def test_a_jacobian_of_other_parameters_raises():
    optimizer = mtl.aggregate(aggregation.mean(), n_tasks=3)
    state, x = optimizer.init(PARAMS), jacobian(0)
    with pytest.raises(ValueError, match=r"jacobian\['head'\]: expected shape \(3, 4\), found shape \(3, 5\)"):
        optimizer.update(x | {"head": np.ones((3, 5), np.float32)}, state, PARAMS)
    with pytest.raises(ValueError, match="jacobian: expected the params' tree"):
        optimizer.update(x["trunk"], state, PARAMS)


def test_a_scalarizer_is_refused():
    with pytest.raises(TypeError, match=r"aggregator: expected an mtlbalance.Aggregator, found Scalarizer"):
        mtl.aggregate(scalarization.mean(), n_tasks=3)


# What may surround an aggregator, and what may not.


def for_each_task(transformation, n_tasks=3):
    """The guide's recipe."""
    return mtl.per_task(transformation, n_tasks)


# 500 and 0.5 long: to a length of 1 each they add up to [0.9, 1.2].
LONG_AND_SHORT = np.float32([[300.0, 400.0], [0.3, 0.4]])


def test_a_global_norm_clip_before_the_aggregator_is_of_all_tasks_together():
    """It runs, but the short gradient goes under; for each task by itself it is another number."""
    params, aggregate = np.zeros(2, np.float32), mtl.aggregate(aggregation.sum(), n_tasks=2)
    clip = optax.clip_by_global_norm(1.0)
    found = {}
    for name, links in {
        "before": (clip, aggregate),
        "each": (for_each_task(clip, 2), aggregate),
        "after": (aggregate, clip),
    }.items():
        found[name] = first_update(optax.chain(*links), LONG_AND_SHORT, params)
    stacked = np.sqrt(np.sum(LONG_AND_SHORT**2))
    np.testing.assert_allclose(found["before"], LONG_AND_SHORT.sum(0) / stacked, rtol=1e-6)
    np.testing.assert_allclose(found["before"], [0.6, 0.8], atol=2e-3)
    np.testing.assert_allclose(found["each"], [0.9, 1.2], rtol=1e-6)
    np.testing.assert_allclose(found["after"], [0.6, 0.8], rtol=1e-6)


def test_an_adaptive_clip_before_the_aggregator_raises_and_is_made_for_each_task():
    """It compares with the parameters' norms: of 5 here, so that a norm of 500 becomes 0.1 times that."""
    params, aggregate = np.float32([3.0, 4.0]), mtl.aggregate(aggregation.sum(), n_tasks=2)
    clip = optax.adaptive_grad_clip(0.1)
    optimizer = optax.chain(clip, aggregate)
    with pytest.raises(ValueError, match=r"Shape mismatch|shapes"):
        optimizer.update(LONG_AND_SHORT, optimizer.init(params), params)
    updates = first_update(optax.chain(for_each_task(clip, 2), aggregate), LONG_AND_SHORT, params)
    np.testing.assert_allclose(updates, [0.3 + 0.3, 0.4 + 0.4], rtol=1e-5)


OF_EACH_NUMBER = {
    "clip": optax.clip(0.5),
    "scale": optax.scale(-3.0),
    "scale_by_sign": optax.scale_by_sign(),
    "scale_by_learning_rate": optax.scale_by_learning_rate(0.1),
    "zero_nans": optax.zero_nans(),
    "identity": optax.identity(),
    "stateless": optax.stateless(lambda rows, params: jax.tree.map(jnp.cbrt, rows)),
    "masked": optax.masked(optax.clip(0.5), {"trunk": True, "head": False}),
    "partition": optax.partition({"a": optax.clip(0.5), "b": optax.scale(2.0)}, {"trunk": "a", "head": "b"}),
}


@pytest.mark.parametrize("transformation", OF_EACH_NUMBER.values(), ids=OF_EACH_NUMBER)
def test_what_treats_every_number_by_itself_may_stand_before_the_aggregator(transformation):
    """It is then the same for each task, and its state stays as it was made."""
    optimizer = optax.chain(transformation, mtl.aggregate(aggregation.sum(), n_tasks=3))
    each = optax.chain(for_each_task(transformation), mtl.aggregate(aggregation.sum(), n_tasks=3))
    x = jacobian(0)
    x["head"][1, 2] = np.nan

    @jax.jit
    def both(x):
        state = optimizer.init(PARAMS)
        return (state, *optimizer.update(x, state, PARAMS), each.update(x, each.init(PARAMS), PARAMS)[0])

    state, updates, new_state, of_each = both(x)
    chex.assert_trees_all_equal(updates, of_each)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


# What is not: of all rows, or of what it takes for the parameter's axes.
OF_ALL_ROWS = {
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(0.5),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "centralize": optax.centralize(),
}


@pytest.mark.parametrize("transformation", OF_ALL_ROWS.values(), ids=OF_ALL_ROWS)
def test_what_takes_all_rows_for_one_gradient_is_another_thing_for_each_task(transformation):
    optimizer = optax.chain(transformation, mtl.aggregate(aggregation.sum(), n_tasks=3))
    each = optax.chain(for_each_task(transformation), mtl.aggregate(aggregation.sum(), n_tasks=3))
    updates, expected = (jax.tree.leaves(jax.device_get(first_update(x, jacobian(0)))) for x in (optimizer, each))
    norm = lambda leaves: np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))
    assert norm(map(np.subtract, updates, expected)) > 0.1 * norm(expected)


def test_an_optimizer_before_the_aggregator_changes_the_shape_of_its_state():
    """Its moments are made for the params, and grow a task axis: nothing here can see that."""
    optimizer = optax.chain(optax.scale_by_adam(), mtl.aggregate(aggregation.sum(), n_tasks=3))
    state = jax.eval_shape(optimizer.init, PARAMS)
    with jax.numpy_rank_promotion("allow"):
        _, new_state = jax.eval_shape(optimizer.update, jacobian(0), state, PARAMS)
    assert optax.tree.get(state, "mu")["head"].shape == (4,)
    assert optax.tree.get(new_state, "mu")["head"].shape == (3, 4)


def test_steps_are_accumulated_after_the_aggregator():
    """Each micro-batch is aggregated, and the gradients are averaged."""
    aggregator = mtl.aggregate(aggregation.mgda(), n_tasks=3)
    optimizer = optax.chain(aggregator, optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    (first, second), _ = run(optimizer, n_steps=2)
    chex.assert_trees_all_equal(first, jax.tree.map(np.zeros_like, PARAMS))
    gradients = jax.device_get([first_update(aggregator, jacobian(i)) for i in range(2)])
    expected = jax.tree.map(lambda a, b: -(a + b) / 2, *gradients)
    chex.assert_trees_all_close(second, expected, rtol=1e-5, atol=1e-6)


# Two of them hand on other updates than they are given, which the aggregator sees. The others raise by themselves.
BRANCHES = TypeError, "cond branches must have equal output types"
AROUND = {
    "MultiSteps": (
        lambda inner: optax.MultiSteps(inner, 2).gradient_transformation(),
        (ValueError, r"jacobian\['head'\]: expected a leading axis of 3, one row per task .*MultiSteps"),
    ),
    "flatten": (optax.flatten, (ValueError, "jacobian: expected a leading axis of 3, one row per task .*flatten")),
    "apply_if_finite": (lambda inner: optax.apply_if_finite(inner, 3), BRANCHES),
    "conditionally_transform": (lambda inner: optax.conditionally_transform(inner, lambda step: step > 1), BRANCHES),
}


@pytest.mark.parametrize(("wrap", "expected"), AROUND.values(), ids=AROUND)
def test_what_expects_updates_shaped_like_the_params_must_not_surround_an_aggregator(wrap, expected):
    error, message = expected
    optimizer = wrap(optax.chain(mtl.aggregate(aggregation.mean(), n_tasks=3), optax.sgd(1.0)))
    with pytest.raises(error, match=message):
        run(optimizer, n_steps=1)


AFTER = {
    "flatten": optax.flatten,
    "apply_if_finite": lambda inner: optax.apply_if_finite(inner, 3),
    "conditionally_transform": lambda inner: optax.conditionally_transform(inner, lambda step: step >= 0),
}


@pytest.mark.parametrize("wrap", AFTER.values(), ids=AFTER)
def test_they_may_follow_it(wrap):
    adam, aggregate = optax.adam(1e-2), mtl.aggregate(aggregation.mean(), n_tasks=3)
    wrapped, _ = run(optax.chain(aggregate, wrap(adam)))
    plain, _ = run(optax.chain(aggregate, adam))
    chex.assert_trees_all_close(wrapped, plain, rtol=1e-6)


def test_groups_with_a_state_of_their_own_and_plain_heads():
    """One group is the whole model; with heads that get the plain sum, the trunk alone is as ``shared=`` has it."""

    def losses_fn(params):
        features = jnp.tanh(jnp.arange(3.0) @ params["trunk"]["w"] + params["trunk"]["b"])
        return jnp.array([1.0, 5.0]) * (features @ params["head"].reshape(2, 2) - jnp.array([3.0, -4.0])) ** 2

    method, n_tasks = aggregation.upgrad(), 2
    grouped = {
        "balanced": mtl.aggregate(method, n_tasks=n_tasks),
        "plain": optax.stateless(lambda rows, params: jax.tree.map(lambda leaf: leaf.sum(0), rows)),
    }

    def both(head):
        _, x = mtl.value_and_jac(losses_fn)(PARAMS)
        optimizer = optax.partition(grouped, {"trunk": "balanced", "head": head})
        updates, _ = optimizer.update(x, optimizer.init(PARAMS), PARAMS)
        shared = {"trunk": True, "head": head == "balanced"}
        state = method.init((n_tasks, mtl.subset(PARAMS, shared)))
        _, expected = mtl.value_and_grad(losses_fn, method, shared=shared)(PARAMS, state)
        return updates, expected

    for updates, expected in jax.jit(lambda: [both(head) for head in ("balanced", "plain")])():
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)
