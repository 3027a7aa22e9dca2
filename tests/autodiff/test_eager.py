"""Outside of ``jit`` the second call of any way to take a step compiles nothing, and gives what a compiled one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, gramian, scalarization
from tests.autodiff.models import normal_batch, normal_layers, squared_error, squared_errors
from tests.events import compilations, recorded

pytestmark = pytest.mark.unoptimized

# On the device, as users' are: of NumPy's arrays some operations would be NumPy's.
PARAMS = jax.device_put(normal_layers(0, [5, 4, 3]))
BATCH = jax.device_put(normal_batch(1, 4, n_in=5, n_out=3))
OWN_BATCHES = jax.device_put(normal_batch(2, 3, 4, n_in=5, n_out=3))
MASK, YES, NO = jax.device_put((np.array([True, False, True]), np.array(True), np.array(False)))


def rectified(params, batch):
    """Losses of operations that JAX has as compiled functions of their own."""
    errors = squared_errors(params, batch, jax.nn.relu)
    return {name: jnp.where(x > 1, jnp.log1p(x), x) for name, x in zip("abc", errors, strict=True)}


def counted(params, batch):
    n, losses = len(batch[0]), squared_errors(params, batch)
    return {name: mtl.Counted(n * x, jnp.int32(n)) for name, x in zip("abc", losses, strict=True)}


def counted_and_aux(params, batch):
    return counted(params, batch), jnp.sum(batch[1], axis=0)


def trunk(params, batch):
    return jnp.tanh(batch[0] @ params["w"] + params["b"][None])


HEADS = [
    lambda params, features, batch, i=i: jnp.mean((features @ params["w"] + params["b"] - batch[1][:, i]) ** 2)
    for i in range(3)
]
PAIR = PARAMS[0], jax.device_put([{"w": w, "b": np.float32(0)} for w in np.asarray(PARAMS[1]["w"]).T])
TWO = trunk, HEADS
SKIPPED = mtl.skip_nonfinite(aggregation.cr_mogm(mtl.chain(scalarization.scale_invariant(), aggregation.mgda())))
upgrad, excess_mtl = aggregation.upgrad(), aggregation.excess_mtl()
AGAIN, ANEW = {"refresh": NO}, {"refresh": YES}

# The losses, the method, and the keywords of the function and of the call.
WAYS = {
    "rows=1": (rectified, upgrad, {"rows": 1}, {}),
    "rows=2": (rectified, upgrad, {"rows": 2}, {}),
    "two_pass": (rectified, upgrad, {"rows": "two_pass"}, {}),
    "stream": (rectified, excess_mtl, {"rows": "stream"}, {"mask": MASK}),
    "visits": (rectified, aggregation.m_config(), {}, {}),
    "microbatches": (counted_and_aux, upgrad, {"microbatches": 2, "has_aux": True}, {}),
    "task_axis rows=2": (squared_error, upgrad, {"task_axis": 0, "rows": 2}, {}),
    "anew": (rectified, mtl.amortize(excess_mtl), {"rows": "stream"}, ANEW),
    "again": (rectified, mtl.amortize(upgrad), {}, AGAIN),
    "vmap": (rectified, upgrad, {}, {}),
    "scalarizer": (rectified, scalarization.dwa(steps_per_epoch=100), {}, {}),
    "finish": (rectified, aggregation.moco(), {"rows": "stream"}, {}),
    "no weights": (rectified, aggregation.graddrop(0), {"rows": 1}, {}),
    "wrapped": (rectified, SKIPPED, {"rows": "two_pass"}, {}),
    "shared": (rectified, upgrad, {"shared": [True, False], "rows": 1}, {}),
    "decide_on": (rectified, upgrad, {"decide_on": [False, True], "rows": 1}, {}),
    "microbatches, scalarizer": (rectified, scalarization.dwa(steps_per_epoch=100), {"microbatches": 2}, {}),
    "microbatches, stream": (counted, excess_mtl, {"microbatches": 2, "rows": "stream"}, {}),
    "microbatches, two_pass": (counted, upgrad, {"microbatches": 2, "rows": "two_pass"}, {}),
    "task_axis": (squared_error, upgrad, {"task_axis": 0}, {}),
    "task_axis rows=1": (squared_error, upgrad, {"task_axis": 0, "rows": 1}, {}),
    "task_axis stream": (squared_error, excess_mtl, {"task_axis": 0, "rows": "stream"}, {}),
    "task_axis microbatches": (squared_error, upgrad, {"task_axis": 0, "microbatches": 2}, {}),
    "heads": (TWO, upgrad, {}, {}),
    "heads rows=1": (TWO, upgrad, {"rows": 1}, {}),
    "heads two_pass": (TWO, upgrad, {"rows": "two_pass"}, {}),
    "features": (TWO, aggregation.graddrop(0), {"at": "features"}, {}),
}


def assert_second_call_compiles_nothing(function, compiled, *args, **kwargs):
    """And that it is as in one program."""
    function(*args, **kwargs)
    with recorded() as events:
        found = function(*args, **kwargs)
    assert compilations(events) == 0
    expected = compiled(*args, **kwargs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)
    types = lambda tree: jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)
    assert types(found) == types(expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.by_default("rows=1", "stream", "microbatches", "again")
def test_a_step(way):
    losses_fn, method, keywords, given = WAYS[way]
    params = PAIR if losses_fn is TWO else PARAMS
    batch = OWN_BATCHES if "task_axis" in keywords else BATCH
    grad_fn = mtl.value_and_grad(losses_fn, method, **keywords)
    compiled = jax.jit(grad_fn)
    (_, state, *_), _ = compiled(params, jax.jit(grad_fn.init)(params, batch), batch)
    assert_second_call_compiles_nothing(grad_fn, compiled, params, state, batch, **given)


def wide(params, scale):
    """More parameters than a CPU multiplies at a time."""
    return scale * jnp.stack([jnp.sum(params**2), jnp.sum(jnp.sin(params))])


@pytest.mark.parametrize("rows", ["vmap", 1, 2, "two_pass"])
@pytest.mark.by_default("1", "two_pass")
def test_jacobian_and_gramian(rows):
    params = jax.device_put(np.linspace(-1, 2, 3 * gramian._CHUNK, dtype=np.float32))  # of which nothing cancels
    calls = [(mtl.value_and_gramian(wide, rows=rows), params, 2.0)]
    if rows != "two_pass":
        calls.append((mtl.value_and_jac(rectified, rows=rows), PARAMS, BATCH))
        calls.append((mtl.value_and_jac(squared_error, rows=rows, task_axis=0), PARAMS, OWN_BATCHES))
    for function, *args in calls:
        assert_second_call_compiles_nothing(function, jax.jit(function), *args)


def test_losses_may_look_at_numbers():
    """As with :func:`jax.value_and_grad` outside of ``jit``: also in a loop over rows."""

    def losses_fn(params, batch):
        x, _ = batch
        return squared_errors(params, batch) * (2.0 if jnp.sum(x) > 0 else 3.0)

    factor = 2.0 if np.sum(np.asarray(BATCH[0])) > 0 else 3.0
    expected = factor * np.asarray(jax.jit(squared_errors)(PARAMS, BATCH))
    for method in upgrad, aggregation.m_config():
        grad_fn = mtl.value_and_grad(losses_fn, method, rows=None if method.gramian_weighting is None else 1)
        (losses, _), _ = grad_fn(PARAMS, grad_fn.init(PARAMS, BATCH), BATCH)
        np.testing.assert_allclose(losses, expected, rtol=1e-6)


@pytest.mark.parametrize("way", ["rows=1", "stream", "microbatches"])
def test_inside_of_a_transformation_a_loop_is_one_operation(way):
    losses_fn, method, keywords, _ = WAYS[way]
    grad_fn = mtl.value_and_grad(losses_fn, method, **keywords)
    state = jax.eval_shape(grad_fn.init, PARAMS, BATCH)
    text = str(jax.make_jaxpr(grad_fn)(PARAMS, state, BATCH))
    assert " scan[" in text
