"""One record of ``record.py`` against this library in float32, on inputs that float32 holds exactly.

Everything is compared relative to the size of what was added up: a sum of terms of both signs may come out
near zero, and float32 (6e-8 for each rounding) knows it only to a fraction of its terms. A few roundings, the
one of ``exp`` among them, and up to 24 terms stay below 1e-6.
"""

import functools

import jax
import numpy as np

from mtlbalance import aggregation, scalarization

ROUNDING = 1e-6


def check_uw(case):
    check_learned(case, scalarization.uw, regulariser=0.5)


def check_imtl_l(case):
    log_scale, losses = arrays(case, "learned", "losses")
    check_learned(case, scalarization.imtl_l, regulariser=1.0)
    value, *_ = learned_call(scalarization.imtl_l, log_scale, losses)
    half, *_ = learned_call(scalarization.uw, -log_scale, losses)
    assert_near(value, 2 * np.asarray(half), ROUNDING * case["terms"])


def check_learned(case, factory, regulariser):
    learned, losses = arrays(case, "learned", "losses")
    value, learned_grad, losses_grad = learned_call(factory, learned, losses)
    assert_near(value, case["value"], ROUNDING * case["terms"])
    assert_near(losses_grad, case["losses_grad"], ROUNDING * np.abs(case["losses_grad"]))
    # d/ds of the weighted loss, and of s itself.
    learned_terms = np.abs(np.multiply(case["losses_grad"], losses)) + regulariser
    assert_near(learned_grad, case["learned_grad"], ROUNDING * learned_terms)


@functools.partial(jax.jit, static_argnums=0)
def learned_call(factory, learned, losses):
    """The value, and its gradients by what is learned and by the losses: compiled once for each method and shape."""
    method = factory(learned)
    grad_fn = jax.value_and_grad(method.apply, argnums=(0, 1), has_aux=True)
    (value, _), (state_grad, losses_grad) = grad_fn(method.init(losses), losses)
    return value, getattr(state_grad, *method.learned), losses_grad


def check_baseline_scalarizer(case):
    losses, weights = arrays(case, "losses", "weights")
    given = {"weights": weights} if case["method"] == "constant" else {}
    value, losses_grad = stateless_call(case["method"], given, losses)
    terms = np.sum(np.abs(np.multiply(case["losses_grad"], losses)))
    assert_near(value, case["value"], ROUNDING * terms)
    assert_near(losses_grad, case["losses_grad"], ROUNDING * np.abs(case["losses_grad"]))


def check_baseline_aggregator(case):
    jacobian, weights = arrays(case, "jacobian", "weights")
    method = aggregation.constant(weights) if case["method"] == "constant" else getattr(aggregation, case["method"])()
    gradient, _ = method.apply(method.init(jacobian.shape), jacobian)
    ones = np.ones(len(weights))
    size = {"mean": ones / len(weights), "sum": ones, "constant": np.abs(weights)}[case["method"]]
    assert_near(gradient, case["gradient"], ROUNDING * (size @ np.abs(jacobian)))


def check_dwa(case):
    """Every call, with ``end_epoch`` after each epoch."""
    method = scalarization.dwa(case["temperature"])
    (losses,) = arrays(case, "losses")
    state = method.init(losses[0])
    outputs = []
    ends = np.cumsum(case["epoch_lengths"])
    for n_calls, call_losses in enumerate(losses, start=1):
        state, output = dwa_call(method, state, call_losses)
        outputs.append(output)
        if n_calls in ends:
            state = method.end_epoch(state)
    check_dwa_calls(case, *zip(*outputs, strict=True))


def check_dwa_with_steps_per_epoch(case):
    """The same in one ``lax.scan``, where all epochs are of one length and ``apply`` closes them."""
    (epoch_length,) = set(case["epoch_lengths"])
    method = scalarization.dwa(case["temperature"], steps_per_epoch=epoch_length)
    (losses,) = arrays(case, "losses")
    calls = jax.jit(lambda losses: jax.lax.scan(functools.partial(dwa_call, method), method.init(losses[0]), losses))
    check_dwa_calls(case, *calls(losses)[1])


