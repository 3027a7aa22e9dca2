"""Methods that remember gradients, or learn from their lengths: who is absent, whose turn it is, what a call needs.

Their values over many calls are in tests/golden.
"""

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

M, N = 4, 6
LOSSES = np.float32([2.0, 0.5, 1.0, 4.0])
NORMAL = jax.jit(lambda: jax.random.normal(jax.random.key(0), (8, M, N)))
JACOBIANS = np.asarray(NORMAL()) * np.float32([[[1.0], [10.0], [0.3], [3.0]]])
METHODS = {
    "db_mtl": aggregation.db_mtl(beta=0.9),
    "moco": aggregation.moco(lr=0.01),
    "moco-libmtl": aggregation.moco(normalize=True, softmax=True),
    "m_config": aggregation.m_config(),
    "gradnorm": aggregation.gradnorm(),
    "gradnorm-softmax": aggregation.gradnorm(softmax=True),
    "lr_annealing": aggregation.lr_annealing(),
    "grad_norm_weights": aggregation.grad_norm_weights(),
}


def after(method, n_calls, **given):
    """The state after some calls with all tasks, or those of ``mask``, present."""
    state = method.init((M, N))
    for jacobian in JACOBIANS[:n_calls]:
        _, state = method.apply(state, jacobian, values=LOSSES, **given)
    return state


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.by_default("moco", "m_config", "gradnorm")
def test_what_is_remembered_of_an_absent_task_stays(name):
    """Bit for bit, whatever its loss and its gradient are; what is remembered of the others does not."""
    method, absent = METHODS[name], 2
    before = after(method, 5, mask=np.ones(M, bool))
    jacobian, losses = (with_new(x, absent, np.nan) for x in (JACOBIANS[5], LOSSES))
    gradient, state = method.apply(before, jacobian, values=losses, mask=np.arange(M) != absent)
    before, state = jax.device_get((before, state))
    chex.assert_tree_all_finite((gradient, state))
    per_task = [(x, y) for x, y in zip(*map(jax.tree.leaves, (before, state)), strict=True) if x.shape[:1] == (M,)]
    for old, new in per_task:
        np.testing.assert_array_equal(new[absent], old[absent])
    assert any(np.any(new != old) for old, new in per_task)


# M-ConFIG.


def test_m_config_takes_the_task_that_waited_longest():
    """Of those present, the lowest of equal ones; a task that comes back is next."""
    method, rng = METHODS["m_config"], np.random.default_rng(0)
    masks = np.concatenate([rng.uniform(size=(30, M)) < 0.6, np.zeros((1, M), bool), np.ones((2 * M, M), bool)])
    masks[5:20, 1] = False
    state, last_turn, turns = method.init((M, N)), np.zeros(M, int), []
    for call, mask in enumerate(masks):
        if any(mask):
            turn = min(np.flatnonzero(mask), key=lambda task: (last_turn[task], task))
            last_turn[turn] = np.max(last_turn) + 1
            turns.append(turn)
            np.testing.assert_array_equal(method.rowwise.visits(state, mask=mask), [turn])
        _, state = method.apply(state, JACOBIANS[call % 8], mask=mask)
        np.testing.assert_array_equal(state.last_turn, last_turn)
    np.testing.assert_array_equal(state.seen, np.sum(masks, axis=0))
    np.testing.assert_array_equal(state.turns, np.bincount(turns, minlength=M))
    assert sorted(turns[-M:]) == list(range(M))
    assert turns[-M:] == turns[-2 * M : -M]


def test_m_config_gives_no_gradient_before_every_task_present_had_a_turn():
    method, mask = METHODS["m_config"], np.array([True, False, True, True])
    state = method.init((M, N))
    for call, jacobian in enumerate(JACOBIANS):
        gradient, state = method.apply(state, jacobian, mask=mask)
        assert np.any(np.asarray(gradient)) == (call >= 2)
    # Task 1 is new: the others wait for its first turn, which comes at once.
    gradient, _ = method.apply(state, JACOBIANS[0])
    np.testing.assert_array_equal(method.rowwise.visits(state), [1])
    assert np.all(np.asarray(gradient))


