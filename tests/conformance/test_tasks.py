"""Absent tasks, counted losses, named losses: what the boundary does for every method."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from tests.conformance.helpers import SAME, assert_path_agrees, scalar_and_gradient

pytestmark = pytest.mark.unoptimized

ALL, NONE, SOME = np.ones(3, bool), np.zeros(3, bool), np.array([True, False, True])


def warmed_up(built):
    """A state that has seen something."""
    return built.apply(built.init(), built.sample(7))[1]


def per_task_leaves(state, n_tasks=3):
    """Leaves with one row per task; PARAMS has no axis of length 3 itself."""
    return [leaf for leaf in jax.tree.leaves(state) if leaf.shape[:1] == (n_tasks,)]


def differs(new, old):
    """For each task, whether its part of a leaf differs."""
    return np.reshape(np.asarray(new) != np.asarray(old), (3, -1)).any(1)


def test_all_true_mask_is_no_mask(built):
    state, x = warmed_up(built), built.sample(0)
    chex.assert_trees_all_close(built.apply(state, x, mask=ALL), built.apply(state, x), **SAME)


@pytest.mark.every_method
def test_all_false_mask_gives_zero_and_the_same_state(built):
    state, x = warmed_up(built), built.sample(0)
    for value in 1.0, jnp.nan:
        output, new_state = built.step(state, built.poison(x, NONE, value), mask=NONE, ends_epoch=False)
        chex.assert_trees_all_equal(output, jax.tree.map(jnp.zeros_like, output))
        chex.assert_trees_all_equal(new_state, state)


@pytest.mark.every_method
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf, 1e30])
def test_an_absent_tasks_value_changes_nothing(built, value):
    state, x = warmed_up(built), built.sample(0)
    clean = built.step(state, x, mask=SOME)
    poisoned = built.step(state, built.poison(x, SOME, value), mask=SOME)
    chex.assert_trees_all_equal(poisoned, clean)
    chex.assert_tree_all_finite(poisoned)


@pytest.mark.every_method
@pytest.mark.cases(lambda built: built.case.fewest_tasks <= 2)
def test_masked_is_the_method_on_the_present_tasks_alone(built):
    tasks = np.array([0, 2])
    alone = built.method_for(tasks)
    masked_state, alone_state = built.init(), built.init(alone, n_tasks=2)
    for i in range(6):
        x = built.sample(i)
        if built.case.draws:  # equal tasks: whatever is drawn, the total must be that of the present ones
            x = jax.tree.map(np.ones_like, x)
        ends_epoch = i % 2 == 1
        masked, masked_state = built.step(masked_state, x, mask=SOME, ends_epoch=ends_epoch)
        expected, alone_state = built.step(alone_state, built.restrict(x, tasks), method=alone, ends_epoch=ends_epoch)
        chex.assert_trees_all_close(masked, expected, **SAME)


@pytest.mark.every_method
@pytest.mark.cases(lambda built: built.case.fewest_tasks <= 2)
@pytest.mark.cases(lambda built: not built.case.own_names)
def test_masked_goes_on_as_the_present_tasks_would_alone(built):
    """Tasks of different ages, then some of them: as the method whose state is theirs."""
    tasks = np.array([0, 2])
    state, alone = built.init(), built.method_for(tasks)
    masks = np.random.default_rng(2).random((9, 3)) < 0.6
    masks[0] = True, True, False
    for i, mask in enumerate(masks):
        _, state = built.step(state, built.sample(20 + i), mask=mask, ends_epoch=i % 3 == 2)
    alone_state = built.restrict_state(state, tasks)
    for i in range(3):
        x = jax.tree.map(np.ones_like, built.sample(i)) if built.case.draws else built.sample(i)
        masked, state = built.step(state, x, mask=SOME)
        expected, alone_state = built.step(alone_state, built.restrict(x, tasks), method=alone)
        chex.assert_trees_all_close(masked, expected, **SAME)


@pytest.mark.every_method
def test_statistics_advance_while_present_and_only_then(built):
    """Over 50 random masks an absent task's part of the state is bit-identical; a present one's moves if any does."""
    masks = np.random.default_rng(0).random((50, 3)) < 0.5
    state, moved = jax.device_get(built.init()), np.zeros(3, bool)
    for i, mask in enumerate(masks):
        x = built.poison(built.sample(i), mask, jnp.nan)
        _, new_state = built.step(state, x, mask=mask, ends_epoch=False)
        new_state = jax.device_get(new_state)
        for new, old in zip(per_task_leaves(new_state), per_task_leaves(state), strict=True):
            np.testing.assert_array_equal(new[~mask], old[~mask])
            moved |= differs(new, old)
        chex.assert_tree_all_finite(new_state)
        state = new_state
    stepped = built.step(built.init(), built.sample(0), ends_epoch=False)[1]
    without_masks = zip(per_task_leaves(stepped), per_task_leaves(built.init()), strict=True)
    np.testing.assert_array_equal(moved, np.any([differs(new, old) for new, old in without_masks], axis=0))
    while hasattr(state, "inner"):
        state = state.inner
    seen = getattr(state, "seen", None)
    if seen is not None:
        np.testing.assert_array_equal(seen, np.where(moved, masks.sum(0), 0))  # of what is no task nothing is seen


@pytest.mark.every_method
@pytest.mark.cases(lambda built: built.case.total)
def test_weights_of_the_tasks_present_add_up_to_their_total(built):
    """Whoever comes and goes."""
    masks = np.random.default_rng(1).random((20, 3)) < 0.5
    masks[:, 0] = True
    state = built.init()
    for i, mask in enumerate(masks):
        x = built.sample(i)
        if built.is_scalarizer:
            _, weights = scalar_and_gradient(built.method)(state, x, mask=mask)
        else:
            weights, _ = built.method.weighting.apply(state, x, values=built.losses(x), mask=mask)
        expected = {"1": 1, "m": mask.sum()}[built.case.total]
        np.testing.assert_allclose(np.sum(weights), expected, rtol=1e-5)
        _, state = built.step(state, x, mask=mask, ends_epoch=i % 3 == 2)


@pytest.mark.every_method
def test_gradient_to_an_absent_value_is_zero_and_to_the_others_finite(scalarizer):
    state, x = warmed_up(scalarizer), scalarizer.poison(scalarizer.sample(0), SOME, jnp.nan)
    _, gradient = scalar_and_gradient(scalarizer.method)(state, x, mask=SOME)
    assert gradient[1] == 0
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: built.method.weighting or built.method.rowwise)
def test_paths_of_an_aggregator_agree_under_a_mask(aggregator):
    state = warmed_up(aggregator)
    x = aggregator.poison(aggregator.sample(0), SOME, jnp.nan)
    for path in "weighting", "gramian_weighting", "rowwise":
        if getattr(aggregator.method, path) is not None:
            assert_path_agrees(aggregator, path, state, x, mask=SOME)


@pytest.mark.one_of_a_kind("boundary")
def test_counted_losses_are_value_and_mask(scalarizer):
    state, values = warmed_up(scalarizer), np.asarray(scalarizer.sample(0))
    counts = np.array([4, 0, 7], np.int32)
    sums = np.where(counts > 0, values * counts, np.nan)
    apply = lambda sums, counts: scalarizer.method.apply(state, mtl.Counted(sums, counts))
    of_sums = jax.jit(jax.value_and_grad(apply, has_aux=True))
    counted, gradient = of_sums(sums, counts)
    masked, expected = scalar_and_gradient(scalarizer.method)(state, values, mask=SOME)
    chex.assert_trees_all_close(counted, masked, **SAME)
    chex.assert_trees_all_close(gradient, expected / np.maximum(counts, 1), **SAME)
    (not_a_count, _), _ = of_sums(values, np.array([4.0, np.nan, 7.0], np.float32))
    assert np.isnan(not_a_count)
    absent, _ = of_sums(sums, np.zeros(3, np.int32))
    chex.assert_trees_all_equal(absent, (np.float32(0), state))


@pytest.mark.one_of_a_kind("engine")
def test_counted_and_masked_values_reach_an_aggregator(aggregator):
    state, x = warmed_up(aggregator), aggregator.sample(0)
    by_name = aggregator.method_for({"b": np.arange(2), "c": 2})

    @jax.jit
    def all_forms(state, x, values, counted, named):
        masked = aggregator.method.apply(state, x, values=values, mask=SOME)
        return masked, aggregator.method.apply(state, x, values=counted), by_name.apply(state, x, values=named)

    counted = mtl.Counted(np.array([1.0, np.nan, 15.0]), np.array([2, 0, 5], np.int32))
    named = {"b": mtl.Counted(np.array([1.0, np.nan]), np.array([2, 0], np.int32)), "c": np.array(3.0)}
    masked, *others = all_forms(state, x, np.array([0.5, 9.0, 3.0]), counted, named)
    for other in others:
        chex.assert_trees_all_close(other, masked, **SAME)


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: not built.case.own_names)
def test_named_losses_are_the_array(scalarizer):
    array = np.array([0.7, 1.9, 31.0], np.float32)
    names = dict(zip(("left", "right", "sum"), array, strict=True))
    method, by_name = scalarizer.method, scalarizer.method_for({"left": 0, "right": 1, "sum": 2})
    named_state, state = by_name.init(names), method.init(3)
    chex.assert_trees_all_equal(named_state, state)
    present = {"left": True, "right": False, "sum": True}
    named, named_gradients = jax.jit(partial(two_calls, by_name, (None, present)))(named_state, names)
    plain, gradients = jax.jit(partial(two_calls, method, (None, SOME)))(state, array)
    chex.assert_trees_all_equal(named, plain)
    for by_task, gradient in zip(named_gradients, gradients, strict=True):
        chex.assert_trees_all_equal(by_task, dict(zip(names, np.asarray(gradient), strict=True)))


def two_calls(method, masks, state, losses):
    """Scalars, states and what is observed of each call; and the gradients."""
    found, gradients = [], []
    for mask in masks:
        step = jax.value_and_grad(method.apply, argnums=1, has_aux=True)
        (scalar, state), gradient = step(state, losses, mask=mask)
        found.append((scalar, state, method.observe(state, losses, mask=mask)))
        gradients.append(gradient)
    return found, gradients


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.parametrize("shape", [(), (2, 2)])
@pytest.mark.cases(lambda built: not built.case.own_names)
def test_losses_of_any_shape(scalarizer, shape):
    method = scalarizer.method_for(jnp.zeros(shape, int))
    values = jnp.full(shape, 1.5)
    scalar, state = method.apply(method.init(shape), values)
    assert scalar.shape == ()
    assert jax.tree.leaves(state)[0].shape == shape
    chex.assert_tree_all_finite((scalar, state))


@pytest.mark.one_of_a_kind("boundary")
def test_one_loss_given_as_an_aggregators_values_is_checked(aggregator):
    with pytest.raises(ValueError, match=r"values: expected shape \(3,\).*found shape \(2,\)"):
        aggregator.method.apply(aggregator.init(), aggregator.sample(0), values=jnp.ones(2))


@pytest.mark.every_method
@pytest.mark.cases(lambda built: built.case.reads_losses)
def test_losses_that_are_read_must_be_given(aggregator):
    with pytest.raises(TypeError, match="values: expected the losses, as in values=losses, found None"):
        aggregator.method.apply(aggregator.init(), aggregator.sample(0))


@pytest.mark.one_of_a_kind("boundary")
@pytest.mark.cases(lambda built: not built.case.reads_losses)
def test_losses_that_are_not_read_change_nothing(aggregator):
    state, x, values = aggregator.init(), aggregator.sample(0), jnp.array([1.0, 2.0, 3.0])
    chex.assert_trees_all_equal(aggregator.method.apply(state, x, values=values), aggregator.apply(state, x))
