"""Records what TorchJD computes, in float64, into ``torchjd.json``; ``test_golden.py`` compares this library with it.

Run by hand, with the ``parity`` extra: ``python -m tests.golden.record``. The inputs are float32 numbers of four
digits, so that both libraries are given exactly the same ones. An array is stored as nested lists.
"""

import importlib.metadata
import json
import math
from pathlib import Path

import numpy as np
import torch
import torchjd.aggregation
import torchjd.scalarization

from tests.golden.comparisons import random_statistics

FILE = Path(__file__).with_name("torchjd.json")
SHAPES = [(), (5,), (3, 4), (2, 3, 4)]
STATELESS = {
    "geometric_mean": torchjd.scalarization.GeometricMean,
    "stch": torchjd.scalarization.STCH,
    "cosmos": torchjd.scalarization.COSMOS,
    "pbi": torchjd.scalarization.PBI,
}


def record(seed):
    """Every comparison, as one tree of numbers, strings and nested lists."""
    rng = np.random.default_rng(seed)
    data = {
        "torchjd": importlib.metadata.version("torchjd"),
        "seed": seed,
        "uw": [learned(rng, shape, torchjd.scalarization.UW, uw_terms) for shape in 3 * SHAPES],
        "imtl_l": [learned(rng, shape, torchjd.scalarization.IMTLL, imtl_l_terms) for shape in 3 * SHAPES],
        "scalarizers": [case for shape in SHAPES for case in baseline_scalarizers(rng, shape)],
        "aggregators": [case for shape in [(1, 4), (3, 20), (5, 8)] for case in baseline_aggregators(rng, shape)],
        "dwa": [
            dwa(rng, shape, temperature, epoch_lengths)
            for epoch_lengths in ([3, 1, 5, 2, 4, 7, 2, 6], 6 * [4])
            for shape in [(3,), (5,), (2, 3)]
            for temperature in (2.0, 0.5)
        ],
        "excess_mtl": [excess_mtl(rng, *shape) for shape in [(3, 20), (5, 8)]],
        # Near the ideal point PBI's constant counts.
        "stateless": [case for scale in (1, 1e-6) for shape in SHAPES for case in stateless(rng, shape, scale)],
        "famo": [
            famo(rng, shape, **settings)
            for settings in ({}, {"lr": 0.1, "weight_decay": 0.05}, {"bounded": True})
            for shape in [(3,), (5,), (2, 3)]
        ],
        "random": [random_moments(seed, shape) for shape in [(3,), (2, 3)]],
    }
    return to_lists(data)


# Scalarizers.


def learned(rng, shape, method, terms_of):
    """Value and both gradients of a method with a learned parameter, at a random one."""
    learned_value, losses = short(rng.normal(size=shape)), positive(rng, shape, decades=4)
    scalarizer = method(shape).double()
    (parameter,) = scalarizer.parameters()
    parameter.data = double(learned_value)
    value, losses_grad = value_and_grad(scalarizer, losses)
    return {
        "learned": learned_value,
        "losses": losses,
        "value": value,
        "losses_grad": losses_grad,
        "learned_grad": parameter.grad,
        # What a tolerance is relative to: the terms of both signs that the value is the sum of.
        "terms": sum(np.sum(np.abs(term)) for term in terms_of(learned_value.astype(float), losses.astype(float))),
    }


def uw_terms(log_var, losses):
    return 0.5 * np.exp(-log_var) * losses, 0.5 * log_var


def imtl_l_terms(log_scale, losses):
    return np.exp(log_scale) * losses, log_scale


def baseline_scalarizers(rng, shape):
    losses, weights = short(rng.normal(size=shape)), short(rng.normal(size=shape))
    methods = {
        "mean": torchjd.scalarization.Mean(),
        "sum": torchjd.scalarization.Sum(),
        "constant": torchjd.scalarization.Constant(double(weights)),
    }
    for name, method in methods.items():
        value, losses_grad = value_and_grad(method, losses)
        yield {"method": name, "losses": losses, "weights": weights, "value": value, "losses_grad": losses_grad}


def dwa(rng, shape, temperature, epoch_lengths):
    """Every call of a training of several epochs, calls along the leading axis."""
    scalarizer = torchjd.scalarization.DWA(temperature)
    calls = []
    for epoch_length in epoch_lengths:
        for _ in range(epoch_length):
            losses = positive(rng, shape, decades=1)
            calls.append((losses, *value_and_grad(scalarizer, losses)))
        scalarizer.step()
    losses, values, losses_grads = zip(*calls, strict=True)
    return {
        "temperature": temperature,
        "epoch_lengths": epoch_lengths,
        "losses": losses,
        "values": values,
        "losses_grads": losses_grads,
    }


def stateless(rng, shape, scale):
    """Methods of the losses alone, each with every combination of the arguments that may be left out."""
    losses, reference = short(scale * positive(rng, shape, decades=2)), short(scale * rng.normal(size=shape))
    weights = positive(rng, shape, decades=1)
    weights = short(weights / np.sum(weights))
    settings = [
        ("geometric_mean", {}),
        *[
            ("stch", {"mu": scale * mu, **preferred, **shifted})
            for mu in (0.01, 0.1, 1.0)
            for preferred in ({}, {"weights": weights})
            for shifted in ({}, {"reference": reference})
        ],
        *[("cosmos", {"lambda_": lambda_, "weights": weights}) for lambda_ in (0.0, 0.01, 1.0, 8.0)],
        *[
            ("pbi", {"theta": theta, "weights": weights, **shifted})
            for theta in (0.0, 0.5, 5.0)
            for shifted in ({}, {"reference": reference})
        ],
    ]
    for name, arguments in settings:
        # Arrays in float64; the numbers are Python's.
        doubles = {key: x if isinstance(x, float) else double(x) for key, x in arguments.items()}
        value, losses_grad = value_and_grad(STATELESS[name](**doubles), losses)
        yield {"method": name, "arguments": arguments, "losses": losses, "value": value, "losses_grad": losses_grad}


