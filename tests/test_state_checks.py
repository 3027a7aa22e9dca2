"""States: another method's, or of another shape, is refused by name, on every path, before anything is compiled."""

import itertools
import re
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.serialization import to_state_dict

import mtlbalance as mtl
from mtlbalance import aggregation, base, diagnostics, scalarization, states
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.conformance.helpers import Built

pytestmark = pytest.mark.unoptimized

ones, zeros = partial(np.ones, dtype=np.float32), partial(np.zeros, dtype=np.float32)

PARAMS = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32), "b": jax.ShapeDtypeStruct((2,), jnp.float32)}
LOSSES = ones(3)
JACOBIAN = jax.tree.map(lambda p: ones((3, *p.shape)), PARAMS)
ALL_CASES = [("scalarization", case) for case in SCALARIZERS] + [("aggregation", case) for case in AGGREGATORS]
CASES = {f"{family}-{case.name}": Built(case, family) for family, case in ALL_CASES}
each_case = pytest.mark.parametrize("name", CASES)


def own_state(built):
    return jax.eval_shape(lambda: built.init(params=PARAMS))


def kinds():
    """One state of each kind in the catalogue, by its structure, in which the types are."""
    return {jax.tree.structure(state): state for state in map(own_state, CASES.values())}


KINDS = kinds()


def paths(method, values=LOSSES):
    """Every function of a method that takes a state and does something with it, as functions of the state alone."""
    is_scalarizer = isinstance(method, mtl.Scalarizer)
    total = lambda params: sum(map(jnp.sum, jax.tree.leaves(params)))
    losses_fn = lambda params: jax.tree.map(lambda x: x * total(params), values)
    params = jax.tree.map(lambda p: ones(p.shape), PARAMS)
    if not method.learned:
        yield "value_and_grad", lambda state: mtl.value_and_grad(losses_fn, method, hooks=True)(params, state)
    for name, args in ("end_epoch", ()), ("observe", (values,)):
        hook = getattr(method, name)
        if not hook.__qualname__.endswith("<lambda>"):  # it does nothing with whatever it is given
            yield name, lambda state, hook=hook, args=args: hook(state, *args)
    if method.last_weights is not None:
        yield "last_weights", method.last_weights
        yield "refresh", lambda state: mtl.value_and_grad(losses_fn, method, hooks=True)(params, state, refresh=False)
    if is_scalarizer:
        yield "apply", lambda state: method.apply(state, values)
        yield "effective_weights", lambda state: diagnostics.effective_weights(method, state, values)
        return
    yield "apply", lambda state: method.apply(state, JACOBIAN, values=values)
    yield "aggregate", lambda state: mtl.aggregate(method, 3).update(JACOBIAN, state, params, values=values)
    for part, statistic in (method.weighting, JACOBIAN), (method.gramian_weighting, np.eye(3, dtype=np.float32)):
        if part is not None:
            yield "weighting", lambda state, part=part, x=statistic: part.apply(state, x, values=values)
    if method.rowwise is not None:
        visit, weigh, finish, visits = method.rowwise
        yield "visit", lambda state: visit(state, np.int32(0), params, values=values)
        last = weigh or finish
        yield "after the visits", lambda state: last(state, ones(3), values=values)
        if visits is not None:
            yield "visits", lambda state: visits(state, values=values)


def refused(call, state):
    with pytest.raises(TypeError, match=r"^state(\.\w+|\[\d\])*: expected .+\), found "):
        jax.eval_shape(call, state)


@pytest.mark.parametrize("name", [name for name, built in CASES.items() if "-" not in built.case.name])
@pytest.mark.slow
def test_every_other_methods_state_is_refused(name):
    built = CASES[name]
    own, apply = own_state(built), dict(paths(built.method))["apply"]
    for structure, other in KINDS.items():
        if structure != jax.tree.structure(own):
            refused(apply, other)


@each_case
def test_another_methods_state_is_refused_on_every_path(name):
    """By turns all states that are not the method's. Its own are accepted in all other tests."""
    built = CASES[name]
    own = jax.tree.structure(own_state(built))
    others = itertools.cycle([state for structure, state in KINDS.items() if structure != own])
    others = itertools.islice(others, list(CASES).index(name) % len(KINDS), None)
    for _, call in paths(built.method):
        refused(call, next(others))
    calls = [call for _, call in paths(built.method)]
    refused(calls[list(CASES).index(name) % len(calls)], to_state_dict(own_state(built)))


