"""How a training starts: the state that ``grad_fn.init`` makes, and what is said where there is none."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.autodiff.models import normal_batch, normal_layers, squared_error
from tests.catalogue import AGGREGATORS, SCALARIZERS

pytestmark = pytest.mark.unoptimized

PARAMS = jax.device_put(normal_layers(0, [5, 4, 3]))
BATCH = normal_batch(1, 4, n_in=5, n_out=3)
OWN_BATCHES = normal_batch(2, 3, 4, n_in=5, n_out=3)
NAMES = "depth", "normal", "seg"
SHARED = [True, False]


def squared_errors(params, batch):
    """Of few operations: hardly a test here computes them, and each traces them anew."""
    x, y = batch
    return jnp.mean((x @ params[0]["w"] @ params[1]["w"] - y) ** 2, axis=0)


def named(params, batch):
    return dict(zip(NAMES, squared_errors(params, batch), strict=True))


def counted(params, batch):
    return {name: mtl.Counted(4 * loss, jnp.int32(4)) for name, loss in named(params, batch).items()}


def structs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_same_state(found, expected):
    chex.assert_trees_all_equal_structs(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_equal(found, expected)


def of(method, losses, params):
    """By hand."""
    if isinstance(method, mtl.Scalarizer):
        return method.init(losses)
    return method.init((len(jax.tree.leaves(losses)) if isinstance(losses, dict) else losses.size, params))


# What it makes.


@pytest.mark.parametrize("case", [*SCALARIZERS, *AGGREGATORS], ids=lambda case: case.name)
def test_the_state_of_every_method(case):
    method = case.make()
    method = mtl.learn(method, optax.adam(1e-2)) if method.learned else method
    grad_fn = mtl.value_and_grad(squared_errors, method, hooks=True)
    expected = of(method, np.ones(3, np.float32), PARAMS)
    assert_same_state(grad_fn.init(PARAMS, BATCH), expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(grad_fn.init, PARAMS, BATCH), structs(expected))


def trunk(params, batch):
    return {"one": jnp.tanh(batch[0] @ params["w"] + params["b"][None])}


HEADS = {
    name: lambda params, features, batch, i=i: jnp.mean((features["one"] @ params - batch[1][:, i]) ** 2)
    for i, name in enumerate(NAMES)
}
PAIR = PARAMS[0], {name: np.ones(4, np.float32) for name in NAMES}
FORMS = {
    "names": (named, {}, PARAMS, BATCH, PARAMS),
    "counted": (counted, {}, PARAMS, BATCH, PARAMS),
    "shared": (named, {"shared": SHARED}, PARAMS, BATCH, mtl.subset(PARAMS, SHARED)),
    "decide_on": (
        named,
        {"shared": SHARED, "decide_on": lambda params: [False, True]},
        PARAMS,
        BATCH,
        mtl.subset(PARAMS, [False, True]),
    ),
    "heads": ((trunk, HEADS), {}, PAIR, BATCH, mtl.subset(PAIR, (True, False))),
    "features": ((trunk, HEADS), {"at": "features"}, PAIR, BATCH, {"one": np.ones((4, 4), np.float32)}),
    "task_axis": (squared_error, {"task_axis": 0}, PARAMS, OWN_BATCHES, PARAMS),
    "microbatches": (counted, {"microbatches": 2}, PARAMS, BATCH, PARAMS),
    "has_aux": (lambda *args: (named(*args), jnp.ones(2)), {"has_aux": True}, PARAMS, BATCH, PARAMS),
}
METHODS = {
    "dwa": scalarization.dwa(steps_per_epoch=100),
    "excess_mtl": aggregation.excess_mtl(),
    "wrapped": mtl.skip_nonfinite(
        mtl.amortize(mtl.chain(scalarization.dwa(steps_per_epoch=100), aggregation.excess_mtl()))
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_state_in_every_form(form):
    losses_fn, keywords, params, batch, seen = FORMS[form]
    for method in METHODS.values():
        grad_fn = mtl.value_and_grad(losses_fn, method, **keywords)
        losses = np.ones(3, np.float32) if form == "task_axis" else dict.fromkeys(NAMES, 1.0)
        state = grad_fn.init(params, batch, mask=np.array([True, True, False]))
        assert_same_state(state, of(method, losses, seen))
        assert_same_state(grad_fn.init(structs(params), structs(batch)), state)
        step = jax.eval_shape(grad_fn, params, state, batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(step[0][1], structs(state))


def test_losses_of_two_axes():
    losses_fn = lambda params: jnp.ones((2, 3)) * params
    init = lambda method: jax.eval_shape(mtl.value_and_grad(losses_fn, method).init, 1.0)
    assert init(scalarization.dwa(steps_per_epoch=100)).count.shape == (2, 3)
    assert init(aggregation.upgrad()).seen.shape == (6,)


def test_dtypes_are_those_of_the_losses_and_parameters():
    params, batch = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, BATCH))
    for method in METHODS.values():
        grad_fn = mtl.value_and_grad(named, method)
        assert_same_state(grad_fn.init(params, batch), of(method, jax.eval_shape(named, params, batch), params))


def test_nothing_is_computed():
    """Neither the losses nor a batch has to be: the model may be larger than the machine."""

    def losses_fn(params, batch):
        return jnp.stack([jnp.sum(batch @ params), jnp.sum(params)])

    params, batch = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32), jax.ShapeDtypeStruct((8, 10**6), jnp.float32)
    assert mtl.value_and_grad(losses_fn, aggregation.upgrad()).init(params, batch).seen.shape == (2,)


def test_under_jit_and_vmap_and_from_the_compiled_step():
    grad_fn = mtl.value_and_grad(named, aggregation.excess_mtl())
    state = grad_fn.init(PARAMS, BATCH)
    assert_same_state(jax.jit(grad_fn.init)(PARAMS, BATCH), state)
    assert_same_state(jax.jit(grad_fn).init(PARAMS, BATCH), state)
    three = lambda tree: jax.tree.map(lambda x: np.stack([x] * 3), tree)
    mapped = jax.vmap(grad_fn.init, (0, None))(three(PARAMS), BATCH)
    chex.assert_trees_all_equal_shapes(mapped, three(state))


def test_arguments_and_outputs_that_are_no_arrays():
    def losses_fn(params, batch, kind, *, power, flip):
        assert kind == "squared"
        return squared_errors(params, batch) ** power * (-1 if flip else 1), "text"

    grad_fn = mtl.value_and_grad(losses_fn, scalarization.dwa(steps_per_epoch=100), has_aux=True)
    assert grad_fn.init(PARAMS, BATCH, "squared", power=2, flip=np.array(True)).count.shape == (3,)


def test_losses_that_look_at_numbers_are_computed():
    def losses_fn(params, batch):
        total = jnp.sum(batch[0])
        return squared_errors(params, batch) if total > 1e9 else dict.fromkeys(NAMES, total * params[0]["w"][0, 0])

    grad_fn = mtl.value_and_grad(losses_fn, scalarization.constant(dict.fromkeys(NAMES, 1.0)))
    assert grad_fn.init(PARAMS, BATCH).seen.shape == (3,)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        grad_fn.init(PARAMS, structs(BATCH))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_the_state_lies_where_the_parameters_do(kind):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    losses_fn = lambda params: {"a": jnp.sum(params["w"] ** 2), "b": jnp.sum(jnp.sin(params["w"]))}
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(np.arange(8, dtype=np.float32), NamedSharding(mesh, PartitionSpec("x")))}
        losses = jax.jit(losses_fn)(params)
        for method in METHODS.values():
            found, expected = mtl.value_and_grad(losses_fn, method).init(params), of(method, losses, params)
            assert_same_state(found, expected)
            shardings = lambda state: [leaf.sharding for leaf in jax.tree.leaves(state)]
            assert shardings(found) == shardings(expected)


WRONG = dict.fromkeys(("depth", "normal", "edges"), 1.0)
NAMING = {
    "scalarizer": scalarization.constant(WRONG),
    "aggregator": aggregation.constant(WRONG),
    "preference": aggregation.upgrad(pref_vector=WRONG),
    "in a chain": mtl.chain(scalarization.constant(WRONG), aggregation.mgda()),
    "wrapped": mtl.skip_nonfinite(aggregation.cr_mogm(aggregation.mgda(), initial_weights=WRONG)),
}
TASKS = {
    "an index": aggregation.lr_annealing(),
    "another name": mtl.skip_nonfinite(aggregation.lr_annealing("edges")),
    "a main task": aggregation.pcd(main=1),
}


@pytest.mark.parametrize("method", NAMING.values(), ids=NAMING)
def test_names_are_checked(method):
    with pytest.raises(ValueError, match=r"expected the losses' names \['depth', 'normal', 'seg'\], found"):
        mtl.value_and_grad(named, method).init(PARAMS, BATCH)
    with pytest.raises(ValueError, match="the losses have no names"):
        mtl.value_and_grad(squared_errors, method).init(PARAMS, BATCH)


@pytest.mark.parametrize("method", TASKS.values(), ids=TASKS)
def test_a_task_is_one_of_the_losses(method):
    with pytest.raises(ValueError, match=r"expected one of the losses' names \['depth', 'normal', 'seg'\], found"):
        mtl.value_and_grad(named, method).init(PARAMS, BATCH)
    by_name = mtl.value_and_grad(named, aggregation.lr_annealing("seg"))
    assert by_name.init(PARAMS, BATCH).weights.shape == (3,)


def test_parameters_are_looked_at_before_the_losses():
    for method in METHODS.values():
        with pytest.raises(TypeError, match=r"params\['n'\]: expected real or complex floating point numbers"):
            mtl.value_and_grad(lambda params: params["n"] * jnp.arange(2), method).init({"n": np.array(3)})


def test_pointwise_losses_are_not_taken_for_a_network():
    losses_fn = lambda params: {"u": jnp.sum(params) * jnp.ones((5, 3)), "v": jnp.sum(params) * jnp.ones(3)}
    grad_fn = mtl.value_and_grad(losses_fn, scalarization.mean())
    state = grad_fn.init(jnp.ones(2))
    assert state.seen.shape == (18,)
    jax.eval_shape(grad_fn, jnp.ones(2), state)


def test_a_sum_of_losses_is_refused():
    for method in METHODS.values():
        with pytest.raises(ValueError, match="a scalar: do not add the losses up"):
            mtl.value_and_grad(lambda *args: jnp.sum(squared_errors(*args)), method).init(PARAMS, BATCH)


# Where there is no state.


def taking_a_pair(params, x, y):
    return squared_errors(params, (x, y))


WITHOUT_STATE = {
    "batch": (named, {}, PARAMS, (BATCH,)),
    "x, y": (taking_a_pair, {}, PARAMS, BATCH),
    "dict": (lambda params, batch: named(params, batch["data"]), {}, PARAMS, ({"data": BATCH},)),
    "microbatches": (counted, {"microbatches": 2}, PARAMS, (BATCH,)),
    "task_axis": (squared_error, {"task_axis": 0}, PARAMS, (OWN_BATCHES,)),
    "heads": ((trunk, HEADS), {}, PAIR, (BATCH,)),
    "features": ((trunk, HEADS), {"at": "features"}, PAIR, (BATCH,)),
    "with a default": (lambda params, batch=BATCH: named(params, batch), {}, PARAMS, (BATCH,)),
    "none needed": (lambda params: named(params, BATCH), {}, PARAMS, (np.ones(7, np.float32),)),
    "compiled": (jax.jit(named), {}, PARAMS, (BATCH,)),
}


@pytest.mark.parametrize("form", WITHOUT_STATE)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_missing_state_is_named(form, method):
    losses_fn, keywords, params, args = WITHOUT_STATE[form]
    with pytest.raises(TypeError, match=r"state: expected what grad_fn.init\(params, \*batch\) returned, in its place"):
        mtl.value_and_grad(losses_fn, method, **keywords)(params, *args)


def test_another_slip_keeps_its_own_error():
    """The batch is missing, and not the state; the state is for another number of tasks."""
    for method in METHODS.values():
        grad_fn = mtl.value_and_grad(named, method)
        with pytest.raises(TypeError, match="missing 1 required positional argument: 'batch'"):
            grad_fn(PARAMS, grad_fn.init(PARAMS, BATCH))
        with pytest.raises(ValueError, match=r"values: expected .*\(2,\)"):
            jax.eval_shape(grad_fn, PARAMS, of(method, np.ones(2, np.float32), PARAMS), BATCH)


# Where the auxiliary output is taken for losses.

AUX = {
    "dict": {"logits": np.ones((4, 3), np.float32)},
    "scalars": {"accuracy": np.float32(0.5)},
    "tuple": (np.ones(4, np.float32), 1),
    "none": None,
    "ints": np.arange(3),
    "text": "logits",
}


@pytest.mark.parametrize("aux", AUX.values(), ids=AUX)
def test_an_auxiliary_output_is_not_taken_for_losses(aux):
    losses_fn = lambda params, batch: (named(params, batch), aux)
    message = r"losses_fn: expected .*has_aux=True for a pair \(losses, aux\), found a pair"
    method = scalarization.dwa(steps_per_epoch=100)
    grad_fn = mtl.value_and_grad(losses_fn, method)
    for call in (
        lambda: grad_fn(PARAMS, method.init(3), BATCH),
        lambda: grad_fn.init(PARAMS, BATCH),
        lambda: jax.eval_shape(mtl.value_and_jac(losses_fn), PARAMS, BATCH),
        lambda: jax.eval_shape(mtl.value_and_gramian(losses_fn), PARAMS, BATCH),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_an_auxiliary_array_shows_in_the_number_of_losses():
    for aux in np.float32(1), np.ones((4, 3), np.float32):
        losses_fn = lambda params, batch, aux=aux: (squared_errors(params, batch), aux)
        for method in METHODS.values():
            with pytest.raises(ValueError, match=r"shape \(3,\), or has_aux=True, found a pair"):
                state = of(method, np.ones(3, np.float32), PARAMS)
                jax.eval_shape(mtl.value_and_grad(losses_fn, method), PARAMS, state, BATCH)


def test_a_pair_of_losses_stays_one():
    four = lambda params, batch: (named(params, batch), jnp.sum(params[0]["w"]))
    two = lambda params, batch: (jnp.sum(batch[0]) * params[0]["b"][0], counted(params, batch)["seg"])
    for losses_fn, n_tasks in (four, 4), (two, 2):
        grad_fn = mtl.value_and_grad(losses_fn, aggregation.upgrad())
        (_, state), _ = jax.eval_shape(grad_fn, PARAMS, grad_fn.init(PARAMS, BATCH), BATCH)
        assert state.seen.shape == (n_tasks,)


def test_the_one_loss_of_a_task_is_no_pair():
    with_aux = lambda *args: (squared_error(*args), {"count": 1})
    heads = {name: lambda *args, head=head: (head(*args), 1.0) for name, head in HEADS.items()}
    for losses_fn, keywords, params, batch in (
        (with_aux, {"task_axis": 0}, PARAMS, OWN_BATCHES),
        ((trunk, heads), {}, PAIR, BATCH),
    ):
        with pytest.raises(ValueError, match=r"one loss for each task.*has_aux=True for a pair \(loss, aux\)"):
            mtl.value_and_grad(losses_fn, scalarization.dwa(steps_per_epoch=100), **keywords).init(params, batch)


# A clash of names.


def of_mask(params, batch, mask):
    return named(params, batch)


def of_refresh(params, batch, *, refresh=None):
    return named(params, batch)


class Callable:
    def __call__(self, params, batch, mask=None):
        return named(params, batch)


CLASHES = {
    "mask": of_mask,
    "refresh": of_refresh,
    "partial": partial(of_mask, PARAMS),
    "jit": jax.jit(of_refresh),
    "jit of partial": jax.jit(partial(of_refresh)),
    "method": Callable().__call__,
    "object": Callable(),
    "trunk": (lambda params, batch, refresh: batch, HEADS),
    "head": (trunk, HEADS | {"seg": lambda params, features, batch, mask=None: jnp.sum(features)}),
}


@pytest.mark.parametrize("losses_fn", CLASHES.values(), ids=CLASHES)
def test_a_parameter_that_the_step_takes_itself_is_refused(losses_fn):
    for method in METHODS.values():
        with pytest.raises(ValueError, match=r"losses_fn: .*rename it.*found a parameter '(mask|refresh)'"):
            mtl.value_and_grad(losses_fn, method)


def by_position(params, batch, mask, refresh=None, /):
    return jnp.where(mask, squared_errors(params, batch), 0)


def test_by_position_there_is_no_clash():
    grad_fn = mtl.value_and_grad(by_position, scalarization.dwa(steps_per_epoch=100))
    state, of_losses = grad_fn.init(PARAMS, BATCH, False), np.array([True, False, True])
    (losses, state), _ = jax.jit(grad_fn)(PARAMS, state, BATCH, False, mask=of_losses)
    chex.assert_trees_all_equal((losses, state.count), (np.zeros(3, np.float32), of_losses.astype(np.int32)))


@pytest.mark.parametrize("losses_fn", [partial(of_mask, mask=None), lambda mask, batch: named(mask, batch)])
def test_what_is_given_already_is_no_clash(losses_fn):
    grad_fn = mtl.value_and_grad(losses_fn, scalarization.dwa(steps_per_epoch=100))
    jax.eval_shape(grad_fn, PARAMS, grad_fn.init(PARAMS, BATCH), BATCH)


@pytest.mark.parametrize("losses_fn", [max, lambda *mask: mask, lambda params, **refresh: params, jnp.add])
def test_what_has_no_such_keyword_passes(losses_fn):
    mtl.value_and_grad(losses_fn, scalarization.dwa(steps_per_epoch=100))


# What a method cannot do.


def test_options_that_a_method_has_nothing_for_say_what_to_do():
    method = aggregation.graddrop(0)
    for name, given in {"return_weights": True, "decide_on": SHARED}.items():
        with pytest.raises(ValueError, match=rf"{name}: .*method.weighting.* or a call without {name}="):
            mtl.value_and_grad(named, method, **{name: given})
    grad_fn = mtl.value_and_grad(named, method)
    with pytest.raises(ValueError, match=r"refresh: expected .*mtl.amortize\(method\)"):
        grad_fn(PARAMS, grad_fn.init(PARAMS, BATCH), BATCH, refresh=True)