def famo(rng, shape, lr=0.025, weight_decay=1e-3, bounded=False):
    """Fifty calls, each followed by an update: losses that fall at different rates, some of which rise."""
    min_losses = short(rng.normal(size=shape)) if bounded else np.zeros(shape, np.float32)
    scalarizer = torchjd.scalarization.FAMO(shape, double(min_losses), lr, weight_decay).double()
    (logits,) = scalarizer.parameters()
    rates = np.linspace(-0.3, 0.1, math.prod(shape)).reshape(shape)
    calls = []
    for _ in range(50):
        distances = positive(rng, shape, decades=1)
        after = short(min_losses + distances * np.exp(rates + 0.1 * rng.normal(size=shape)))
        losses = short(min_losses + distances)
        value, losses_grad = value_and_grad(scalarizer, losses)
        scalarizer.update(double(after))
        weights = torch.softmax(logits.detach().flatten(), 0).reshape(shape)
        calls.append((losses, after, value, losses_grad, weights))
    losses, after, values, losses_grads, weights = zip(*calls, strict=True)
    return {
        "lr": lr,
        "weight_decay": weight_decay,
        "min_losses": min_losses,
        "losses": losses,
        "after": after,
        "values": values,
        "losses_grads": losses_grads,
        "weights": weights,
    }


def random_moments(seed, shape, n_draws=10_000):
    """Means of the weights, sorted and not, and of their products, over many draws, with standard deviations."""
    torch.manual_seed(seed)
    losses = np.ones(shape, np.float32)
    scalarizer = torchjd.scalarization.Random()
    draws = np.array([value_and_grad(scalarizer, losses)[1].numpy() for _ in range(n_draws)])
    statistics = random_statistics(draws)
    return {"shape": shape, "n_draws": n_draws, "mean": statistics.mean(0), "deviation": statistics.std(0)}


# Aggregators.


def baseline_aggregators(rng, shape):
    jacobian, weights = short(rng.normal(size=shape)), short(rng.normal(size=shape[0]))
    methods = {
        "mean": torchjd.aggregation.Mean(),
        "sum": torchjd.aggregation.Sum(),
        "constant": torchjd.aggregation.Constant(double(weights)),
    }
    for name, method in methods.items():
        yield {"method": name, "jacobian": jacobian, "weights": weights, "gradient": method(double(jacobian))}


def excess_mtl(rng, m, n):
    """Fifty calls on gradients that shrink task by task at different rates, for several settings.

    They start at 0.05: without a warm-up TorchJD's first exponent is the L1 norm of the gradient.
    """
    shrinking = np.exp(-np.outer(np.arange(50), np.linspace(0, 0.04, m)))
    jacobians = short(0.05 * shrinking[:, :, None] * rng.normal(size=(50, m, n)))
    runs = []
    for n_warmup_steps in (0, 1, 5):
        for robust_step_size in (1.0, 0.3):
            weighting = torchjd.aggregation.ExcessMTLWeighting(robust_step_size, n_warmup_steps)
            aggregator = torchjd.aggregation.ExcessMTL(robust_step_size, n_warmup_steps)
            runs.append(
                {
                    "robust_step_size": robust_step_size,
                    "n_warmup_steps": n_warmup_steps,
                    "weights": [weighting(double(jacobian)).clone() for jacobian in jacobians],
                    "gradients": [aggregator(double(jacobian)) for jacobian in jacobians],
                }
            )
    return {"jacobians": jacobians, "runs": runs}


# Numbers.


def positive(rng, shape, decades):
    """Positive losses over so many orders of magnitude around 1."""
    return short(10 ** (decades * rng.uniform(-0.5, 0.5, size=shape)))


def short(array):
    """Rounded to four significant digits, in float32."""
    return np.vectorize(lambda x: float(f"{x:.4g}"), otypes=[np.float32])(array)


def double(array):
    return torch.tensor(array, dtype=torch.float64)


def value_and_grad(scalarizer, losses):
    values = double(losses).requires_grad_()
    value = scalarizer(values)
    value.backward()
    return value.detach(), values.grad


def to_lists(tree):
    """Arrays as nested lists: float32 inputs in full, float64 results to nine digits."""
    if isinstance(tree, dict):
        return {name: to_lists(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [to_lists(value) for value in tree]
    if isinstance(tree, torch.Tensor):
        assert tree.dtype == torch.float64, tree.dtype
        return to_lists(tree.detach().numpy())
    if isinstance(tree, np.ndarray) and tree.ndim:
        return [to_lists(value) for value in tree]
    if isinstance(tree, np.ndarray):
        tree = tree[()]
    if isinstance(tree, np.float32):
        return float(str(tree))
    if isinstance(tree, float):  # np.float64 is one
        assert math.isfinite(tree)
        return float(f"{tree:.9g}")
    return tree


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(record(seed=0), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
