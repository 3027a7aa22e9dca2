"""``transform_rows`` and ``per_task``: optax on each task's gradient by itself, before the aggregator."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.catalogue import AGGREGATORS

pytestmark = pytest.mark.unoptimized

PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.zeros((), np.float32)}
ADAM = optax.scale_by_adam()
MAKERS = [aggregation.sum, partial(aggregation.db_mtl, 0.9)]  # the second takes the rows one at a time
MASKS = {0: [True, True, True], 1: [True, False, True], 2: [False, False, True]}  # of a step by its number modulo 5


def jacobian(seed, n_tasks=3, params=PARAMS):
    """Rows whose lengths span four orders of magnitude."""
    rng = np.random.default_rng(seed)
    scales = 10.0 ** np.arange(-2, n_tasks - 2)
    row = lambda p: np.asarray(rng.normal(size=(n_tasks, *p.shape)).T * scales, np.float32).T
    return jax.tree.map(row, params)


def rows_of(x):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], x) for i in range(3)]


def losses_fn(params, targets):
    """Three losses of ``PARAMS``, of different scales."""
    errors = params["w"].sum(1) + jnp.sin(params["b"]) - targets
    return jnp.array([0.1, 1.0, 50.0]) * errors**2 + jnp.sum(params["w"] ** 2)


TARGETS = np.array([1.0, -2.0, 0.5], np.float32)


# What it computes.


def separate_adams(n_steps, masks):
    """What one Adam for each task makes of the gradients of each step, added up."""
    states, sums = [jax.jit(ADAM.init)(PARAMS)] * 3, []
    update = jax.jit(ADAM.update)
    for step in range(n_steps):
        present = masks.get(step % 5, [True] * 3)
        total = jax.tree.map(np.zeros_like, PARAMS)
        for i, row in enumerate(rows_of(jacobian(step))):
            if present[i]:
                updates, states[i] = update(row, states[i])
                total = jax.tree.map(np.add, total, updates)
        sums.append(total)
    return sums, states


@pytest.mark.parametrize("masks", [{}, MASKS], ids=["all", "masked"])
@pytest.mark.parametrize("form", ["method", "per_task"])
def test_adatask_is_one_adam_for_each_task_over_50_steps(form, masks):
    expected, states = separate_adams(50, masks)
    method = mtl.transform_rows(aggregation.sum(), ADAM)
    optimizer = mtl.aggregate(method, 3)
    if form == "per_task":
        optimizer = optax.chain(mtl.per_task(ADAM, 3), mtl.aggregate(aggregation.sum(), 3))
    state, update = jax.jit(optimizer.init)(PARAMS), jax.jit(optimizer.update)
    for step, total in enumerate(expected):
        mask = np.array(masks.get(step % 5, [True] * 3))
        x = jacobian(step)
        for leaf in jax.tree.leaves(x):
            leaf[~mask] = np.nan
        updates, state = update(x, state, PARAMS, mask=mask)
        chex.assert_trees_all_close(updates, total, rtol=1e-6, atol=1e-6)
    found = state.transformation if form == "method" else state[0]
    chex.assert_trees_all_close(found, jax.tree.map(lambda *leaves: np.stack(leaves), *states), rtol=1e-6, atol=1e-12)


def test_an_absent_tasks_moments_and_count_stay():
    method = mtl.transform_rows(aggregation.sum(), ADAM)
    state = method.apply(method.init((3, PARAMS)), jacobian(0))[1]
    _, new = method.apply(state, jacobian(1), mask=np.array([True, False, True]))
    at = lambda state, i: jax.tree.map(lambda x: x[i], jax.device_get(state.transformation))
    chex.assert_trees_all_equal(at(new, 1), at(state, 1))
    np.testing.assert_array_equal(new.transformation.count, [2, 1, 2])
    _, none = method.apply(new, jacobian(2), mask=np.zeros(3, bool))
    chex.assert_trees_all_equal(none, new)


def test_on_a_model_with_heads_it_is_adam_for_each_task_in_the_trunk_and_one_adam_in_each_head():
    """As AdaTask's code has it: from the other tasks a head gets zeros, and Adam makes zeros of these."""
    params = {name: np.ones(n, np.float32) for name, n in {"head0": 2, "head1": 2, "trunk": 3}.items()}
    method = mtl.transform_rows(aggregation.sum(), ADAM)
    adam, state = jax.jit(lambda: (ADAM.init(params), method.init((2, params))))()
    update = jax.jit(ADAM.update)
    for seed in range(5):
        x = jacobian(seed, 2, params)
        x["head0"][1] = x["head1"][0] = 0
        gradient, state = method.apply(state, x)
        plain, adam = update(jax.tree.map(lambda leaf: leaf.sum(0), x), adam)
        for name in "head0", "head1":
            np.testing.assert_allclose(gradient[name], plain[name], rtol=1e-6)
    assert np.max(np.abs(np.subtract(gradient["trunk"], plain["trunk"]))) > 0.1


