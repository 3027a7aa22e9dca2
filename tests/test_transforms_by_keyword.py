"""``aggregate`` where a solver owns the loop: the Jacobian and the losses as extra arguments."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation
from tests.test_transforms import PARAMS, jacobian

pytestmark = pytest.mark.unoptimized

GRADIENT = jax.tree.map(lambda leaf: leaf.sum(0), jacobian(0))  # what a solver has: of the sum of the losses
LOSSES = {"ic": jnp.array(3.0), "bc": jnp.array(1.0), "res": jnp.array(2.0)}
VECTOR = jnp.stack(jax.tree.leaves(LOSSES))


def excess(robust_step_size=1.0):
    return mtl.aggregate(aggregation.excess_mtl(robust_step_size), n_tasks=3)


WRAPS = {
    "alone": lambda build: build(),
    "chain": lambda build: optax.chain(build(), optax.adam(1e-2)),
    "named_chain": lambda build: optax.named_chain(("aggregate", build()), ("step", optax.sgd(1.0))),
    "extra args": lambda build: optax.with_extra_args_support(optax.chain(build(), optax.sgd(1.0))),
    "inject_hyperparams": lambda build: optax.inject_hyperparams(build)(robust_step_size=0.3),
    "before a mask": lambda build: optax.chain(
        build(), optax.masked(optax.scale(2.0), {"trunk": True, "head": False}), optax.sgd(1.0)
    ),
    "before a partition": lambda build: optax.chain(
        build(), optax.partition({"a": optax.sgd(1.0), "b": optax.set_to_zero()}, {"trunk": "a", "head": "b"})
    ),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_the_jacobian_by_keyword_gives_the_same_steps(wrap):
    optimizer = wrap(excess)
    plain, by_keyword = optimizer.init(PARAMS), optimizer.init(PARAMS)
    for i in range(2):
        expected, plain = optimizer.update(jacobian(i), plain, PARAMS)
        updates, by_keyword = optimizer.update(GRADIENT, by_keyword, PARAMS, jacobian=jacobian(i), grad_terms="other")
        chex.assert_trees_all_equal(updates, expected)
        chex.assert_trees_all_equal(by_keyword, plain)


@pytest.mark.parametrize("compatible", [False, True])
def test_under_a_mask_it_takes_its_part_and_the_others_keep_the_plain_gradient(compatible):
    mask = {"trunk": True, "head": False}
    optimizer = optax.masked(excess(), mask, mask_compatible_extra_args=compatible)
    state = optimizer.init(PARAMS)
    updates, state = optimizer.update(GRADIENT, state, PARAMS, jacobian=jacobian(0))
    chex.assert_trees_all_equal(updates["head"], GRADIENT["head"])
    alone = aggregation.excess_mtl()
    expected, _ = alone.apply(alone.init((3, PARAMS["trunk"])), jacobian(0)["trunk"])
    chex.assert_trees_all_close(updates["trunk"], expected, rtol=1e-6)
    assert optax.tree.get(state, "squared_gradients")["head"] == optax.MaskedNode()


def test_each_group_of_a_partition_takes_its_part():
    groups = {label: mtl.aggregate(aggregation.mgda(), n_tasks=3) for label in ("trunk", "head")}
    optimizer = optax.partition(groups, {"trunk": "trunk", "head": "head"})
    expected, _ = optimizer.update(jacobian(0), optimizer.init(PARAMS), PARAMS)
    updates, _ = optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS, jacobian=jacobian(0))
    chex.assert_trees_all_equal(updates, expected)


def test_what_stood_before_it_is_replaced():
    """The plain gradient is not finite, and the Jacobian is."""
    optimizer = optax.chain(optax.scale(jnp.nan), mtl.aggregate(aggregation.sum(), n_tasks=3))
    updates, _ = optimizer.update(GRADIENT, optimizer.init(PARAMS), PARAMS, jacobian=jacobian(0))
    chex.assert_trees_all_close(updates, GRADIENT, rtol=1e-6)


@pytest.mark.parametrize("with_params", [True, False])
def test_updates_have_the_structure_and_dtypes_of_the_params(with_params):
    half = lambda tree: tree | {"head": jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree["head"])}
    params, optimizer = half(PARAMS), excess()
    given = (params,) if with_params else ()
    state = optimizer.init(params)
    update = lambda: optimizer.update(half(GRADIENT), state, *given, jacobian=jacobian(0))
    updates, new_state = jax.eval_shape(update)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)


def test_it_runs_in_a_scan_where_the_whole_state_is_the_carry():
    optimizer = optax.chain(excess(), optax.adam(1e-2))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(GRADIENT, state, params, jacobian=jacobian(0), task_losses=LOSSES)
        return (optax.apply_updates(params, updates), state), None

    start = PARAMS, optimizer.init(PARAMS)
    end = jax.eval_shape(lambda: jax.lax.scan(step, start, length=2)[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(end, start)


# The losses by either name.


@pytest.mark.parametrize("keyword", ["values", "task_losses"])
@pytest.mark.parametrize("losses", [VECTOR, LOSSES], ids=["vector", "named"])
def test_the_losses_reach_the_method_by_either_name(keyword, losses):
    method = aggregation.gradnorm(initial_losses=2.0)
    optimizer = mtl.aggregate(method, n_tasks=3)
    for updates, given in (jacobian(0), {}), (GRADIENT, {"jacobian": jacobian(0)}):
        _, state = optimizer.update(updates, optimizer.init(PARAMS), PARAMS, **{keyword: losses}, **given)
        _, expected = method.apply(method.init((3, PARAMS)), jacobian(0), values=VECTOR)
        chex.assert_trees_all_close(state, expected, rtol=1e-6)


@pytest.mark.parametrize("keyword", ["values", "task_losses"])
def test_the_names_of_the_losses_reach_the_method(keyword):
    """The weights are by name, where sorted positions would be bc, ic, res."""
    optimizer = mtl.aggregate(aggregation.constant({"ic": 100.0, "bc": 10.0, "res": 1.0}), n_tasks=3)
    rows = {"w": jnp.eye(3)}  # bc, ic, res
    params = {"w": jnp.zeros(3)}
    state = optimizer.init(params)
    gradient = {"w": jnp.ones(3)}
    updates, _ = optimizer.update(gradient, state, params, jacobian=rows, **{keyword: LOSSES})
    np.testing.assert_array_equal(updates["w"], [10.0, 100.0, 1.0])
    others = {"data": LOSSES["ic"], "bc": LOSSES["bc"], "res": LOSSES["res"]}
    with pytest.raises(ValueError, match=r"weights: expected the losses' names \['bc', 'data', 'res'\], found .*'ic'"):
        optimizer.update(gradient, state, params, jacobian=rows, **{keyword: others})
    by_position = mtl.aggregate(aggregation.constant([100.0, 10.0, 1.0]), n_tasks=3)
    with pytest.raises(ValueError, match=r"weights: expected a number for each of the losses' names, {'bc': ..."):
        by_position.update(gradient, by_position.init(params), params, jacobian=rows, **{keyword: LOSSES})
    by_task = mtl.aggregate(aggregation.lr_annealing("res"), n_tasks=3)
    _, state = by_task.update(gradient, by_task.init(params), params, jacobian=rows, **{keyword: LOSSES})
    assert state.weights[2] == 1 and jnp.all(state.weights[:2] != 1)


# One thing in two forms.


def test_the_losses_given_twice_raise():
    optimizer = excess()
    with pytest.raises(ValueError, match="task_losses: expected the losses as values= or as task_losses=, found both"):
        optimizer.update(jacobian(0), optimizer.init(PARAMS), PARAMS, values=VECTOR, task_losses=VECTOR)


@pytest.mark.parametrize("with_params", [True, False])
def test_the_jacobian_given_twice_raises(with_params):
    optimizer = excess()
    given = (PARAMS,) if with_params else ()
    message = r"updates \(beside jacobian= the plain gradient\)\['head'\]: expected shape \(4,\), found shape \(3, 4\)"
    with pytest.raises(ValueError, match=message):
        optimizer.update(jacobian(0), optimizer.init(PARAMS), *given, jacobian=jacobian(0))


def test_a_gradient_by_that_keyword_or_of_other_parameters_raises():
    optimizer = mtl.aggregate(aggregation.mean(), n_tasks=3)
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=r"jacobian\['head'\]: expected a leading axis of 3, one row per task"):
        optimizer.update(GRADIENT, state, PARAMS, jacobian=GRADIENT)
    with pytest.raises(ValueError, match="jacobian: expected the params' tree"):
        optimizer.update(GRADIENT, state, PARAMS, jacobian=jacobian(0)["trunk"])
    with pytest.raises(ValueError, match=r"updates .*: expected the params' tree"):
        optimizer.update(None, state, PARAMS, jacobian=jacobian(0))


@pytest.mark.parametrize("wrap", [lambda link: link, lambda link: optax.chain(link, optax.adam(1e-3))])
def test_the_signature_names_no_keyword(wrap):
    """Jinns reads it, of each link of a chain too, and demands all that it finds there."""
    update = wrap(excess()).update
    links = inspect.getclosurevars(update).nonlocals.get("update_fns", [update])
    for link in links:
        assert set(inspect.signature(link).parameters) <= {"updates", "state", "params", "extra_args"}
