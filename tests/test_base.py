"""What the builders tell the author of a method: each mistake by name, at build, ``init`` or trace."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import pytest

import mtlbalance as mtl
from mtlbalance import base, states
from mtlbalance.states import SeenState, count_seen, init_seen

pytestmark = pytest.mark.unoptimized


class Level(NamedTuple):
    level: Any


class Remembered(NamedTuple):
    seen: Any
    averages: Any


class MemoryFirst(NamedTuple):
    averages: Any
    seen: Any


class Empty(NamedTuple):
    pass


ROWS = jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])


def total(state, values, mask):
    return jnp.sum(values, where=mask), state


def equal(state, statistic, values, mask):
    return jnp.ones(len(mask)), state


def remembering(m, params, dtype):
    return Remembered(states.zero_counts(m), states.zeros_jacobian(m, params, dtype))


def apply_scalarizer(init, apply, **others):
    method = base.scalarizer(init, apply, **others)
    return method.apply(method.init(2), jnp.ones(2))


def apply_aggregator(init=init_seen, **functions):
    method = base.aggregator(init, **functions)
    return method.apply(method.init((2, 3)), ROWS)


def apply_rowwise(init, visit, weigh=equal, **others):
    method = base.rowwise_aggregator(init, visit, weigh, **others)
    return method.apply(method.init((2, 3)), ROWS)


def step_by_rows(method):
    step = mtl.value_and_grad(lambda params: jnp.stack([params.sum(), 2 * params.sum()]), method, rows="stream")
    return step(jnp.ones(3), method.init((2, 3)))


def keep(memory, row, task):
    return memory, ()


MISTAKES = {
    "a state without arrays": (
        lambda: base.scalarizer(lambda shape, dtype: Empty(), total).init(2),
        ValueError,
        r"init: expected a state whose first leaf has one entry per task, shape \(2,\).*found Empty\(\)",
    ),
    "a scalar counter first": (
        lambda: base.scalarizer(lambda shape, dtype: Level(jnp.zeros((), jnp.int32)), total).init(2),
        ValueError,
        r"init: .*first leaf has one entry per task, shape \(2,\).*found shape \(\)",
    ),
    "what is shaped like the Jacobian first": (
        lambda: base.rowwise_aggregator(
            lambda m, params, dtype: MemoryFirst(states.zeros_jacobian(m, params, dtype), states.zero_counts(m)),
            keep,
            equal,
            memory="averages",
        ).init((2, 3)),
        ValueError,
        r"init: .*first leaf has one entry per task, shape \(2,\).*found shape \(2, 3\)",
    ),
    "nothing that weighs": (
        lambda: base.aggregator(init_seen),
        TypeError,
        "aggregator: expected one of apply, weighting and gramian_weighting, found none",
    ),
    "visits and nothing after them": (
        lambda: base.rowwise_aggregator(init_seen, keep),
        TypeError,
        "rowwise_aggregator: expected one of weigh and finish, found none",
    ),
    "two ends of the visits": (
        lambda: base.rowwise_aggregator(init_seen, keep, equal, finish=equal),
        TypeError,
        "rowwise_aggregator: expected one of weigh and finish, found both",
    ),
    "(state, scalar)": (
        lambda: apply_scalarizer(init_seen, lambda *given: total(*given)[::-1]),
        TypeError,
        r"apply: expected \(scalar, new_state\).*found \(a SeenState, an array of shape \(\)\)",
    ),
    "a scalar alone": (
        lambda: apply_scalarizer(init_seen, lambda *given: total(*given)[0]),
        TypeError,
        r"apply: expected \(scalar, new_state\), found an array of shape \(\)",
    ),
    "one loss per task": (
        lambda: apply_scalarizer(init_seen, lambda state, values, mask: (values, state)),
        TypeError,
        r"apply: .*the scalar of shape \(\), found \(an array of shape \(2,\), a SeenState\)",
    ),
    "a new state of another shape": (
        lambda: apply_scalarizer(init_seen, lambda *given: (total(*given)[0], SeenState(jnp.zeros(5, jnp.int32)))),
        ValueError,
        r"the new state of apply.seen: expected shape \(2,\), as before, found shape \(5,\)",
    ),
    "a new state of another structure": (
        lambda: apply_scalarizer(init_seen, lambda *given: (total(*given)[0], Level(jnp.zeros(2)))),
        TypeError,
        r"the new state of apply: expected what it was, SeenState\(seen\), found Level\(level\)",
    ),
    "an epoch's end that forgets": (
        lambda: base.scalarizer(init_seen, total, end_epoch=lambda state: Level(state.seen)).end_epoch(init_seen(2)),
        TypeError,
        r"the new state of end_epoch: expected what it was, SeenState\(seen\), found Level\(level\)",
    ),
    "observed into another shape": (
        lambda: base.scalarizer(
            init_seen, total, observe=lambda state, values, mask: SeenState(jnp.zeros(3, jnp.int32))
        ).observe(init_seen(2), jnp.ones(2)),
        ValueError,
        r"the new state of observe.seen: expected shape \(2,\), as before, found shape \(3,\)",
    ),
    "(state, weights)": (
        lambda: apply_aggregator(gramian_weighting=lambda *given: equal(*given)[::-1]),
        TypeError,
        r"gramian_weighting: expected \(weights, new_state\), .*of shape \(2,\), found \(a SeenState, an array",
    ),
    "one weight for all": (
        lambda: apply_aggregator(weighting=lambda state, jacobian, values, mask: (jnp.ones(()), state)),
        TypeError,
        r"weighting: .*the weights of shape \(2,\), found \(an array of shape \(\), a SeenState\)",
    ),
    "a gradient with the task axis": (
        lambda: apply_aggregator(apply=lambda state, jacobian, values, mask: (jacobian, state)),
        ValueError,
        r"the gradient of apply: expected shape \(3,\), found shape \(2, 3\)",
    ),
    "a state without counts": (
        lambda: base.rowwise_aggregator(lambda m, params, dtype: Level(jnp.zeros(m)), keep, equal).init((2, 3)),
        ValueError,
        "init: expected a state with a field 'seen', found level",
    ),
    "a memory of another name": (
        lambda: base.rowwise_aggregator(remembering, keep, equal, memory="average").init((2, 3)),
        ValueError,
        "init: expected a state with a field 'average', found seen, averages",
    ),
    "learned fields of another name": (
        lambda: base.scalarizer(init_seen, total, learned=("log_var",)).init(2),
        ValueError,
        "init: expected a state with a field 'log_var', found seen",
    ),
    "(state, weights) after the visits": (
        lambda: apply_rowwise(init_seen, keep, lambda *given: equal(*given)[::-1]),
        TypeError,
        r"weigh: expected \(weights, new_state\), the weights of shape \(2,\), found \(a SeenState, an array",
    ),
    "(state, gradient)": (
        lambda: apply_rowwise(init_seen, keep, None, finish=lambda state, *others: (state, jnp.zeros(3))),
        TypeError,
        r"finish: expected \(gradient, new_state\), found \(a SeenState, an array of shape \(3,\)\)",
    ),
    "a gradient of another shape by rows": (
        lambda: step_by_rows(
            base.rowwise_aggregator(init_seen, keep, finish=lambda state, *others: (jnp.zeros(7), state))
        ),
        ValueError,
        r"the gradient of finish: expected shape \(3,\), found shape \(7,\)",
    ),
    "counts that become numbers": (
        lambda: base.scalarizer(init_seen, total, end_epoch=lambda state: SeenState(state.seen / 2)).end_epoch(
            init_seen(2)
        ),
        TypeError,
        "the new state of end_epoch.seen: expected dtype int32, as before, found dtype float32",
    ),
    "numbers that are truncated": (
        lambda: apply_scalarizer(
            lambda shape, dtype: Level(jnp.zeros(shape, dtype)),
            lambda *given: (total(*given)[0], Level(jnp.ones(2, int))),
        ),
        TypeError,
        "the new state of apply.level: expected dtype float32, as before, found dtype int32",
    ),
    "a complex scalar": (
        lambda: apply_scalarizer(init_seen, lambda *given: (total(*given)[0] + 0j, given[0])),
        TypeError,
        r"apply: expected \(scalar, new_state\), the scalar of shape \(\), found \(a .*, a SeenState\)",
    ),
    "a memory without a task axis": (
        lambda: apply_rowwise(
            lambda m, params, dtype: Remembered(states.zero_counts(m), states.zeros_params(params, dtype)),
            keep,
            memory="averages",
        ),
        ValueError,
        r"init: the field 'averages': expected a leading axis of 2, as states.zeros_jacobian.*found shape \(3,\)",
    ),
    "(statistic, memory)": (
        lambda: apply_rowwise(
            remembering, lambda memory, row, task: (jnp.sum(row), memory), memory="averages", axis_name=None
        ),
        ValueError,
        r"the memory of visit, the first of \(memory, statistic\): expected shape \(3,\), as before, found shape \(\)",
    ),
}


def test_a_python_number_in_a_state_becomes_a_strong_type():
    method = base.scalarizer(lambda shape, dtype: Stepping(jnp.zeros(shape), 0.0, 1), total)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(method.init(2)))


@pytest.mark.parametrize(("mistake", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_an_authors_mistake_is_named(mistake, error, message):
    with pytest.raises(error, match=message):
        mistake()


def test_the_mistakes_are_found_under_jit_too():
    method = base.scalarizer(init_seen, lambda *given: total(*given)[::-1])
    with pytest.raises(TypeError, match="apply: expected"):
        jax.jit(method.apply)(method.init(2), jnp.ones(2))


class Momentum(NamedTuple):
    """As an optimizer's state might be: with a field that has the name of another state's Jacobian-shaped one."""

    averages: Any


class Stepping(NamedTuple):
    seen: Any
    averages: Any
    opt_state: Any


def test_a_field_is_jacobian_shaped_by_its_place_and_not_by_its_name():
    """Where no task is present nothing may change; of what is shaped like the Jacobian the method's functions see."""

    def init(m, params, dtype):
        return Stepping(*remembering(m, params, dtype), Momentum(jnp.zeros(m, dtype)))

    def weigh(state, statistics, values, mask):
        state = state._replace(opt_state=Momentum(state.opt_state.averages + 1))
        return jnp.ones(len(mask)), count_seen(state, mask)

    def visit(average, row, task):
        return jnp.where(task.present, row, average), ()

    method = base.rowwise_aggregator(init, visit, weigh, memory="averages")
    state = method.init((2, 3))
    for apply in method.apply, method.weighting.apply:
        _, new_state = apply(state, ROWS, mask=jnp.zeros(2, bool))
        chex.assert_trees_all_equal(new_state, state)
        _, new_state = apply(state, ROWS)
        chex.assert_trees_all_equal(new_state.opt_state.averages, jnp.ones(2))


def test_fields_within_fields():
    state = Level({"a": Remembered(jnp.zeros(2), jnp.ones((2, 3)))})
    outer = Level(Remembered(jnp.zeros(2), jnp.ones((2, 3))))
    named = lambda fields, tree: [states.is_in(fields, path) for path, _ in jax.tree.leaves_with_path(tree)]
    assert named(("level.averages",), outer) == [False, True]
    assert named(("averages",), outer) == [False, False]
    assert named(("level",), outer) == [True, True]
    assert named(("level.averages",), state) == [False, False]


def test_counts_are_int32():
    """As every state's docstring says, and checkpoints depend on it."""
    assert states.zero_counts(2).dtype == states.init_seen((2,)).seen.dtype == jnp.int32