def test_multiadam_is_the_mean_of_adams():
    """One group of losses a task, weights 1/n and betas of 0.99, as in its code."""
    adam = optax.scale_by_adam(0.99, 0.99)
    method, update = mtl.transform_rows(aggregation.mean(), adam), jax.jit(adam.update)
    start, state = jax.jit(lambda: (adam.init(PARAMS), method.init((3, PARAMS))))()
    states = [start] * 3
    for seed in range(4):
        each = [update(row, s) for row, s in zip(rows_of(jacobian(seed)), states, strict=True)]
        states = [s for _, s in each]
        gradient, state = method.apply(state, jacobian(seed))
        expected = jax.tree.map(lambda *updates: sum(map(np.asarray, updates)) / 3, *[updates for updates, _ in each])
        chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_each_gradient_is_clipped_by_itself():
    rows = np.array([[300.0, 400.0], [0.3, 0.4]], np.float32)
    method = mtl.transform_rows(aggregation.sum(), optax.clip_by_global_norm(1.0))
    np.testing.assert_allclose(method.apply(method.init((2, 2)), rows)[0], [0.9, 1.2], rtol=1e-6)


LOG_MGDA = mtl.chain(scalarization.scale_invariant(), aggregation.mgda())


@pytest.mark.parametrize(("inside", "power"), [(aggregation.mgda(), 0), (LOG_MGDA, 1)], ids=["l2", "loss+"])
def test_normalized_mgda_is_that_of_libmtl(inside, power):
    """``mgda_gn=``: the solver and the combination both take the gradients divided by their norms, and the losses."""
    method, x = mtl.transform_rows(inside, optax.normalize_by_update_norm(eps=0.0)), jacobian(3)
    losses = np.array([0.5, 2.0, 3.0], np.float32)
    length = lambda tree: np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(tree)))
    norms = np.array([length(row) for row in rows_of(x)]) * losses**power
    unit = {"w": x["w"] / norms[:, None, None], "b": x["b"] / norms}
    bare = aggregation.mgda()
    expected, _ = bare.apply(bare.init((3, PARAMS)), unit)
    found, _ = method.apply(method.init((3, PARAMS)), x, values=losses)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    unscaled, _ = bare.apply(bare.init((3, PARAMS)), x)  # nearly the shortest gradient
    assert length(unscaled) < 0.2 * length(expected)


SOME = ["sum", "mgda", "excess_mtl", "db_mtl-averages", "m_config", "graddrop", "chain-imtl", "skip-excess_mtl"]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=() if c.name in SOME else pytest.mark.slow)
        for c in AGGREGATORS
        if "-" not in c.name or c.name in SOME
    ],
)
def test_identity_gives_the_methods_own_numbers_and_has_no_state(case):
    bare = case.make()
    method = mtl.transform_rows(bare, optax.identity())
    state, bare_state = start = jax.jit(lambda: (method.init((3, PARAMS)), bare.init((3, PARAMS))))()
    assert method.jacobian_shaped == tuple(f"inner.{name}" for name in bare.jacobian_shaped)
    assert jax.tree.leaves(state.transformation) == []
    losses = np.array([1.0, 2.0, 3.0], np.float32)

    @jax.jit
    def call(state, bare_state, x, mask):
        given = {"values": losses, "mask": mask}
        return method.apply(state, x, **given), bare.apply(bare_state, x, **given)

    for seed, mask in enumerate([None, np.array([True, False, True]), None]):
        (gradient, state), (expected, bare_state) = call(state, bare_state, jacobian(seed), mask)
        chex.assert_trees_all_close((gradient, state.inner), (expected, bare_state), rtol=1e-6, atol=1e-7)
    after = jax.eval_shape(lambda: method.end_epoch(method.observe(state, losses)))
    chex.assert_trees_all_equal_structs(after, start[0])


