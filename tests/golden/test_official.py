"""This library against the official codes of its methods, held as data: none of them is needed here.

``official_recorded.json`` was recorded by ``record_official.py``, ``official.json`` holds printed numbers. Where a code
departs from its paper, or from what we do, a test pins its way beside ours.
"""

import functools
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import scalarization
from mtlbalance.states import select
from tests.golden.comparisons import ROUNDING, arrays, assert_near, check_learned, learned_call, stateless_call

pytestmark = pytest.mark.unoptimized

softmax = jax.jit(jax.nn.softmax)
RECORDED, OFFICIAL = (
    json.loads(Path(__file__).with_name(name).read_text()) for name in ("official_recorded.json", "official.json")
)


def run(method, losses, **given):
    """Every call in a row: scalars, their gradients (the weights) and the states afterwards.

    ``after`` are losses for ``observe``; ``ends`` says after which calls an epoch ends.
    """
    return jax.device_get(calls(method, losses, **given))


@functools.partial(jax.jit, static_argnums=0)
def calls(method, losses, after=None, ends=None):
    grad_fn = jax.value_and_grad(method.apply, argnums=1, has_aux=True)
    after = losses if after is None else after
    ends = np.zeros(len(losses), bool) if ends is None else ends

    def call(state, inputs):
        losses, after, end = inputs
        (value, state), grad = grad_fn(state, losses)
        state = method.observe(state, after)
        state = select(end, method.end_epoch(state), state)
        return state, (value, grad, state)

    return jax.lax.scan(call, method.init(losses[0]), (losses, after, ends))[1]


def epoch_ends(case):
    return np.isin(np.arange(1, sum(case["epoch_lengths"]) + 1), np.cumsum(case["epoch_lengths"]))


def check_weighted(case, values, weights, tolerance=ROUNDING):
    """Positive weights of positive losses: a relative error."""
    np.testing.assert_allclose(weights, case["losses_grads"], rtol=tolerance)
    np.testing.assert_allclose(values, case["values"], rtol=tolerance)


# STCH.


@pytest.mark.parametrize("case", RECORDED["stch"], ids=lambda case: f"mu{case['mu']}-warmup{case['n_warmup_epochs']}")
def test_stch(case):
    (losses,) = arrays(case, "losses")
    method = scalarization.stch(case["mu"], n_warmup_epochs=case["n_warmup_epochs"])
    check_stch(case, *run(method, losses, ends=epoch_ends(case)))

    lengths = set(case["epoch_lengths"])
    if len(lengths) == 1:
        by_steps = scalarization.stch(
            case["mu"], n_warmup_epochs=case["n_warmup_epochs"], steps_per_epoch=lengths.pop()
        )
        check_stch(case, *run(by_steps, losses))


def check_stch(case, values, weights, states):
    """The official scalar lacks what is subtracted before the exponential: after the warm-up, the largest logarithm.

    That is a constant of differentiation there, so the gradients are the same.
    """
    # The logarithms are up to 5 and divided by mu: so many roundings enter the softmax.
    np.testing.assert_allclose(weights, case["losses_grads"], rtol=5 * ROUNDING / case["mu"])
    n_warmup_calls = sum(case["epoch_lengths"][: case["n_warmup_epochs"] + 1])
    largest = np.max(np.log(case["losses"] / np.array(states.nadir[-1])), axis=1)
    largest[:n_warmup_calls] = 0
    assert_near(values, case["values"] + 3 * largest, 10 * ROUNDING)


# FAMO.


@pytest.mark.parametrize("case", RECORDED["famo"], ids=lambda case: f"delayed-{case['delayed']}-{case['min_losses']}")
def test_famo(case):
    """With an update after each call, and in the delayed form, where the next iterate's losses serve.

    Its weight decay is 0.01 by default, ten times ours, which is LibMTL's.
    """
    assert (case["lr"], case["weight_decay"]) == (0.025, 0.01)
    losses, after, min_losses = arrays(case, "losses", "after", "min_losses")
    method = scalarization.famo(min_losses, case["lr"], case["weight_decay"], delayed=case["delayed"])
    values, grads, states = run(method, losses, after=after)
    # As in comparisons.check_famo.
    assert_near(softmax(states.logits), case["weights"], 2 * ROUNDING * np.array(case["weights"]))
    assert_near(grads, case["losses_grads"], 2 * ROUNDING * np.array(case["losses_grads"]))
    distances = np.subtract(case["losses"], case["min_losses"])
    terms = np.sum(np.abs(case["losses_grads"] * distances * np.log(distances)), axis=1)
    assert_near(values, case["values"], 2 * ROUNDING * terms)


# Weights from the history of the losses.


