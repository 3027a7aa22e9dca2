"""Losses, and plain gradients, given to an aggregator as a Jacobian: refused where it can be known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from mtlbalance.states import like_jacobian
from tests.catalogue import AGGREGATORS

pytestmark = pytest.mark.unoptimized

CASES = {case.name: case for case in AGGREGATORS}
ROWS = r"leaves \[m, \*param\.shape\], one row per task, as mtl\.value_and_jac returns"
PLAIN = rf"jacobian: expected {ROWS}: shapes .*plain gradient"
LOSSES = np.float32([2.0, 5.0, 1.0])
REMEMBERING = {name: case.make() for name, case in CASES.items()}
REMEMBERING = {
    name: method for name, method in REMEMBERING.items() if like_jacobian(method.jacobian_shaped) or name == "bloop"
}
# What it remembers of a gradient has a shape of its own: tests/aggregation/test_accumulate.py.
OF_ANY_SHAPE = ["excess_mtl-every64"]
# A gradient with as many rows as there are tasks.
PARAMS = {"w": np.ones((3, 2), np.float32), "b": np.ones(3, np.float32)}


def losses_fn(params):
    return params["w"] @ np.ones(2, np.float32) * params["b"]


# The losses themselves.


@pytest.mark.parametrize("name", [name for name in CASES if name not in [*REMEMBERING, *OF_ANY_SHAPE]])
def test_losses_inside_grad_are_refused(name):
    method = CASES[name].make()
    state = method.init((3, PARAMS))

    def loss_fn(params, **kwargs):
        losses = losses_fn(params)
        given = {"values": losses + 0} if CASES[name].reads_losses else {}
        return method.apply(state, losses, **given, **kwargs)

    differentiate = [jax.grad(loss_fn, has_aux=True), jax.value_and_grad(loss_fn, has_aux=True)]
    for function in (*differentiate, jax.jit(differentiate[0]), jax.grad(lambda params: loss_fn(params)[0])):
        with pytest.raises(ValueError, match=rf"jacobian: expected {ROWS}.*found a vector that is differentiated"):
            function(PARAMS)


@pytest.mark.parametrize("name", CASES)
def test_losses_that_are_given_as_values_too_are_refused(name):
    method = CASES[name].make()
    state = method.init((3, PARAMS))
    functions = [method.apply] + ([method.weighting.apply] if method.weighting else [])
    for apply in functions:
        for losses in LOSSES, dict(zip("abc", LOSSES, strict=True)):
            with pytest.raises(ValueError, match=r"jacobian: .*found the losses themselves"):
                apply(state, losses, values=losses)
    with pytest.raises(ValueError, match=r"jacobian: .*found the losses themselves"):
        jax.eval_shape(lambda losses: method.apply(state, losses, values=losses), LOSSES)


def test_a_scalar_parameter_has_a_jacobian_that_is_a_vector():
    grad_fn = mtl.value_and_grad(lambda x, y: jnp.stack([x**2, y * x]), aggregation.sum())
    state = aggregation.sum().init((2, np.float32(0)))
    (_, state), gradient = jax.jit(grad_fn)(np.float32(3.0), state, 2.0)
    assert gradient == 8
    outer = lambda y: grad_fn(np.float32(3.0), state, y)[1]
    np.testing.assert_allclose(jax.jit(jax.grad(outer))(2.0), 1, rtol=1e-6)
    rows = np.float32([6.0, 2.0])
    np.testing.assert_allclose(aggregation.sum().apply(state, rows)[0], 8)
    by_name = lambda scale: aggregation.sum().apply(state, {"x": scale * rows})[0]["x"]
    np.testing.assert_allclose(jax.jit(jax.grad(by_name))(1.0), 8)
    remembering = aggregation.db_mtl(0.5)
    state = remembering.init((2, np.float32(0)))  # which knows that there is one scalar parameter
    constant = jax.jit(jax.grad(lambda scale: remembering.apply(state, scale * rows)[0]))
    assert constant(1.0) == 0


# A plain gradient, whose first axis happens to be the number of tasks.


def wrapped(method):
    methods = {"bare": method, "skip": mtl.skip_nonfinite(method), "chain": mtl.chain(scalarization.mean(), method)}
    if method.weighting is not None:
        methods["cr_mogm of amortize"] = aggregation.cr_mogm(mtl.amortize(method))
    return methods


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_plain_gradient_is_refused_where_the_state_knows_the_parameters(name):
    gradient = jax.tree.map(np.ones_like, PARAMS)
    for method in wrapped(REMEMBERING[name]).values():
        state = method.init((3, PARAMS))
        functions = [method.apply] + ([method.weighting.apply] if method.weighting else [])
        for apply in functions:
            with pytest.raises(ValueError, match=PLAIN):
                apply(state, gradient, values=LOSSES)
            with pytest.raises(ValueError, match=r"jacobian.*one row per task.*found a vector, such as the losses"):
                apply(state, LOSSES, values=LOSSES + 0)
            with pytest.raises(ValueError, match=r"jacobian: expected the params' tree"):
                apply(state, {"w": np.ones((3, 3, 2), np.float32)}, values=LOSSES)
            with pytest.raises(ValueError, match=r"jacobian\['b'\]: expected shape \(3, 3\), found shape \(3, 4\)"):
                apply(state, {"w": np.ones((3, 3, 2), np.float32), "b": np.ones((3, 4), np.float32)}, values=LOSSES)
        if method.rowwise is None:  # all rows are kept
            continue
        with pytest.raises(ValueError, match=r"row\['b'\]: expected shape \(3,\), found shape \(\)"):
            method.rowwise.visit(state, 0, {"w": np.ones((3, 2), np.float32), "b": np.float32(1.0)}, values=LOSSES)


def test_the_state_of_other_parameters_is_refused_on_every_way_of_a_step():
    method = aggregation.excess_mtl()
    state = method.init((3, {"w": np.ones((3, 2), np.float32), "b": np.ones(2, np.float32)}))
    for rows, name in ("vmap", "jacobian"), (1, "jacobian"), ("stream", "row"):
        with pytest.raises(ValueError, match=rf"{name}\['b'\]: expected shape"):
            mtl.value_and_grad(losses_fn, method, rows=rows)(PARAMS, state)


@pytest.mark.parametrize(
    "name", ["mgda", "graddrop", "excess_mtl", "db_mtl-averages", "skip-cr_mogm-amortize-excess_mtl"]
)
def test_aggregate_refuses_what_is_no_jacobian(name):
    method = CASES[name].make()
    for optimizer in mtl.aggregate(method, 3), optax.chain(mtl.aggregate(method, 3), optax.adam(1e-3)):
        state = optimizer.init(PARAMS)
        with pytest.raises(ValueError, match=PLAIN):
            optimizer.update(jax.grad(lambda params: jnp.sum(losses_fn(params)))(PARAMS), state, PARAMS)
        with pytest.raises(ValueError, match=r"jacobian: expected leaves .*found a vector, such as the losses"):
            optimizer.update(LOSSES, state, PARAMS)
        with pytest.raises(ValueError, match=r"jacobian\['b'\]: expected shape \(3, 3\), found shape \(3, 4\)"):
            optimizer.update({"w": np.ones((3, 3, 2), np.float32), "b": np.ones((3, 4), np.float32)}, state, PARAMS)


def test_a_plain_gradient_of_a_bare_array():
    optimizer = mtl.aggregate(aggregation.mean(), 3)
    for params in np.ones(3, np.float32), np.ones((3, 3), np.float32):
        with pytest.raises(ValueError, match=PLAIN):
            optimizer.update(params, optimizer.init(params), params)
