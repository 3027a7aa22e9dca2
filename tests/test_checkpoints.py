"""States go to a file and come back, in another process too; and what comes back as dicts becomes a state again."""

import os
import pathlib
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.checkpoints import (
    FIRST_HALF,
    FORMATS,
    SECOND_HALF,
    cases,
    flat_names,
    load_by_numpy,
    load_by_orbax,
    numbered,
    save_by_orbax,
)

pytestmark = pytest.mark.unoptimized

ROOT = pathlib.Path(__file__).parent.parent
EMPTY = optax.chain(optax.clip(1.0), optax.adam(0.1))  # two of whose parts have a state without arrays


# Across processes.


def in_a_process(half, folder):
    quickly = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "tests.checkpoints", half, folder]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | quickly, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_goes_on_in_another_process_to_the_same_numbers(tmp_path):
    """Bit by bit, for every row of the catalogue, keys included: outputs and states of the second half."""
    in_a_process(FIRST_HALF, tmp_path)
    in_a_process(SECOND_HALF, tmp_path)
    expected = load_by_numpy(tmp_path / "ends")
    assert {name.partition("/")[0] for name in expected} == set(cases())
    for form in FORMATS:
        found = load_by_numpy(tmp_path / f"ends-{form}")
        assert found.keys() == expected.keys()
        different = [
            name for name, x in expected.items() if x.dtype != found[name].dtype or not same_bits(x, found[name])
        ]
        assert not different, (form, different)


def same_bits(x, y):
    return x.shape == y.shape and x.tobytes() == y.tobytes()


# From dicts, lists and names.


def learning():
    return mtl.skip_nonfinite(mtl.learn(scalarization.uw(), EMPTY)).init(3)


def transforming():
    params = {"trunk/linear": {"w": jnp.ones((2, 3))}, "head": jnp.ones((), jnp.bfloat16)}
    return mtl.transform_rows(aggregation.excess_mtl(), EMPTY).init((3, params))


def training():
    """Parameters, some of them narrow, and two states."""
    params = {"w": jnp.arange(3.0), "layers": [jnp.ones(2, jnp.bfloat16), jnp.zeros(())]}
    return params, optax.adam(1e-3).init(params), scalarization.random(0).init(2)


STATES = {"learn": learning, "transform_rows": transforming, "training": training}


def assert_restored(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_what_comes_back_without_a_target(make, form, tmp_path):
    save, load = FORMATS[form]
    state = numbered(make())
    save(tmp_path / "state", state)
    saved = load(tmp_path / "state")
    assert jax.tree.structure(saved) != jax.tree.structure(state)
    assert_restored(mtl.restore(saved, like=make()), state)
    assert_restored(mtl.restore(saved, like=jax.eval_shape(make)), state)


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_names_in_one_piece_are_those_of_keystr(make):
    state = numbered(make())
    by_keystr = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    assert by_keystr.keys().isdisjoint(flat_names(state))
    assert_restored(mtl.restore(by_keystr, like=make()), state)
    assert_restored(mtl.restore(state, like=make()), state)  # nothing was lost


def test_what_has_no_arrays_may_be_there_or_not():
    expected = numbered(learning())
    learned, (_, (adam, _)) = expected.inner.inner, expected.inner.opt_state
    for nothing in ({}, [], (), None):
        opt_state = {"0": nothing, "1": {"0": adam._asdict(), "1": nothing}}
        saved = {**expected._asdict(), "inner": {"inner": learned, "opt_state": opt_state, "nothing": nothing}}
        assert_restored(mtl.restore(saved, like=learning()), expected)
    saved["inner"]["opt_state"] = {"1": {"0": adam._asdict()}}
    assert_restored(mtl.restore(saved, like=learning()), expected)
    assert mtl.restore({}, like=optax.EmptyState()) == optax.EmptyState()


def test_the_state_is_a_copy_where_the_template_is(tmp_path):
    """On a mesh that is the new state itself, for orbax too."""
    mesh = jax.make_mesh((2,), ("data",))
    params = jax.device_put(jnp.ones((4, 2)), NamedSharding(mesh, PartitionSpec("data")))
    like = aggregation.excess_mtl().init((2, params))
    saved = numbered(like)
    placed = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), saved, like)
    save_by_orbax(tmp_path / "state", placed)
    state = mtl.restore(saved._asdict(), like=like)
    for restored in state, load_by_orbax(tmp_path / "state", like):
        jax.tree.map(lambda new, old: chex.assert_equal(new.sharding, old.sharding), restored, like)
        chex.assert_trees_all_equal(restored, saved)
    assert not state.squared_gradients.sharding.is_fully_replicated
    saved.baseline[:] = 0
    assert np.all(state.baseline != 0)
    one = {"seen": jnp.ones(2, jnp.int32)}
    state = mtl.restore(one, like=aggregation.mgda().init((2, 3)))
    jax.jit(lambda state: state, donate_argnums=0)(state)
    assert not one["seen"].is_deleted()


