"""Hostile inputs stay finite; wrong ones raise an error that says what is wrong."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import diagnostics
from mtlbalance.states import like_jacobian
from tests.conformance.helpers import Built, by_rows, scalar_and_gradient

pytestmark = pytest.mark.unoptimized  # `.ci/run` has a run with all optimizations

LOSSES = {
    "zero": (0.0, 0.0, 0.0),
    "tiny": (1e-30, 1e-30, 1e-30),
    "huge": (1e30, 1e30, 1e30),
    "last is huge": (1e-30, 1.0, 1e30),
    "twelve decades": (1e-6, 1.0, 1e6),
    "negative": (-1.0, -2.0, -0.5),
    "first is zero": (0.0, 1.0, 1.0),
}

# Rows of the Jacobian as multiples of one row and another.
ROWS = {
    "zero": [(0.0, 0.0)] * 3,
    "one zero": [(0.0, 0.0), (1.0, 0.0), (0.5, 1.0)],
    "duplicates": [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0)],
    "opposite": [(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0)],
    "norm ratio 1e6": [(1e-3, 0.0), (1e3, 0.0), (0.0, 1.0)],
    "rank one": [(1.0, 0.0), (2.0, 0.0), (-3.0, 0.0)],
    "tiny": [(1e-10, 0.0), (0.0, 1e-10), (1e-10, 1e-10)],
    "huge": [(1e10, 0.0), (0.0, 1e10), (1e10, 1e10)],
}


def assert_stays_finite(built, x, state=None, method=None):
    method, state = method or built.method, built.init() if state is None else state
    for _ in range(4):
        if built.is_scalarizer:
            (output, state), gradient = scalar_and_gradient(method)(state, x)
            chex.assert_tree_all_finite(gradient)
        else:
            output, state = built.apply(state, x, method=method)
        state = built.hooks(state, x, method=method)
        chex.assert_tree_all_finite((output, state))


@pytest.mark.every_method
@pytest.mark.parametrize("losses", LOSSES.values(), ids=LOSSES.keys())
def test_losses_without_sign_or_scale_stay_finite(scalarizer, losses):
    losses = np.minimum(np.float32(losses), scalarizer.case.largest)
    if not (scalarizer.case.needs_positive and np.any(losses < 0)):
        assert_stays_finite(scalarizer, losses)


@pytest.mark.every_method
@pytest.mark.cases(lambda built: built.case.needs_positive)
def test_a_negative_loss_has_no_weight_to_climb_on(scalarizer):
    """In three epochs: its weight is NaN, no other is negative, a guard skips it, and absent it does not count."""
    guard = Built(scalarizer.case._replace(make=guarded(scalarizer.case.make)), "scalarization")
    losses, present = np.float32([1.0, -0.36, 0.5]), np.array([True, False, True])
    state, before = scalarizer.init(), guard.init()
    for _ in range(3):
        (scalar, _), weights = scalar_and_gradient(scalarizer.method)(state, losses)
        weights = np.asarray(weights)
        assert np.isnan(scalar)
        assert np.isnan(weights[1])
        assert not np.any(weights < 0)
        after = guard.apply(before, losses)[1]
        chex.assert_trees_all_equal(after.inner, before.inner)
        assert int(after.skipped) == int(before.skipped) + 1
        weights = diagnostics.effective_weights(scalarizer.method, state, losses, mask=present)
        chex.assert_tree_all_finite(weights)
        ones = np.ones(3, np.float32)
        state, before = scalarizer.step(state, ones)[1], guard.step(after, ones)[1]


JUMPS = {
    "from zero": [(0.0, 1.0, 1.0), (1.0, 1.0, 0.5)],
    "to zero": [(1.0, 1.0, 1.0), (0.0, 1.0, 0.5)],
    "from tiny to huge": [(1e-30, 1.0, 1.0), (1e30, 1.0, 0.5)],
    "from huge to tiny": [(1e30, 1.0, 1.0), (1e-30, 1.0, 0.5)],
    "one not finite": [(1.0, np.nan, 1.0), (1.0, 1.0, 0.5)],
}


@pytest.mark.every_method
@pytest.mark.parametrize("jump", JUMPS.values(), ids=JUMPS.keys())
def test_losses_that_jump_between_calls_stay_finite(scalarizer, jump):
    before, after = np.minimum(np.float32(jump), scalarizer.case.largest)
    finite = np.all(np.isfinite(before))
    if not finite:
        scalarizer = Built(scalarizer.case._replace(make=guarded(scalarizer.case.make)), "scalarization")
    state = scalarizer.init()
    for x in before, after, before, after, after, after:
        output, state = scalarizer.step(state, x, ends_epoch=False)
        assert np.isfinite(output) == np.all(np.isfinite(x))
        chex.assert_tree_all_finite(state)


def guarded(make):
    """The method under ``skip_nonfinite``, with what is learned inside ``learn``."""

    def make_guarded():
        method = make()
        return mtl.skip_nonfinite(mtl.learn(method, optax.adam(0.1)) if method.learned else method)

    return make_guarded


@pytest.mark.every_method
@pytest.mark.parametrize("combination", ROWS.values(), ids=ROWS.keys())
def test_degenerate_jacobians_stay_finite(aggregator, combination):
    one, other = jax.device_get((aggregator.sample(0, n_tasks=1), aggregator.sample(1, n_tasks=1)))
    rows = lambda a, b: np.stack([p * a[0] + q * b[0] for p, q in combination])
    assert_stays_finite(aggregator, jax.tree.map(rows, one, other))


@pytest.mark.every_method
@pytest.mark.parametrize("start", [2**31 - 2, 2**31 - 1])
@pytest.mark.by_default("*-2147483646")
def test_counters_stop_at_the_largest_int(built, start):
    """And what is done then is what is done at half as large a count, whether epochs end or not."""
    steps = {count: three_steps(built, count) for count in (2**30, start)}
    for output, state in steps[start]:
        chex.assert_tree_all_finite((output, state))
        assert all(np.all(np.asarray(leaf) >= 0) for leaf in jax.tree.leaves(state) if leaf.dtype == np.int32)
    for (output, _), (expected, _) in zip(steps[start], steps[2**30], strict=True):
        # Rates that fall with the root of the count are some 1e-5 there.
        chex.assert_trees_all_close(output, expected, rtol=1e-3, atol=1e-3)


def three_steps(built, count):
    """The outputs and states of three calls, and two more with an epoch's end, after one from which counts start."""
    count_leaf = lambda x: np.full_like(x, count) if x.dtype == np.int32 else x
    state = jax.tree.map(count_leaf, built.step(built.init(), built.sample(0), ends_epoch=False)[1])
    steps = []
    for i in range(5):
        steps.append(built.step(state, built.sample(1 + i), ends_epoch=i > 2))
        state = steps[-1][1]
    return steps