@each_case
@pytest.mark.slow
def test_what_was_restored_or_is_for_others_is_refused_on_every_path(name):
    """Without its types, for another number of tasks, and, on the paths that see gradients, for other parameters."""
    built = CASES[name]
    own, shapes = own_state(built), lambda state: [x.shape for x in jax.tree.leaves(state)]
    other_params = {"w": jax.ShapeDtypeStruct((5, 2), jnp.float32), "b": PARAMS["b"]}
    for_others = jax.eval_shape(lambda: built.init(params=other_params))
    for path, call in paths(built.method):
        refused(call, to_state_dict(own))
        refused(call, jax.tree.leaves(own))
        if not built.case.own_names and path not in ("last_weights", "end_epoch"):
            of_four = lambda: built.init(built.method_for(np.arange(4)), n_tasks=4, params=PARAMS)
            with pytest.raises(
                ValueError, match=r"^values: expected shape \(4,\), as given to init, found shape \(3,\)"
            ):
                jax.eval_shape(call, jax.eval_shape(of_four))
        if shapes(for_others) != shapes(own) and path in ("apply", "aggregate", "value_and_grad", "weighting", "visit"):
            with pytest.raises(ValueError, match=r"^(jacobian|row).*: expected .*found "):
                jax.eval_shape(call, for_others)


EXCESS_MTL = aggregation.excess_mtl()
STATE = jax.eval_shape(lambda: EXCESS_MTL.init((3, PARAMS)))
WHOLE = re.escape("excess_mtl's ExcessMTLState(log_weights, baseline, seen, squared_gradients), found ")
AS_RESTORED = re.escape(" (of a checkpoint? mtl.restore makes the state of it, like jax.eval_shape of init)")
OF_DWA = re.escape("dwa's DWAState(average, count, newer, older)")
NO_STATES = {
    "fields": (list(STATE), f"a list of 4{AS_RESTORED}"),
    "a tuple": (tuple(STATE), "a tuple of 4"),
    "as a checkpoint without a target": (
        STATE._asdict(),
        f"a dict of 'baseline', 'log_weights', 'seen', 'squared_gradients'{AS_RESTORED}",
    ),
    "an array": (JACOBIAN["w"], r"an array of shape \(3, 4, 2\)"),
    "none": (None, "None"),
    "nothing": ((), "a tuple of 0"),
    "a scalarizer's": (scalarization.dwa().init(3), OF_DWA),
    "one that several methods have": (states.init_seen(3), re.escape("SeenState(seen)")),
}


@pytest.mark.parametrize(("state", "found"), NO_STATES.values(), ids=NO_STATES)
def test_what_is_found_is_named(state, found):
    for path, call in paths(EXCESS_MTL):
        due = WHOLE if hasattr(state, "_fields") else f"what the method's init returned, {WHOLE}"
        if path == "value_and_grad" and not hasattr(state, "_fields"):
            due = r"what grad_fn\.init\(.*\) returned, in its place: .*, found "
        with pytest.raises(TypeError, match=f"state: expected {due}{found}"):
            jax.eval_shape(call, state)
            pytest.fail(f"{state}")


def test_the_methods_are_named():
    """Also the one whose state others have too, and an author's."""
    pcgrad, gradvac = aggregation.pcgrad(), aggregation.gradvac()
    found = re.escape("RandomState(seen, key), found gradvac's GradVacState(seen, targets, key)")
    with pytest.raises(TypeError, match=f"state: expected pcgrad's {found}"):
        pcgrad.apply(gradvac.init((3, PARAMS)), JACOBIAN)
    with pytest.raises(TypeError, match=re.escape("state: expected mgda's SeenState(seen), found ") + OF_DWA):
        aggregation.mgda().apply(scalarization.dwa().init(3), JACOBIAN)
    with pytest.raises(TypeError, match=re.escape("state: expected largest's Largest(level), found SeenState(seen)")):
        largest().apply(states.init_seen(2), ones(2))
    with pytest.raises(TypeError, match="state: expected following_gradients's SeenState"):
        following_gradients().apply(Largest(ones(3)), JACOBIAN)


def following_gradients():
    def finish(state, statistics, values, mask):
        return jax.tree.map(lambda p: zeros(p.shape), PARAMS), state

    return base.rowwise_aggregator(states.init_seen, lambda memory, row, task: (memory, ()), finish=finish)


