"""SLAW, DoReMi, CoBa, normalised MGDA and inverse-Dirichlet weighting against the official codes, held as data.

``official_weights.json`` was recorded by ``record_official_weights.py``. Where a code departs from what we do, a test
pins its way beside ours. In float64 a difference is one of method: the records have nine digits.
"""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation, numerics, scalarization
from mtlbalance.gramian import gramian
from mtlbalance.solvers import simplex_qp
from tests.golden.test_gradients import DIGITS, SEQUENCES

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("official_weights.json").read_text())


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def given(case, *names):
    """Inputs, stored with the few digits that tell a float32 from its neighbours."""
    return [np.array(case[name], np.float32).astype(float) for name in names]


def weights_of(method, state, losses):
    return jax.grad(method.apply, argnums=1, has_aux=True)(state, losses)


# SLAW.


@pytest.mark.parametrize("case", RECORDED["slaw"], ids=lambda case: f"decay{case['decay']}")
def test_slaw(case):
    """Its least deviation is 1e-5, ours that much of the mean: it is reached where one loss comes twice."""
    method, (losses,) = scalarization.slaw(case["decay"]), given(case, "losses")

    def step(state, losses):
        weights, state = weights_of(method, state, losses)
        return state, (weights, state)

    run = jax.jit(lambda losses: jax.lax.scan(step, method.init(losses[0]), losses)[1])
    weights, states = jax.device_get(run(losses))
    least = np.min(states.deviation[1:], axis=1) < 2e-5
    assert np.sum(least) == (case["decay"] == 0.5)
    np.testing.assert_allclose(weights[0], 1)
    np.testing.assert_allclose(weights[1:][~least], np.array(case["weights"])[1:][~least], rtol=DIGITS)
    np.testing.assert_allclose(weights[1:][least], np.array(case["weights"])[1:][least], rtol=1e-2)


# DoReMi.


def run_doremi(case, excess, masks):
    """The weights and the states of all calls, the reference of each such that this is the excess of its losses."""
    losses = np.mean(*given(case, "losses"), axis=-1)
    return jax.device_get(doremi_calls(case["eta"], case["eps"], losses, np.array(excess), np.array(masks)))


@jax.jit
def doremi_calls(eta, eps, losses, excess, masks):
    def step(state, inputs):
        losses, excess, mask = inputs
        method = scalarization.group_dro(eta, losses - excess, eps)
        weights, state = jax.grad(method.apply, argnums=1, has_aux=True)(state, losses, mask=mask)
        return state, (weights, state)

    start = scalarization.group_dro().init(losses[0])
    return jax.lax.scan(step, start, (losses, excess, masks))[1]


@pytest.mark.parametrize("case", RECORDED["doremi"], ids=lambda case: f"eta{case['eta']}-eps{case['eps']}")
def test_doremi(case):
    """Given the excess that it takes, of the tokens; its average counts the weights before the first call too."""
    present = np.array(case["present"])
    clipped = np.maximum(np.subtract(*given(case, "losses", "references")), 0).mean(axis=-1)
    np.testing.assert_allclose(np.array(case["scores"])[present], clipped[present], rtol=DIGITS)
    weights, states = run_doremi(case, case["scores"], np.ones_like(present))
    calls = np.arange(1, len(weights) + 1)[:, None]
    np.testing.assert_allclose(weights, case["weights"], rtol=DIGITS)
    np.testing.assert_allclose(states.average, np.cumsum(case["weights"], axis=0) / calls, rtol=DIGITS)
    np.testing.assert_allclose((1 / 3 + calls * states.average) / (calls + 1), case["averages"], rtol=DIGITS)
    np.testing.assert_allclose(np.sum(states.average, axis=1), 1)


def test_doremi_moves_an_absent_domain():
    """By its last excess, and the first ones by the logarithm of the vocabulary's size; ours keeps its weight."""
    case = RECORDED["doremi"][2]
    present = np.array(case["present"])
    assert not present.all()
    _, states = run_doremi(case, case["scores"], present)
    kept = np.exp(np.concatenate([np.full((1, 3), -np.log(3)), states.log_weights]))
    np.testing.assert_array_equal(kept[1:][~present], kept[:-1][~present])
    theirs = np.concatenate([np.full((1, 3), 1 / 3), case["weights"]])
    assert np.min(np.abs(theirs[1:] - theirs[:-1])[~present]) > 0
    np.testing.assert_allclose(np.sum(kept, axis=1), 1)


