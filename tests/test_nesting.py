"""Wrappers around wrappers: every pair in either order is a method or is refused when built; nothing to do is free."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests import catalogue
from tests.conformance.helpers import Built

pytestmark = pytest.mark.unoptimized

WRAPPERS = {
    "transform_weights": lambda method: mtl.transform_weights(method, optax.ema(0.9)),
    "transform_rows": lambda method: mtl.transform_rows(method, optax.trace(0.9)),
    "prioritize": lambda method: mtl.prioritize(method, np.float32([1.0, 0.5, 0.0])),
    "regularize": lambda method: mtl.regularize(method, {0: optax.linear_schedule(0.5, 2.0, 3)}),
    "amortize": mtl.amortize,
    "checked": mtl.checked,
    "skip_nonfinite": mtl.skip_nonfinite,
    "skip_zero": mtl.skip_zero,
    "cr_mogm": aggregation.cr_mogm,
    "chain": lambda method: mtl.chain(scalarization.scale_invariant(), method),
}
OF_AGGREGATORS = "transform_rows", "cr_mogm", "chain"
OF_WEIGHTS = "transform_weights", "prioritize", "regularize", "amortize", "cr_mogm"


def one_of_each_kind():
    """A method for each set of paths; learned ones inside ``learn``, the others without a wrapper."""
    kinds = {}
    for family, cases in ("scalarization", catalogue.SCALARIZERS), ("aggregation", catalogue.AGGREGATORS):
        for case in cases:
            if "-" not in case.name or case.name.startswith("learn-"):
                built = Built(case, family)
                if not built.method.learned and not case.per_task and case.fewest_tasks == 1:
                    kinds.setdefault(built.paths, built)
    return {built.case.name: built for built in kinds.values()}


METHODS = one_of_each_kind()


def refused(name, method, built):
    """Why the wrapper of this name is not for this method, or ``None``."""
    if name in OF_AGGREGATORS and built.is_scalarizer:
        return "expected an Aggregator"
    if name in OF_WEIGHTS and not built.is_scalarizer and method.weighting is None:
        return "expected an aggregator that makes weights .*, found one without a weighting"
    if name == "skip_zero" and built.case.name == "m_config":
        return "expected one that takes in all rows at every call, found one whose rows have turns"
    return None


def wrap(name, method, built):
    reason = refused(name, method, built)
    if reason is None:
        return WRAPPERS[name](method)
    with pytest.raises((TypeError, ValueError), match=reason):
        WRAPPERS[name](method)
    return None


def assert_is_a_method(method, built):
    """Output of the right shape and the same state's shapes, on every path; nothing is compiled."""
    state, x = jax.eval_shape(lambda: built.init(method)), built.sample(0)
    given = {} if built.is_scalarizer else {"values": np.float32([0.5, 1.0, 2.0])}
    apply = lambda method, x: jax.eval_shape(lambda state: method.apply(state, x, **given), state)
    output, new_state = apply(method, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert jax.tree.map(jnp.shape, output) == (() if built.is_scalarizer else jax.tree.map(lambda x: x.shape[1:], x))
    for path, rows in ("weighting", x), ("gramian_weighting", np.eye(3, dtype=np.float32)):
        if getattr(method, path, None):
            found = apply(getattr(method, path), rows)
            chex.assert_trees_all_equal_shapes_and_dtypes(found, (np.ones(3, np.float32), state))
    for hook in method.end_epoch, lambda state: method.observe(state, np.ones(3, np.float32)):
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(hook, state), state)


@pytest.mark.by_default("group_dro-*", "mgda-*")
@pytest.mark.parametrize("inner", WRAPPERS)
@pytest.mark.parametrize("name", METHODS)
def test_wrappers_nest_in_any_order(name, inner):
    built = METHODS[name]
    once = wrap(inner, built.method, built)
    if once is not None:
        assert_is_a_method(once, built)
        for outer in WRAPPERS:
            twice = wrap(outer, once, built)
            if twice is not None:
                assert_is_a_method(twice, built)


def test_the_outer_wrapper_acts_on_what_the_inner_one_gives():
    halve, losses = (lambda method: mtl.transform_weights(method, optax.scale(0.5))), np.float32([2.0, 4.0, 8.0])
    term = lambda method: mtl.regularize(method, {2: 1.0})
    value = lambda method: method.apply(method.init(3), losses)[0]
    assert value(halve(term(scalarization.sum()))) == 0.5 * 2 + 0.5 * 4 + 0.5 * 8
    assert value(term(halve(scalarization.sum()))) == 0.5 * 2 + 0.5 * 4 + 1.0 * 8


def test_a_zero_loss_is_absent_for_what_is_inside_of_skip_zero():
    term, losses = (lambda method: mtl.regularize(method, {1: 0.5})), np.float32([1.0, 0.0])
    rows = np.float32([[3.0, 4.0], [1.0, 2.0]])
    gradient = lambda method: method.apply(method.init((2, 2)), rows, values=losses)[0]
    np.testing.assert_array_equal(gradient(mtl.skip_zero(term(aggregation.sum()))), [3.0, 4.0])
    np.testing.assert_array_equal(gradient(term(mtl.skip_zero(aggregation.sum()))), [3.5, 5.0])


NOTHING_TO_DO = {
    "transform_weights": lambda method: mtl.transform_weights(method, optax.identity()),
    "transform_rows": lambda method: mtl.transform_rows(method, optax.identity()),
    "prioritize": lambda method: mtl.prioritize(method, 1.0),
}


@pytest.mark.parametrize("name", ["dwa", "uw_so", "mgda", "excess_mtl"])
def test_a_wrapper_with_nothing_to_do_costs_nothing(name):
    """Not one leaf of state, and not one operation of the compiled program."""
    is_scalarizer = hasattr(scalarization, name)
    method = getattr(scalarization if is_scalarizer else aggregation, name)()

    def cost(method):
        state, x = method.init(3 if is_scalarizer else (3, 50)), np.ones(3 if is_scalarizer else (3, 50), np.float32)
        text = jax.jit(method.apply).lower(state, x).compile().as_text()
        return len(jax.tree.leaves(state)), sorted(re.findall(r"= \S+ ([a-z-]+)\(", text))

    expected = cost(method)
    assert len(expected[1]) > 20
    for wrapper, wrap_in in NOTHING_TO_DO.items():
        if wrapper != "transform_rows" or not is_scalarizer:
            assert cost(wrap_in(method)) == expected