@functools.partial(jax.jit, static_argnums=0)
def dwa_call(method, state, losses):
    (value, state), grad = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, losses)
    return state, (value, grad)


def check_dwa_calls(case, values, grads):
    # All terms are positive. A rate is at most 10 and is divided by at least 0.5: softmax turns the few roundings of
    # its argument, 6e-8 * 20 each, into the same relative error of a weight.
    np.testing.assert_allclose(values, case["values"], rtol=1e-5)
    np.testing.assert_allclose(grads, case["losses_grads"], rtol=1e-5)


def check_stateless(case):
    (losses,) = arrays(case, "losses")
    value, losses_grad = stateless_call(case["method"], case_arguments(case, np.float32), losses)
    value_terms, grad_terms = STATELESS_TERMS[case["method"]](np.array(case["losses"]), **case_arguments(case, float))
    assert_near(value, case["value"], ROUNDING * value_terms)
    assert_near(losses_grad, case["losses_grad"], ROUNDING * grad_terms)


@functools.partial(jax.jit, static_argnums=0)
def stateless_call(name, arguments, losses):
    """Compiled once for each method, set of arguments and shape."""
    method = getattr(scalarization, name)(**arguments)
    (value, _), losses_grad = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(method.init(losses), losses)
    return value, losses_grad


def case_arguments(case, dtype):
    return {name: np.asarray(x, dtype) for name, x in case["arguments"].items()}


def geometric_mean_terms(losses):
    # The exponential turns the roundings of the mean logarithm into a relative error.
    mean = np.exp(np.mean(np.log(losses)))
    roundings = 1 + np.max(np.abs(np.log(losses)))
    return roundings * mean, roundings * mean / (losses.size * losses)


def stch_terms(losses, mu, weights=None, reference=0.0):
    weights = np.full_like(losses, 1 / losses.size) if weights is None else weights
    preferred = weights * (losses - reference)
    # A softmax s turns an error of its argument, here roundings of this size, into s (1 - s) times that. Of the whole
    # preference it is at most 1e-5.
    largest = np.max(weights * (np.abs(losses) + np.abs(reference)))
    shares = np.exp((preferred - np.max(preferred)) / mu)
    shares = shares / np.sum(shares)
    roundings = np.minimum(1 + (1 - shares) * largest / mu, 1e-5 / ROUNDING / shares)
    # The last term, since a tiny share times a tiny mu is zero in float32.
    return largest + mu, weights * shares * roundings + 1e-20


def cosmos_terms(losses, lambda_, weights):
    norm, unit = np.linalg.norm(losses), np.abs(weights) / np.linalg.norm(weights)
    return np.sum(np.abs(weights * losses)) + lambda_, weights + lambda_ * (unit + np.abs(losses) / norm) / norm


def pbi_terms(losses, theta, weights, reference=0.0):
    unit = weights / np.linalg.norm(weights)
    terms = np.linalg.norm(np.abs(losses) + np.abs(reference))
    beside = losses - reference - np.sum((losses - reference) * unit) * unit
    distance = np.sqrt(np.sum(beside**2) + 1e-12)
    return (1 + theta) * terms + theta * 1e-6, unit + theta * terms / distance


STATELESS_TERMS = {
    "geometric_mean": geometric_mean_terms,
    "stch": stch_terms,
    "cosmos": cosmos_terms,
    "pbi": pbi_terms,
}


def check_famo(case):
    """Every call and the weights after its update."""
    values, grads, weights = famo_calls(*arrays(case, "min_losses", "lr", "weight_decay", "losses", "after"))
    # The logits add up fifty steps of at most lr, each with a few roundings of its own: below 1e-6 in all.
    assert_near(weights, case["weights"], 2 * ROUNDING * np.array(case["weights"]))
    assert_near(grads, case["losses_grads"], 2 * ROUNDING * np.array(case["losses_grads"]))
    distances = np.subtract(case["losses"], case["min_losses"])
    terms = np.abs(case["losses_grads"] * distances * np.log(distances))
    assert_near(values, case["values"], 2 * ROUNDING * np.sum(terms.reshape(len(terms), -1), axis=1))