@pytest.mark.parametrize("mask", [[True] * M, [True, False, True, True]])
def test_m_config_needs_one_gradient(mask):
    """The other rows may be anything, in the Jacobian as among the visits; an engine leaves those visits out."""
    method, mask = METHODS["m_config"], np.array(mask)
    states = dict.fromkeys(["all", "one", "rows", "visits"], method.init((M, N)))
    for jacobian in JACOBIANS:
        (turn,) = method.rowwise.visits(states["all"], mask=mask)
        alone = np.where(np.arange(M)[:, None] == turn, jacobian, np.float32(np.nan))
        gradients = {}
        gradients["all"], states["all"] = method.apply(states["all"], jacobian, mask=mask)
        gradients["one"], states["one"] = method.apply(states["one"], alone, mask=mask)
        for name, visits in {"rows": range(M), "visits": [turn]}.items():
            visited = states[name]
            for i in visits:
                visited, _ = method.rowwise.visit(visited, i, alone[i], mask=mask)
            gradients[name], states[name] = method.rowwise.finish(visited, (), mask=mask)
        for name in ("one", "rows", "visits"):
            chex.assert_trees_all_close(
                (gradients[name], states[name]), (gradients["all"], states["all"]), rtol=1e-5, atol=1e-6
            )


# GradNorm.


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("lr", [1e-4, 1.0])
def test_gradnorm_weights_add_up_to_the_number_of_tasks_present(softmax, lr):
    """And are never negative, even where a step at the larger rate goes beyond zero."""
    method = aggregation.gradnorm(optimizer=optax.sgd(lr), softmax=softmax)
    masks = with_new(np.random.default_rng(1).uniform(size=(40, M)) < 0.6, 0, True)

    def call(state, inputs):
        jacobian, mask = inputs
        weights, state = method.weighting.apply(state, jacobian, values=LOSSES, mask=mask)
        return state, (weights, state.raw_weights)

    inputs = np.tile(JACOBIANS, (5, 1, 1)), masks
    weights, raw = jax.device_get(jax.jit(lambda: jax.lax.scan(call, method.init((M, N)), inputs)[1])())
    assert np.all(weights >= 0)
    # Dividing by the total and multiplying again leave some roundings of 6e-8.
    np.testing.assert_allclose(np.sum(weights, axis=1), np.sum(masks, axis=1), rtol=1e-6)
    if not softmax:
        assert np.all(raw >= 0)
        np.testing.assert_allclose(np.sum(raw, axis=1), M, rtol=1e-5)  # 40 times
        assert np.any(raw == 0) == (lr == 1.0)


@pytest.mark.parametrize("softmax", [False, True])
def test_gradnorm_keeps_the_moments_of_absent_tasks(softmax):
    method = METHODS["gradnorm-softmax" if softmax else "gradnorm"]
    before, mask = after(method, 3), np.array([True, False, True, True])
    _, state = method.apply(before, JACOBIANS[3], values=LOSSES, mask=mask)
    before, state = jax.device_get((before, state))
    (old,), (new,) = (optax.tree.get_all_with_path(x.opt_state, "mu") for x in (before, state))
    np.testing.assert_array_equal(new[1]["raw_weights"][~mask], old[1]["raw_weights"][~mask])
    assert np.all(new[1]["raw_weights"][mask] != old[1]["raw_weights"][mask])
    assert int(optax.tree.get(state.opt_state, "count")) == 4


# Weights for physics-informed networks.


def test_lr_annealing_waits_for_its_reference():
    """Absent, or without a gradient, it leaves every weight as it was."""
    method = aggregation.lr_annealing(reference=1)
    before = jax.device_get(after(method, 3))
    absent = {"jacobian": JACOBIANS[3], "mask": np.arange(M) != 1}
    for given in absent, {"jacobian": with_new(JACOBIANS[3], 1, 0)}:
        weights, state = method.weighting.apply(before, given["jacobian"], mask=given.get("mask"))
        np.testing.assert_array_equal(state.weights, before.weights)
        np.testing.assert_array_equal(weights, np.where(given.get("mask", True), before.weights, 0))
    # Any other task that is absent, or without a gradient, keeps its own only.
    for given in {"mask": np.arange(M) != 2, "jacobian": JACOBIANS[3]}, {"jacobian": with_new(JACOBIANS[3], 2, 0)}:
        _, state = method.weighting.apply(before, given["jacobian"], mask=given.get("mask"))
        np.testing.assert_array_equal(np.asarray(state.weights) == before.weights, [False, True, True, False])


