"""The training step against the same step written by hand: a Jacobian and ``apply``, or the gradient of ``apply``."""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import base
from mtlbalance.states import select

pytestmark = pytest.mark.unoptimized

NAMES = ("depth", "normals", "segment")  # in the order in which JAX flattens them
SHARED = {"trunk": True, "heads": False}
ROUNDING = 1e-5  # of the largest term: one computation compiled in several ways, in float32
STEPS = 100


@jax.jit
def new_params(seed=0):
    """A trunk and a head for every task."""
    trunk, *heads = jax.random.split(jax.random.key(seed), 4)
    return {
        "trunk": {"w": jax.random.normal(trunk, (4, 8)) / 2, "b": jnp.zeros(8)},
        "heads": {
            name: {"w": jax.random.normal(key, (8,)), "b": jnp.float32(0.1)}
            for name, key in zip(NAMES, heads, strict=True)
        },
    }


@jax.jit
def new_batch(seed):
    """Inputs, and the labels of three tasks of which no two want the same."""
    x = jax.random.normal(jax.random.key(1000 + seed), (8, 4))
    return x, jnp.stack([2 * x[:, 0] + 1, x[:, 1] * x[:, 2], jnp.sin(3 * x[:, 3])], axis=1)


def squares(params, batch):
    """The squared errors, one row for every example and one column for every task."""
    x, labels = batch
    hidden = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"][None])
    outputs = [hidden @ params["heads"][name]["w"] + params["heads"][name]["b"][None] for name in NAMES]
    return (jnp.stack(outputs, axis=1) - labels) ** 2


def losses_fn(params, batch):
    return jnp.mean(squares(params, batch), axis=0)


def named_losses_fn(params, batch):
    return dict(zip(NAMES, losses_fn(params, batch), strict=True))


def counted_losses_fn(params, batch, present):
    """No label of an absent task."""
    there = jnp.broadcast_to(present, batch[1].shape)
    return mtl.Counted(jnp.sum(squares(params, batch) * there, axis=0), jnp.sum(there, axis=0))


class Step(NamedTuple):
    """What one step by the library gives; ``weights`` are ``None`` for a method that makes none."""

    losses: Any
    state: Any
    weights: Any
    gradient: Any


class Expected(NamedTuple):
    """What one step by hand gives, and the rows from which each leaf of the gradient is made."""

    losses: Any
    state: Any
    gradient: Any
    jacobian: Any


losses_and_jacobian = jax.jit(lambda params, batch: (losses_fn(params, batch), jax.jacrev(losses_fn)(params, batch)))


def step_of(grad_fn, params, state, *args, **kwargs):
    """The step as the library takes it."""
    (losses, state, *weights), gradient = grad_fn(params, state, *args, **kwargs)
    return Step(losses, state, *(weights or [None]), gradient)


def by_hand(method, params, state, batch, mask=None, shared=False):
    """The step without the library's derivatives."""
    losses, jacobian = losses_fn(params, batch), jax.jacrev(losses_fn)(params, batch)
    if isinstance(method, base.Scalarizer):
        scalar = lambda params: method.apply(state, losses_fn(params, batch), mask=mask)
        gradient, new_state = jax.grad(scalar, has_aux=True)(params)
    else:
        seen = mtl.subset(jacobian, SHARED) if shared else jacobian
        gradient, new_state = method.apply(state, seen, values=losses, mask=mask)
    if shared:
        gradient = {"trunk": gradient["trunk"], "heads": combined(jnp.ones(3), jacobian["heads"])}
    return Expected(losses, new_state, gradient, jacobian)


def combined(weights, jacobian):
    """One gradient of the rows; of one step, or of each of those along a leading axis."""
    return jax.tree.map(lambda rows: (per_row(weights, rows) * rows).sum(weights.ndim - 1), jacobian)


def terms_of(weights, jacobian):
    """The size of the largest number that goes into every leaf of :func:`combined`."""
    return jax.tree.map(lambda rows: (abs(per_row(weights, rows)) * abs(rows)).max(), jacobian)


def per_row(weights, rows):
    return weights.reshape(weights.shape + (1,) * (rows.ndim - weights.ndim))


def trained(built, tasks=None):
    """The method, its learned fields trained, because the training step refuses it otherwise."""
    method = built.method if tasks is None else built.method_for(tasks)
    return mtl.learn(method, optax.sgd(1e-3)) if method.learned else method


