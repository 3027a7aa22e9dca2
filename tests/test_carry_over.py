"""The state for a changed set of tasks: for every case of the catalogue, and what is not the state's to know."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, base, scalarization
from mtlbalance.states import SeenState, init_seen, like_jacobian
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.conformance.helpers import Built

pytestmark = pytest.mark.unoptimized

OLD, NEW = ["a", "b", "c"], ["e", "c", "d", "a"]  # a stays where it is, c moves, b goes, two come
STAY_OLD, STAY_NEW = [0, 2], [0, 1]
PARAMS = {"w": jax.ShapeDtypeStruct((3, 4), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float32)}
ALL_CASES = [("scalarization", case) for case in SCALARIZERS] + [("aggregation", case) for case in AGGREGATORS]
CASES = {f"{family}-{case.name}": Built(case, family) for family, case in ALL_CASES if not case.own_names}
each_case = pytest.mark.parametrize("name", CASES)


def filled(init):
    """A state of the shapes that ``init`` makes, and whatever numbers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.integers(1, 1000, x.shape).astype(x.dtype), jax.eval_shape(init))


def carried(old, start):
    """One leaf, for tasks of which some stay; along the axes on which three have become four."""
    axes = [n == (3, 4) for n in zip(old.shape, start.shape, strict=True)]
    if not any(axes):
        return old
    new = np.array(start)
    places = lambda stay, shape: np.ix_(
        *(stay if is_task else range(n) for is_task, n in zip(axes, shape, strict=True))
    )
    new[places(STAY_NEW, new.shape)] = old[places(STAY_OLD, old.shape)]
    return new


def carry_over(method, *given):
    """With the parameters where the state remembers something of gradients that does not tell them."""
    fields = method.jacobian_shaped
    return mtl.carry_over(method, *given, params=PARAMS if fields and not like_jacobian(fields) else None)


@each_case
def test_tasks_go_come_and_move(name):
    built = CASES[name]
    method, init = built.method_for(np.arange(4)), partial(built.init, params=PARAMS)
    old, start = filled(init), init(method, n_tasks=4)
    new = carry_over(method, old, OLD, NEW)
    chex.assert_trees_all_equal(new, jax.tree.map(carried, old, start))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, start)
    assert jax.tree.structure(new) == jax.tree.structure(start)
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(new))


@each_case
@pytest.mark.by_default("*skip-learn-uw", "*chain-dwa-excess_mtl", "*gradvac", "*softadapt")
def test_the_same_tasks_have_the_same_state_and_fewer_that_of_the_others(name):
    built = CASES[name]
    old = filled(partial(built.init, params=PARAMS))
    old = jax.tree.map(lambda x: np.where(x == x.max(), np.nan, x) if x.dtype == np.float32 else x, old)

    @jax.jit
    def carried_over(old):
        same = carry_over(built.method, old, OLD, set(OLD))
        if not two_will_do(built):
            return same, None, None
        fewer = carry_over(built.method_for(np.arange(2)), old, OLD, ("c", "a"))
        to_new = partial(carry_over, built.method_for(np.arange(4)))
        return same, to_new(fewer, ["a", "c"], NEW), to_new(old, OLD, NEW)

    same, more, at_once = carried_over(old)
    chex.assert_trees_all_equal(same, old)
    chex.assert_trees_all_equal(more, at_once)


def two_will_do(built):
    return built.case.fewest_tasks <= 2


def test_pairs_of_tasks_stay_where_both_do():
    method = aggregation.gradvac()
    state = method.init((3, 2))._replace(targets=jnp.arange(9.0).reshape(3, 3))
    new = mtl.carry_over(method, state, OLD, ["c", "a", "bb"])
    chex.assert_trees_all_equal(new.targets, jnp.array([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [6.0, 0.0, 8.0]]))
    chex.assert_trees_all_equal(new.key, state.key)