@pytest.mark.by_default(*SOME)
@pytest.mark.parametrize("case", AGGREGATORS, ids=lambda case: case.name)
def test_every_aggregator_takes_transformed_rows(case):
    """And the method can be guarded, balanced twice and carried by optax; nothing is compiled."""
    method = mtl.transform_rows(case.make(), optax.chain(optax.clip_by_global_norm(1.0), ADAM))
    assert method.weighting is None
    assert method.last_weights is None
    losses = dict.fromkeys(("left", "right", "sum"), np.float32(1)) if case.per_task else np.ones(3, np.float32)
    chained = mtl.chain(mtl.learn(scalarization.uw(), optax.sgd(0.1)), method)
    for wrapped in method, mtl.skip_nonfinite(method), chained, mtl.transform_rows(chained, ADAM):
        state = jax.eval_shape(lambda wrapped=wrapped: wrapped.init((3, PARAMS)))
        step = lambda state, values, wrapped=wrapped: wrapped.apply(state, jacobian(0), values=values)
        if not case.per_task:
            _, new = jax.eval_shape(step, state, losses)
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


def test_hyperparameters_of_the_transformation_may_be_traced():
    def clipped(max_norm):
        method = mtl.transform_rows(
            aggregation.sum(), optax.chain(optax.clip_by_global_norm(max_norm), optax.trace(0.9))
        )
        return method.apply(method.init((2, 2)), np.array([[300.0, 400.0], [0.3, 0.4]], np.float32))[0]

    found = jax.jit(jax.vmap(clipped))(np.array([1.0, 2.0]))
    np.testing.assert_allclose(found, [[0.9, 1.2], [1.5, 2.0]], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacobian(clipped))(1.0), [0.6, 0.8], rtol=1e-5)


# In a training step.


@pytest.mark.by_default("sum", "m_config")
@pytest.mark.parametrize(
    "make", [*MAKERS, aggregation.mgda, aggregation.m_config], ids=["sum", "db_mtl", "mgda", "m_config"]
)
def test_every_way_of_a_step_gives_the_same(make):
    # All that Adam makes of a first gradient is its signs: too few directions for M-ConFIG.
    transformation = optax.trace(0.5) if make is aggregation.m_config else ADAM
    method = mtl.transform_rows(make(), transformation)
    ways = ("vmap", 1, 2) + (("stream",) if method.rowwise else ())
    paths = {}
    for rows in ways:
        grad_fn = jax.jit(mtl.value_and_grad(losses_fn, method, rows=rows))
        state = jax.jit(grad_fn.init)(PARAMS, TARGETS)
        for i, mask in enumerate([None, None, np.array([True, False, True]), None]):
            (_, state), gradient = grad_fn(PARAMS, state, TARGETS + i, mask=mask)
            paths.setdefault(rows, []).append((gradient, state))
    for rows in ways[1:]:
        chex.assert_trees_all_close(paths[rows], paths["vmap"], rtol=1e-5, atol=1e-6)


def test_a_row_of_a_method_with_turns_is_transformed_when_it_is_taken_in():
    method = mtl.transform_rows(aggregation.m_config(), ADAM)
    state = method.init((3, PARAMS))
    for step in range(4):
        _, state = method.apply(state, jacobian(step))
    np.testing.assert_array_equal(state.transformation.count, [2, 1, 1])