def test_grad_norm_weights_at_rest_make_all_gradients_as_long_as_the_mean():
    method, norms = aggregation.grad_norm_weights(0.5), np.linalg.norm(JACOBIANS[0], axis=1)
    state = method.init((M, N))
    for _ in range(30):  # half of what is missing goes each time
        weights, state = method.weighting.apply(state, JACOBIANS[0])
    np.testing.assert_allclose(np.asarray(weights) * norms, np.full(M, np.mean(norms)), rtol=1e-6)


# Losses, and hyperparameters that are mapped over.


@pytest.mark.parametrize(
    "method",
    [
        METHODS["moco-libmtl"],
        METHODS["gradnorm"],
        mtl.chain(scalarization.sum(), aggregation.mgda()),
        mtl.chain(scalarization.scale_invariant(), METHODS["db_mtl"]),
    ],
    ids=["moco", "gradnorm", "chain", "chain-rows"],
)
def test_the_methods_that_read_losses_ask_for_them(method):
    state = method.init((M, N))
    with pytest.raises(TypeError, match="values"):
        method.apply(state, JACOBIANS[0])
    with pytest.raises(TypeError, match="values"):
        method.rowwise.visit(state, 0, JACOBIANS[0, 0]) if method.rowwise else method.weighting.apply(
            state, JACOBIANS[0]
        )


@pytest.mark.parametrize("name", ["db_mtl", "moco", "m_config", "lr_annealing", "grad_norm_weights"])
def test_the_others_do_not(name):
    method = METHODS[name]
    without, with_losses = (method.apply(method.init((M, N)), JACOBIANS[0], **x) for x in ({}, {"values": LOSSES}))
    chex.assert_trees_all_equal(without, with_losses)


FLOATS = {
    "gradnorm lr": (lambda lr: aggregation.gradnorm(optimizer=optax.adam(lr)), (0.01, 0.5)),
    "gradnorm alpha": (lambda alpha: aggregation.gradnorm(alpha, softmax=True), (0.0, 1.5)),
    "moco beta": (lambda beta: aggregation.moco(beta, lr=0.01), (0.0, 1.0)),
    "moco lr": (lambda lr: aggregation.moco(lr=lr, normalize=True), (0.1, 3.0)),
    "db_mtl beta": (aggregation.db_mtl, (0.0, 0.9)),
    "m_config beta_1": (aggregation.m_config, (0.0, 0.9)),
    "lr_annealing alpha": (lambda alpha: aggregation.lr_annealing(alpha=alpha), (0.0, 0.1)),
    "grad_norm_weights momentum": (aggregation.grad_norm_weights, (0.0, 0.9)),
    "chain lr": (
        lambda lr: mtl.chain(mtl.learn(scalarization.imtl_l(), optax.sgd(lr)), aggregation.mgda()),
        (0.0, 0.1),
    ),
}


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.by_default("gradnorm lr")
def test_a_float_may_be_mapped_over(name):
    make, numbers = FLOATS[name]
    losses = LOSSES * np.linspace(0.8, 1, M, dtype=np.float32) ** np.arange(8, dtype=np.float32)[:, None]

    def last_gradient(number):
        method = make(number)
        call = lambda state, inputs: method.apply(state, inputs[0], values=inputs[1])[::-1]
        return jax.lax.scan(call, method.init((M, N)), (JACOBIANS, losses))[1][-1]

    both = jax.jit(lambda mapped: (jax.vmap(last_gradient)(mapped), [*map(last_gradient, numbers)]))
    mapped, one_by_one = jax.device_get(both(np.float32(numbers)))
    largest = np.max(np.abs(one_by_one))
    assert np.max(np.abs(mapped[0] - mapped[1])) > 1e-3 * largest
    # The same sums in another order, eight calls of them.
    np.testing.assert_allclose(mapped, one_by_one, rtol=0, atol=1e-5 * largest)