def test_an_axis_is_not_one_of_tasks_because_of_its_length():
    method = scalarization.softadapt(window=3)
    recent = jnp.arange(9.0).reshape(3, 3)
    new = mtl.carry_over(method, method.init(3)._replace(recent=recent), OLD, ["b", "c"])
    chex.assert_trees_all_equal(new.recent, recent[1:])
    method = mtl.learn(scalarization.uw(), optax.lbfgs(memory_size=3))
    new = mtl.carry_over(method, method.init(3), OLD, ["b", "c"])
    chex.assert_trees_all_equal_shapes_and_dtypes(new, method.init(2))
    method = aggregation.random(0)  # a key of two numbers
    state = method.init((2, ()))
    chex.assert_trees_all_equal(mtl.carry_over(method, state, ["a", "b"], ["b"]).key, state.key)


def test_adams_moments_go_with_their_tasks():
    method = mtl.learn(scalarization.uw(), optax.adam(0.1))
    _, state = method.apply(method.init(2), {"cls": 3.0, "reg": 0.5})
    new = mtl.carry_over(method, state, {"cls": 3.0, "reg": 0.5}, {"aux": 1.0, "reg": 0.5})
    mu, nu = state.opt_state[0].mu["log_var"][1], state.opt_state[0].nu["log_var"][1]
    chex.assert_trees_all_equal(new.opt_state[0].mu["log_var"], jnp.array([0.0, mu]))
    chex.assert_trees_all_equal(new.opt_state[0].nu["log_var"], jnp.array([0.0, nu]))
    chex.assert_trees_all_equal(new.inner.log_var, jnp.array([0.0, state.inner.log_var[1]]))
    assert new.opt_state[0].count == 1


def test_new_tasks_start_as_the_new_methods_hyperparameters_say():
    old = scalarization.uw(initial_log_var={"cls": 1.0, "reg": 2.0})
    method = scalarization.uw(initial_log_var={"cls": -1.0, "aux": -3.0, "depth": -4.0})
    losses = {"cls": 1.0, "aux": 1.0, "depth": 1.0}
    for new_losses in losses, list(losses):
        new = mtl.carry_over(method, old.init(2), ["cls", "reg"], new_losses)
        chex.assert_trees_all_equal(new.log_var, jnp.array([-3.0, 1.0, -4.0]))
    weighted = aggregation.constant({"cls": 1.0, "reg": 2.0})
    for refused, argument in (old, "initial_log_var"), (weighted, "weights"):
        state = refused.init(2 if refused is old else (2, 3))
        for new_losses in {"cls": 1.0, "aux": 1.0}, ["cls", "aux"]:
            with pytest.raises(ValueError, match=rf"{argument}: expected the losses' names \['aux', 'cls'\], found"):
                mtl.carry_over(refused, state, ["cls", "reg"], new_losses)
    with pytest.raises(ValueError, match=r"reference: expected one of the losses' names \['bc', 'ic'\], found 'res'"):
        method = aggregation.lr_annealing("res")
        mtl.carry_over(method, method.init((2, 3)), ["bc", "res"], ["bc", "ic"])
    with pytest.raises(ValueError, match="number of tasks: expected at least 3 with this n_byzantine, found 2"):
        mtl.carry_over(aggregation.krum(0), aggregation.krum(0).init((3, 2)), OLD, ["a", "b"])


class Pair(NamedTuple):
    c: float
    a: float