@pytest.mark.parametrize("option", [{"rows": "two_pass"}, {"rows": "stream"}, {"return_weights": True}])
def test_what_needs_weights_is_refused(option):
    """Weights of the transformed rows are not those of the rows that a pull-back would give."""
    with pytest.raises(
        ValueError, match=r"rows: expected an int or one of 'vmap'|return_weights: expected a method that"
    ):
        mtl.value_and_grad(losses_fn, mtl.transform_rows(aggregation.sum(), ADAM), **option)
    with pytest.raises(ValueError, match="decide_on: expected a method that makes weights"):
        mtl.value_and_grad(losses_fn, mtl.transform_rows(aggregation.sum(), ADAM), decide_on={"w": True, "b": False})


OUTSIDE = {
    "amortize": mtl.amortize,
    "cr_mogm": aggregation.cr_mogm,
    "transform_weights": lambda method: mtl.transform_weights(method, optax.ema(0.9)),
    "prioritize": lambda method: mtl.prioritize(method, 1.0),
    "regularize": lambda method: mtl.regularize(method, {"kl": 1.0}),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_wrappers_of_weights_go_inside(name):
    with pytest.raises(ValueError, match=r"method: expected an aggregator that makes weights .*, found one without"):
        OUTSIDE[name](mtl.transform_rows(aggregation.sum(), ADAM))
    method = mtl.transform_rows(OUTSIDE[name](aggregation.sum()), ADAM)
    jax.eval_shape(lambda: method.init((3, PARAMS)))
    with pytest.raises(ValueError, match="refresh: expected a method that keeps its last weights"):
        jax.eval_shape(
            lambda state: mtl.value_and_grad(losses_fn, method)(PARAMS, state, TARGETS, refresh=True),
            method.init((3, PARAMS)),
        )


def test_a_prior_inside_is_on_the_transformed_rows():
    method = mtl.transform_rows(
        mtl.prioritize(aggregation.sum(), np.array([1.0, 0.0, 2.0], np.float32)), optax.scale_by_sign()
    )
    gradient, _ = method.apply(method.init((3, 2)), np.array([[300.0, -1.0], [7.0, 7.0], [0.1, 0.1]], np.float32))
    np.testing.assert_allclose(gradient, [3.0, 1.0])


# Guards.


@pytest.mark.parametrize("make", MAKERS)
def test_a_bad_gradient_stays_out_of_its_tasks_moments_alone(make):
    method = mtl.skip_nonfinite(mtl.transform_rows(make(), ADAM))
    state = method.apply(method.init((3, PARAMS)), jacobian(0))[1]
    bad = jacobian(1)
    bad["w"][1, 0, 0] = np.inf
    gradient, new = method.apply(state, bad)
    assert all(np.all(np.isnan(x)) for x in jax.tree.leaves(gradient))
    alone = mtl.transform_rows(make(), ADAM)
    _, expected = alone.apply(state.inner, jacobian(1), mask=np.array([True, False, True]))
    chex.assert_trees_all_close(new.inner.transformation, expected.transformation, rtol=1e-6)
    np.testing.assert_array_equal(new.inner.transformation.count, [2, 1, 2])  # each row's own, as its moments
    np.testing.assert_array_equal(new.nonfinite, [0, 1, 0])
    if method.rowwise is not None:
        visited, statistics = state, []
        for i, row in enumerate(rows_of(bad)):
            visited, statistic = method.rowwise.visit(visited, i, row)
            statistics.append(statistic)
        statistics = jax.tree.map(lambda *leaves: np.stack(leaves), *statistics)
        chex.assert_trees_all_close(method.rowwise.finish(visited, statistics)[1], new, rtol=1e-6)


def test_a_task_without_gradient_keeps_its_moments_under_skip_zero():
    method = mtl.skip_zero(mtl.transform_rows(aggregation.mean(), ADAM))
    state = method.apply(method.init((2, 2)), np.array([[1.0, -1.0], [2.0, 2.0]], np.float32))[1]
    gradient, state = method.apply(state, np.array([[1.0, -1.0], [0.0, 0.0]], np.float32))
    np.testing.assert_array_equal(state.inner.transformation.count, [2, 1])
    np.testing.assert_allclose(gradient, [1.0, -1.0], rtol=1e-4)


def test_the_order_of_chain_and_transformation():
    """Adam takes every factor out, so weights before it are lost."""
    rows, losses = np.array([[30.0, -40.0], [0.3, 0.4]], np.float32), np.array([10.0, 0.5], np.float32)
    first = mtl.chain(scalarization.scale_invariant(), mtl.transform_rows(aggregation.sum(), ADAM))
    last = mtl.transform_rows(mtl.chain(scalarization.scale_invariant(), aggregation.sum()), ADAM)
    for method, expected in (first, [2.0, 0.0]), (last, [2.1, 1.9]):
        gradient, _ = method.apply(method.init((2, 2)), rows, values=losses)
        np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


# Inputs.


def test_complex_gradients_are_transformed_as_optax_does():
    """The second moment of a complex number is of its modulus, and not one for each coordinate."""
    params = {"z": np.ones((2,), np.complex64), "x": np.ones((2,), np.float32)}
    rows = {
        "z": np.array([[3 + 4j, 1j], [0.5j, -1 + 1j]], np.complex64),
        "x": np.array([[1.0, -2.0], [3.0, 0.1]], np.float32),
    }
    method = mtl.transform_rows(aggregation.sum(), ADAM)
    optimizer = optax.chain(mtl.per_task(ADAM, 2), mtl.aggregate(aggregation.sum(), 2))

    @jax.jit
    def call(state, opt_state, states, given):
        gradient, state = method.apply(state, given)
        updates, opt_state = optimizer.update(given, opt_state, params)
        each = [ADAM.update(jax.tree.map(lambda x, i=i: x[i], given), states[i]) for i in range(2)]
        states = [s for _, s in each]
        return gradient, updates, optax.tree.add(each[0][0], each[1][0]), (state, opt_state, states)

    states = jax.jit(lambda: (method.init((2, params)), optimizer.init(params), [ADAM.init(params)] * 2))()
    assert states[0].transformation.mu["z"].dtype == np.complex64
    for scale in 1.0, -0.3, 2.0:
        gradient, updates, expected, states = call(*states, jax.tree.map(lambda x, scale=scale: scale * x, rows))
        chex.assert_trees_all_close(gradient, expected, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)

    losses_fn = lambda p: jnp.stack([jnp.sum(jnp.abs(p["z"] - 2j) ** 2), jnp.sum(jnp.abs(p["z"]) ** 2 * p["x"])])
    remembering, found = mtl.transform_rows(aggregation.db_mtl(0.5), ADAM), []
    for rows in "stream", "vmap":
        step = jax.jit(mtl.value_and_grad(losses_fn, remembering, rows=rows))
        found.append(step(params, remembering.init((2, params))))
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-6)