def test_group_dro_without_reference_and_smoothing_is_what_it_was():
    """Bit for bit."""
    (losses,) = given(RECORDED["slaw"][0], "losses")
    method = scalarization.group_dro(0.3)

    def before(log_weights, losses):
        log_weights = numerics.exponentiated_step(log_weights, 0.3 * losses, moving=jnp.ones(3, bool))
        weights = numerics.softmax(log_weights, jnp.ones(3, bool))
        return log_weights, (numerics.weighted_sum(weights, losses, jnp.ones(3, bool)), log_weights)

    def now(state, losses):
        scalar, state = method.apply(state, losses)
        return state, (scalar, state.log_weights)

    for dtype in jnp.float32, jnp.float64:
        start = method.init(losses[0].astype(dtype))
        expected = jax.jit(partial(jax.lax.scan, before))(np.full(3, -np.log(3), dtype), losses.astype(dtype))[1]
        found = jax.jit(partial(jax.lax.scan, now))(start, losses.astype(dtype))[1]
        for new, old in zip(found, expected, strict=True):
            np.testing.assert_array_equal(new, old)


# CoBa.


def softmax(logits):
    weights = np.exp(logits - np.max(logits))
    return weights / np.sum(weights)


def coba_by_hand(observed, tau, window, warmup, kept_slopes, kept_worst):
    """The weights once so many of the later losses are observed, with so many slopes kept."""
    ratios = observed[1:] / observed[0]
    m, slopes, worst, history = observed.shape[1], [], [], []
    for n in range(warmup, len(ratios) + 1):
        part = ratios[max(n - window, 0) : n]
        slope = lambda y: np.polyfit(np.arange(len(y)), y, 1)[0] if len(y) > 1 else 0.0
        slopes.append([slope(y) for y in part.T])
        worst.append(slope(part.max(axis=1)))
        of_tasks, of_worst = np.array(slopes[-kept_slopes(n) :]), np.array(worst[-kept_worst(n) :])
        relative = softmax(m * of_tasks[-1] / np.abs(of_tasks[-1]).sum())
        absolute = softmax(-len(of_tasks) * of_tasks[-1] / np.abs(of_tasks).sum(axis=0))
        divergence = len(of_worst) * softmax(-tau * len(of_worst) * of_worst / np.abs(of_worst).sum())[-1]
        weights = softmax(m * (divergence * relative + (1 - divergence) * absolute))
        history.append(0.9 * weights + 0.1 / m if np.any(weights < 0.1 / m) else weights)
    return np.array(history)


@pytest.mark.parametrize("case", RECORDED["coba"], ids=lambda case: f"window{case['history_length']}")
def test_coba(case):
    """It forgets all but the last window of slopes, where the official code keeps fewer of one kind, all of the other.

    The official warm-up ends with one observation less than its number says: it begins with the second step.
    """
    (observed,), window, warmup = given(case, "observed"), case["history_length"], case["warmup_steps"] - 1
    setting = observed, case["tau"], window, warmup
    official = coba_by_hand(*setting, lambda n: n - warmup + 1 - max(n + 1 - window, 0), lambda n: n)
    tolerance = 1e-5  # weights of ten times the slopes' shares, which cancel a little
    np.testing.assert_allclose(official[: len(case["weights"])], case["weights"], rtol=tolerance)
    expected = coba_by_hand(*setting, lambda n: window, lambda n: window)
    n_same = window - warmup
    np.testing.assert_allclose(expected[:n_same], official[:n_same])
    if n_same < len(expected):
        assert np.max(np.abs(expected - official)[n_same:]) > 0.01

    method = scalarization.coba(case["tau"], window, warmup)

    def step(state, losses):
        state = method.observe(state, losses)
        return state, weights_of(method, state, jnp.ones_like(losses))[0]

    run = jax.jit(lambda observed: jax.lax.scan(step, method.init(observed[0]), observed)[1])
    weights = np.asarray(run(observed))
    np.testing.assert_allclose(weights[:warmup], 1 / observed.shape[1])
    np.testing.assert_allclose(weights[warmup:], expected, rtol=tolerance)