def init(method, params):
    return method.init(3 if isinstance(method, base.Scalarizer) else (3, params))


def every_rows(method):
    """Every way to compute rows that the method allows, the default for parameters so few first."""
    if isinstance(method, base.Scalarizer):
        return (None,)
    more = ("two_pass",) * (getattr(method, "gramian_weighting", None) is not None)
    more += ("stream",) * (getattr(method, "rowwise", None) is not None)
    return ("vmap", 1, *more)


def in_order(named):
    """Named numbers as the array that serves where losses have no names."""
    return None if named is None else jnp.stack([named[name] for name in NAMES])


def assert_close(actual, expected, sizes=None, rounding=ROUNDING):
    """Equal up to a rounding of the largest number of each leaf, or of what has been added up to it."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    sizes = jax.tree.leaves(expected if sizes is None else sizes)
    for (path, leaf), other, size in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), sizes, strict=True
    ):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            largest = np.max(np.abs(size), initial=0, where=np.isfinite(size))
            name = jax.tree_util.keystr(path)
            np.testing.assert_allclose(leaf, other, rtol=0, atol=rounding * largest, err_msg=name)
        else:
            chex.assert_trees_all_equal(leaf, other)


def assert_same_step(step, expected, shared=False, rounding=ROUNDING):
    """The library's step is the one by hand, and its weights are those that make this gradient of the rows."""
    assert_close(step.losses, expected.losses)
    assert_close(step.state, expected.state)
    if step.weights is None:
        assert_close(step.gradient, expected.gradient, rounding=rounding)
        return
    weights, jacobian = jax.device_get((step.weights, expected.jacobian))
    weights = {"trunk": weights, "heads": np.ones_like(weights) if shared else weights}
    of_all = lambda of_one: {name: of_one(weights[name], rows) for name, rows in jacobian.items()}
    terms = of_all(terms_of)
    chex.assert_tree_all_finite((step.weights, expected.gradient))
    assert_close(step.gradient, expected.gradient, terms, rounding)
    assert_close(of_all(combined), expected.gradient, terms, rounding)


@pytest.mark.every_method
@pytest.mark.cases(lambda built: built.method.learned)
def test_learned_fields_must_be_trained_by_someone(scalarizer):
    with pytest.raises(ValueError, match=r"mtl\.learn"):
        mtl.value_and_grad(losses_fn, scalarizer.method)


@pytest.mark.every_method
@pytest.mark.cases(lambda built: built.method.needs or {"end_epoch", "observe"} & set(built.kind))
def test_without_the_hooks_that_it_needs_a_method_does_nothing(scalarizer):
    """It then gives what it gives at first, and a training step refuses it unless told that the loop calls them."""
    alone = called = start = scalarizer.init()
    for i in range(5):
        _, alone = scalarizer.apply(alone, scalarizer.sample(i))
        _, called = scalarizer.step(called, scalarizer.sample(i))
    first, without, with_hooks = (scalarizer.apply(state, scalarizer.sample(5))[0] for state in (start, alone, called))
    assert np.allclose(without, first, rtol=1e-6) == bool(scalarizer.method.needs)
    assert not np.allclose(with_hooks, without, rtol=1e-3)
    mtl.value_and_grad(losses_fn, scalarizer.method, hooks=True)
    if scalarizer.method.needs:
        with pytest.raises(ValueError, match=rf"^hooks: expected True.* state = method.{scalarizer.method.needs[0]}\("):
            mtl.value_and_grad(losses_fn, scalarizer.method)


def grad_fns(method, every, **kwargs):
    """The library's steps, by the way in which they compute rows."""
    kwargs |= {"return_weights": mtl.has_weights(method), "hooks": True}
    return {str(rows): mtl.value_and_grad(losses_fn, method, rows=rows, **kwargs) for rows in every}


def take_three(method, state, grad_fns, batches, **kwargs):
    """Three steps by every function and by hand, each with its own state; keywords are for the hand."""

    @jax.jit
    def take(params, states, hand, batch, mask):
        taken = {name: step_of(grad_fn, params, states[name], batch, mask=mask) for name, grad_fn in grad_fns.items()}
        return taken, by_hand(method, params, hand, batch, mask, **kwargs)

    states, hand = dict.fromkeys(grad_fns, state), state
    for batch, mask in batches:
        taken, expected = take(new_params(), states, hand, batch, mask)
        yield taken, expected
        states, hand = {name: step.state for name, step in taken.items()}, expected.state