class LastState(NamedTuple):
    value: chex.Array


def watching():
    """A transformation that remembers the loss it is given."""

    def update(updates, state, params=None, *, value, **extra_args):
        del state, params, extra_args
        return updates, LastState(value)

    return optax.GradientTransformationExtraArgs(lambda params: LastState(jnp.zeros(())), update)


def test_each_task_gets_its_own_loss_and_named_losses_their_place():
    losses = {"right": 7.0, "left": 5.0, "up": mtl.Counted(np.float32(0), np.int32(0))}
    method = mtl.transform_rows(aggregation.sum(), watching())
    _, state = method.apply(method.init((3, PARAMS)), jacobian(0), values=losses)
    np.testing.assert_array_equal(state.transformation.value, [5.0, 7.0, 0.0])  # an uncounted task is absent
    chained = optax.chain(mtl.per_task(watching(), 3), mtl.aggregate(aggregation.sum(), 3))
    for given in {"values": losses}, {"task_losses": losses}:
        update = jax.jit(lambda given: chained.update(jacobian(0), chained.init(PARAMS), PARAMS, **given))
        _, state = update(given)
        np.testing.assert_array_equal(state[0].value, [5.0, 7.0, 0.0])


def test_carry_over_takes_each_tasks_moments_along():
    method = mtl.transform_rows(aggregation.db_mtl(0.9), optax.chain(optax.clip(1e3), ADAM))
    state = method.apply(method.init((2, PARAMS)), jacobian(0, 2), mask=np.array([True, False]))[1]
    new = mtl.carry_over(method, state, ["a", "c"], ["b", "a"])
    _, adam = new.transformation
    np.testing.assert_array_equal(adam.count, [1, 0])
    chex.assert_trees_all_equal(
        *(jax.tree.map(lambda x: x[0], jax.device_get(mu)) for mu in (adam.mu, state.transformation[1].mu))
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(new, jax.eval_shape(lambda: method.init((2, PARAMS))))


def test_a_state_of_another_transformation_or_of_other_parameters_is_refused():
    method = mtl.transform_rows(aggregation.sum(), ADAM)
    other = mtl.transform_rows(aggregation.sum(), optax.trace(0.9))
    with pytest.raises((TypeError, ValueError), match=r"state.*ScaleByAdamState.*TraceState"):
        method.apply(other.init((3, PARAMS)), jacobian(0))
    with pytest.raises(ValueError, match=r"jacobian\['w'\]: expected shape \(3, 3, 2\), found shape \(3, 4\)"):
        method.apply(method.init((3, PARAMS)), {"w": np.ones((3, 4), np.float32), "b": np.ones(3, np.float32)})
    # Its gradient has as many rows as there are tasks.
    params = {"w": np.ones((3, 2), np.float32), "b": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=r"jacobian: .*found a plain gradient"):
        method.apply(method.init((3, params)), params)


@pytest.mark.parametrize(
    "transformation",
    [
        optax.add_noise(0.1, 0.5, 0),
        optax.masked(ADAM, {"w": True, "b": False}),
        optax.masked(ADAM, lambda params: jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.partition({"a": ADAM, "b": optax.identity()}, {"w": "a", "b": "b"}),
        optax.scale_by_schedule(lambda count: 1 / (1 + count)),
        optax.zero_nans(),
        optax.apply_if_finite(ADAM, 3),
        optax.named_chain(("first", ADAM)),
        optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=1.0),
    ],
    ids=["noise", "masked", "masked by rank", "partition", "schedule", "zero_nans", "if_finite", "named", "inject"],
)
def test_whatever_a_transformation_keeps_is_kept_for_each_task(transformation):
    """Also what is not shaped like the parameters, or like some of them only."""
    method = mtl.transform_rows(aggregation.sum(), transformation)
    state = jax.jit(lambda: method.init((3, PARAMS)))()
    assert all(x.shape[0] == 3 for x in jax.tree.leaves(state))
    gradient, new = method.apply(state, jacobian(0), mask=np.array([True, False, True]))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    at = jax.jit(lambda state, i: jax.tree.map(lambda x: x[i], state.transformation))
    chex.assert_trees_all_equal(at(new, 1), at(state, 1))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (at(new, 0), at(state, 0))), strict=True)) or (
        "zero_nans" in f"{transformation}" or "inject" in f"{transformation}"
    )
    guarded = mtl.skip_nonfinite(method)
    jax.eval_shape(lambda: guarded.apply(guarded.init((3, PARAMS)), jacobian(0)))