@pytest.mark.parametrize(
    ("losses", "order"),
    {
        "dict": ({"c": 1.0, "a": 2.0}, "ac"),
        "structs": (dict.fromkeys("ca", jax.ShapeDtypeStruct((), jnp.float32)), "ac"),
        "counted": (dict.fromkeys("ca", mtl.Counted(jnp.ones(()), jnp.ones((), int))), "ac"),
        "no values": (dict.fromkeys("ca"), "ac"),
        "list": (["c", "a"], "ac"),
        "tuple": (("c", "a"), "ac"),
        "keys": ({"c": 1.0, "a": 2.0}.keys(), "ac"),
        "frozenset": (frozenset("ca"), "ac"),
        "named tuple": (Pair(1.0, 2.0), "ca"),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_forms_of_names(losses, order):
    losses, order = order
    method = scalarization.dwa()
    state = method.init(3)._replace(average=jnp.array([1.0, 2.0, 3.0]))
    new = mtl.carry_over(method, state, OLD, losses)
    chex.assert_trees_all_equal(new.average, jnp.array([{"a": 1.0, "c": 3.0}[name] for name in order]))
    chex.assert_trees_all_equal(mtl.carry_over(method, new, losses, Pair(0.0, 0.0)).average, jnp.array([3.0, 1.0]))


def test_names_within_names():
    method = scalarization.dwa()
    old, new = {"pose": {"rot": 0, "shift": np.zeros(2)}, "depth": 0}, {"pose": {"shift": np.zeros(2), "turn": 0}}
    state = method.init(4)._replace(average=jnp.array([1.0, 2.0, 3.0, 4.0]))
    chex.assert_trees_all_equal(mtl.carry_over(method, state, old, new).average, jnp.array([3.0, 4.0, 0.0]))


def test_under_jit_and_vmap():
    method = aggregation.excess_mtl()
    state = filled(lambda: method.init((3, PARAMS)))
    carry = lambda state: mtl.carry_over(method, state, OLD, NEW)
    chex.assert_trees_all_equal(jax.jit(carry)(state), carry(state))
    stacked = jax.tree.map(lambda x: np.stack([x, x]), state)
    chex.assert_trees_all_equal(jax.vmap(carry)(stacked), jax.tree.map(lambda x: jnp.stack([x, x]), carry(state)))
    template = jax.eval_shape(carry, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(template, method.init((4, PARAMS)))


def test_the_old_state_may_be_kept_when_the_new_one_is_donated():
    method = mtl.skip_nonfinite(aggregation.gradvac())
    state = method.init((2, 3))
    for new in mtl.carry_over(method, state, ["a", "b"], ["a", "b"]), mtl.carry_over(method, state, ["a", "b"], OLD):
        jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(new)
        jax.block_until_ready(jax.tree.map(np.asarray, state))


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_rows_are_where_their_parameters_are(axes):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(axes,))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    params = {"w": put(jnp.ones((16, 3)), "devices"), "b": put(jnp.ones(3))}
    method = mtl.skip_nonfinite(aggregation.m_config())
    carry = lambda state: mtl.carry_over(method, state, OLD, NEW)
    state, start = method.init((3, params)), method.init((4, params))
    for new in carry(state), jax.jit(carry)(state):
        for leaf, like in zip(jax.tree.leaves(new), jax.tree.leaves(start), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)


def task_losses(params, x):
    return {"b": jnp.mean((x @ params - 1) ** 2), "c": jnp.mean(jnp.abs(x @ params + 2)), "a": jnp.sum(params**2)}


@pytest.mark.parametrize(
    "method",
    [mtl.learn(scalarization.uw(), optax.adam(0.1)), aggregation.db_mtl(beta=0.9, beta_sigma=0.5)],
    ids=["learn-uw", "db_mtl"],
)
def test_a_training_goes_on_with_a_task_more(method):
    """As one in which that task was absent until then."""

    def steps(losses_fn, state, params, masks):
        grad_fn = jax.jit(mtl.value_and_grad(losses_fn, method))
        for mask in masks:
            (_, state), grads = grad_fn(params, state, x, mask=mask)
            params = params - 0.05 * grads
        return state, params

    x, params = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32), jnp.ones(4)
    init = lambda m: method.init(m if isinstance(method, mtl.Scalarizer) else (m, params))
    absent, present = {"a": False, "b": True, "c": True}, {"a": True, "b": True, "c": True}
    expected = steps(task_losses, init(3), params, [absent] * 3 + [present] * 3)
    fewer = lambda params, x: {name: loss for name, loss in task_losses(params, x).items() if name != "a"}
    state, params = steps(fewer, init(2), params, [None] * 3)
    found = steps(task_losses, mtl.carry_over(method, state, ["b", "c"], OLD), params, [present] * 3)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)  # float32, two programs, six steps


def spread():
    """An author's method whose state has an entry for each pair of different tasks, in one vector."""

    def init(shape, dtype):
        (m,) = shape
        return Spread(jnp.zeros(m, jnp.int32), jnp.zeros(m * (m - 1)))

    return base.scalarizer(init, lambda state, values, mask: (jnp.sum(values, where=mask), state))


class Spread(NamedTuple):
    seen: chex.Array
    pairs: chex.Array


class Direction(NamedTuple):
    seen: chex.Array
    momentum: chex.ArrayTree


