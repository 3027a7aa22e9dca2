"""The flat dict that is logged: its numbers, its keys at every step, where it goes, and what it refuses."""

import collections
import json
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, diagnostics
from tests.pages import block_below

pytestmark = pytest.mark.unoptimized

LOSSES = {"right": np.float32(3.0), "left": np.float32(0.5)}
WEIGHTS = {"left": np.float32(4.0), "right": np.float32(1.0)}
ones = partial(np.ones, dtype=np.float32)
ROWS = np.float32([[1.0, 0.0], [-3.0, -4.0]])  # of norms 1 and 5, and cosine -0.6
EXPECTED = {
    "present/left": 1,
    "present/right": 1,
    "loss/left": 0.5,
    "loss/right": 3,
    "weight/left": 4,
    "weight/right": 1,
    "norm/left": 1,
    "norm/right": 5,
    "cosine/left/right": -0.6,
    "conflict/left/right": 1,
    "alignment": -0.6,
}


def test_numbers_made_by_hand():

    @jax.jit
    def logs(rows):
        of_jacobian = mtl.report(LOSSES, WEIGHTS, jacobian=rows)
        of_gramian = mtl.report(LOSSES, WEIGHTS, gramian=rows @ rows.T)
        assert list(of_jacobian) == list(of_gramian) == list(EXPECTED)  # here, as `jit` sorts them
        return list(of_jacobian.values()), list(of_gramian.values())

    for numbers in logs(ROWS):
        np.testing.assert_allclose(numbers, list(EXPECTED.values()), rtol=1e-6)
        assert {(x.shape, x.dtype.name) for x in numbers} == {((), "float32")}


def test_whatever_is_at_hand():
    keys = lambda **given: jax.eval_shape(partial(mtl.report, **given)).keys()
    assert keys(losses=LOSSES) == {"present/left", "present/right", "loss/left", "loss/right"}
    assert "weight/left" in keys(weights=WEIGHTS) and "norm/1" in keys(jacobian=ROWS)
    assert list(mtl.report(ones(2), prefix="train/"))[-1] == "train/loss/1"
    nested = {"pose": [ones(2), np.float32(1.0)], "depth": np.float32(1.0)}
    names = ["depth", "pose.0.0", "pose.0.1", "pose.1"]
    assert [key for key in mtl.report(nested) if "loss" in key] == [f"loss/{name}" for name in names]
    changes = jax.jit(diagnostics.directional_derivatives)(ROWS, np.float32([-0.5, 0.0]), LOSSES)
    log = jax.jit(mtl.report)(LOSSES, change=changes, right={"left": 3, "right": False})
    assert (log["change/left"], log["change/right"], log["right/left"], log["right/right"]) == (-0.5, 1.5, 3, 0)


def test_names_count_and_not_their_order():
    Named = collections.namedtuple("Named", "right left")
    log = mtl.report(Named(3.0, 0.5), WEIGHTS)
    assert (log["loss/left"], log["weight/left"], log["loss/right"], log["weight/right"]) == (0.5, 4, 3, 1)


def test_an_absent_task_has_zeros_and_the_same_keys():
    """Whatever stands in its place."""
    report, nan = jax.jit(mtl.report), np.float32(np.nan)
    counted = {"left": mtl.Counted(nan, np.int32(0)), "right": mtl.Counted(np.float32(6.0), np.int32(2))}
    by_count = report(counted, {**WEIGHTS, "left": nan}, jacobian=ROWS * np.float32([[np.nan], [1.0]]))
    mask = {"left": np.array(False), "right": np.array(True)}
    by_mask = report({**LOSSES, "left": nan}, {**WEIGHTS, "left": nan}, gramian=ROWS @ ROWS.T, mask=mask)
    expected = dict.fromkeys(EXPECTED, 0.0) | {"present/right": 1, "loss/right": 3, "weight/right": 1, "norm/right": 5}
    for log in jax.device_get((by_count, by_mask)):
        assert log == expected | {"alignment": 1}
    none = report(LOSSES, WEIGHTS, jacobian=ROWS, mask=np.zeros(2, bool))
    assert jax.device_get(none) == dict.fromkeys(EXPECTED, 0.0)