class Largest(NamedTuple):
    level: Any


def largest(bound=None):
    def init(shape, dtype):
        if bound is not None and shape != bound:
            raise RuntimeError("not my tasks")
        return Largest(jnp.zeros(shape, dtype))

    return base.scalarizer(init, lambda state, values, mask: (jnp.max(values, where=mask, initial=0), state))


def test_states_of_methods_that_remember_the_same_may_be_exchanged():
    aggregation.random(0).apply(aggregation.pcgrad(3).init((3, PARAMS)), JACOBIAN)
    scalarization.sum().apply(aggregation.mgda().init((3, PARAMS)), ones(3))


def test_an_init_that_cannot_be_asked():
    """Where it refuses the number of tasks it is asked for the type alone; refuses it that too, nothing is known."""
    method = largest(bound=(2,))
    method.apply(Largest(zeros(3)), ones(3))
    method.apply(states.init_seen(3), ones(3))
    with pytest.raises(TypeError, match="state: expected largest's"):
        method.apply(states.init_seen(2), ones(2))
    with pytest.raises(TypeError, match="state: expected largest's"):
        largest(bound=(1,)).apply(states.init_seen(3), ones(3))


class Reloaded(NamedTuple):
    level: Any


Reloaded.__name__ = "Largest"


def test_a_type_goes_by_its_name():
    """A class that was pickled by value, or reloaded, is another object."""
    scalar, _ = largest().apply(Reloaded(zeros(2)), np.float32([1.0, 2.0]))
    assert scalar == 2


LEARN = mtl.learn(scalarization.uw(), optax.adam(0.1))
CHAIN = mtl.skip_nonfinite(mtl.chain(scalarization.mean(), EXCESS_MTL))
INSIDE = {
    "the inner state": (
        LEARN,
        lambda state: state._replace(inner=scalarization.imtl_l().init(3)),
        r"state.inner: expected uw's UWState\(log_var\), found imtl_l's IMTLLState\(log_scale\)",
    ),
    "another optimizer's": (
        LEARN,
        lambda state: state._replace(opt_state=optax.sgd(0.1, momentum=0.9).init({"log_var": ones(3)})),
        r"state.opt_state\[0\]: expected ScaleByAdamState\(count, mu, nu\), found TraceState\(trace\)",
    ),
    "two levels down": (
        CHAIN,
        lambda state: state._replace(inner=state.inner._replace(aggregator=states.init_seen(3))),
        r"state.inner.aggregator: expected excess_mtl's ExcessMTLState\(.*\), found SeenState\(seen\)",
    ),
    "the optimizer's number of tasks": (
        LEARN,
        lambda state: state._replace(opt_state=LEARN.init(2).opt_state),
        r"state.opt_state\[0\].mu\['log_var'\]: expected shape \(3,\), as init makes it, found shape \(2,\)",
    ),
    "another number of tasks": (
        scalarization.dwa(),
        lambda state: state._replace(newer=zeros(2)),
        r"state.newer: expected shape \(3,\), as init makes it, found shape \(2,\)",
    ),
    "pairs of another number of tasks": (
        aggregation.gradvac(),
        lambda state: state._replace(targets=zeros((2, 2))),
        r"state.targets: expected shape \(3, 3\), as init makes it, found shape \(2, 2\)",
    ),
    "rows of another number of tasks": (
        CHAIN,
        lambda state: state._replace(
            inner=state.inner._replace(aggregator=EXCESS_MTL.init((2, PARAMS))._replace(log_weights=zeros(3)))
        ),
        r"state.inner.aggregator.baseline: expected shape \(3,\), as init makes it, found shape \(2,\)",
    ),
    "rows alone": (
        EXCESS_MTL,
        lambda state: state._replace(squared_gradients=EXCESS_MTL.init((2, PARAMS)).squared_gradients),
        r"state.squared_gradients\['b'\]: expected shape \(3, 2\), as init makes it, found shape \(2, 2\)",
    ),
    "other parameters in one field": (
        aggregation.m_config(),
        lambda state: state._replace(squares={"w": zeros((4, 2)), "b": zeros(7)}),
        r"state.squares\['b'\]: expected shape \(2,\), as init makes it, found shape \(7,\)",
    ),
    "a tree of other parameters in one field": (
        aggregation.m_config(),
        lambda state: state._replace(direction={"w": zeros((4, 2))}),
        "state.direction: expected a dict of 'b', 'w' as init makes it, found a dict of 'w' of another structure",
    ),
}