# Chains.


def losses_fn(params, scale=1.0):
    """Positive, and of very different sizes."""
    distances = params["a"][None] - jnp.arange(12.0).reshape(3, 4) / 5 + jnp.sum(params["b"])
    return scale * jnp.array([0.01, 1.0, 100.0]) * (0.1 + jnp.sum(distances**2, axis=1))


PARAMS = {"a": np.float32([0.3, -0.7, 0.2, 0.5]), "b": np.float32([0.1, -0.4])}


@pytest.mark.parametrize("rows", ["two_pass", "vmap"])
def test_chain_in_log_space_is_the_method_on_logarithms(rows):
    in_log_space = mtl.chain(scalarization.scale_invariant(), aggregation.mgda())
    plain = aggregation.mgda()
    grad_fn = mtl.value_and_grad(losses_fn, in_log_space, rows=rows, return_weights=True)
    of_logs = mtl.value_and_grad(lambda params: jnp.log(losses_fn(params)), plain, return_weights=True)

    @jax.jit
    def found(params):
        steps = grad_fn(params, in_log_space.init((3, params))), of_logs(params, plain.init((3, params)))
        return *steps, jax.jacobian(losses_fn)(params)

    of_chain, of_plain, jacobian = jax.device_get(found(PARAMS))
    (losses, _, weights), grads = of_chain
    (logs, _, of_logs_weights), expected = of_plain
    np.testing.assert_allclose(np.log(losses), logs, rtol=1e-5)
    # MGDA's weights, and so its gradient, are known to some roundings of the products of gradients.
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)
    # Chain's are those of the losses' own gradients.
    np.testing.assert_allclose(weights * losses, of_logs_weights, atol=1e-5)
    combined = jax.tree.map(lambda j: np.tensordot(weights, j, 1), jacobian)
    chex.assert_trees_all_close(grads, combined, rtol=1e-4, atol=1e-5)


def test_chain_by_rows_weighs_unscaled_gradients_too():
    """GradNorm in log space, by rows, as Gramian and as a whole: one set of weights, and one state."""
    method = mtl.chain(scalarization.scale_invariant(), METHODS["gradnorm"])
    jacobian = JACOBIANS[0]
    state = after(method, 3)
    gradient, expected_state = method.apply(state, jacobian, values=LOSSES)
    weights, _ = method.weighting.apply(state, jacobian, values=LOSSES)
    np.testing.assert_allclose(np.asarray(weights) @ jacobian, gradient, rtol=1e-5)
    of_gramian, _ = method.gramian_weighting.apply(state, jacobian @ jacobian.T, values=LOSSES)
    np.testing.assert_allclose(of_gramian, weights, rtol=1e-5)
    visited, statistics = state, []
    for i, row in enumerate(jacobian):
        visited, statistic = method.rowwise.visit(visited, i, row, values=LOSSES)
        statistics.append(statistic)
    of_rows, new_state = method.rowwise.weigh(visited, np.array(statistics), values=LOSSES)
    np.testing.assert_allclose(of_rows, weights, rtol=1e-5)
    chex.assert_trees_all_close(new_state, expected_state, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((scalarization.uw(), aggregation.mgda()), ValueError, r"scalarizer: .*learn\(scalarizer, optimizer\)"),
        ((aggregation.mgda(), scalarization.sum()), TypeError, "scalarizer: expected a Scalarizer, found Aggregator"),
        ((scalarization.sum(), scalarization.sum()), TypeError, "aggregator: expected an Aggregator, found Scalarizer"),
        ((aggregation.mgda, aggregation.mgda()), TypeError, "scalarizer: expected a Scalarizer, found function"),
    ],
)
def test_chain_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        mtl.chain(*arguments)