def test_the_output_of_a_scan_with_absent_tasks_and_steps_without_new_weights():
    """One dict of curves; and what ``json.dumps`` and ``device_get`` make of it and of one step's."""
    task_losses = lambda params: {"left": jnp.sum((params - 1) ** 2), "right": 3 * jnp.sum((params + 1) ** 2)}
    grad_fn = mtl.value_and_grad(task_losses, mtl.amortize(aggregation.upgrad()), return_weights=True)

    def step(carry, given):
        (params, state), (refresh, mask) = carry, given
        (losses, state, weights), grads = grad_fn(params, state, refresh=refresh, mask=mask)
        _, gramian = mtl.value_and_gramian(task_losses)(params)
        params = optax.apply_updates(params, -0.01 * grads)
        return (params, state), mtl.report(losses, weights, gramian=gramian, mask=mask)

    params = np.float32([0.1, -0.2])
    given = np.array([True, False, True]), np.array([[True, True], [True, True], [True, False]])
    run = jax.jit(lambda params, given: jax.lax.scan(step, (params, grad_fn.init(params)), given)[1])
    log = run(params, given)
    assert log.keys() == EXPECTED.keys() and {x.shape for x in log.values()} == {(3,)}
    weights = np.asarray(log["weight/left"])
    assert weights[0] == weights[1] > 0
    np.testing.assert_array_equal(log["present/right"], [1, 1, 0])
    assert json.loads(json.dumps(jax.device_get(log), default=lambda x: x.tolist()))["present/right"] == [1, 1, 0]
    assert json.loads(json.dumps(mtl.report(LOSSES), default=float))["loss/left"] == 0.5


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: mtl.report(LOSSES, {"left": 1.0}), r"weights: .*\['left', 'right'\], found \['left'\]"),
        (lambda: mtl.report(LOSSES, {"left": 1.0, "rihgt": 1.0}), r"weights: .*\['left', 'right'\], found .*rihgt"),
        (lambda: mtl.report(LOSSES, ones(2)), r"weights: .*\['left', 'right'\], found 2 numbers without names"),
        (lambda: mtl.report(ones(2), ones(3)), r"weights: .*\['0', '1'\], found 3 numbers"),
        (lambda: mtl.report(LOSSES, change={"a": 1.0, "b": 1.0}), r"change: .*\['left', 'right'\]"),
        (lambda: mtl.report(LOSSES, mask={"left": True}), "mask: .*'left'.*'right'"),
        (lambda: mtl.report(LOSSES, jacobian=ones((3, 2))), r"jacobian: .*\['left', 'right'\], found 3 rows"),
        (lambda: mtl.report(LOSSES, gramian=ones((3, 3))), r"gramian: .*\['left', 'right'\], found 3 rows"),
        (lambda: mtl.report(LOSSES, jacobian=ROWS, gramian=ROWS), "gramian: expected either"),
        (lambda: mtl.report(LOSSES, weight=WEIGHTS), "weight: .*'weights'"),
        (lambda: mtl.report({"a": {"b": 1.0}, "a.b": 2.0}), "losses: .*'present/a.b' twice"),
        (lambda: mtl.report(), "report: expected losses"),
        (lambda: mtl.report({"left": "1"}), "losses"),
    ],
)
def test_what_is_refused_names_the_tasks(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call()


def test_the_guides_step_with_a_writer_is_ten_lines_more(monkeypatch):
    """At most, the changed ones counted; and it runs, but for the writer, which is no dependency."""
    old, new, n_added = "", "", 0
    program = block_below("guides/training_steps.md", "One training step for every method")
    for hunk in block_below("guides/logging.md", "TensorBoard and W&B", "diff").split("@@\n"):
        lines = [(line[:1], line[1:]) for line in hunk.splitlines()]
        old, new = ("".join(f"{line}\n" for sign, line in lines if sign != skipped) for skipped in "+-")
        n_added += sum(sign == "+" for sign, _ in lines)
        assert program.count(old) == 1, hunk
        program = program.replace(old, new)
    assert n_added <= 10

    written = []
    writer = types.SimpleNamespace(add_scalar=lambda key, value, i: written.append((key, float(value), i)))
    module = types.SimpleNamespace(SummaryWriter=lambda folder: writer)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    exec(compile(program, "logging.md", "exec"), {"__name__": "__main__"})
    keys = {f"{word}/{task}" for word in ("present", "loss", "weight") for task in ("pressure", "velocity")}
    assert {key for key, *_ in written} == keys and len(written) == 30 * len(keys)
    assert sorted({i for *_, i in written}) == list(range(30))