@pytest.mark.parametrize(("method", "change", "message"), INSIDE.values(), ids=INSIDE)
def test_what_stands_in_the_fields(method, change, message):
    is_scalarizer = isinstance(method, mtl.Scalarizer)
    state = change(method.init(3 if is_scalarizer else (3, PARAMS)))
    for _, call in paths(method):
        with pytest.raises((TypeError, ValueError), match=message):
            jax.eval_shape(call, state)


class Direction(NamedTuple):
    seen: Any
    momentum: Any


def test_parameters_that_the_state_does_not_tell_may_have_any_shape():
    def init(m, params, dtype):
        return Direction(states.zero_counts(m), jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))

    method = base.aggregator(init, weighting=lambda state, jacobian, values, mask: (jnp.ones(len(mask)), state))
    state = method.init((3, PARAMS))
    chex.assert_trees_all_equal(method.apply(state, JACOBIAN)[1], state)
    with pytest.raises(TypeError, match=r"state: expected .*Direction\(seen, momentum\), found SeenState\(seen\)"):
        method.apply(states.init_seen(3), JACOBIAN)


def test_stacked_and_traced_states_and_traced_hyperparameters():
    def train(temperature, state):
        return scalarization.dwa(temperature).apply(state, np.float32([1.0, 2.0]))[1]

    state = jax.vmap(train, in_axes=(0, None))(np.float32([0.5, 2.0]), scalarization.dwa().init(2))
    state = jax.jit(jax.vmap(train))(np.float32([0.5, 2.0]), state)
    chex.assert_trees_all_equal(state.count, np.full((2, 2), 2))
    with pytest.raises(ValueError, match=r"state.seen: expected shape \(2,\), as init makes it, found shape \(2, 3\)"):
        stacked = jax.tree.map(lambda x: np.stack([x, x]), aggregation.mgda().init((3, PARAMS)))
        aggregation.mgda().apply(stacked, JACOBIAN)


def test_a_checkpoint_goes_with_a_target_and_not_without(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    method = mtl.skip_nonfinite(scalarization.dwa())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", method.init(2))
        checkpointer.wait_until_finished()
        method.apply(checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: method.init(2))), ones(2))
        with pytest.raises(TypeError, match=r"expected .*SkipNonfiniteState\(.*, found a dict of .*of a checkpoint"):
            method.apply(checkpointer.restore(tmp_path / "state"), ones(2))


def test_another_number_of_tasks_is_named():
    losses, mask = {"cls": 1.0, "seg": 2.0}, {"cls": True, "seg": False}
    found = re.escape("expected shape (3,), as given to init, found shape (2,) of ['cls', 'seg'] (mtl.carry_over makes")
    methods = scalarization.dwa(), mtl.amortize(EXCESS_MTL)
    for method in methods:
        state = method.init(3 if isinstance(method, mtl.Scalarizer) else (3, PARAMS))
        for path, call in paths(method, losses):
            if path not in ("last_weights", "end_epoch"):
                with pytest.raises(ValueError, match=f"values: {found}"):
                    jax.eval_shape(call, state)
    with pytest.raises(ValueError, match=f"mask: {found}"):
        EXCESS_MTL.apply(EXCESS_MTL.init((3, PARAMS)), JACOBIAN, values=losses, mask=mask)
    with pytest.raises(ValueError, match=r"(?m)values: expected shape \(3,\), as given to init, found shape \(2,\)$"):
        EXCESS_MTL.apply(EXCESS_MTL.init((3, PARAMS)), JACOBIAN, values=ones(2))


def test_it_costs_nothing_once_compiled():
    """And the plain ``init`` is asked once for a method, whatever the path."""
    calls = []

    def init(shape, dtype):
        calls.append(shape)
        return Largest(jnp.zeros(shape, dtype))

    apply = lambda state, values, mask: (jnp.sum(values, where=mask), state)
    method = base.scalarizer(init, apply, end_epoch=lambda state: state, observe=lambda state, values, mask: state)
    state = method.init(2)
    for _ in range(3):
        _, state = method.apply(state, ones(2))
        state = method.end_epoch(method.observe(state, ones(2)))
    assert calls == [(2,), (2,)]
