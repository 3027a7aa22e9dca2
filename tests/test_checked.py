"""``mtl.checked`` says which task's loss or gradient is not finite, on every path, and changes no number."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.catalogue import following

pytestmark = pytest.mark.unoptimized

ROWS = np.array([[1.0, 2.0], [np.inf, 1.0], [np.nan, np.nan]], np.float32)
WITHOUT_SECOND, FIRST_ALONE = np.array([True, False, True]), np.array([True, False, False])


def failure(function, *args, **kwargs):
    """What the first check that fails says; ``None`` where none does."""
    message = in_one_program(function)(*args, **kwargs)[0].get()
    return message and message.partition(" (`check`")[0]


@functools.cache
def in_one_program(function):
    return jax.jit(checkify.checkify(function))


def test_a_loss_goes_by_its_name_or_its_index():
    method = mtl.checked(scalarization.dwa())
    losses = {"cls": np.nan, "{box}": 1.0, "pose": np.array([1.0, np.inf], np.float32)}
    apply = lambda losses, **kwargs: failure(method.apply, method.init(losses), losses, **kwargs)
    assert apply(losses) == "loss 'cls' (task 0): expected a finite number, found nan"
    assert apply(losses | {"cls": 1.0}) == "loss 'pose.1' (task 2): expected a finite number, found inf"
    finite = losses | {"cls": 1.0, "pose": np.ones(2, np.float32)}
    assert apply(finite | {"{box}": -np.inf}) == "loss '{box}' (task 3): expected a finite number, found -inf"
    assert apply(finite) is None
    assert apply(np.array([1.0, np.nan, np.inf], np.float32)) == "loss of task 1: expected a finite number, found nan"
    assert apply(np.array([1.0, np.nan, np.inf], np.float32), mask=WITHOUT_SECOND).startswith("loss of task 2")
    assert apply(np.array([1.0, np.nan, np.inf], np.float32), mask=FIRST_ALONE) is None


@pytest.mark.parametrize("path", ["apply", "weighting", "gramian_weighting", "rowwise"])
def test_a_gradient_goes_by_its_name_or_its_index_on_every_path(path):
    method = mtl.checked(aggregation.db_mtl())
    state = method.init((3, 2))

    def call(given, **kwargs):
        if path == "gramian_weighting":
            return method.gramian_weighting.apply(state, given @ given.T, **kwargs)
        if path != "rowwise":
            return (method.apply if path == "apply" else method.weighting.apply)(state, given, **kwargs)
        visit = lambda state, ix: method.rowwise.visit(state, *ix, **kwargs)
        after, statistics = jax.lax.scan(visit, state, (jnp.arange(3), given))
        return method.rowwise.weigh(after, statistics, **kwargs)

    values = {"box": 1.0, "cls": 2.0, "pose": 3.0}
    assert re.match(r"(squared length of the )?gradient of loss of task 1: .*found (1|inf)", failure(call, ROWS))
    assert "gradient of loss 'cls' (task 1)" in failure(call, ROWS, values=values)
    assert "gradient of loss 'pose' (task 2)" in failure(call, ROWS, values=values, mask=WITHOUT_SECOND)
    assert failure(call, ROWS, values=values, mask=FIRST_ALONE) is None
    assert failure(call, ROWS, values=values | {"box": np.nan}).startswith("loss 'box' (task 0)")


def test_what_comes_out_is_checked():
    """Of finite numbers: the scalar of a negative loss, weights of rows too long to be squared, what is learned."""
    famo, mean = mtl.checked(scalarization.famo()), mtl.checked(aggregation.excess_mtl())
    assert failure(famo.apply, famo.init(2), np.array([-1.0, 1.0], np.float32)) == (
        "scalar: expected finite numbers, found 1 of 1 that are not"
    )
    rows, state = np.full((2, 3), 1e25, np.float32), mean.init((2, 3))
    assert failure(mean.weighting.apply, state, rows) == "weight of loss of task 0: expected a finite number, found nan"
    assert failure(mean.apply, state, rows) == "gradient: expected finite numbers, found 3 of 3 that are not"
    follow, large = mtl.checked(following(rate=1e38)), np.full(2, 1e10, np.float32)
    state = follow.init(2)
    assert (
        failure(follow.observe, state, large) == "new state.level: expected finite numbers, found 2 of 2 that are not"
    )
    # What was infinite before is so by design, as the best value so far of a line search, or has been told.
    infinite = state._replace(level=np.array([np.inf, 1.0], np.float32))
    assert failure(follow.observe, infinite, np.ones(2, np.float32)) is None
    assert failure(follow.end_epoch, state) is None
    assert failure(famo.observe, famo.init(2), np.array([1.0, np.nan], np.float32)).startswith("loss of task 1")


def losses_fn(params, scale):
    """The second loss is finite, and its gradient is not where ``scale`` is zero."""
    return {"cls": jnp.sum(params**2), "box": jnp.sum((params - 1) ** 2) + jnp.sqrt(scale * jnp.sum(params))}


@pytest.mark.parametrize("make", [lambda: mtl.learn(scalarization.uw(), optax.sgd(0.1)), aggregation.mgda])
def test_a_step_is_what_it_is_unchecked_and_its_gradient_is_checked(make):
    params, method = np.array([0.5, 2.0], np.float32), make()
    plain, checked = (mtl.value_and_grad(losses_fn, m) for m in (method, mtl.checked(method)))
    state = checked.init(params, 1.0)
    chex.assert_trees_all_equal(state, plain.init(params, 1.0))
    step = jax.jit(checkify.checkify(checked))
    error, output = step(params, state, 1.0)
    assert error.get() is None
    chex.assert_trees_all_close(output, jax.jit(plain)(params, state, 1.0), rtol=1e-6)
    message = step(params, state, 0.0)[0].get()
    assert message.startswith("gradient of " + ("the step" if isinstance(method, mtl.Scalarizer) else "loss 'box'"))


def test_without_checkify_jax_says_so_and_others_than_methods_are_refused():
    method = mtl.checked(scalarization.mean())
    with pytest.raises(ValueError, match="was not functionalized"):
        method.apply(method.init(2), np.ones(2, np.float32))
    with pytest.raises(TypeError, match=r"method: expected a Scalarizer or an Aggregator, found .*mean\(\)"):
        mtl.checked(scalarization.mean)


def test_a_sweep_is_one_model_after_the_other():
    """UPGrad's own loop, one problem for each task, is one that ``checkify`` takes."""
    method = mtl.checked(aggregation.upgrad())
    rows = np.stack([np.eye(3, dtype=np.float32)] * 2)
    rows[1, 2, 0] = np.nan
    sweep = lambda rows: jax.lax.map(lambda x: method.apply(method.init((3, 3)), x), rows)
    assert failure(sweep, rows) == "gradient of loss of task 2: expected finite numbers, found 1 that are not"
    assert failure(sweep, rows[:1]) is None