def gradients_by_every_path(method, state, x, values):
    """The gradient by ``apply``, and what the weights of the other paths make of the rows."""
    given = {"values": values, "mask": None}
    yield "apply", method.apply(state, x, **given)[0]
    if method.weighting is not None:
        yield "weighting", mtl.gramian.combine(method.weighting.apply(state, x, **given)[0], x)
    if method.gramian_weighting is not None:
        weights, _ = method.gramian_weighting.apply(state, mtl.gramian.gramian(x), **given)
        yield "gramian_weighting", mtl.gramian.combine(weights, x)
    if method.rowwise is not None:
        found, _ = by_rows(method.rowwise, state, x, given)
        yield "rowwise", found if method.rowwise.weigh is None else mtl.gramian.combine(found, x)


def test_a_row_that_is_not_finite_shows(aggregator):
    """On every path. A row too long to be squared gives NaN, or what it gives where all rows are shorter by 1e-15."""
    method, state, x = aggregator.method, aggregator.init(), jax.device_get(aggregator.sample(0))
    values = aggregator.losses(x)
    at = int(method.rowwise.visits(state)[0]) if method.rowwise and method.rowwise.visits else 1

    def gradients(x, entry):
        """By every path, with this entry in one row."""
        x = jax.tree.map(np.array, x)
        x["dense"]["w"][at, 2, 3] = entry
        return {path: jax.device_get(found) for path, found in gradients_by_every_path(method, state, x, values)}

    for bad in np.nan, np.inf, -np.inf:
        for path, gradient in gradients(x, bad).items():
            is_finite = all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
            assert is_finite == aggregator.case.trims, (path, bad)
    shorter = gradients(jax.tree.map(lambda leaf: leaf * np.float32(1e-15), x), 1e5)
    for path, gradient in gradients(x, 1e20).items():
        if not all(np.all(np.isnan(g)) for g in jax.tree.leaves(gradient)):
            expected = jax.tree.map(lambda g: g * np.float32(1e15), shorter[path])
            chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-4)


