"""``nonfinite="drop_task"``: a step in which a task's loss or gradient is not finite is one of the other tasks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from mtlbalance.autodiff import decide
from tests.autodiff.models import affine, assert_close, normal_batch, normal_layers

pytestmark = pytest.mark.unoptimized

PARAMS = normal_layers(0, [5, 16, 4]), {name: np.full(4, 0.25, np.float32) for name in "abc"}
BATCH = normal_batch(1, 8, n_in=5, n_out=3)
OTHERS = {"a": np.array(True), "b": np.array(False), "c": np.array(True)}

# What is bad about the second task, of its good loss and of what that is made of.
BAD = {
    "nothing": lambda loss, z: loss,
    "the loss": lambda loss, z: loss + jax.lax.stop_gradient(jnp.nan),
    "the gradient": lambda loss, z: loss + jnp.sum(jnp.sqrt(z - z)),
    "both": lambda loss, z: loss / jnp.sum(z - z),
    "overflow": lambda loss, z: loss * jnp.exp(100 + z[0, 0]),
}


def trunk(params, x, y):
    for layer in params:
        x = jnp.tanh(affine(x, layer))
    return x


def head(i, bad, params, z, x, y):
    loss = 3.0**i * jnp.mean((z @ params - y[:, i]) ** 2)
    return BAD[bad](loss, z) if i == 1 else loss


def heads(bad):
    return {name: partial(head, i, bad) for i, name in enumerate("abc")}


def alone(i, bad, params, x, y):
    """The loss of one task that has its own data."""
    return head(i, bad, params[1]["abc"[i]], trunk(params[0], x, y), x, y)


def named(bad, params, x, y):
    z = trunk(params[0], x, y)
    return {name: one(params[1][name], z, x, y) for name, one in heads(bad).items()}


def of_named(bad, method, **options):
    return mtl.value_and_grad(partial(named, bad), method, **options), BATCH


def of_heads(bad, method, **options):
    return mtl.value_and_grad((trunk, heads(bad)), method, **options), BATCH


def of_functions(bad, method, **options):
    functions = {name: partial(alone, i, bad) for i, name in enumerate("abc")}
    return mtl.value_and_grad(functions, method, **options), [dict.fromkeys("abc", part) for part in BATCH]


FORMS = {"named": of_named, "heads": of_heads, "functions": of_functions}
METHODS = {
    "dwa": scalarization.dwa(steps_per_epoch=1),
    "geometric_mean": scalarization.geometric_mean(),
    "upgrad": aggregation.upgrad(),
    "excess_mtl": aggregation.excess_mtl(),
    "m_config": aggregation.m_config(),
    "moco": aggregation.moco(),
    "graddrop": aggregation.graddrop(key=0),
    "chain": mtl.chain(scalarization.uw_so(), aggregation.mgda()),
}


def assert_is_step_of_the_others(form, method, bad, **options):
    """Twice, as the second step looks at what the first one remembers."""
    good_fn, batch = form("nothing", method, **options)
    bad_fn, _ = form(bad, method, **options, nonfinite="drop_task")
    good_fn, bad_fn = jax.jit(good_fn), jax.jit(bad_fn)
    state = expected_state = jax.jit(bad_fn.init)(PARAMS, *batch)
    for _ in range(2):
        (_, expected_state, *_), expected = good_fn(PARAMS, expected_state, *batch, mask=OTHERS)
        (losses, state, *_), gradient = bad_fn(PARAMS, state, *batch)
        assert_close((gradient, state), (expected, expected_state))
    assert np.isfinite(losses["b"]) == (bad == "the gradient")


# Each kind of method, whatever may be bad, and each form.
CASES = [("named", method, "the gradient") for method in METHODS if method != "dwa"]
CASES += [("named", "dwa", bad) for bad in list(BAD)[1:]]
CASES += [("heads", "dwa", "the loss"), ("heads", "upgrad", "the gradient"), ("heads", "moco", "both")]
CASES += [("functions", "dwa", "overflow"), ("functions", "m_config", "the gradient"), ("functions", "upgrad", "both")]


@pytest.mark.parametrize(("form", "method", "bad"), CASES)
@pytest.mark.by_default("named-dwa-both", "heads-dwa-the loss", "functions-dwa-overflow")
def test_a_bad_task_is_as_an_absent_one(form, method, bad):
    assert_is_step_of_the_others(FORMS[form], METHODS[method], bad)


OPTIONS = {
    "micro-batches": {"microbatches": 2},
    "shared": {"shared": ([True, True], False)},
    "decide_on": {"decide_on": ([False, True], False)},
    "rows": {"rows": 1},
    "features": {"at": "features"},
}


ASKED = [("named", method, option) for method in ("dwa", "upgrad") for option in OPTIONS if option != "features"]
ASKED += [("heads", method, option) for method in ("dwa", "upgrad") for option in ("micro-batches", "features")]
ASKED += [("heads", "upgrad", "decide_on"), ("functions", "upgrad", "micro-batches"), ("functions", "dwa", "shared")]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "method", "option"), ASKED)
def test_whatever_else_is_asked_for(form, method, option):
    assert_is_step_of_the_others(FORMS[form], METHODS[method], "the gradient", **OPTIONS[option])


@pytest.mark.parametrize("method", ["dwa", "upgrad"])
@pytest.mark.slow
def test_a_task_axis(method):
    """Of which the second example is bad."""
    params, data, good = (np.array(x, np.float32) for x in ([0.5, 2], [1, 0, 3], [1, 1, 3]))
    loss = lambda params, x: jnp.sum((x * params - 1) ** 2) + jnp.sum(jnp.sqrt(jnp.where(x == 0, params - params, 1)))
    step = partial(mtl.value_and_grad, loss, METHODS[method], task_axis=0)
    state = jax.jit(step().init)(params, data)
    found = jax.jit(step(nonfinite="drop_task"))(params, state, data)
    expected = jax.jit(step())(params, state, good, mask=np.array([True, False, True]))
    assert_close((found[0][1], found[1]), (expected[0][1], expected[1]))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["geometric_mean", "excess_mtl"])
def test_nothing_bad_changes_nothing(method):
    step, batch = of_named("nothing", METHODS[method])
    dropping, _ = of_named("nothing", METHODS[method], nonfinite="drop_task")
    state = jax.jit(step.init)(PARAMS, *batch)
    assert_close(jax.jit(dropping)(PARAMS, state, *batch), jax.jit(step)(PARAMS, state, *batch))


def counts(state):
    return dict(zip("abc", (np.asarray(state.nonfinite)).tolist(), strict=True)), int(state.skipped)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.by_default("named")
def test_guards_count_whom_they_have_not_seen(form):
    """Also one inside another wrapper; and a task that is absent anyway is not counted."""
    guarded = mtl.skip_nonfinite(METHODS["excess_mtl"])
    method = mtl.chain(mtl.skip_nonfinite(scalarization.mean()), mtl.skip_zero(guarded))
    step, batch = form("the gradient", method, nonfinite="drop_task")
    state, step = jax.jit(step.init)(PARAMS, *batch), jax.jit(step)
    for mask in None, OTHERS, None:
        (_, state), gradient = step(PARAMS, state, *batch, mask=mask)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    for guard in state.scalarizer, state.aggregator.inner:
        assert counts(guard) == ({"a": 0, "b": 2, "c": 0}, 0)
    guard = jax.device_get(guard)
    log = mtl.report(nonfinite=mtl.diagnostics.by_task(guard.nonfinite, dict.fromkeys("abc", 0.0)))
    assert log["nonfinite/b"] == 2


@pytest.mark.parametrize("method", ["dwa", "upgrad"])
@pytest.mark.by_default("dwa")
def test_all_bad_is_all_absent(method):
    """Here it is the features that are not finite, and with them every task."""
    step, batch = of_named("nothing", mtl.skip_nonfinite(METHODS[method]), nonfinite="drop_task")
    state = jax.jit(step.init)(PARAMS, *batch)
    (_, new_state), gradient = jax.jit(step)(PARAMS, state, np.full((8, 5), np.nan, np.float32), batch[1])
    assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get(gradient)))
    jax.tree.map(np.testing.assert_array_equal, new_state.inner, state.inner)
    assert counts(new_state) == ({"a": 1, "b": 1, "c": 1}, 0)


@pytest.mark.slow
def test_frozen_weights():
    """Not compiled."""
    method = mtl.amortize(METHODS["upgrad"])
    step, batch = of_named("both", method, nonfinite="drop_task", return_weights=True)
    state = jax.jit(step.init)(PARAMS, *batch)
    (_, new_state, weights), gradient = step(PARAMS, state, *batch, refresh=False)
    assert_close(list(weights.values()), [1 / 3, 0.0, 1 / 3])
    loss = lambda params: sum(x / 3 for name, x in named("nothing", params, *batch).items() if name != "b")
    assert_close(gradient, jax.jit(jax.grad(loss))(PARAMS))
    jax.tree.map(np.testing.assert_array_equal, new_state, state)


@pytest.mark.parametrize("method", ["upgrad", "excess_mtl"])
def test_rows_that_are_kept_are_not_computed_again(method, monkeypatch):
    """Of a Jacobian of which others would be two passes, or streamed."""
    for name in "gramian_at", "_decide_by_visits":
        monkeypatch.setattr(decide, name, None)
    losses_fn = lambda params: {"a": jnp.sum(params), "b": jnp.sum(params**2)}
    step = mtl.value_and_grad(losses_fn, METHODS[method], nonfinite="drop_task")
    params = jax.ShapeDtypeStruct((2**20,), jnp.float32)
    (losses, _), _ = jax.eval_shape(step, params, jax.eval_shape(lambda: METHODS[method].init((2, 2**20))))
    assert losses.keys() == {"a", "b"}
    with pytest.raises(TypeError, match="not callable"):
        step = mtl.value_and_grad(losses_fn, METHODS[method])
        jax.eval_shape(step, params, jax.eval_shape(lambda: METHODS[method].init((2, 2**20))))


@pytest.mark.slow
def test_in_a_scan_and_a_sweep():
    """The second model's second task is bad."""
    step, batch = of_named("nothing", METHODS["upgrad"], nonfinite="drop_task")
    x, y = (np.stack([part, part]) for part in batch)
    y[1, :, 1] = np.nan
    state = jax.jit(step.init)(PARAMS, *batch)

    def train(x, y):
        def one(carry, _):
            (_, state), gradient = step(*carry, x, y)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, carry[0], gradient), state), None

        return jax.lax.scan(one, (PARAMS, state), length=3)[0]

    params, states = jax.jit(jax.vmap(train))(x, y)
    np.testing.assert_array_equal(states.seen, [[3, 3, 3], [3, 0, 3]])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


