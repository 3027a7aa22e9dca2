"""Records what EPO's and Auto-Lambda's official codes compute, in float64, into ``official_bilevel.json``.

Run by hand, with the ``parity`` extra, ``cvxpy`` and ``cvxopt``: ``python -m tests.golden.record_bilevel FOLDER``,
where FOLDER contains clones of these GitHub repositories, each in a folder of its name:

* dbmptr/EPOSearch at 19f14dd61e1d: ``toy_experiments/solvers``;
* lorenmt/auto-lambda at bdba6365953f: ``auto_lambda.py``.

The classes themselves are run, Auto-Lambda's with a stand-in for ``utils``, which wants data sets. Beside its
hypergradient, which is one by finite differences, stands the exact one, by differentiating twice. The networks start
from and are trained on numbers that stand in the file too.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.golden.record import short, to_lists

FILE = Path(__file__).with_name("official_bilevel.json")


def record(folder, seed=0):
    rng = np.random.default_rng(seed)
    torch.set_default_dtype(torch.float64)
    solvers = folder / "EPOSearch" / "toy_experiments" / "solvers"
    epo_lp = load(solvers / "epo_lp.py", "solvers.epo_lp")
    with mock.patch.dict(sys.modules, {"solvers": types.ModuleType("solvers"), "solvers.epo_lp": epo_lp}):
        epo_search = load(solvers / "epo_search.py", "solvers.epo_search")
    stand_in = types.ModuleType("utils")
    stand_in.torch = torch
    stand_in.compute_loss = lambda prediction, target, task: torch.mean((prediction - target) ** 2)
    with mock.patch.dict(sys.modules, {"utils": stand_in}):
        auto_lambda = load(folder / "auto-lambda" / "auto_lambda.py", "auto_lambda")
    data = {
        "epo": [epo_weights(rng, epo_lp, m, relax) for m in (2, 3, 5, 8) for relax in (False, True)],
        "epo_search": [search(rng, epo_search, first) for first in (0.2, 0.5, 0.7)],
        "auto_lambda": [
            learn(rng, auto_lambda, ["a"], {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}),
            learn(rng, auto_lambda, ["a", "c"], {"lr": 0.5, "weight_decay": 0.0}),
        ],
    }
    return to_lists(data)


def load(file, name):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def epo_weights(rng, module, m, relax):
    """Far from the preference and near it. Gradients are independent: else many weights may be as good."""
    preference = short(rng.uniform(0.1, 1, m))
    losses, jacobians, weights, moves = [], [], [], []
    for i in range(24):
        spread = (1, 0.3, 1e-2, 3e-3)[i % 4]
        losses.append(short(np.exp(spread * rng.normal(size=m)) / preference))
        jacobians.append(short(rng.normal(size=(m, m if i % 3 else 12))))
        solver = module.EPO_LP(m, None, preference.astype(float))
        found = solver.get_alpha(losses[-1].astype(float), jacobians[-1].astype(float), relax=relax)
        weights.append(np.full(m, -1.0) if found is None else found)
        moves.append(solver.last_move)
    return {
        "preference": preference,
        "relax": relax,
        "losses": losses,
        "jacobians": jacobians,
        "weights": weights,
        "moves": moves,
    }


def search(rng, module, first):
    """The code's search on its toy problem, whose front is concave."""
    preference, start = np.array([first, 1 - first]), short(rng.uniform(-0.4, 0.4, 20))

    def losses_and_rows(x):
        x = torch.tensor(x, requires_grad=True)
        centre = 1 / np.sqrt(len(x))
        losses = [1 - torch.exp(-torch.sum((x - sign * centre) ** 2)) for sign in (1, -1)]
        rows = [torch.autograd.grad(loss, x)[0].numpy() for loss in losses]
        return np.array([loss.item() for loss in losses]), np.stack(rows)

    _, found = module.epo_search(losses_and_rows, preference, start.astype(float), max_iters=60, step_size=0.05)
    return {"preference": preference, "start": start, "step_size": 0.05, "losses": found["ls"]}


class Network(torch.nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = (torch.nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (first, second))

    def forward(self, x):
        return (torch.tanh(x @ self.first) @ self.second).T


def learn(rng, module, primary, settings, n_steps=8):
    """A training: the weights after each step, and their gradients by finite differences and exactly."""
    tasks, start = ("a", "b", "c"), (short(rng.normal(size=(4, 6)) / 2), short(rng.normal(size=(6, 3)) / 2))
    batches = [(short(rng.normal(size=(n_steps, 10, 4))), short(rng.normal(size=(n_steps, 10, 3)))) for _ in range(2)]
    model = Network(*start)
    official = module.AutoLambda(model, "cpu", dict.fromkeys(tasks), primary, 0.1)
    official.meta_weights = official.meta_weights.detach().double().requires_grad_()
    meta_optimizer = torch.optim.Adam([official.meta_weights], lr=0.01)
    optimizer = torch.optim.SGD(model.parameters(), **settings)
    recorded = {"weights": [], "by_differences": [], "exact": [], "losses": []}
    for step in range(n_steps):
        (train_x, train_y), (val_x, val_y) = ([torch.tensor(x[step]).double() for x in batch] for batch in batches)
        train_y, val_y = (dict(zip(tasks, y.T, strict=True)) for y in (train_y, val_y))
        recorded["exact"].append(exact(official, optimizer, train_x, train_y, val_x, val_y, primary))
        meta_optimizer.zero_grad()
        official.unrolled_backward(train_x, train_y, val_x, val_y, settings["lr"], optimizer)
        recorded["by_differences"].append(official.meta_weights.grad.clone())
        meta_optimizer.step()
        losses = official.model_fit(model(train_x), train_y)
        optimizer.zero_grad()
        sum(weight * loss for weight, loss in zip(official.meta_weights, losses, strict=True)).backward()
        optimizer.step()
        recorded["weights"].append(official.meta_weights.detach().clone())
        recorded["losses"].append(torch.stack(losses).detach())
    (train_x, train_y), (val_x, val_y) = batches
    data = {"train_x": train_x, "train_y": train_y, "val_x": val_x, "val_y": val_y}
    return {"primary": primary, "settings": settings, "first": start[0], "second": start[1]} | data | recorded


def exact(official, optimizer, train_x, train_y, val_x, val_y, primary):
    """The derivative of the validation losses after the optimizer's step, by differentiating through that."""
    model, weights = official.model, official.meta_weights.detach().clone().requires_grad_()
    names, params = zip(*model.named_parameters(), strict=True)
    losses = official.model_fit(model(train_x), train_y)
    loss = sum(weight * loss for weight, loss in zip(weights, losses, strict=True))
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    (group,) = optimizer.param_groups
    stepped = []
    for param, gradient in zip(params, gradients, strict=True):
        buffer = optimizer.state[param].get("momentum_buffer", torch.zeros_like(param))
        velocity = group["momentum"] * buffer + gradient + group["weight_decay"] * param
        stepped.append(param - group["lr"] * velocity)
    prediction = torch.func.functional_call(model, dict(zip(names, stepped, strict=True)), (val_x,))
    losses = dict(zip(official.train_tasks, official.model_fit(prediction, val_y), strict=True))
    return torch.autograd.grad(sum(losses[task] for task in primary), weights)[0]


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(record(Path(sys.argv[1])), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