def remembering(of_param):
    """An author's method that remembers something of each parameter, and no gradients."""

    def init(m, params, dtype):
        return Direction(jnp.zeros(m, jnp.int32), jax.tree.map(lambda p: jnp.zeros(of_param(p), dtype), params))

    return base.aggregator(init, weighting=lambda state, jacobian, values, mask: (jnp.ones(len(mask)), state))


def test_parameters_that_the_state_does_not_tell():
    """Unless something in it is shaped like them."""
    momentum, per_tensor = remembering(lambda p: p.shape), remembering(lambda p: ())
    for method in momentum, per_tensor:
        state = method.init((2, PARAMS))
        _, state = method.apply(state, jax.tree.map(lambda p: jnp.ones((2, *p.shape)), PARAMS))
        new = mtl.carry_over(method, state, ["a", "b"], OLD, params=PARAMS)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, method.init((3, PARAMS)))
    with pytest.raises(TypeError, match=r"state\.momentum: expected"):
        mtl.carry_over(per_tensor, state, ["a", "b"], OLD)
    new = mtl.carry_over(momentum, momentum.init((2, PARAMS)), ["a", "b"], OLD)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, momentum.init((3, PARAMS)))


DWA, UW = scalarization.dwa(), scalarization.uw()
ERRORS = {
    "another method's state": (
        lambda: mtl.carry_over(DWA, UW.init(3), OLD, NEW),
        TypeError,
        r"state: expected dwa's DWAState\(average, count, newer, older\), found uw's UWState\(log_var\)",
    ),
    "another number of tasks": (
        lambda: mtl.carry_over(DWA, DWA.init(2), OLD, NEW),
        ValueError,
        r"state: expected one entry for each of old_losses \['a', 'b', 'c'\], found shape \(2,\)",
    ),
    "rows of another number of tasks": (
        lambda: mtl.carry_over(
            aggregation.excess_mtl(),
            aggregation.excess_mtl().init((3, 2))._replace(squared_gradients=jnp.zeros((2, 2))),
            OLD,
            NEW,
        ),
        ValueError,
        r"state.squared_gradients: expected shape \(3, 2\), as init makes it, found shape \(2, 2\)",
    ),
    "no tasks": (
        lambda: mtl.carry_over(DWA, DWA.init(3), OLD, []),
        ValueError,
        "new_losses: expected at least one task, found none",
    ),
    "no losses": (
        lambda: mtl.carry_over(DWA, DWA.init(3), OLD, {}),
        ValueError,
        "new_losses: expected at least one task, found none",
    ),
    "a name twice": (
        lambda: mtl.carry_over(DWA, DWA.init(3), ["a", "b", "a"], NEW),
        ValueError,
        r"old_losses: expected each name once, found \['a', 'a', 'b'\]",
    ),
    "no names": (
        lambda: mtl.carry_over(DWA, DWA.init(3), jnp.ones(3), NEW),
        ValueError,
        "old_losses: expected named losses, or a list of their names, found losses without names",
    ),
    "a number of tasks": (
        lambda: mtl.carry_over(DWA, DWA.init(3), 3, 4),
        ValueError,
        "old_losses: expected named losses, or a list of their names, found losses without names",
    ),
    "one name that is a string": (
        lambda: mtl.carry_over(DWA, DWA.init(3), "abc", NEW),
        ValueError,
        "old_losses: expected named losses, or a list of their names, found losses without names",
    ),
    "no method": (
        lambda: mtl.carry_over(DWA.init(3), DWA, OLD, NEW),
        TypeError,
        "method: expected a Scalarizer or an Aggregator, found DWAState",
    ),
    "an axis that is of tasks in another way": (
        lambda: mtl.carry_over(spread(), spread().init(3), OLD, NEW),
        ValueError,
        r"state.pairs: expected axes with one entry per task, found shape \(6,\) for 3 tasks and \(12,\) for one more",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_carried_over_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_methods_that_only_count_calls():
    state = scalarization.mean().init(3)._replace(seen=jnp.array([4, 5, 6]))
    new = mtl.carry_over(aggregation.mgda(), state, OLD, ["c", "d"])
    chex.assert_trees_all_equal(new, SeenState(jnp.array([6, 0])))
    assert new.seen.dtype == init_seen(2).seen.dtype