def test_a_model_whose_parts_are_compiled_recomputed_or_scanned():
    """What is not differentiated is not computed, through all that JAX has; its own backward passes too."""

    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, x), lambda x, g: (2 * g + 0 * x,))

    @jax.jit
    @jax.checkpoint
    def losses_fn(params):
        z, sums = jax.lax.scan(lambda z, _: (jnp.tanh(twice(z)), jnp.sum(z)), params["w"], length=2)
        root = jax.lax.cond(jnp.sum(z) > 0, lambda z: jnp.sum(jnp.sqrt(z - z)), jnp.sum, z)
        return {"good": jnp.sum(sums), "constant": jnp.array(1.0), "root": root + params["b"]}

    params = {"w": np.array([0.1, 0.2], np.float32), "b": np.float32(0.5), "seed": 3}
    step = mtl.value_and_grad(losses_fn, scalarization.sum(), nonfinite="drop_task", allow_int=True)

    (_, state), gradient = step(params, step.init(params), mask=None)  # not compiled, where an int is none of JAX's
    expected = jax.jit(jax.grad(lambda w: losses_fn(params | {"w": w})["good"]))(params["w"])
    np.testing.assert_array_equal(state.seen, [1, 1, 0])
    assert_close((gradient["w"], gradient["b"]), (expected, 0.0))
    assert gradient["seed"].dtype == jax.dtypes.float0


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda: scalarization.sum(), lambda: aggregation.upgrad(axis_name="d")])
def test_every_device_drops_what_is_bad_on_one(make):
    """Of parameters that are split the first is where a root has no slope; all others are elsewhere."""
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()

    def losses_fn(params):
        total = lambda x: jax.lax.psum(jnp.sum(x), "d")
        return {"line": total(2 * params), "root": total(jnp.sqrt(params))}

    step = mtl.value_and_grad(losses_fn, make(), nonfinite="drop_task")

    @partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=(whole, split))
    def seen_and_gradient(params):
        (_, state), gradient = step(params, step.init(params))
        return state.seen, gradient

    seen, gradient = jax.device_get(jax.jit(seen_and_gradient)(np.arange(8, dtype=np.float32)))
    np.testing.assert_array_equal(seen, [1, 0])
    assert_close(gradient, np.full(8, gradient[0]))
    assert gradient[0] > 0


@pytest.mark.parametrize("outer", [partial(scalarization.dwa, steps_per_epoch=100), aggregation.mgda])
def test_guards_of_groups_are_told_whom_they_have_not_seen(outer):
    def losses_fn(params, x):
        pde = {"a": jnp.mean((params - x) ** 2), "b": jnp.sqrt(jnp.sum(params**2))}  # whose slope at zero is NaN
        return {"pde": pde, "bc": {"c": jnp.mean(jnp.abs(params + x))}}

    guarded = mtl.skip_nonfinite(scalarization.dwa(steps_per_epoch=100))
    method = mtl.nested(mtl.skip_nonfinite(outer()), {"pde": guarded, "bc": scalarization.sum()})
    grad_fn = mtl.value_and_grad(losses_fn, mtl.checked(method), nonfinite="drop_task")
    step = lambda params, x: grad_fn(params, grad_fn.init(params, x), x)
    error, ((_, state), gradient) = jax.jit(checkify.checkify(step))(np.zeros(3, np.float32), np.ones(3, np.float32))
    error.throw()
    assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(state.inner["pde"].nonfinite, [0, 1])
    np.testing.assert_array_equal(state.outer.nonfinite, [0, 1])  # bc, pde