def assert_tasks_stay_finite(built, n_tasks):
    method = built.method_for(np.arange(n_tasks))
    state = built.init(method, n_tasks=n_tasks)
    assert_stays_finite(built, built.sample(0, n_tasks=n_tasks), state, method)


@pytest.mark.cases(lambda built: built.case.fewest_tasks == 1)
def test_one_task(built):
    assert_tasks_stay_finite(built, 1)


@pytest.mark.one_of_a_kind("engine")
def test_forty_tasks(built):
    assert_tasks_stay_finite(built, 40)


@pytest.mark.one_of_a_kind("boundary")
def test_a_jacobian_without_parameters(aggregator):
    """optax.partition hands an empty group to its transformation."""
    for params in {}, {"w": jax.ShapeDtypeStruct((0,), jnp.float32)}:
        state = aggregator.init(params=params)
        x = jax.tree.map(lambda p: np.zeros((3, *p.shape), np.float32), params)
        values = np.ones(3, np.float32) if aggregator.case.reads_losses else None
        gradient, new_state = aggregator.method.apply(state, x, values=values)
        assert jax.tree.structure(gradient) == jax.tree.structure(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
        chex.assert_tree_all_finite(new_state)


@pytest.mark.one_of_a_kind("boundary")
def test_wrong_losses_raise(scalarizer):
    state, apply = scalarizer.init(), scalarizer.method.apply
    with pytest.raises(ValueError, match=r"values: expected shape \(3,\), as given to init, found shape \(4,\)"):
        apply(state, jnp.ones(4))
    with pytest.raises(ValueError, match=r"values: expected shape \(3,\).*found shape \(1,\)"):
        apply(state, jnp.ones(1))  # no broadcast
    by_name = scalarizer.method_for({"left": 0, "right": 1})
    with pytest.raises(ValueError, match=r"values.*found shape \(2,\)"):
        by_name.apply(state, {"left": 1.0, "right": 2.0})
    for wrong in jnp.ones(3, int), jnp.ones(3, bool), jnp.ones(3, complex):
        with pytest.raises(TypeError, match=rf"values: expected floating point numbers, found dtype {wrong.dtype}"):
            apply(state, wrong)
    with pytest.raises(TypeError, match="values: expected the losses, as in values=losses, found None"):
        apply(state, None)
    with pytest.raises(ValueError, match="values: expected a count of the sum's shape"):
        apply(state, mtl.Counted(jnp.ones(3), jnp.ones(())))


@pytest.mark.one_of_a_kind("boundary")
def test_an_error_leaves_a_donated_state_usable(built):
    state, wrong = built.init(), built.sample(0, n_tasks=4)
    with pytest.raises(ValueError, match=r"values|jacobian"):
        jax.jit(built.apply, donate_argnums=0)(state, wrong)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    chex.assert_trees_all_equal(state, built.init())


@pytest.mark.one_of_a_kind("boundary")
def test_wrong_masks_raise(built):
    state, x = built.init(), built.sample(0)
    with pytest.raises(TypeError, match="mask: expected booleans, found dtype int32"):
        built.apply(state, x, mask=jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match=r"mask: expected shape \(3,\), as given to init, found shape \(2,\)"):
        built.apply(state, x, mask=jnp.ones(2, bool))


@pytest.mark.one_of_a_kind("boundary")
def test_a_mask_of_other_names_raises(scalarizer):
    losses = {"left": 1.0, "right": 2.0, "sum": 3.0}
    by_name = scalarizer.method_for({"left": 0, "right": 1, "sum": 2})
    with pytest.raises(ValueError, match="mask: expected one array, or the shapes of values"):
        by_name.apply(scalarizer.init(), losses, mask={"left": True, "right": True, "total": True})
    uneven, labels = {"a": jnp.ones(2), "b": jnp.ones(1)}, {"a": jnp.array([True]), "b": jnp.array([True, False])}
    with pytest.raises(ValueError, match="mask: expected one array, or the shapes of values"):
        scalarizer.method_for({"a": jnp.arange(2), "b": jnp.array([2])}).apply(scalarizer.init(), uneven, mask=labels)


@pytest.mark.one_of_a_kind("boundary")
def test_wrong_jacobians_raise(aggregator):
    state, x = aggregator.init(), aggregator.sample(0)
    apply = partial(aggregator.method.apply, values=aggregator.losses(x))
    with pytest.raises(ValueError, match=r"jacobian\['dense'\]\['b'\]: expected a leading axis of 3.*\(4, 8\)"):
        apply(state, aggregator.sample(0, n_tasks=4))
    with pytest.raises(ValueError, match=r"summed loss .*, found shape \(8,\)"):
        apply(state, aggregator.restrict(x, 0))
    with pytest.raises(TypeError, match=r"jacobian\['scale'\]: expected floating point numbers, found dtype int32"):
        apply(state, x | {"scale": jnp.ones(3, jnp.int32)})
    if like_jacobian(aggregator.method.jacobian_shaped):
        with pytest.raises(ValueError, match="jacobian: expected the params' tree"):
            apply(state, x["dense"])
        with pytest.raises(ValueError, match=r"jacobian\['scale'\]: expected shape \(3,\), found shape \(3, 2\)"):
            apply(state, x | {"scale": jnp.ones((3, 2))})
    if aggregator.method.gramian_weighting is not None:
        with pytest.raises(ValueError, match=r"gramian: expected shape \(3, 3\), found shape \(2, 2\)"):
            aggregator.method.gramian_weighting.apply(state, jnp.eye(2), values=aggregator.losses(x))
    rowwise, given = aggregator.method.rowwise, {"values": aggregator.losses(x)}
    if rowwise is not None:
        if like_jacobian(aggregator.method.jacobian_shaped):
            with pytest.raises(ValueError, match=r"row\['scale'\]: expected shape \(\), found shape \(2,\)"):
                rowwise.visit(state, 0, aggregator.restrict(x, 0) | {"scale": jnp.ones(2)}, **given)
        with pytest.raises(ValueError, match="statistics: expected a leading axis of 3"):
            (rowwise.weigh or rowwise.finish)(state, jnp.ones(2), **given)


@pytest.mark.one_of_a_kind("boundary")
def test_wrong_shapes_for_init_raise(scalarizer):
    init = scalarizer.method.init
    for empty in 0, (3, 0), -1, {}:
        with pytest.raises(ValueError, match="shape: expected at least one task"):
            init(empty)
    for not_losses in {"left": 3}, jnp.ones(3, int), True:
        with pytest.raises(TypeError, match=r"shape.*: expected floating point numbers"):
            init(not_losses)


@pytest.mark.one_of_a_kind("boundary")
def test_wrong_pairs_for_init_raise(aggregator):
    init = aggregator.method.init
    for slip in {"w": jnp.ones(3)}, (jnp.ones(3), jnp.ones(3)), 3, (2.0, 3), (1, 2, 3):
        with pytest.raises(TypeError, match=r"init: expected a pair \(number of tasks: int, params\)"):
            init(slip)
    with pytest.raises(ValueError, match="number of tasks: expected an int of at least 1, found 0"):
        init((0, 3))
    with pytest.raises(TypeError, match="params: expected arrays"):
        init((3, (4, 5)))
