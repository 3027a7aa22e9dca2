"""One method that is several gives each one's own numbers, wherever one may stand."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.catalogue import AGGREGATORS, SCALARIZERS

pytestmark = pytest.mark.unoptimized

CALLS = 3
LOSSES = np.array([[1.0, 4.0, 0.5], [0.8, 3.0, 0.9], [0.9, 2.0, 0.3]], np.float32)
ROWS = {"w": np.random.default_rng(0).normal(size=(CALLS, 3, 4)), "b": np.random.default_rng(1).normal(size=(CALLS, 3))}
ROWS = jax.tree.map(lambda x: x.astype(np.float32), ROWS)
PARAMS = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), ROWS)
SAME = {"rtol": 1e-6, "atol": 1e-6}  # one computation in two programs, in float32

CASES = {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}
# One of each kind: with weights and without, with hooks, with rows in its state, which draws.
SOME = {
    "scalarization": ["geometric_mean", "dwa", "famo", "uw", "random"],
    "aggregation": ["mean", "mgda", "excess_mtl", "moco", "m_config", "graddrop"],
}


def every_method(family, names=None):
    """The public methods of a family by name, as the catalogue builds them; what learns is trained by SGD."""
    cases = {case.name: case for case in CASES[family]}
    names = [info.name for info in mtl.methods() if info.family == family] if names is None else names
    made = {name: cases[name].make() for name in names}
    return {name: mtl.learn(method, optax.sgd(0.1)) if method.learned else method for name, method in made.items()}


def init(method):
    return method.init(3 if isinstance(method, mtl.Scalarizer) else (3, PARAMS))


def run(method):
    """What several calls give, with every hook between them, and the state after the last."""

    def step(state, given):
        losses, rows = given
        if isinstance(method, mtl.Scalarizer):
            (scalar, state), weights = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, losses)
            output = scalar, weights
        else:
            output, state = method.apply(state, rows, values=losses)
        return method.end_epoch(method.observe(state, losses / (1 + losses))), output

    return jax.lax.scan(step, init(method), (jnp.asarray(LOSSES), jax.tree.map(jnp.asarray, ROWS)))


def check_each_alone(methods):
    choose = mtl.switch(tuple(methods.values()))
    all_runs = jax.jit(partial(jax.lax.map, lambda i: run(choose(i))))
    states, outputs = jax.device_get(all_runs(np.arange(len(methods))))
    start = jax.jit(lambda: init(choose(0)).states)()
    for i, (name, method) in enumerate(methods.items()):
        at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        found = at(outputs), at(states.states[i])
        chex.assert_trees_all_close(found, jax.jit(partial(run, method))()[::-1], **SAME, custom_message=name)
        others = [j for j in range(len(methods)) if j != i]
        chex.assert_trees_all_equal([at(states.states[j]) for j in others], [start[j] for j in others])


@pytest.mark.parametrize("family", SOME)
def test_each_method_gives_its_own_numbers_and_leaves_the_others_states(family):
    check_each_alone(every_method(family, SOME[family]))


@pytest.mark.slow
@pytest.mark.parametrize("family", SOME)
def test_all_methods_of_a_family_in_one_program(family):
    methods = every_method(family)
    assert len(methods) > 30
    check_each_alone(methods)


def test_paths_are_those_that_all_methods_have():
    of = lambda *methods: mtl.switch(methods)(0)
    paths = lambda method: [name for name in ("weighting", "gramian_weighting", "rowwise") if getattr(method, name)]
    mgda, excess, none = aggregation.mgda(), aggregation.excess_mtl(), aggregation.graddrop()
    both, combines = aggregation.grad_norm_weights(), aggregation.m_config()
    assert paths(of(mgda, both)) == ["weighting", "gramian_weighting"]
    assert paths(of(excess, both)) == ["weighting", "rowwise"]
    assert paths(of(both, both)) == ["weighting", "gramian_weighting", "rowwise"]
    assert paths(of(mgda, none)) == paths(of(combines, excess)) == []
    assert paths(of(combines, combines)) == ["rowwise"]
    assert of(combines, combines).rowwise.visits is None
    assert mtl.has_weights(of(mgda, excess)) and not mtl.has_weights(of(mgda, none))
    assert of(mtl.amortize(mgda), mgda).last_weights is None
    assert of(mtl.skip_nonfinite(mgda), mgda).after_gradient and of(mgda).after_gradient is None


STEPS = {
    "scalarizer": ((scalarization.uw_so(), scalarization.dwa(steps_per_epoch=1)), {"return_weights": True}),
    "two_pass": ((aggregation.mgda(), aggregation.mean()), {"rows": "two_pass", "return_weights": True}),
    "stream": ((aggregation.excess_mtl(), aggregation.grad_norm_weights()), {"rows": "stream"}),
    "finish": ((aggregation.m_config(), aggregation.m_config(beta_1=0.5)), {"rows": "stream"}),
    "guards": ((mtl.skip_nonfinite(aggregation.mgda()), aggregation.mean()), {}),
    "refresh": ((mtl.amortize(aggregation.mgda()), mtl.amortize(aggregation.mean())), {}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_is_that_of_the_chosen_method(name):
    """Each way to the rows, with a guard, and with the last weights again."""
    methods, options = STEPS[name]
    targets = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    losses_fn = lambda params, scale: scale * jnp.mean((params[None] - targets) ** 2, axis=1)

    def train(method):
        grad_fn = mtl.value_and_grad(losses_fn, method, **options)
        params = jnp.zeros(4)
        state = grad_fn.init(params, 1.0)
        for i, scale in enumerate((1.0, 3.0, 1.0)):
            refresh = {"refresh": jnp.array(i != 1)} if name == "refresh" else {}
            (_, state, *weights), gradient = grad_fn(params, state, scale, **refresh)
            params -= 0.1 * gradient
        return params, weights, state

    choose = mtl.switch(methods)
    *found, states = jax.device_get(jax.jit(partial(jax.lax.map, lambda i: train(choose(i))))(np.arange(2)))
    for i, method in enumerate(methods):
        *alone, state = jax.jit(partial(train, method))()
        at = lambda tree, i=i: jax.tree.map(lambda x: x[i], tree)
        chex.assert_trees_all_close((at(found), at(states.states[i])), (alone, state), **SAME)


def test_a_guard_of_the_chosen_method_hears_of_the_gradient_alone():
    method = mtl.switch((mtl.skip_nonfinite(scalarization.mean()), mtl.skip_nonfinite(scalarization.sum())))(1)
    grad_fn = mtl.value_and_grad(lambda params: jnp.sqrt(jnp.stack([params, params])), method)
    (_, state), _ = jax.jit(grad_fn)(np.float32(0), method.init(2))  # the root's slope at zero is infinite
    assert [inner.skipped for inner in state.states] == [0, 1]


def test_a_state_is_carried_over_to_other_tasks():
    """A direction like the parameters, which one of the states alone remembers, is found in it."""
    method = mtl.switch((aggregation.mean(), aggregation.bloop("a")))(1)
    params, losses = np.zeros(3, np.float32), {"a": 1.0, "b": 2.0}
    start = mtl.value_and_grad(lambda p: losses, method).init(params)
    _, state = method.apply(start, np.ones((2, 3), np.float32), values=losses)
    new = mtl.carry_over(method, state, losses, ["a", "b", "c"])
    assert new.states[1].seen.shape == (3,)
    chex.assert_trees_all_equal(new.states[1]._replace(seen=state.states[1].seen), state.states[1])


def test_a_schedule_of_methods():
    """Each sees the calls in which it was chosen, and no others."""
    choose = mtl.switch((scalarization.mean(), scalarization.first_loss()))
    step = lambda state, given: choose(given[0]).apply(state, given[1])[::-1]
    calls = np.array([0, 1, 0, 1]), np.array([[1.0], [2.0], [3.0], [4.0]], np.float32)
    state, scalars = jax.jit(lambda: jax.lax.scan(step, choose(0).init(1), calls))()
    np.testing.assert_allclose(scalars, [1, 1, 3, 2])
    assert state.states[0].seen == 2


def test_a_traced_index_out_of_range_is_the_nearest():
    choose = mtl.switch((scalarization.mean(), scalarization.sum()))
    call = lambda i: choose(i).apply(choose(i).init(2), np.array([1.0, 3.0], np.float32))[0]
    np.testing.assert_allclose(jax.lax.map(call, np.array([-1, 0, 1, 9])), [2, 2, 4, 4])
    np.testing.assert_allclose(jax.vmap(call)(np.arange(2)), [2, 4])


def test_an_index_and_a_count_may_be_arrays_from_outside_of_a_traced_function():
    choose, one = mtl.switch((scalarization.mean(), scalarization.sum())), jnp.int32(1)

    @jax.jit
    def calls(values):
        dwa = scalarization.dwa(steps_per_epoch=one)
        return [method.apply(method.init(2), values)[0] for method in (choose(one), dwa)]

    np.testing.assert_allclose(calls(np.array([1.0, 3.0], np.float32)), [4, 4])


REFUSED = {
    "a method": (scalarization.mean(), TypeError, r"^methods: expected a tuple or list of methods.* found Scalarizer"),
    "none": ((), ValueError, r"^methods: expected at least one method, found none"),
    "a factory": ((scalarization.mean,), TypeError, r"^methods\[0\]: .*a factory must be called, mean\(\)"),
    "both families": (
        (scalarization.mean(), aggregation.mean()),
        TypeError,
        r"^methods: expected methods of one family, found Aggregator and Scalarizer",
    ),
    "learns": ((scalarization.mean(), scalarization.uw()), ValueError, r"^methods\[1\]: .*learn\(method, optimizer\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    methods, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        mtl.switch(methods)


@pytest.mark.parametrize(
    ("index", "error", "found"),
    [
        (2, ValueError, "2"),
        (-1, ValueError, "-1"),
        (np.array(2), ValueError, "2"),
        (0.5, TypeError, "0.5"),
        (True, TypeError, "True"),
        (np.array(0.5), TypeError, "dtype float64"),
        (np.arange(2), ValueError, "shape"),
    ],
)
def test_indices_that_are_refused(index, error, found):
    choose = mtl.switch((scalarization.mean(), scalarization.sum()))
    with pytest.raises(error, match=rf"^index: expected .*, found {found}"):
        choose(index)