NEEDS_PARAMS = [optax.add_decayed_weights(0.1), optax.adaptive_grad_clip(0.1), optax.scale_by_trust_ratio()]


@pytest.mark.parametrize("transformation", NEEDS_PARAMS)
def test_one_that_needs_params_is_refused_and_per_task_has_them(transformation):
    with pytest.raises(ValueError, match=r"transformation: expected one that needs no params.*mtl\.per_task"):
        mtl.transform_rows(aggregation.sum(), transformation)
    each = mtl.per_task(transformation, 3)
    update = lambda transformation: jax.jit(lambda x: transformation.update(x, transformation.init(PARAMS), PARAMS)[0])
    found, alone = jax.device_get(update(each)(jacobian(0))), update(transformation)
    for i, (row, given) in enumerate(zip(rows_of(found), rows_of(jacobian(0)), strict=True)):
        expected = alone(given)
        chex.assert_trees_all_close(row, expected, rtol=1e-5, atol=1e-7, custom_message=f"{i}")


def test_what_is_neither_is_refused():
    with pytest.raises(TypeError, match="aggregator: expected an Aggregator, found Scalarizer"):
        mtl.transform_rows(scalarization.mean(), ADAM)
    for wrap in partial(mtl.transform_rows, aggregation.sum()), partial(mtl.per_task, n_tasks=2):
        with pytest.raises(TypeError, match=r"transformation: expected an optax one.*found the function scale_by_adam"):
            wrap(transformation=optax.scale_by_adam)
    with pytest.raises(ValueError, match="n_tasks"):
        mtl.per_task(ADAM, 0)