# MGDA of normalised gradients.


def divisors(case, losses, jacobians):
    norms = np.linalg.norm(jacobians, axis=-1)
    return {"l2": norms, "loss": losses, "loss+": losses * norms}[case["normalize"]]


@pytest.mark.parametrize("case", RECORDED["mgda"], ids=lambda case: f"{case['normalize']}-{case['sequence']}")
def test_normalized_mgda(case):
    """LibMTL's iteration stops at three digits, and its weights of two tasks 0.001 from the corners.

    By the theorem of projections the squared distance of a combination from the shortest one is at most the difference
    of their squares.
    """
    sequence = SEQUENCES[case["sequence"]]
    losses, jacobians = sequence["losses"][:10], sequence["jacobians"][:10]
    by = divisors(case, losses, jacobians)
    unit = jacobians / by[..., None]

    def run(**kwargs):
        method = aggregation.mgda(case["normalize"], **kwargs)
        weigh = lambda jacobian, losses: method.weighting.apply(method.init(jacobian.shape), jacobian, values=losses)
        return np.array(jax.jit(jax.vmap(weigh))(jacobians, losses)[0])

    weights = run()
    np.testing.assert_allclose(np.sum(weights, axis=1), 1)
    ours, theirs = (np.einsum("tm,tmn->tn", w, unit) for w in (weights, np.array(case["weights"])))
    squares = lambda rows: np.sum(rows**2, axis=1)
    assert np.all(squares(ours) <= squares(theirs) * (1 + DIGITS))
    assert np.all(squares(theirs - ours) <= squares(theirs) - squares(ours) + DIGITS * squares(theirs))
    # In LibMTL's norm of the shortest the difference is small, but where it is nearly zero.
    assert np.all(squares(theirs) - squares(ours) <= 0.01 * np.max(squares(unit.reshape(-1, unit.shape[-1]))))
    # What LibMTL leaves is the combination of what it has divided: ours by a keyword.
    np.testing.assert_allclose(theirs, case["gradients"], rtol=DIGITS, atol=1e-6 * np.max(np.abs(theirs)))
    np.testing.assert_allclose(run(combine_normalized=True), weights / by, rtol=1e-6)
    if weights.shape[1] == 2:
        inside = (weights > 0.002).all(axis=1)
        np.testing.assert_allclose(weights[inside], np.array(case["weights"])[inside], rtol=1e-6)


def test_mgda_without_normalizing_is_what_it_was():
    """Bit for bit: the solver on the Gramian."""
    products = jax.jit(gramian)(SEQUENCES[1]["jacobians"][0])
    weighting = aggregation.mgda().gramian_weighting
    found, _ = weighting.apply(weighting.init(3), products)
    np.testing.assert_array_equal(found, jax.jit(simplex_qp)(products))


# Inverse-Dirichlet weighting.


@pytest.mark.parametrize("case", RECORDED["inverse_dirichlet"], ids=lambda case: f"{case['sequence']}")
@pytest.mark.parametrize("reference", [0, None])
def test_inverse_dirichlet(case, reference):
    """The official code's reference task, and the paper's largest. Parameters are two arrays, as a layer's are."""
    jacobians = SEQUENCES[case["sequence"]]["jacobians"]
    deviations = np.array(case["deviations"])
    np.testing.assert_allclose(deviations, np.std(jacobians, axis=-1, ddof=1), rtol=DIGITS)
    weights, expected = np.ones(deviations.shape[1]), case["weights"]
    if reference is None:
        expected = []
        for call in deviations:
            weights = 0.5 * weights + 0.5 * np.max(call) / call
            expected.append(weights)
    method = aggregation.inverse_dirichlet(case["alpha"], reference)
    split = lambda x: {"w": x[..., :-1], "b": x[..., -1:]}
    start = lambda: method.init((deviations.shape[1], split(jacobians[0, 0])))
    call = lambda state, x: method.weighting.apply(state, x)[::-1]
    found = jax.jit(lambda x: jax.lax.scan(call, start(), x)[1])(split(jacobians))
    np.testing.assert_allclose(found, expected, rtol=1e-7)