@pytest.mark.parametrize("case", RECORDED["cov_weighting"], ids=lambda case: f"{case['decay']}-{case['decades'][0]}")
def test_cov_weighting(case):
    """Also with a decay of 1, the official default of the decaying means, which then never move."""
    values, weights, _ = run(scalarization.cov_weighting(case["decay"]), *arrays(case, "losses"))
    # A sum of squares over 30 calls, each with a few roundings. The squares are of differences between ratios near 1:
    # the smaller those are, the fewer digits are left.
    check_weighted(case, values, weights, max(5, 0.5 / min(case["decades"])) * ROUNDING)


@pytest.mark.parametrize("method", [scalarization.cov_weighting(), scalarization.lbtw()], ids=["cov_weighting", "lbtw"])
def test_printed(method, request):
    case = OFFICIAL[request.node.callspec.id]
    _, weights, _ = run(method, *arrays(case, "losses"))
    for call, numbers in case["weights"].items():
        # Six decimals are printed, of numbers near 1.
        np.testing.assert_allclose(weights[int(call)], numbers, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", RECORDED["lbtw"], ids=lambda case: f"alpha{case['alpha']}-{case['epoch_lengths'][0]}")
def test_lbtw(case):
    (losses,) = arrays(case, "losses")
    _, weights, _ = run(scalarization.lbtw(case["alpha"]), losses, ends=epoch_ends(case))
    np.testing.assert_allclose(weights, case["weights"], rtol=ROUNDING)

    lengths = set(case["epoch_lengths"])
    if len(lengths) == 1:
        _, weights, _ = run(scalarization.lbtw(case["alpha"], steps_per_epoch=lengths.pop()), losses)
        np.testing.assert_allclose(weights, case["weights"], rtol=ROUNDING)


@pytest.mark.parametrize("case", RECORDED["softadapt"], ids=lambda case: f"{case['variant']}-{len(case['windows'][0])}")
def test_softadapt(case):
    """The weights of a window serve from its last call to the one before the next window's last; equal ones before."""
    (windows,) = arrays(case, "windows")
    n_windows, window, m = windows.shape
    method = scalarization.softadapt(window=window, variant=case["variant"])
    _, weights, _ = run(method, windows.reshape(-1, m))

    expected = np.concatenate([np.full((1, m), 1 / m), case["weights"]])
    expected = expected[np.arange(1, n_windows * window + 1) // window]
    # A slope is a sum of differences up to 10, each times up to 8: some roundings of 200, times beta, in the exponent.
    np.testing.assert_allclose(weights, expected, rtol=20 * ROUNDING)


def test_softadapt_starts_with_equal_weights_of_total_1():
    """The README of the official code starts with weights of 1 each, and goes on with a total of 1."""
    _, weights, _ = run(scalarization.softadapt(), np.ones((4, 3), np.float32))
    np.testing.assert_allclose(weights, 1 / 3, rtol=ROUNDING)


@pytest.mark.parametrize("example", [1, 2])
@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
def test_readme_of_softadapt(variant, example):
    case = OFFICIAL["softadapt"][f"example_{example}"]
    (losses,) = arrays(case, "losses")
    _, weights, _ = run(scalarization.softadapt(variant=variant), losses.T)
    # Five digits are printed, 5e-5, but four decimals by the normalized variant, whose weights are at least 0.24. The
    # slopes are sums of terms up to 6000, known to 1e-3, and beta is 0.1.
    np.testing.assert_allclose(weights[-1], case[variant], rtol=3e-4 if variant == "normalized" else 1.5e-4)


# Group DRO.


@pytest.mark.parametrize("case", RECORDED["group_dro"], ids=lambda case: f"eta{case['robust_step_size']}")
def test_group_dro(case):
    """Our weights sum to 1, as the official ones; those of the ExcessMTL authors are m times as large."""
    method = scalarization.group_dro(case["robust_step_size"])
    values, weights, states = run(method, *arrays(case, "losses"))
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, rtol=ROUNDING)
    np.testing.assert_allclose(np.exp(states.log_weights), weights, rtol=5 * ROUNDING)
    # The logarithms of the weights go down to -7, in 30 steps with a rounding or two of up to 2e-7 in each.
    check_weighted(case["official"], values, weights, 5 * ROUNDING)
    check_weighted(case["excess_mtl"], 3 * values, 3 * weights, 5 * ROUNDING)


# MinMax.


def test_minmax():
    """ConFIG's version makes no step on its first call and returns the logits, which start at 1, as weights."""
    case = RECORDED["minmax"]
    losses, official = arrays(case, "losses", "logits")
    np.testing.assert_array_equal(official[0], 1)
    method = mtl.learn(scalarization.minmax(), optax.adam(case["lr"]))
    _, weights, states = run(method, losses[1:])
    # Forty steps of 1e-3, each of them 6e-6 off: the bias correction 1 - 0.999**t of Optax's Adam, in float32.
    assert_near(states.inner.logits, np.array(case["logits"][1:]) - 1, ROUNDING)
    np.testing.assert_allclose(weights, 3 * np.asarray(softmax(official[:-1])), rtol=ROUNDING)


# ReLoBRaLo.


def ratio_softmax(losses, old, temperature):
    exponents = losses / (temperature * old + 1e-12)
    shares = np.exp(exponents - np.max(exponents))
    return len(losses) * shares / np.sum(shares)


def official_relobralo(losses, temperature, alpha, keeps):
    """The rule of ``rbischof/relative_balancing``, which needs TensorFlow: its weights at every call.

    ``keeps`` are its draws, 0 to look back. Its first losses are 1 on the first two calls, and those of the second call
    from then on.
    """
    losses = np.array(losses)
    weights, previous, first = np.ones((3, losses.shape[1]))
    history = []
    for call, current in enumerate(losses):
        keep, past = keeps[call], [1.0, 0.0, alpha][min(call, 2)]
        lookback = ratio_softmax(current, first, temperature)
        recent = ratio_softmax(current, previous, temperature)
        weights = past * (keep * weights + (1 - keep) * lookback) + (1 - past) * recent
        previous, first = current, current if call == 1 else first
        history.append(weights)
    return np.array(history)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_relobralo_without_lookback(temperature):
    """As the official code; and the numbers that were printed for it."""
    printed = OFFICIAL["relobralo"]
    (losses,) = arrays(printed, "losses")
    values, weights, states = run(scalarization.relobralo(temperature), losses)
    expected = official_relobralo(printed["losses"], temperature, 0.999, np.ones(len(losses)))
    # The exponents are up to 12, known to a few 1e-6.
    np.testing.assert_allclose(weights, expected, rtol=5 * ROUNDING)
    np.testing.assert_allclose(states.weights, weights, rtol=ROUNDING)
    np.testing.assert_allclose(values, np.sum(expected * printed["losses"], axis=1), rtol=5 * ROUNDING)
    for call, numbers in printed[f"temperature_{temperature}"].items():
        # Six decimals are printed, of numbers up to 3, where float32 adds 2e-7 for each rounding.
        np.testing.assert_allclose(weights[int(call)], numbers, rtol=0, atol=2e-6)


def test_relobralo_looks_back_to_the_first_losses():
    """The official code looks back to the second call's losses, and on its first call to losses of 1."""
    case = OFFICIAL["relobralo"]
    (losses,) = arrays(case, "losses")
    _, weights, _ = run(scalarization.relobralo(1.0, alpha=0.9, rho=0.0), losses)
    steps = np.array(case["losses"])
    for call in (2, 3):
        recent = 0.1 * ratio_softmax(steps[call], steps[call - 1], 1.0)
        np.testing.assert_allclose(
            weights[call], 0.9 * ratio_softmax(steps[call], steps[0], 1.0) + recent, rtol=ROUNDING
        )
    np.testing.assert_array_equal(weights[0], 1)

    official = official_relobralo(case["losses"], 1.0, 0.9, np.zeros(4))
    np.testing.assert_allclose(official[0], ratio_softmax(steps[0], np.ones(3), 1.0))
    np.testing.assert_allclose(official[2], ratio_softmax(steps[2], steps[1], 1.0))
    np.testing.assert_allclose(weights[1], official[1], rtol=ROUNDING)
    assert np.min(np.abs(weights - official)[[0, 2, 3]].max(axis=1)) > 0.03


@pytest.mark.parametrize("case", RECORDED["relobralo"], ids=lambda case: f"keeps{sum(case['keeps'])}")
def test_relobralo_of_config(case):
    """With its draws. Its second call keeps ``alpha`` of the first weights, 1, where ours forgets them.

    After t more calls ``alpha ** t`` of that is left, until the first lookback forgets it too.
    """
    losses = arrays(case, "losses")[0]
    keeps = np.array(case["keeps"])

    def call(state, inputs):
        losses, keep = inputs
        method = scalarization.relobralo(case["temperature"], case["alpha"], rho=keep)
        _, state = method.apply(state, losses)
        return state, state.weights

    start = scalarization.relobralo().init(losses[0])
    weights = jax.jit(lambda *given: jax.lax.scan(call, start, given)[1])(losses, keeps.astype(np.float32))
    # Nothing of it is left where the second call looks back: to the first losses, which are the last ones then.
    kept = np.concatenate([[0], np.cumprod(case["alpha"] * keeps[1:])])
    difference = kept[:, None] * (1 - np.array(weights[1]))
    # The exponents are up to 6, known to 1e-6.
    np.testing.assert_allclose(weights + difference, case["weights"], rtol=2 * ROUNDING)


def test_relobralo_of_physicsnemo():
    """It too keeps ``alpha``, 0.95, of the first weights on its second call: ``alpha ** 3`` of them two calls later."""
    case = OFFICIAL["relobralo"]
    _, weights, _ = run(scalarization.relobralo(1.0, alpha=0.95), *arrays(case, "losses"))
    theirs = weights[3] + 0.95**3 * (1 - weights[1])
    np.testing.assert_allclose(theirs, case["physicsnemo"]["3"], rtol=0, atol=1e-6)  # six decimals are printed


# DWA over a sliding window.


def test_dwa_and_the_sliding_window_of_nash_mtl():
    """Nash-MTL's window slides, and takes in the current losses before it weighs them.

    So its weights are ours where one of our windows has just closed, from the second one on; ours then serve for the
    next window, from its first call on. Its scalar is a mean, with weights of total 1.
    """
    case = RECORDED["sliding_dwa"]
    (losses,) = arrays(case, "losses")
    window, m = case["window"], 3
    method = scalarization.dwa(case["temperature"], steps_per_epoch=window)
    _, weights, states = run(method, losses)
    theirs = m * np.array(case["losses_grads"])
    np.testing.assert_allclose(np.sum(weights, axis=1), m, rtol=ROUNDING)
    np.testing.assert_allclose(np.sum(case["losses_grads"], axis=1), 1, rtol=ROUNDING)
    for closed in range(2 * window, len(losses), window):
        # The rates are at most 10, over a temperature of 2, and theirs are in float32 too.
        np.testing.assert_allclose(weights[closed], theirs[closed - 1], rtol=5 * ROUNDING)
        state = jax.tree.map(lambda x, at=closed - 1: x[at], states)
        value, _ = method.apply(state, losses[closed - 1])
        np.testing.assert_allclose(value / m, case["values"][closed - 1], rtol=5 * ROUNDING)

    # Before its two windows are full theirs counts losses of 1 for those not yet seen; ours waits.
    np.testing.assert_allclose(weights[: 2 * window], 1, rtol=ROUNDING)
    np.testing.assert_allclose(theirs[: window + 1], 1, rtol=ROUNDING)
    seen = np.array(case["losses"][: window + 2])
    padded = np.concatenate([np.ones((window - 2, m)), seen])
    rates = np.mean(padded[window:], axis=0) / np.mean(padded[:window], axis=0) / case["temperature"]
    np.testing.assert_allclose(theirs[window + 1], m * np.exp(rates) / np.sum(np.exp(rates)), rtol=5 * ROUNDING)


# Losses alone, and learned weights.


@pytest.mark.parametrize("case", RECORDED["scale_invariant"], ids=["equal", "weighted"])
def test_scale_invariant(case):
    losses, weights = arrays(case, "losses", "weights")
    value, grad = stateless_call("scale_invariant", {} if np.all(weights == 1) else {"weights": weights}, losses)
    assert_near(value, case["value"], ROUNDING * np.sum(np.abs(weights * np.log(losses))))
    assert_near(grad, case["losses_grad"], ROUNDING * np.abs(case["losses_grad"]))


@pytest.mark.parametrize("case", RECORDED["revised_uw"])
def test_revised_uw(case):
    (sigma,) = arrays(case, "learned")
    terms = np.sum(np.abs(np.multiply(case["losses_grad"], case["losses"]))) + np.sum(np.log1p(sigma**2))
    # The gradient with respect to sigma is a sum of two terms, -L / sigma ** 3 and at most 1.
    check_learned(case | {"terms": terms}, scalarization.revised_uw, regulariser=1.0)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_uw_so(temperature):
    case = OFFICIAL["uw_so"]
    (losses,) = arrays(case, "losses")
    _, weights = stateless_call("uw_so", {"temperature": temperature}, losses)
    # Six decimals are printed.
    np.testing.assert_allclose(weights, case[f"temperature_{temperature}"], rtol=0, atol=6e-7)


def test_uw_o():
    """The weights that UW has at its optimum, twice as large."""
    losses = np.array([4.0, 1.0, 0.5], np.float32)
    value, weights = stateless_call("uw_o", {}, losses)
    np.testing.assert_allclose(weights, [0.25, 1, 2], rtol=ROUNDING)
    np.testing.assert_allclose(value, 3, rtol=ROUNDING)
    _, of_learned, at_optimum = learned_call(scalarization.uw, np.log(losses), losses)
    np.testing.assert_allclose(weights, 2 * np.asarray(at_optimum), rtol=ROUNDING)
    np.testing.assert_allclose(of_learned, 0, atol=ROUNDING)