# As a link of a chain.


def test_per_task_refuses_what_is_no_jacobian():
    optimizer = optax.chain(mtl.per_task(ADAM, 3), mtl.aggregate(aggregation.sum(), 3))
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"jacobian\['b'\]: expected a leading axis of 3, one row per task"):
        optimizer.update(PARAMS, state, PARAMS)
    with pytest.raises(
        ValueError, match=r"jacobian: expected the Jacobian as updates.*transform_rows.*found jacobian="
    ):
        optimizer.update(PARAMS, state, PARAMS, jacobian=jacobian(0))
    taken = optax.chain(mtl.aggregate(mtl.transform_rows(aggregation.sum(), ADAM), 3), optax.sgd(1.0))
    updates, _ = jax.jit(lambda x: taken.update(PARAMS, taken.init(PARAMS), PARAMS, jacobian=x))(jacobian(0))
    expected, _ = jax.jit(optimizer.update)(jacobian(0), state, PARAMS)
    chex.assert_trees_all_close(updates, jax.tree.map(np.negative, jax.device_get(expected)), rtol=1e-6)


def test_per_task_treats_a_part_of_the_parameters():
    """Under ``optax.masked`` and ``partition``, as everything in a chain."""
    mask = {"w": True, "b": False}
    optimizer = optax.chain(optax.masked(mtl.per_task(ADAM, 3), mask), mtl.aggregate(aggregation.sum(), 3))
    x = jacobian(0)
    updates, _ = jax.jit(lambda x: optimizer.update(x, optimizer.init(PARAMS), PARAMS))(x)
    np.testing.assert_allclose(updates["b"], x["b"].sum(0), rtol=1e-6)
    np.testing.assert_allclose(updates["w"], np.sign(x["w"]).sum(0), atol=1e-4)


def test_states_lie_with_the_parameters():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    params = {"w": put(np.ones((4, 2), np.float32), PartitionSpec("data")), "b": put(np.float32(1), PartitionSpec())}
    method = mtl.transform_rows(aggregation.sum(), optax.chain(optax.scale(2.0), ADAM))
    for state in method.init((3, params)).transformation[1], mtl.per_task(ADAM, 3).init(params):
        for moments in state.mu, state.nu:
            assert moments["w"].sharding == NamedSharding(mesh, PartitionSpec(None, "data"))
        chex.assert_trees_all_equal_shapes(state.mu, {"w": np.ones((3, 4, 2)), "b": np.ones(3)})


def test_what_spoils_the_moments_shows_now_and_later():
    """The square of 1e20 overflows: Adam's update would be zero from then on."""
    for method, bad in [(mtl.transform_rows(make(), ADAM), bad) for make in MAKERS for bad in (1e20, np.inf, np.nan)]:
        state = method.init((2, 2))
        gradient, state = method.apply(state, np.array([[1.0, 2.0], [bad, 4.0]], np.float32))
        assert np.all(np.isnan(gradient))
        assert np.all(np.isnan(method.apply(state, np.array([[1.0, 2.0], [3.0, 4.0]], np.float32))[0]))


def test_identity_compiles_to_the_bare_method():
    bare = aggregation.mgda()
    programs = []
    for method in bare, mtl.transform_rows(bare, optax.identity()):
        given = jax.eval_shape(lambda method=method: (method.init((3, PARAMS)), jacobian(0)))
        memory = jax.jit(method.apply).lower(*given).compile()
        programs.append((memory.cost_analysis()["flops"], memory.memory_analysis().temp_size_in_bytes))
    assert programs[0] == programs[1]