def test_hooks_of_a_chain_act_on_both():
    """As the parts' own. No aggregator has hooks of itself: here it is one around a chain."""
    mask = np.arange(M) != 1
    famo, dwa = scalarization.famo(), scalarization.dwa()
    with_hooks = aggregation.cr_mogm(mtl.chain(dwa, aggregation.mgda()))
    differs = lambda *trees: not all(jax.tree.leaves(jax.tree.map(np.array_equal, *trees)))
    for scalarizer, aggregator in (famo, aggregation.mgda()), (dwa, with_hooks), (famo, with_hooks):
        method = mtl.chain(scalarizer, aggregator)
        state = after(method, 2)
        observed, ended = method.observe(state, LOSSES / 2, mask=mask), method.end_epoch(state)
        chex.assert_trees_all_equal(observed.scalarizer, scalarizer.observe(state.scalarizer, LOSSES / 2, mask=mask))
        chex.assert_trees_all_equal(ended.scalarizer, scalarizer.end_epoch(state.scalarizer))
        chex.assert_trees_all_equal(ended.aggregator, aggregator.end_epoch(state.aggregator))
        assert differs(observed.scalarizer, state.scalarizer) == (scalarizer is famo)
        assert differs(ended.scalarizer, state.scalarizer) == (scalarizer is dwa)
        assert differs(ended.aggregator, state.aggregator) == (aggregator is with_hooks)


def test_gradnorm_takes_a_loss_of_the_other_sign_for_zero():
    method = aggregation.gradnorm()
    rows, state = JACOBIANS[0], method.init(JACOBIANS[0].shape)
    _, state = method.apply(state, rows, values=np.ones(4, np.float32))
    negative, zero = (method.apply(state, rows, values=np.float32([first, 1.0, 2.0, 0.5])) for first in (-1.0, 0.0))
    chex.assert_tree_all_finite(negative)
    chex.assert_trees_all_equal(negative, zero)


