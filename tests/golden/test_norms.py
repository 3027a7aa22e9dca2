"""Methods by gradients' lengths and main tasks against the official codes, held as data: none of them is needed here.

``official_norms.json`` was recorded by ``record_norms.py``. In float64 a difference is one of method: the records have
nine digits, which leaves what the codes add to avoid a division by zero, and we do not.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation
from tests.golden.comparisons import ROUNDING

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("official_norms.json").read_text())
ROWS = np.array(RECORDED["rows"], np.float32)
DIGITS = 1e-8  # of records rounded to nine digits, in sums of a few terms
MAIN, NEAR, FAR = 0, 1, 2


@pytest.fixture(params=["float32", "float64"], autouse=True)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def run(method, rows=ROWS, state=None, values=None):
    """The gradients of all calls in a row; losses are named where there are ``values``."""
    state = method.init((rows.shape[1], rows[0, 0])) if state is None else state

    def call(state, rows):
        gradient, state = method.apply(state, rows, values=values)
        return state, gradient

    return jax.jit(lambda state, rows: jax.lax.scan(call, state, rows)[1])(state, rows)


def check(found, case, dtype, added=0.0):
    """Of every call, relative to its largest entry."""
    expected = np.array(case["gradients"])
    largest = np.max(np.abs(expected), axis=(1, 2), keepdims=True)
    assert found.dtype == dtype
    error = np.max(np.abs(np.asarray(found, float) - expected) / largest)
    # Rounding: averages of positive numbers, and few sums; what a difference cancels is a tenth of its terms or more.
    assert error <= (10 * ROUNDING if dtype == jnp.float32 else DIGITS) + added, error


def inputs(dtype):
    return ROWS.astype(dtype)


@pytest.mark.parametrize("case", RECORDED["encodec"])
def test_encodec(case, dtype):
    """Its balancer, by example as it is by default, and whole as in the paper."""
    shares, settings = np.array(case["shares"]), {name: case[name] for name in ("total", "decay", "per_example")}
    check(run(aggregation.gradient_shares(shares, **settings), inputs(dtype)), case, dtype)


@pytest.mark.parametrize("case", RECORDED["metabalance"])
def test_metabalance(case, dtype):
    """An aggregator for each tensor; and its averages start at 0, which cancels."""
    labels = {"a": "a", "b": "b"}
    method = mtl.aggregate(aggregation.match_norm(relax=case["relax"], decay=case["decay"]), n_tasks=3)
    by_tensor = optax.partition({"a": method, "b": method}, labels)
    split = lambda rows, axis: {"a": jnp.take(rows, 0, axis), "b": jnp.take(rows, np.arange(1, 4), axis)}
    params = inputs(dtype)[0, 0]
    params = {"a": params[0], "b": params[1:]}

    def call(state, rows):
        update, state = by_tensor.update(split(rows, 1), state, params)
        return state, jnp.concatenate([update["a"][None], update["b"]])

    gradients = jax.jit(lambda rows: jax.lax.scan(call, by_tensor.init(params), rows)[1])(inputs(dtype))
    check(gradients, case, dtype)


@pytest.mark.parametrize("case", RECORDED["vqgan"])
def test_vqgan(case, dtype):
    """Its whole loss: the start step, the weight of the discriminator, and the codebook's loss beside them."""
    start, weight = case["start"], case["weight"]
    adaptive = aggregation.match_norm("main", relax=1.0, decay=0.0, clip=1e4, eps=1e-4)
    from_start = lambda step: {"main": 1.0, "near": jnp.where(step < start, 0.0, weight), "far": 1.0}
    method = mtl.regularize(mtl.prioritize(adaptive, from_start), {"far": case["codebook"]})
    names = {"main": MAIN, "near": NEAR, "far": FAR}
    rows = inputs(dtype)[:, [names[name] for name in sorted(names)]]
    check(run(method, rows, values={name: jnp.ones((), dtype) for name in names}), case, dtype)


def test_vqgans_clamp(dtype):
    """Beyond 1e4; with the constant that it adds to the length."""
    method = aggregation.match_norm(relax=1.0, decay=0.0, clip=1e4, eps=1e-4)
    rows = jnp.array([[3.0, 4.0], [1e-6, 0.0]], dtype)
    weights, _ = method.weighting.apply(method.init((2, 2)), rows)
    np.testing.assert_allclose(weights, [1, 1e4])
    weights, _ = method.weighting.apply(method.init((2, 2)), rows.at[1, 0].set(1e-2))
    np.testing.assert_allclose(weights, [1, 5 / (1e-2 + 1e-4)], rtol=ROUNDING)


@pytest.mark.parametrize("case", RECORDED["bloop"])
def test_bloop(case, dtype):
    """Of two auxiliary gradients, their sum. It adds 1e-7 to the average's squared length."""
    method, rows = aggregation.bloop(lambda_=case["lambda"], decay=1 - case["ema"]), inputs(dtype)
    state = method.init((3, rows[0, 0]))
    if case["init"] == "grad":
        state = state._replace(average=rows[0, 0])
    from_zero = case["init"] == "zeros"
    added = 1e-7 / (case["ema"] * np.linalg.norm(rows[0, 0])) ** 2 if from_zero else 0.0  # in the first average
    check(run(method, rows, state), case, dtype, added)


def test_cosine_gate(dtype):
    rows = inputs(dtype)
    check(run(aggregation.cosine_gate(), rows), RECORDED["cosine_gate"], dtype)
    method = aggregation.cosine_gate(weighted=True)
    weigh = lambda rows: method.weighting.apply(method.init((3, rows[0])), rows)[0]
    weights = jax.jit(jax.vmap(weigh))(rows)
    flat = ROWS.astype(float).reshape(len(rows), 3, -1)
    cosines = np.einsum("tn,tmn->tm", flat[:, MAIN], flat) / np.linalg.norm(flat, axis=2)
    cosines /= np.linalg.norm(flat[:, MAIN], axis=1)[:, None]
    np.testing.assert_allclose(weights, np.maximum(cosines, 0), atol=3 * ROUNDING)
    closed = np.mean(np.asarray(weights)[:, 1:] == 0)
    assert 0.2 < closed < 0.8  # the gate is open at times, and at times it is not