@pytest.mark.one_of_a_kind("engine")
def test_every_way_gives_what_the_jacobian_gives(built):
    """And the weights are those of the gradient."""
    method, params = trained(built), new_params()
    steps = grad_fns(method, every_rows(method))
    batches = [(new_batch(i), None) for i in range(3)]
    for taken, expected in take_three(method, init(method, params), steps, batches):
        for step in taken.values():
            assert_same_step(step, expected)


@pytest.mark.one_of_a_kind("engine")
def test_heads_get_the_plain_gradient_where_the_trunk_is_shared(built):
    method, params = trained(built), new_params()
    steps = grad_fns(method, {None, every_rows(method)[-1]}, shared=SHARED)
    state = init(method, mtl.subset(params, SHARED))
    for taken, expected in take_three(method, state, steps, [(new_batch(i), None) for i in range(3)], shared=True):
        for step in taken.values():
            assert_same_step(step, expected, shared=True)


@pytest.mark.one_of_a_kind("engine")
def test_weights_are_decided_on_a_part_and_applied_to_all(aggregator):
    method, params, batch = aggregator.method, new_params(), new_batch(0)
    if method.weighting is None:
        with pytest.raises(ValueError, match="decide_on: expected a method that makes weights"):
            mtl.value_and_grad(losses_fn, method, decide_on=SHARED, hooks=True)
        return
    steps = grad_fns(method, {None, every_rows(method)[-1]}, decide_on=SHARED)
    state = init(method, mtl.subset(params, SHARED))
    losses, jacobian = jax.device_get(losses_and_jacobian(params, batch))
    weights, new_state = method.weighting.apply(state, mtl.subset(jacobian, SHARED), values=losses)
    expected = Expected(losses, new_state, combined(np.asarray(weights), jacobian), jacobian)
    for grad_fn in steps.values():
        # Aligned-MTL's weights are those of an ill-conditioned Gramian here: 1.5e-5.
        assert_same_step(step_of(jax.jit(grad_fn), params, state, batch), expected, rounding=2 * ROUNDING)


@pytest.mark.one_of_a_kind("engine")
def test_absent_tasks_are_left_out_whether_masked_or_without_labels(built):
    """In their place there may be anything that has a gradient."""
    method, params = trained(built), new_params()
    steps = grad_fns(method, {None, every_rows(method)[-1]})
    by_name = trained(built, {name: i for i, name in enumerate(NAMES)})
    named = mtl.value_and_grad(named_losses_fn, by_name, return_weights=mtl.has_weights(method), hooks=True)
    counted = mtl.value_and_grad(counted_losses_fn, method, return_weights=mtl.has_weights(method), hooks=True)

    def of_named(params, state, batch, *, mask):
        (losses, new_state, *weights), gradient = named(params, state, batch, mask=dict(zip(NAMES, mask, strict=True)))
        assert all(set(per_task) == set(NAMES) for per_task in (losses, *weights))
        return (in_order(losses), new_state, *map(in_order, weights)), gradient

    def of_counted(params, state, batch, *, mask):
        (losses, *rest), gradient = counted(params, state, batch, present=mask)
        return (jnp.where(mask, losses.sum / losses.count, losses_fn(params, batch)), *rest), gradient

    steps |= {"named": of_named, "counted": of_counted}
    masks = np.array([[True, False, True], [True, True, True], [False, True, True]])
    batches = [(new_batch(i), mask) for i, mask in enumerate(masks)]
    for taken, expected in take_three(method, init(method, params), steps, batches):
        for step in taken.values():
            assert_same_step(step, expected)