OPTIMIZERS = {
    "sgd": optax.sgd(0.01),
    "lbfgs": optax.lbfgs(0.01),
    "momo": optax.contrib.momo(0.01),
    "polyak_sgd": optax.polyak_sgd(0.01),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.by_default("momo", "lbfgs")
def test_gradnorm_gives_its_optimizer_what_it_wants(optimizer):
    method = aggregation.gradnorm(optimizer=optimizer)
    state = after(method, 3)
    raw_weights = np.asarray(state.raw_weights)
    np.testing.assert_allclose(np.sum(raw_weights), 4, rtol=1e-5)
    assert np.any(raw_weights != 1)


REMEMBERING = {
    "chain-db_mtl": lambda: mtl.chain(scalarization.scale_invariant(), aggregation.db_mtl(beta=0.9)),
    "chain-m_config": lambda: mtl.chain(scalarization.scale_invariant(), aggregation.m_config()),
    "chain-excess_mtl": lambda: mtl.chain(scalarization.geometric_mean(), aggregation.excess_mtl()),
    "moco": lambda: aggregation.moco(normalize=True),
}


@pytest.mark.parametrize("loss", [np.nan, np.inf])
@pytest.mark.parametrize("make", REMEMBERING.values(), ids=REMEMBERING)
@pytest.mark.by_default("*-nan")
def test_a_loss_that_is_not_finite_does_not_stay_in_what_is_remembered(make, loss):
    """Where rows are scaled by losses; by both paths."""
    method = mtl.skip_nonfinite(make())
    rows, state = JACOBIANS[0], after(method, 3)
    bad = with_new(LOSSES, 1, loss)
    gradient, by_jacobian = method.apply(state, rows, values=bad)
    assert np.all(np.isnan(gradient))
    visited, statistics = state, []
    for i, row in enumerate(rows):
        visited, statistic = method.rowwise.visit(visited, i, row, values=bad)
        statistics.append(statistic)
    statistics = jax.tree.map(lambda *x: np.stack(x), *statistics)
    _, by_rows = (method.rowwise.weigh or method.rowwise.finish)(visited, statistics, values=bad)
    for new in by_jacobian, by_rows:
        chex.assert_tree_all_finite(new)
        assert int(new.skipped) == 1
        np.testing.assert_array_equal(new.nonfinite, [0, 1, 0, 0])
    chex.assert_trees_all_close(by_rows, by_jacobian, rtol=1e-5)


def test_in_a_chain_both_parts_are_guarded_against_what_grows_too_large_between_them():
    parts = mtl.skip_nonfinite(scalarization.scale_invariant()), mtl.skip_nonfinite(aggregation.db_mtl(beta=0.9))
    method = mtl.chain(*parts)
    state = after(method, 2)
    _, state = method.apply(state, 1e10 * JACOBIANS[0], values=with_new(LOSSES, 0, 1e-30))
    assert int(state.aggregator.skipped) == 1
    chex.assert_tree_all_finite(method.apply(state, JACOBIANS[0], values=LOSSES))


@pytest.mark.parametrize("rows", ["vmap", 1, "stream"])
@pytest.mark.parametrize("name", ["db_mtl", "moco", "m_config"])
def test_a_gradient_of_what_is_remembered_is_a_constant_of_differentiation(name, rows):
    """On every way alike, whichever the size of the model makes the default."""
    method = {"db_mtl": aggregation.db_mtl(0.9), "moco": aggregation.moco(), "m_config": aggregation.m_config()}[name]
    losses_fn = lambda params, x: jnp.stack([jnp.sum((params - x) ** 2), jnp.sum((params + x) ** 4)])
    grad_fn = mtl.value_and_grad(losses_fn, method, rows=rows)

    def length(x):
        _, gradient = grad_fn(jnp.ones(3), method.init((2, 3)), x)
        return jnp.sum(gradient**2)

    assert float(jax.jit(jax.grad(length))(0.5)) == 0


@pytest.mark.parametrize("name", ["db_mtl", "moco", "m_config"])
def test_hyperparameters_of_a_wider_dtype_leave_the_memory_its_own(name):
    with jax.enable_x64(True):
        method = getattr(aggregation, name)(jnp.asarray(0.9, jnp.float64))
        params = np.ones(3, np.float32)
        old = jax.eval_shape(lambda: method.init((2, params)))
        losses_fn = lambda params: jnp.stack([jnp.sum(params**2), jnp.sum((params + 1) ** 4)])
        for rows in "vmap", "stream":
            (_, state), gradient = jax.eval_shape(mtl.value_and_grad(losses_fn, method, rows=rows), params, old)
            chex.assert_trees_all_equal_shapes_and_dtypes(state, old)
            assert gradient.dtype == jnp.float32


def test_moco_does_not_follow_the_gradient_of_a_negative_loss():
    """Made as long as its loss is large it would point upwards."""
    method, rows = aggregation.moco(normalize=True), np.float32([[3.0, 4.0], [1.0, 0.0]])
    _, state = method.apply(method.init(rows.shape), rows, values=np.float32([1.0, 2.0]))
    gradient, after = method.apply(state, rows, values=np.float32([1.0, -0.36]))
    assert np.all(np.isnan(gradient))
    np.testing.assert_array_equal(*(np.asarray(x.tracked)[1] for x in (after, state)))
    assert np.all(np.isfinite(method.apply(after, rows, values=np.float32([1.0, 2.0]))[0]))


def test_m_config_takes_turns_beyond_the_largest_int():
    """The numbers of the last turns begin anew in their order."""
    method, rows = aggregation.m_config(), np.float32([[3.0, 4.0], [1.0, 0.0], [0.0, 1.0]])
    last = np.iinfo(np.int32).max - np.array([1, 3, 2], np.int32)
    state, order = method.init(rows.shape)._replace(last_turn=last), []
    for _ in range(6):
        _, new = method.apply(state, rows)
        order.append(np.argmax(np.asarray(new.turns) - np.asarray(state.turns)))
        state = new
    assert order == [1, 2, 0, 1, 2, 0]
    np.testing.assert_array_equal(np.argsort(state.last_turn), [1, 2, 0])
    assert np.max(np.asarray(state.last_turn)) < 20