DWA = scalarization.dwa().init(3)
LEARN = mtl.learn(scalarization.uw(), optax.adam(0.1)).init(3)
ERRORS = {
    "another method's": (
        lambda: (scalarization.uw().init(3)._asdict(), DWA),
        TypeError,
        "saved.average: expected an array of shape (3,), as in like, found none, beside 'log_var'",
    ),
    "a field too many": (
        lambda: ({**DWA._asdict(), "oldest": np.ones(3)}, DWA),
        TypeError,
        "saved: expected what like has, found besides that 'oldest'",
    ),
    "a renamed field within": (
        lambda: ({"inner": {"log_var": np.zeros(3)}, "opt_state": [{"count": 0, "m": {"log_var": 0}}]}, LEARN),
        TypeError,
        "saved.opt_state[0].mu['log_var']: expected an array of shape (3,), as in like, found none, beside "
        "'opt_state/0/m/log_var'",
    ),
    "nothing": (
        lambda: ({}, DWA),
        TypeError,
        "saved.average: expected an array of shape (3,), as in like, found none, and nothing else in its place",
    ),
    "many others": (
        lambda: ({f"layer_{i}": np.ones(2) for i in range(9)}, DWA),
        TypeError,
        "found none, beside 'layer_0', 'layer_1', 'layer_2', 'layer_3', 'layer_4', 'layer_5' and 3 more",
    ),
    "leaves alone": (
        lambda: ({f"arr_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(DWA))}, DWA),
        TypeError,
        "'arr_3' (of jax.tree.leaves? jax.tree.unflatten(jax.tree.structure(like), leaves))",
    ),
    "a number of tasks": (
        lambda: (scalarization.dwa().init(2)._asdict(), DWA),
        ValueError,
        "saved.average: expected shape (3,), as in like, found shape (2,) (of other tasks? restore it like their "
        "state, then mtl.carry_over)",
    ),
    "a shape": (
        lambda: ({**DWA._asdict(), "count": np.zeros((3, 1), np.int32)}, DWA),
        ValueError,
        "saved.count: expected shape (3,), as in like, found shape (3, 1)",
    ),
    "a dtype": (
        lambda: ({**DWA._asdict(), "count": np.zeros(3)}, DWA),
        TypeError,
        "saved.count: expected dtype int32, as in like, found dtype float64",
    ),
    "no array": (
        lambda: ({**DWA._asdict(), "count": "3"}, DWA),
        TypeError,
        "saved.count: expected an array of shape (3,), as in like, found '3'",
    ),
    "a template": (
        lambda: (jax.eval_shape(lambda: DWA), DWA),
        TypeError,
        "saved.average: expected an array of shape (3,), as in like, found ShapeDtypeStruct",
    ),
    "a vector for a number": (
        lambda: ({"seed": np.zeros(2, np.uint32)}, {"seed": jnp.zeros((), jnp.uint32)}),
        ValueError,
        "saved['seed']: expected shape (), as in like, found shape (2,)",
    ),
    "names of two types": (
        lambda: ({1: np.zeros(2), "a": np.zeros(2)}, {"a": jnp.zeros(2)}),
        TypeError,
        "saved: expected names of one type in each dict, as in like, found several types",
    ),
    "a number in the template": (
        lambda: ({"step": np.array(3)}, {"step": 3}),
        TypeError,
        "like['step']: expected an array (jnp.asarray(x) for a Python number), found int",
    ),
    "no tree": (
        lambda: ("state", DWA),
        TypeError,
        "saved: expected dicts and lists of arrays, or a mapping from names to arrays, found 'state'",
    ),
}


@pytest.mark.parametrize(("given", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_what_is_not_the_state_is_named(given, error, message):
    saved, like = given()
    with pytest.raises(error, match=f"{re.escape(message)}$"):
        mtl.restore(saved, like=like)


# Other places than methods that take a state.


def test_the_links_of_a_chain_refuse_what_was_restored_without_a_target():
    params, rows = {"w": jnp.ones(3)}, {"w": jnp.ones((2, 3))}
    for transformation in (optax.scale_by_adam(), EMPTY, optax.partition({"a": optax.scale_by_adam()}, {"w": "a"})):
        link = mtl.per_task(transformation, n_tasks=2)
        state = link.init(params)
        restored = {"0": {}, "1": {}} if type(state) is tuple else state._asdict()
        with pytest.raises(
            TypeError, match=r"state: expected .* found a dict of .*of a checkpoint\? mtl.restore makes"
        ):
            link.update(rows, restored, params)
        with pytest.raises((TypeError, ValueError), match=r"state.*: expected "):
            link.update(rows, mtl.per_task(optax.trace(0.9), 2).init(params), params)
        with pytest.raises(ValueError, match=r"state.*: expected shape \(2,.*found shape \(4,"):
            link.update(rows, mtl.per_task(transformation, n_tasks=4).init(params), params)
        link.update(rows, state, params)
    with pytest.raises(
        TypeError, match=r"state: expected what .*SeenState\(seen\), found a dict of 'seen' \(of a check"
    ):
        mtl.aggregate(aggregation.mgda(), 2).update(rows, {"seen": jnp.zeros(2, jnp.int32)}, params)


def test_weights_learned_on_other_data_refuse_another_state():
    grad_fn = mtl.auto_lambda(lambda params, x: jnp.stack([jnp.sum(params * x), jnp.sum(params)]), optax.sgd(0.1))
    params = x = jnp.ones(2)
    state = grad_fn.init(params, x)
    step = lambda state: grad_fn(params, state, x, validation=(x,))
    with pytest.raises(TypeError, match=r"found a dict of 'raw_weights', .*of a checkpoint"):
        step(state._asdict())
    with pytest.raises(TypeError, match=r"state: expected auto_lambda's AutoLambdaState\(.*found dwa's DWAState"):
        step(DWA)
    assert_restored(mtl.restore(state._asdict(), like=state), state)