@jax.jit
def famo_calls(min_losses, lr, weight_decay, losses, after):
    method = scalarization.famo(min_losses, lr, weight_decay)
    grad_fn = jax.value_and_grad(method.apply, argnums=1, has_aux=True)

    def call(state, both):
        losses, after = both
        (value, state), grad = grad_fn(state, losses)
        state = method.observe(state, after)
        return state, (value, grad, jax.nn.softmax(state.logits, axis=None))

    return jax.lax.scan(call, method.init(losses[0]), (losses, after))[1]


def check_random(case):
    """The moments of the weights, where the draws are another generator's."""
    method, losses = scalarization.random(key=0), np.ones(case["shape"], np.float32)

    def call(state, _):
        (_, state), weights = jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, losses)
        return state, weights

    _, draws = jax.jit(lambda: jax.lax.scan(call, method.init(losses), length=10 * case["n_draws"]))()
    found = np.mean(random_statistics(draws), axis=0)
    # Six standard errors of the difference of the two means: by chance less than 1e-8 for each of the 50 numbers.
    standard_error = np.array(case["deviation"]) * np.sqrt(1.1 / case["n_draws"])
    np.testing.assert_array_less(np.abs(found - case["mean"]), 6 * standard_error)


def random_statistics(draws):
    """Of every draw: its weights, the same in order of size, and their products."""
    draws = np.reshape(draws, (len(draws), -1))
    products = draws[:, :, None] * draws[:, None, :]
    return np.concatenate([draws, np.sort(draws), products.reshape(len(draws), -1)], axis=1)


def check_excess_mtl(jacobians, run):
    """The weights, and the gradient, of every call in a row."""
    jacobians = np.array(jacobians, np.float32)
    # Without a warm-up TorchJD moves its weights on the first call already.
    normalize_first_step = run["n_warmup_steps"] > 0
    settings = run["robust_step_size"], run["n_warmup_steps"]
    weights, gradients = excess_mtl_calls(normalize_first_step, *settings, jacobians)
    # The logarithms of the weights add up to 15 ratios' worth over 50 calls. Their rounding errors, 6e-8 of up to 15
    # in each call, add up to a few 1e-6, and so do those of the weights, which are at most 1.
    assert_near(weights, run["weights"], 1e-5)
    assert_near(gradients, run["gradients"], 1e-5 * np.linalg.norm(jacobians, axis=(1, 2))[:, None])


@functools.partial(jax.jit, static_argnums=0)
def excess_mtl_calls(normalize_first_step, robust_step_size, n_warmup_steps, jacobians):
    method = aggregation.excess_mtl(robust_step_size, n_warmup_steps, normalize_first_step=normalize_first_step)

    def call(states, jacobian):
        weights, of_weighting = method.weighting.apply(states[0], jacobian)
        gradient, of_aggregator = method.apply(states[1], jacobian)
        return (of_weighting, of_aggregator), (weights, gradient)

    state = method.init(jacobians[0].shape)
    return jax.lax.scan(call, (state, state), jacobians)[1]


def arrays(case, *names):
    return [np.array(case[name], np.float32) for name in names]


def assert_near(actual, expected, tolerance):
    """Elementwise, with one absolute tolerance per element, or one for all."""
    actual = np.asarray(actual)
    assert actual.dtype == np.float32
    assert actual.shape == np.shape(expected), (actual.shape, np.shape(expected))
    excess = np.abs(actual.astype(np.float64) - expected) / tolerance
    assert np.all(excess <= 1), f"{np.max(excess):.3g} times the tolerance: {actual} is not {expected}"
