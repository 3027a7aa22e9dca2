"""Shares of the gradient's length, lengths matched to one task's, and a main task with auxiliary ones.

Their values over many calls are in tests/golden.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation
from tests.aggregation.problems import with_new

pytestmark = pytest.mark.unoptimized

SHARES = {"adv": 3.0, "feat": 3.0, "mel": 1.0, "time": 0.1}
ROWS = np.random.default_rng(0).normal(size=(12, 4, 6)).astype(np.float32) * np.array(
    [[[1.0], [100.0], [0.01], [3.0]]], np.float32
)
LOSSES = dict.fromkeys(SHARES, np.float32(1.0))
CALL = {"values": LOSSES}
PARAMS = {"w": np.ones((8, 3), np.float32), "b": np.ones(3, np.float32)}


def after(method, n_calls, **given):
    """The state after some calls."""
    state = method.init((4, 6))
    for rows in ROWS[:n_calls]:
        _, state = method.apply(state, rows, **given)
    return state


# Gradient shares.


def test_each_task_has_its_share_once_the_averages_have_converged():
    """To 1%, in the mean over calls, of gradients whose lengths vary by a factor of e, and differ by 10,000."""
    method, rng = aggregation.gradient_shares(SHARES, total=2.0), np.random.default_rng(0)
    lengths = np.exp(0.5 * rng.normal(size=(20_000, 4))) * np.array([1.0, 100.0, 0.01, 3.0])
    squares = np.float32(lengths**2)

    def call(state, squares):
        weights, state = method.gramian_weighting.apply(state, jnp.diag(squares), **CALL)
        return state, weights

    weights = jax.jit(lambda: jax.lax.scan(call, method.init((4, 6)), squares)[1])()
    found = np.mean(np.asarray(weights)[5_000:] * lengths[5_000:], axis=0)
    np.testing.assert_allclose(found, 2.0 * np.array([3.0, 3.0, 1.0, 0.1]) / 7.1, rtol=0.01)


def test_a_batch_without_a_task_leaves_its_average_and_its_share_to_the_others():
    method = aggregation.gradient_shares(SHARES, total=2.0)
    before, mask = after(method, 5, **CALL), {"adv": True, "feat": True, "mel": False, "time": True}
    weights, state = method.weighting.apply(before, with_new(ROWS[5], 2, np.nan), **CALL, mask=mask)
    weights, state, before = jax.device_get((weights, state, before))
    assert state.norms[2] == before.norms[2]
    assert state.seen[2] == before.seen[2]
    assert np.all(np.delete(state.norms != before.norms, 2))
    np.testing.assert_allclose(weights * state.norms, 2.0 * np.array([3.0, 3.0, 0.0, 0.1]) / 6.1, rtol=1e-5)


def test_a_task_without_a_share_or_a_gradient_has_none():
    method = aggregation.gradient_shares(np.array([0.0, 1.0, 1.0]))
    rows = np.float32([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    gradient, _ = method.apply(method.init((3, 2)), rows)
    np.testing.assert_allclose(gradient, [0.3, 0.4], rtol=1e-6)  # the zero gradient keeps its half
    alone, _ = method.apply(method.init((3, 2)), rows, mask=np.array([True, False, False]))
    np.testing.assert_array_equal(alone, 0)


TRUNK = lambda params, x: jnp.tanh(x @ params)
HEADS = {
    name: lambda params, features, x, scale=scale: jnp.mean(scale * (features @ params - 1) ** 2)
    for name, scale in zip(SHARES, (1.0, 100.0, 0.01, 3.0), strict=True)
}


def trunk_and_heads():
    rng = np.random.default_rng(1)
    x, trunk = (np.float32(rng.normal(size=shape)) for shape in ((8, 5), (5, 3)))
    return (trunk, {name: np.float32(rng.normal(size=3)) for name in HEADS}), x


@pytest.mark.parametrize("per_example", [True, False])
def test_at_the_features_it_is_the_balancer(per_example):
    """One gradient of the features, pulled back through the trunk; the heads have their own."""
    params, x = trunk_and_heads()
    method = aggregation.gradient_shares(SHARES, per_example=per_example)
    grad_fn = mtl.value_and_grad((TRUNK, HEADS), method, at="features")
    _, grads = jax.jit(grad_fn)(params, grad_fn.init(params, x), x)

    @jax.jit
    def of_trunk(params, x):
        features, pull = jax.vjp(lambda trunk: TRUNK(trunk, x), params[0])
        added = 0
        for name, head in HEADS.items():
            gradient = jax.grad(lambda features, head=head, name=name: head(params[1][name], features, x))(features)
            norm = jnp.mean(jnp.linalg.norm(gradient, axis=1)) if per_example else jnp.linalg.norm(gradient)
            added += SHARES[name] / 7.1 * gradient / norm
        return pull(added)[0]

    chex.assert_trees_all_close(grads[0], of_trunk(params, x), rtol=1e-4)


def test_decided_on_the_last_layer():
    """The shares are those of its gradients, and the weights those of all parameters."""
    rng = np.random.default_rng(2)
    x, first, last = (np.float32(rng.normal(size=shape)) for shape in ((8, 5), (5, 4), (4, 3)))
    params, method = {"first": first, "last": last}, aggregation.gradient_shares({"large": 1.0, "small": 3.0})

    def losses_fn(params, x):
        out = jnp.tanh(x @ params["first"]) @ params["last"]
        return {"large": 100 * jnp.mean(jnp.abs(out - 1)), "small": jnp.mean(out**2)}

    decides = {"first": False, "last": True}
    grad_fn = mtl.value_and_grad(losses_fn, method, decide_on=decides, return_weights=True)

    @jax.jit
    def found(params, x):
        return grad_fn(params, grad_fn.init(params, x), x), mtl.value_and_jac(losses_fn)(params, x)

    ((_, _, weights), grads), (_, jacobian) = jax.device_get(found(params, x))
    weights = np.array([weights["large"], weights["small"]])
    lengths = np.linalg.norm(jacobian["last"].reshape(2, -1), axis=1)
    np.testing.assert_allclose(weights * lengths, [0.25, 0.75], rtol=1e-4)
    expected = np.tensordot(weights, jacobian["first"], 1)
    np.testing.assert_allclose(grads["first"], expected, rtol=1e-4, atol=1e-6)


def test_by_example_with_the_batch_on_eight_devices():
    """A mean over all examples, under ``shard_map`` too; features may be a tree."""
    rng, specs = np.random.default_rng(3), {"a": PartitionSpec(None, "x"), "b": PartitionSpec(None, "x")}
    rows = {"a": np.float32(rng.normal(size=(2, 16, 3))), "b": np.float32(rng.normal(size=(2, 16)))}
    make = partial(aggregation.gradient_shares, np.array([1.0, 2.0]), per_example=True)
    one = make()
    state = one.init((2, jax.tree.map(lambda x: x[0], rows)))
    expected, _ = one.weighting.apply(state, rows)
    norms = np.sqrt(np.sum(np.square(rows["a"], dtype=float), axis=2) + np.square(rows["b"], dtype=float))
    np.testing.assert_allclose(expected, np.array([1, 2]) / 3 / np.mean(norms, axis=1), rtol=1e-5)

    weigh = lambda rows: make(axis_name="x").weighting.apply(state, rows)[0]
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
    found = jax.jit(jax.shard_map(weigh, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec()))(rows)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Match norm.


def test_where_the_reference_is_absent_its_length_is_what_it_was():
    method, absent = aggregation.match_norm(1, relax=0.5, decay=0.5), np.array([True, False, True, True])
    first, _ = method.weighting.apply(method.init((4, 6)), ROWS[0], mask=absent)
    np.testing.assert_array_equal(first, absent)  # never seen: nothing to match
    before = after(method, 5)
    weights, state = method.weighting.apply(before, ROWS[5], mask=absent)
    before, state = jax.device_get((before, state))
    assert state.norms[1] == before.norms[1]
    lengths = 0.5 * np.linalg.norm(ROWS[5], axis=1) / (1 - 0.5**6)  # 5 of 6 calls before, without their bias
    norms = np.where(absent, lengths + before.norms * (1 - 0.5 / (1 - 0.5**6)), before.norms)
    np.testing.assert_allclose(state.norms, norms, rtol=1e-5)
    np.testing.assert_allclose(weights, np.where(absent, 0.5 + 0.5 * norms[1] / norms, 0), rtol=1e-5)


@pytest.mark.parametrize(("relax", "clip"), [(0.0, np.inf), (1.0, np.inf), (1.0, 1.0)])
def test_from_the_sum_to_equal_lengths(relax, clip):
    """A clip at 1 shortens only."""
    method = aggregation.match_norm(3, relax, decay=0.0, clip=clip)
    weights, _ = method.weighting.apply(method.init((4, 6)), ROWS[0])
    lengths = np.linalg.norm(ROWS[0], axis=1)
    expected = np.minimum(lengths[3] / lengths, clip) if relax else np.ones(4)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


# Bloop.


def transcript(rows, masks, lambda_, decay):
    average = np.zeros(rows.shape[2])
    for call, mask in zip(rows.astype(float), masks, strict=True):
        main, auxiliary = mask[0] * call[0], mask[1:] @ call[1:]
        average = decay * average + (1 - decay) * main if mask[0] else average
        square = average @ average
        yield main + lambda_ * (auxiliary - (auxiliary @ average / square if square else 0) * average)


def test_bloop_with_absent_tasks():
    """Before the main task is seen the others are as they are; where it is absent its average is as it was."""
    masks = np.random.default_rng(0).random((12, 4)) < 0.6
    masks[:2, 0], masks[5] = False, True
    method = aggregation.bloop(lambda_=0.3, decay=0.8)
    call = lambda state, inputs: method.apply(state, inputs[0], mask=inputs[1])[::-1]
    found = jax.jit(lambda: jax.lax.scan(call, method.init((4, 6)), (ROWS, masks))[1])()
    expected = np.array(list(transcript(ROWS, masks, 0.3, 0.8)))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.max(np.abs(expected)))


def test_bloop_keeps_one_vector():
    """Whatever the number of tasks."""
    state = jax.eval_shape(lambda: aggregation.bloop().init((40, PARAMS)))
    assert jax.tree.map(np.shape, state.average) == {"w": (8, 3), "b": (3,)}


def test_bloop_refuses_the_average_of_other_parameters():
    method = aggregation.bloop()
    with pytest.raises(ValueError, match=r"jacobian: expected shape \(4, 1\), found shape \(4, 6\)"):
        method.apply(method.init((4, 1)), ROWS[0])


def test_a_main_gradient_that_is_not_finite_is_kept_out_of_the_average():
    method = mtl.skip_nonfinite(aggregation.bloop())
    before = after(method, 3)
    gradient, state = method.apply(before, with_new(ROWS[3], (0, 2), np.nan))
    assert np.all(np.isnan(gradient))
    chex.assert_trees_all_equal(state.inner, before.inner)


def test_bloops_average_is_carried_over_under_a_wrapper_too():
    for method in aggregation.bloop(), mtl.skip_nonfinite(aggregation.bloop()):
        state = method.init((2, PARAMS))
        state = jax.tree.map(lambda x: x + x.dtype.type(1), jax.device_get(state))
        new = mtl.carry_over(method, state, ["a", "b"], ["a", "b", "c"])
        old, new = (getattr(x, "inner", x) for x in (state, new))
        chex.assert_trees_all_equal(new.average, old.average)
        np.testing.assert_array_equal(new.seen, [1, 1, 0])


def test_bloop_takes_bfloat16_gradients_without_a_rounding_of_its_own():
    rows = ROWS.astype(jnp.bfloat16)
    method = aggregation.bloop(lambda_=1.0, decay=0.5)
    _, exact = method.apply(method.init((4, 6)), rows[0].astype(np.float32))
    found, state = method.apply(method.init((4, 6)), rows[0])
    chex.assert_trees_all_equal(state, exact)
    assert found.dtype == jnp.bfloat16


# The cosine gate.


@pytest.mark.parametrize("weighted", [False, True])
def test_a_gate_without_a_main_gradient_is_closed(weighted):
    method, rows = aggregation.cosine_gate(1, weighted=weighted), np.float32([[1.0, 2.0], [1.0, 0.0]])
    weights, _ = method.weighting.apply(method.init((2, 2)), rows)
    np.testing.assert_allclose(weights, [1 / np.sqrt(5) if weighted else 1, 1], rtol=1e-6)
    for zeroed, mask in ((with_new(rows, 1, 0), None), (rows, np.array([True, False]))):
        gradient, _ = method.apply(method.init((2, 2)), zeroed, mask=mask)
        np.testing.assert_array_equal(gradient, 0)


# Names and errors.


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (aggregation.match_norm, "reference"),
        (aggregation.bloop, "main"),
        (aggregation.cosine_gate, "main"),
    ],
    ids=["match_norm", "bloop", "cosine_gate"],
)
def test_the_task_goes_by_its_name(make, argument):
    by_name, by_index = make("mel"), make(2)
    apply = lambda method, values: method.apply(method.init((4, 6)), ROWS[0], values=values)[0]
    np.testing.assert_array_equal(apply(by_name, LOSSES), apply(by_index, None))
    with pytest.raises(ValueError, match=rf"{argument}: expected one of the losses' names .* found the index 2"):
        apply(by_index, LOSSES)
    with pytest.raises(ValueError, match=rf"{argument}: expected one of the losses' names .* found 'l1'"):
        apply(make("l1"), LOSSES)
    with pytest.raises(ValueError, match=f"{argument}: expected a name, or an int of at least 0 below"):
        make(4).init((4, 6))
    with pytest.raises(TypeError, match=f"{argument}: expected the name or the index of a task"):
        make(0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregation.gradient_shares(1.0, total=0.0), "total: expected a finite number above 0"),
        (lambda: aggregation.gradient_shares(1.0, decay=1.5), "decay: expected a number from 0 to 1"),
        (lambda: aggregation.gradient_shares(-1.0).init((3, 4)), "shares: expected a finite number of at least 0"),
        (lambda: aggregation.gradient_shares(np.ones(2)).init((3, 4)), "shares: expected a scalar or one number per"),
        (
            lambda: aggregation.gradient_shares(1.0, per_example=True).init(
                (3, {"w": np.zeros((4, 2), np.float32), "b": np.zeros(2, np.float32)})
            ),
            "params: expected with per_example features that share a first axis",
        ),
        (lambda: aggregation.match_norm(relax=1.5), "relax: expected a number from 0 to 1"),
        (lambda: aggregation.match_norm(decay=1.0), "decay: expected a number of at least 0 and below 1"),
        (lambda: aggregation.match_norm(clip=0.0), "clip: expected a number above 0"),
        (lambda: aggregation.match_norm(eps=-1.0), "eps: expected a finite number of at least 0"),
        (lambda: aggregation.bloop(lambda_=-0.1), "lambda_: expected a finite number of at least 0"),
        (lambda: aggregation.bloop(decay=1.0), "decay: expected a number of at least 0 and below 1"),
    ],
)
def test_what_is_out_of_bounds_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