@pytest.mark.one_of_a_kind("engine")
def test_a_hundred_steps_of_sgd_in_a_scan_are_those_by_hand(built):
    """With both hooks; each run goes its own way, so that the smallest systematic difference adds up."""
    method, params = trained(built), new_params()
    rows = None if built.case.amplifies_rounding else every_rows(method)[-1]
    (grad_fn,) = grad_fns(method, [rows]).values()

    def update(params, step, batch, ends_epoch):
        params = jax.tree.map(lambda p, g: p - 0.01 * g, params, step.gradient)
        after = losses_fn(params, batch)
        state = method.observe(step.state, after / (1 + after))  # the losses, or DTP's indicator from 0 to 1
        return params, select(ends_epoch, method.end_epoch(state), state)

    def both(carry, i):
        batch = new_batch(i)
        library, hand = carry
        steps = step_of(grad_fn, *library, batch), by_hand(method, *hand, batch)
        carry = tuple(update(params, step, batch, i % 10 == 9) for (params, _), step in zip(carry, steps, strict=True))
        return carry, steps

    start = params, init(method, params)
    run = jax.jit(partial(jax.lax.scan, both))
    (library, hand), (steps, expected) = run((start, start), jnp.arange(STEPS))
    np.testing.assert_allclose(steps.losses, expected.losses, rtol=ROUNDING)
    rounding = 10 * ROUNDING if built.case.amplifies_rounding else ROUNDING
    assert_same_step(steps, expected, rounding=rounding)
    assert_close(library, hand, rounding=rounding)
    assert len(np.unique(steps.losses[:, 0])) == STEPS


@pytest.mark.one_of_a_kind("engine")
def test_amortized_weights_serve_until_they_are_refreshed(built):
    """Whether ``refresh`` is traced or not; without it the next gradient has the last weights."""
    plain, params = trained(built), new_params()
    if not mtl.has_weights(plain):
        with pytest.raises(ValueError, match="method: expected an aggregator that makes weights"):
            mtl.amortize(plain)
        return
    method = plain if plain.last_weights else mtl.amortize(plain)
    inner_of = lambda state: state if method is plain else state.inner
    grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True, hooks=True)

    @jax.jit
    def take(params, state, batch, refresh, mask):
        again = partial(step_of, grad_fn, params, state, batch, refresh=False)
        taken = {
            "refreshed": step_of(grad_fn, params, state, batch, refresh=True),
            "traced": step_of(grad_fn, params, state, batch, refresh=refresh),
            "again": again(),
            "masked": again(mask=mask),
        }
        return taken, by_hand(plain, params, inner_of(state), batch)

    state, mask = init(method, params), np.array([True, False, True])
    for i, refresh in enumerate([True, False]):
        taken, expected = take(params, state, new_batch(i), refresh, mask)
        for step in [taken["refreshed"], taken["traced"]] if refresh else [taken["refreshed"]]:
            assert_same_step(step._replace(state=inner_of(step.state)), expected)
            # XLA may compute what is in the output and in the state twice.
            chex.assert_trees_all_close(method.last_weights(step.state), step.weights, rtol=1e-6)
        if not refresh:
            assert_close(taken["traced"].gradient, taken["again"].gradient)
            chex.assert_trees_all_equal(taken["traced"].weights, taken["again"].weights)
            chex.assert_trees_all_equal(taken["traced"].state, state)
        last = jax.device_get(method.last_weights(state))
        losses, jacobian = jax.device_get(losses_and_jacobian(params, new_batch(i)))
        for name, weights in {"again": last, "masked": np.where(mask, last, 0)}.items():
            assert_close(taken[name].losses, losses)
            chex.assert_trees_all_equal(taken[name].weights, weights)
            chex.assert_trees_all_equal(taken[name].state, state)
            assert_close(taken[name].gradient, combined(weights, jacobian), terms_of(weights, jacobian))
        state = taken["refreshed"].state


class Nothing(NamedTuple):
    per_task: Any


def test_a_method_without_weights_gets_rows_and_has_none_to_return():
    """The median of each coordinate, as no public method is."""
    median = lambda rows: jnp.median(jnp.array(rows), axis=0)
    method = base.aggregator(
        lambda m, params, dtype: Nothing(jnp.zeros(m, dtype)),
        apply=lambda state, jacobian, values, mask: (jax.tree.map(median, jacobian), state),
    )
    params, batch = new_params(), new_batch(0)
    _, jacobian = jax.device_get(losses_and_jacobian(params, batch))
    for rows in every_rows(method):
        step = jax.jit(mtl.value_and_grad(losses_fn, method, rows=rows, hooks=True))
        _, gradient = step(params, init(method, params), batch)
        assert_close(gradient, jax.tree.map(median, jacobian), terms_of(np.ones(3), jacobian))
    for name, given in {"return_weights": True, "decide_on": SHARED}.items():
        with pytest.raises(ValueError, match=f"{name}: .*makes none"):
            mtl.value_and_grad(losses_fn, method, hooks=True, **{name: given})
    with pytest.raises(ValueError, match="without a weighting"):
        mtl.amortize(method)
