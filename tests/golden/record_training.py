"""Records trainings of a small network with TorchJD, in float64, into ``torchjd_training.json``.

Run by hand, with the ``parity`` extra: ``python -m tests.golden.record_training``; ``test_training.py`` repeats them.
Data and initial weights are recorded too: float32 numbers of four digits, so that both libraries start from the same.
"""

import importlib.metadata
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import torch
from torchjd import aggregation, scalarization
from torchjd.autojac import backward, jac_to_grad, mtl_backward

from tests.golden.record import double, short, to_lists

FILE = Path(__file__).with_name("torchjd_training.json")
STEPS, EPOCH = 50, 10
# At a rate of 0.1 UPGrad's training leaves the region where SGD is stable: rounding then grows by 1.8 in every step.
OPTIMIZERS = {"sgd": (torch.optim.SGD, 0.05), "adam": (torch.optim.Adam, 1e-3)}


def mgda():
    """Exact to 1e-6: only the number of iterations ends Frank-Wolfe, whose steps may be short far from the optimum."""

    def check_gap(weighting, arguments, weights):  # which bounds the squared distance from the exact gradient
        products = arguments[0] @ weights
        assert weights @ products - torch.min(products) < 1e-12

    method = aggregation.MGDA(epsilon=1e-300, max_iters=1000)
    method.gramian_weighting.register_forward_hook(check_gap)
    return method


METHODS = {
    "sum": scalarization.Sum,
    "mean": scalarization.Mean,
    "uw": lambda: scalarization.UW(3),
    "dwa": lambda: scalarization.DWA(temperature=0.5),
    "upgrad": aggregation.UPGrad,
    "mgda": mgda,
    "excess_mtl": lambda: aggregation.ExcessMTL(robust_step_size=0.1),
}
RUNS = [
    *(("network", name, "sgd") for name in METHODS),
    *(("network", name, "adam") for name in ("sum", "mean", "uw", "upgrad")),
    *(("trunk and heads", name, "sgd") for name in ("sum", "mean", "upgrad")),
]


def record(seed):
    rng = np.random.default_rng(seed)
    inputs, noise = short(rng.normal(size=(32, 6))), rng.normal(size=(32, 3))
    targets = short(targets_of(inputs.astype(float)) + 0.3 * noise)
    starts = {
        "network": layers(rng, 6, 12, 12, 3),
        "trunk and heads": {
            "trunk": layers(rng, 6, 12, 12),
            "heads": {"left": layers(rng, 12, 8, 1), "right": layers(rng, 12, 8, 1)},
        },
    }
    return {
        "torchjd": importlib.metadata.version("torchjd"),
        "seed": seed,
        "steps": STEPS,
        "epoch": EPOCH,
        "learning_rates": {name: rate for name, (_, rate) in OPTIMIZERS.items()},
        "inputs": inputs,
        "targets": targets,
        "starts": starts,
        "runs": [train(starts[model], double(inputs), double(targets), model, *rest) for model, *rest in RUNS],
    }


def targets_of(inputs):
    """Three of unequal size that pull the same inputs both ways."""
    a, b, c = inputs.T[:3]
    return np.stack([a - b, 2 * np.sin(b) - a, 0.5 * a * c], axis=1)


def layers(rng, *sizes):
    return {
        f"layer {i}": {"w": short(rng.normal(size=(n_in, n_out)) / np.sqrt(n_in)), "b": np.zeros(n_out, np.float32)}
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    }


def train(start, inputs, targets, model, name, optimizer):
    """One run: the losses before every tenth step, and the parameters after the last."""
    method = METHODS[name]().double()
    params = jax.tree.map(lambda x: double(x).requires_grad_(), start)
    learned = dict(method.named_parameters())
    make, learning_rate = OPTIMIZERS[optimizer]
    optimize = make([*jax.tree.leaves(params), *learned.values()], lr=learning_rate)
    kept = []
    for i in range(STEPS):
        optimize.zero_grad()
        losses = MODELS[model](params, inputs, targets, method)
        optimize.step()
        if i % EPOCH == 0:
            kept.append(losses)
        if name == "dwa" and i % EPOCH == EPOCH - 1:
            method.step()
    return {
        "model": model,
        "method": name,
        "optimizer": optimizer,
        "losses": kept,
        "params": params,
        "learned": learned,
    }


# The losses of a model, differentiated.


def of_network(params, inputs, targets, method):
    losses = torch.mean((network(params, inputs) - targets) ** 2, dim=0)
    if isinstance(method, scalarization.Scalarizer):
        method(losses).backward()
    else:
        backward(losses)
        jac_to_grad(jax.tree.leaves(params), method)
    return losses


def of_trunk_and_heads(params, inputs, targets, method):
    features = torch.tanh(network(params["trunk"], inputs))
    outputs = [network(params["heads"][head], features)[:, 0] for head in ("left", "right")]
    losses = [torch.mean((output - targets[:, i]) ** 2) for i, output in enumerate(outputs)]
    if isinstance(method, scalarization.Scalarizer):
        method(torch.stack(losses)).backward()
    else:
        mtl_backward(losses, features=features)
        jac_to_grad(jax.tree.leaves(params["trunk"]), method)
    return torch.stack(losses)


MODELS = {"network": of_network, "trunk and heads": of_trunk_and_heads}


def network(layers, x):
    *hidden, last = (layers[name] for name in sorted(layers))
    for layer in hidden:
        x = torch.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


if __name__ == "__main__":
    recorded = to_lists(record(seed=0))
    with FILE.open("w") as file:
        json.dump(recorded, file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
