"""Slips of a first hour: each is refused before anything compiles, in the sentence that its maker needs."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mtlbalance as mtl
from mtlbalance import aggregation, diagnostics, scalarization, states

pytestmark = pytest.mark.unoptimized

DWA, UW, UPGRAD, EXCESS = (
    scalarization.dwa(steps_per_epoch=100),
    scalarization.uw(),
    aggregation.upgrad(),
    aggregation.excess_mtl(),
)
PARAMS = {"trunk": jnp.ones((5, 16)), "heads": jnp.ones((16, 2))}
BATCH = jnp.ones((4, 5)), jnp.ones((4, 2))
ADAM = optax.adam(1e-2)
KEY = jax.random.key(0)
MLP = eqx.nn.MLP(5, 2, 8, 1, key=KEY)
JACOBIAN = {"w": jnp.ones((2, 3))}
BY_NAME = dict.fromkeys(["cls", "reg"], BATCH[0])


def task_losses(params, x, y):
    error = jnp.tanh(x @ params["trunk"]) @ params["heads"] - y
    return {"cls": jnp.mean(error[:, 0] ** 2), "reg": jnp.mean(error[:, 1] ** 2)}


EACH = dict.fromkeys(["cls", "reg"], lambda params, x, y: task_losses(params, x, jnp.ones((4, 2))))


def grad_fn(method=DWA, losses_fn=task_losses, **options):
    return mtl.value_and_grad(losses_fn, method, **options)


def returning(make, method=DWA, params=PARAMS, **options):
    """A step whose losses function returns this, for a state of two tasks."""
    state = method.init(2) if isinstance(method, mtl.Scalarizer) else method.init((2, params))
    return lambda: grad_fn(method, lambda params, x, y: make(task_losses(params, x, y)), **options)(
        params, state, *BATCH
    )


def apply(*args, **kwargs):
    return lambda: DWA.apply(*args, **kwargs)


STATE = DWA.init(2)
LOSSES, NAMED = jnp.array([1.0, 2.0]), {"cls": jnp.array(1.0), "reg": jnp.array(2.0)}
ABSENT = r"floating point numbers \(a task that is absent: mask=, or mtl.Counted\(sum, 0\)\)"
ONLY = r"floating point numbers \(of a module its parameters alone: eqx.filter\(model, eqx.is_inexact_array\) or eqx"
STATE_DUE = r"state: expected what grad_fn.init\(params, \*batch\) returned, in its place: grad_fn\(params, state"
PAIR = r"init: expected a pair \(number of tasks: int, params\), as in init\(\(3, params\)\)"
A_METHOD = "expected a Scalarizer or an Aggregator, found"

METHODS = {
    "a factory that is not called": (lambda: grad_fn(scalarization.uw), rf"method: {A_METHOD} function uw: .* uw\(\)"),
    "... guarded": (lambda: mtl.skip_nonfinite(scalarization.dwa), rf"method: {A_METHOD} function dwa: .* dwa\(\)"),
    "... amortized": (lambda: mtl.amortize(aggregation.mgda), rf"method: {A_METHOD} function mgda: .* mgda\(\)"),
    "... learned": (
        lambda: mtl.learn(scalarization.uw, ADAM),
        r"method: .*learned fields, found function uw: .* uw\(\)",
    ),
    "... first of a chain": (lambda: mtl.chain(scalarization.dwa, UPGRAD), r"scalarizer: .* function dwa: .* dwa\(\)"),
    "... second": (lambda: mtl.chain(DWA, aggregation.mgda), r"aggregator: .* function mgda: a factory must be called"),
    "... smoothed": (
        lambda: aggregation.cr_mogm(aggregation.mgda),
        r"method: expected an Aggregator, found function mg",
    ),
    "... in optax": (lambda: mtl.aggregate(aggregation.mgda, 2), r"aggregator: .* function mgda: .* mgda\(\)"),
    "... logged": (
        lambda: diagnostics.effective_weights(scalarization.dwa, STATE, LOSSES),
        r"scalarizer: expected a Scalarizer.* found function dwa: a factory must be called, dwa\(\)",
    ),
    "... for other tasks": (
        lambda: mtl.carry_over(scalarization.dwa, STATE, ["a", "b"], ["a"]),
        rf"method: {A_METHOD} function dwa: a factory must be called, dwa\(\)",
    ),
    "a wrapper that is not called": (lambda: grad_fn(mtl.amortize), rf"method: {A_METHOD} function amortize"),
    "a part of a method": (lambda: grad_fn(DWA.apply), rf"method: {A_METHOD} a function$"),
    "a name": (lambda: grad_fn("uw"), rf"method: {A_METHOD} 'uw': the factory of that name must be called"),
    "a class": (lambda: grad_fn(mtl.Scalarizer), rf"method: {A_METHOD} the class Scalarizer"),
    "a module": (lambda: grad_fn(scalarization), rf"method: {A_METHOD} module"),
    "an optimizer": (lambda: grad_fn(ADAM), rf"method: {A_METHOD} GradientTransformation"),
    "learn: arguments swapped": (
        lambda: mtl.learn(ADAM, UW),
        "method: expected a Scalarizer with learned fields, found Gr",
    ),
    "learn: a rate": (lambda: mtl.learn(UW, 0.1), r"optimizer: .*such as optax.adam\(1e-2\), found float"),
    "learn: a factory": (lambda: mtl.learn(UW, optax.adam), r"optimizer: .*, found the function adam"),
    "learn: a part of a factory": (lambda: mtl.learn(UW, partial(optax.adam, 0.1)), "optimizer: .*, found partial$"),
    "learn: nothing to learn": (lambda: mtl.learn(DWA, ADAM), "found Scalarizer with nothing to learn, which needs no"),
    "learn: an aggregator": (lambda: mtl.learn(UPGRAD, ADAM), "found Aggregator with nothing to learn, which needs no"),
    "learn: outside": (lambda: mtl.learn(mtl.skip_nonfinite(UW), ADAM), r"as in skip_nonfinite\(learn\(method, optimi"),
    "not wrapped": (lambda: grad_fn(UW), r"nothing left to learn, as in mtl.value_and_grad\(losses_fn, mtl.learn\("),
    "hooks": (
        lambda: grad_fn(scalarization.dwa()),
        r"hooks: expected True, to say that your loop calls state = method.end_epoch\(state\) after each epoch \(with "
        r"steps_per_epoch= it needs none\), found False, with needs=\('end_epoch',\)",
    ),
    "... and none": (lambda: grad_fn(hooks=None), "hooks: expected True or False, found NoneType"),
    "... of a link in optax": (
        lambda: mtl.aggregate(mtl.chain(scalarization.famo(), UPGRAD), 2),
        r"hooks: .*method.observe\(state, losses\) after each optimizer step.*delayed=True",
    ),
    "swapped": (lambda: mtl.value_and_grad(DWA, task_losses), "losses_fn: expected a function, .* found Scalarizer"),
    "losses in place of the function": (lambda: grad_fn(DWA, LOSSES), "losses_fn: expected a function, .* found Array"),
    "a tuple of three functions": (
        lambda: grad_fn(DWA, (task_losses,) * 3),
        "losses_fn: expected a function, a pair of a trunk and heads, or a dict or list of functions, .* found tuple",
    ),
    "a function that is called, in a dict": (
        lambda: grad_fn(DWA, {"a": task_losses, "b": LOSSES}),
        r"losses_fn\['b'\]: expected a function, as in a dict or list of functions, one for each task, found Array",
    ),
    "a dict of functions with a task axis": (
        lambda: grad_fn(DWA, {"a": task_losses}, task_axis=0),
        "losses_fn: expected one function for all tasks with task_axis=, found a dict of functions",
    ),
    "one batch for a dict of functions": (
        lambda: grad_fn(DWA, EACH)(PARAMS, STATE, *BATCH),
        r"args\[0\]: expected a part for each task, a dict of 'cls', 'reg' as the functions .*, found an array of",
    ),
    "... by other names": (
        lambda: grad_fn(DWA, EACH)(PARAMS, STATE, BY_NAME, {"cls": 1.0, "box": 1.0}),
        r"args\[1\]: expected .* a dict of 'cls', 'reg' as the functions are .*, found a dict of 'cls', 'box'",
    ),
    "... in a list": (
        lambda: grad_fn(DWA, EACH).init(PARAMS, BY_NAME, [1.0, 2.0]),
        r"args\[1\]: expected .* a dict of 'cls', 'reg' as the functions are .*, found a list of 2",
    ),
    "... of all losses": (
        lambda: grad_fn(DWA, EACH)(PARAMS, STATE, BY_NAME, BY_NAME),
        r"losses_fn\['cls'\]: expected one loss for each task, a scalar",
    ),
    "a bad task dropped of one array": (
        lambda: grad_fn(DWA, lambda *args: jnp.stack([*task_losses(*args).values()]), nonfinite="drop_task").init(
            PARAMS, *BATCH
        ),
        r"losses_fn: expected losses in a dict or list, one number each .* for nonfinite='drop_task', found one array",
    ),
    "... of many": (
        lambda: grad_fn(
            DWA, lambda params, x, y: {"a": jnp.sum(params["heads"], 0), "b": 1.0}, nonfinite="drop_task"
        ).init(PARAMS, *BATCH),
        r"losses_fn\['a'\]: expected losses in a dict or list, one number each .*, found shape \(2,\)",
    ),
    "... misspelt": (
        lambda: grad_fn(DWA, nonfinite="drop"),
        "nonfinite: expected 'drop_task' or None, found 'drop'",
    ),
    "... of rows that are not kept": (
        lambda: grad_fn(UPGRAD, nonfinite="drop_task", rows="two_pass"),
        "rows: expected an int, 'vmap' or None with nonfinite='drop_task', which looks at all rows, found 'two_pass'",
    ),
    "an aggregator in optax": (
        lambda: optax.chain(UPGRAD, ADAM).init(PARAMS),
        rf"{PAIR}; in an optax chain mtl.aggreg",
    ),
    "misspelt rows": (lambda: grad_fn(UPGRAD, rows="two-pass"), "rows: .*'two_pass', None, found 'two-pass'"),
    "params with the function": (
        lambda: mtl.value_and_jac(task_losses, PARAMS),
        "argnums: expected positions .* given to",
    ),
    "params for the function": (lambda: mtl.value_and_gramian(PARAMS), "losses_fn: expected a function that returns"),
    "many keys": (
        lambda: scalarization.random(jax.random.split(KEY)),
        r"key: expected one key \(.*vmap\), found shape \(2,",
    ),
}

STARTS = {
    "init(params)": (lambda: DWA.init(PARAMS), "shape: .*needs no parameters; .* what looks like parameters, shapes"),
    "init(2, params)": (lambda: DWA.init(2, PARAMS), r"init: expected the number of tasks, as in init\(2\)"),
    "init((2, params))": (lambda: DWA.init((2, PARAMS)), "init: .*a scalarizer's state needs no parameters"),
    "init()": (lambda: DWA.init(), "shape: expected at least one task, found None"),
    "init(function)": (lambda: DWA.init(task_losses), "shape: expected floating point numbers, found function"),
    "init(names)": (lambda: DWA.init(["cls", "reg"]), r"shape\[0\]: expected floating point numbers.* found 'cls'"),
    "init of ints": (lambda: DWA.init({"cls": 0, "reg": 0}), r"shape\['cls'\]: expected .* found the int 0"),
    "init of None": (lambda: DWA.init({"cls": 0.0, "reg": None}), rf"shape\['reg'\]: expected {ABSENT}, found None"),
    "aggregator: init(2, params)": (
        lambda: UPGRAD.init(2, PARAMS),
        r"init: expected one pair .*init\(\(3, params\)\), found 2 a",
    ),
    "aggregator: init(2)": (lambda: UPGRAD.init(2), rf"{PAIR}.* found int"),
    "aggregator: init()": (lambda: UPGRAD.init(), rf"{PAIR}.* found NoneType"),
    "aggregator: init(params)": (lambda: UPGRAD.init(PARAMS), rf"{PAIR}.* found dict"),
    "aggregator: init((params, 2))": (lambda: UPGRAD.init((PARAMS, 2)), rf"{PAIR}.* found \(dict, int\)"),
    "aggregator: init((2, function))": (
        lambda: EXCESS.init((2, task_losses)),
        rf"params: expected {ONLY}.* found function",
    ),
}

CALLS = {
    "no state": (
        apply(LOSSES),
        r"apply: expected the arguments \(state, values, .* missing a required argument: 'values'",
    ),
    "mask by position": (apply(STATE, LOSSES, True), r"apply: expected the arguments \(.* too many positional"),
    "misspelt": (apply(STATE, LOSSES, masks=True), "apply: .* found an unexpected keyword argument 'masks'"),
    "values by position": (
        lambda: UPGRAD.apply(UPGRAD.init((2, {"w": jnp.ones(3)})), JACOBIAN, LOSSES),
        r"apply: expected the arguments \(state, jacobian, \*, values=None, mask=None\), found too many positional",
    ),
    "strings": (apply(STATE, ["a", "b"]), r"values\[0\]: expected an array or a tree of arrays, found 'a'"),
    "names of the present": (
        apply(STATE, NAMED, mask=["cls"]),
        r"mask\[0\]: expected booleans, one per task, found 'cls'",
    ),
    "the method for its state": (
        apply(DWA, LOSSES),
        r"state.init: expected what the method's init returned, found functi",
    ),
    "int losses": (apply(STATE, jnp.array([1, 2])), "values: expected floating point numbers, found dtype int32"),
    "an int": (apply(STATE, {"cls": 1.0, "reg": 0}), rf"values\['reg'\]: expected {ABSENT}, found dtype int32"),
    "None": (apply(STATE, {"cls": 1.0, "reg": None}), rf"values\['reg'\]: expected {ABSENT}, found None"),
    "nested None": (
        apply(STATE, {"a": {"b": 1.0, "c": None}}),
        rf"values\['a'\]\['c'\]: expected {ABSENT}, found None",
    ),
    "None for an aggregator": (
        lambda: aggregation.gradnorm().apply(
            aggregation.gradnorm().init((2, {"w": jnp.ones(3)})), JACOBIAN, values={"cls": 1.0, "reg": None}
        ),
        rf"values\['reg'\]: expected {ABSENT}, found None",
    ),
    "the losses for the state": (
        lambda: scalarization.dwa(steps_per_epoch=100).apply(jnp.ones(2), STATE),
        r"state: expected what the method's init returned, dwa's DWAState.* found an array of shape \(2,\)",
    ),
    "a named mask of a vector": (
        apply(STATE, jnp.ones(2), mask={"cls": True, "reg": False}),
        "mask: expected one array",
    ),
    "None before names": (
        lambda: scalarization.constant({"cls": 1.0, "reg": 2.0}).apply(states.init_seen(2), {"cls": 1.0, "reg": None}),
        rf"values\['reg'\]: expected {ABSENT}, found None",
    ),
    "the method for its state, at an epoch's end": (
        lambda: DWA.end_epoch(DWA),
        r"state.init: expected what the method's init returned, found functi",
    ),
    "an epoch's number": (
        lambda: DWA.end_epoch(STATE, 1),
        r"end_epoch: expected the arguments \(state\), found too many positional",
    ),
    "nothing to observe": (
        lambda: scalarization.famo().observe(scalarization.famo().init(2), None),
        "values: expected the losses, as in values=losses, found None",
    ),
    "Counted without its count": (
        apply(STATE, {"cls": mtl.Counted(jnp.array(1.0), None), "reg": 1.0}),
        r"values\['cls'\]: expected floating point numbers .* found None",
    ),
}

STEPS = {
    "no state": (lambda: grad_fn()(PARAMS, *BATCH), rf"{STATE_DUE}.* found an array of shape"),
    "no state, one batch": (lambda: grad_fn()(PARAMS, BATCH), rf"{STATE_DUE}.* found a tuple of"),
    "no state, aggregator": (lambda: grad_fn(UPGRAD)(PARAMS, *BATCH), rf"{STATE_DUE}.* found an array of shape"),
    "the optimizer's state": (lambda: grad_fn()(PARAMS, ADAM.init(PARAMS), *BATCH), rf"{STATE_DUE}.* found a tuple of"),
    "the method": (lambda: grad_fn()(PARAMS, DWA, *BATCH), rf"{STATE_DUE}.* found Scalarizer"),
    "state first": (lambda: grad_fn()(STATE, PARAMS, *BATCH), rf"{STATE_DUE}.* found a dict of"),
    "the number of tasks": (lambda: grad_fn()(PARAMS, 2, *BATCH), rf"{STATE_DUE}.* found int$"),
    "the sum": (returning(lambda losses: sum(losses.values())), "losses_fn: .*a scalar: do not add the losses up"),
    "an int": (
        returning(lambda losses: losses | {"reg": 0}),
        rf"losses_fn\['reg'\]: expected {ABSENT}, found the int 0",
    ),
    "None": (returning(lambda losses: losses | {"reg": None}), rf"losses_fn\['reg'\]: expected {ABSENT}, found None"),
    "None, aggregator": (
        returning(lambda losses: losses | {"reg": None}, UPGRAD),
        r"losses_fn\['reg'\]: .* found None",
    ),
    "an accuracy": (
        returning(lambda losses: losses | {"acc": jnp.array(1)}),
        r"losses_fn\['acc'\]: .* found dtype int32",
    ),
    "a name": (returning(lambda losses: losses | {"name": "net"}), r"losses_fn\['name'\]: expected .* found 'net'"),
    "aux without has_aux": (
        returning(lambda losses: (losses, jnp.ones((4, 3)))),
        r"losses_fn: expected as many losses as the state is for, shape \(2,\), or has_aux=True, found a pair",
    ),
    "aux of ints without has_aux": (
        returning(lambda losses: (losses, jnp.arange(3))),
        r"losses_fn: .*has_aux=True for a pair \(losses, aux\), found a pair of which the second is dtype int32",
    ),
    "has_aux without aux": (returning(lambda losses: losses, has_aux=True), "losses_fn: expected a pair .* found dict"),
    "losses per example": (
        returning(lambda losses: {name: jnp.ones(8) * loss for name, loss in losses.items()}),
        r"losses_fn: .*each the mean over its examples, found shapes {'cls': \(8,\), 'reg': \(8,\)}",
    ),
    "a matrix of losses": (
        returning(lambda losses: jnp.ones((8, 2)) * losses["cls"]),
        r"losses_fn: .*each the mean over its examples, found shapes \(8, 2\)",
    ),
    "shared none": (returning(lambda losses: losses, UPGRAD, shared=False), "shared: expected at least one parameter"),
    "decide on none": (
        returning(lambda losses: losses, UPGRAD, decide_on=lambda params: jax.tree.map(lambda p: False, params)),
        "decide_on: expected at least one parameter to decide on, found False for all",
    ),
    "names of the present": (
        lambda: grad_fn()(PARAMS, STATE, *BATCH, mask=["cls"]),
        "mask: expected booleans, one per task, found 'cls'",
    ),
    "no pair": (
        lambda: grad_fn(UPGRAD, (lambda p, x: x, {"a": lambda p, f, x: f.sum()}))(PARAMS, STATE, BATCH[0]),
        "params: expected a pair, as losses_fn is one: the trunk's, .* found dict",
    ),
}

KINDS = {"methods": METHODS, "starts": STARTS, "calls": CALLS, "steps": STEPS}


@pytest.mark.parametrize(
    ("slip", "sentence"),
    [pytest.param(*case, id=f"{kind}: {name}") for kind, slips in KINDS.items() for name, case in slips.items()],
)
def test_slip(slip, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence):
        slip()


# What looks like a slip and is none.


@pytest.mark.parametrize(
    "losses",
    [
        (16, 2),
        jnp.ones((16, 2)),
        {"per example": jnp.ones((16, 2)), "other": jnp.ones((16, 2))},
        {"residual": jnp.ones((100, 1)), "boundary": jnp.ones((8, 1))},
        {"momentum": jnp.ones((100, 3)), "continuity": jnp.ones(100), "boundary": jnp.ones((8, 3))},
        {"a": jnp.ones(3), "b": {"c": jnp.ones(()), "d": jnp.ones(3)}},
        [1.0, 2.0],
        {"a": mtl.Counted(np.float32(1.0), 3), "b": 0.0},
    ],
    ids=lambda losses: str(jax.tree.map(jnp.shape, losses)),
)
def test_losses_of_any_shape_are_no_parameters(losses):
    jax.eval_shape(lambda: DWA.init(losses))


@pytest.mark.parametrize(
    "params",
    [
        {"dense": {"kernel": np.ones((5, 16)), "bias": np.ones(16)}},
        [np.ones((5, 16)), np.ones((16, 2))],
        {"conv1": np.ones((3, 3, 1, 8)), "conv2": np.ones((3, 3, 8, 16))},
        jax.eval_shape(lambda: PARAMS),
        MLP,
        eqx.filter(MLP, eqx.is_inexact_array),
        nnx.state(nnx.Linear(5, 2, rngs=nnx.Rngs(0))),
    ],
    ids=["flax", "list", "convolutions", "shapes", "module", "equinox", "nnx"],
)
def test_a_network_is_no_losses(params):
    with pytest.raises(ValueError, match="needs no parameters"):
        DWA.init(params)


def test_a_state_may_have_gone_through_a_tree_map():
    (_, state), _ = jax.eval_shape(grad_fn(), PARAMS, jax.tree.map(jnp.copy, STATE), *BATCH)
    assert type(state) is type(STATE)
