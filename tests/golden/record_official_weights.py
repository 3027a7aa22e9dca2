"""Records what more official codes make of losses and gradients, in float64, into ``official_weights.json``.

``test_official_weights.py`` compares. Run by hand, with the ``parity`` extra and SciPy:
``python -m tests.golden.record_official_weights FOLDER``, where FOLDER contains clones of these GitHub repositories,
each in a folder of its name:

* codefuse-ai/MFTCoder at 8ba13f44e203: CoBa;
* median-research-group/LibMTL at 4336804847ea: MGDA with normalised gradients;
* mosaic-group/inverse-dirichlet-pinn at 157a3ed4f401;
* mtcrawshaw/meta at 31a2a2c89cbf, its branch slaw: SLAW;
* sangmichaelxie/doremi at 7cde52d1848737: DoReMi.

The classes themselves are run. Inverse-Dirichlet's running average stands in the middle of training scripts, such as
``active_turbulence/solve_vort_square.py``, and is stated here anew. The gradients are the sequences of
``record_gradients.py``, read from its file.
"""

import enum
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.golden.record import double, positive, short, to_lists
from tests.golden.record_official import in_libmtl, load

FILE = Path(__file__).with_name("official_weights.json")
GRADIENTS = Path(__file__).with_name("official_gradients.json")


def record(folder, seed=0):
    rng = np.random.default_rng(seed)
    torch.set_default_dtype(torch.float64)
    sequences = [
        {name: np.array(numbers, np.float32).astype(float) for name, numbers in sequence.items()}
        for sequence in json.loads(GRADIENTS.read_text())["sequences"]
    ]
    libmtl = load(folder / "LibMTL", "LibMTL.weighting.MGDA").MGDA
    data = {
        "slaw": [
            slaw(rng, load_without(folder / "meta", "meta.train.loss"), *settings)
            for settings in [(0.9, [1, 1, 1]), (0.5, [0.003, 0.1, 1]), (1.0, [1, 1, 1, 1])]
        ],
        "doremi": [
            doremi(rng, load_without(folder / "doremi", "doremi.trainer"), *settings)
            for settings in [(1.0, 1e-4, True), (0.3, 0.05, True), (1.0, 1e-3, False)]
        ],
        "coba": [
            coba(rng, folder / "MFTCoder", *settings) for settings in [(5, 40, 10, 3), (1, 40, 4, 5), (5, 12, 4, 3)]
        ],
        "mgda": [
            mgda(libmtl, sequence, i, normalize)
            for i, sequence in enumerate(sequences[:2])
            for normalize in ("l2", "loss", "loss+")
        ],
        "inverse_dirichlet": [
            inverse_dirichlet(load_without(folder / "inverse-dirichlet-pinn", "pinnutils"), sequence, i)
            for i, sequence in enumerate(sequences[:2])
        ],
    }
    return to_lists(data)


class Anything(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what the codes import and do not need here, and in it whatever is asked for: a class that does nothing."""

    needless = "datasets", "PIL", "sklearn", "tqdm", "transformers", "wandb"

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in self.needless:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module):
        module.__getattr__ = lambda name: type(name, (), {"__init__": lambda self, *a, **k: None})


def load_without(root, name):
    """A module of a clone, without what it imports and what is not needed for its numbers."""
    finder, before = Anything(), set(sys.modules)
    of_transformers = types.ModuleType("transformers.utils")  # asked for a base class, and for answers
    of_transformers.ExplicitEnum = enum.Enum
    of_transformers.__getattr__ = lambda name: mock.MagicMock(return_value=False)
    sys.meta_path.insert(0, finder)
    try:
        with mock.patch.dict(sys.modules, {"transformers.utils": of_transformers}):
            module = load(root, name)
    finally:
        sys.meta_path.remove(finder)
        for loaded in set(sys.modules) - before:
            if getattr(getattr(sys.modules[loaded], "__spec__", None), "loader", None) is finder:
                del sys.modules[loaded]
    return module


def slaw(rng, module, decay, decades):
    """Losses that vary by so many decades; its decay is 0.99 where nothing else is said."""
    m = len(decades)
    method = module.SLAW(ema_alpha=decay, num_tasks=m, loss_weights=None)
    calls, weights = [], []
    for _ in range(30):
        losses = positive(rng, m, np.array(decades))
        method.update(double(losses))
        calls.append(losses)
        weights.append(method.loss_weights.clone().double())
    return {"decay": decay, "losses": calls, "weights": weights}


def doremi(rng, module, eta, eps, always_there):
    """Every call six tokens of each domain; not always there: each domain is missing from every third call or so."""
    m = 3
    model = types.SimpleNamespace(
        train_domain_weights=torch.full((m,), 1 / m),
        avg_domain_weights=torch.full((m,), 1 / m),
        perdomain_scores=torch.ones(m) * np.log(50),
        update_counter=torch.tensor(1),
    )
    method = module.DoReMiTrainer.__new__(module.DoReMiTrainer)
    method.model, method.domain_list = model, list("abc")
    method.args = types.SimpleNamespace(doremi_optimizer="doremiv1", reweight_eta=eta, reweight_eps=eps)
    calls = {"losses": [], "references": [], "present": [], "weights": [], "averages": [], "scores": []}
    for _ in range(25):
        losses, references = positive(rng, (m, 6), decades=1), positive(rng, (m, 6), decades=0.5)
        present = np.ones(m, bool) if always_there else rng.random(m) < 0.7
        present[0] |= not present.any()
        domains = torch.arange(m)[torch.tensor(present)]
        scores = (double(losses) - double(references))[domains]
        float_there = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)  # it keeps its weights in float32
        with float_there, mock.patch.object(module, "wandb", mock.MagicMock()):
            method.update_domain_weights(scores, torch.ones_like(scores, dtype=torch.bool), domains)
        numbers = losses, references, present.tolist(), model.train_domain_weights.clone()
        numbers = *numbers, model.avg_domain_weights.clone(), model.perdomain_scores.clone()
        for values, number in zip(calls.values(), numbers, strict=True):
            values.append(number)
    return {"eta": eta, "eps": eps} | calls


def coba(rng, folder, tau, history_length, warmup_steps, m):
    """As its trainer calls it; the first losses are those before the training, one of which later turns up."""
    common = types.ModuleType("utils.common_utils")
    common.TASK2ID, common.ID2TASK = {str(i): i for i in range(m)}, {i: str(i) for i in range(m)}
    common.print_rank_0 = print
    root = folder / "mftcoder_accelerate" / "src"
    with mock.patch.dict(sys.modules, {}):
        for name in [name for name in sys.modules if name.split(".")[0] == "utils"]:
            del sys.modules[name]
        package = types.ModuleType("utils")
        package.__path__ = [str(root / "utils")]
        sys.modules["utils"], sys.modules["utils.common_utils"] = package, common
        module = importlib.import_module("utils.loss_utils")
    steps = np.arange(30)[:, None]
    falls = np.exp(-np.linspace(0.01, 0.1, m) * steps) + np.linspace(0, 0.02, m) * np.maximum(steps - 15, 0)
    observed = short(np.linspace(1, 3, m) * falls * positive(rng, (30, m), decades=0.02))
    status = module.CoBaStatus(warmup_steps, history_length, tau, valid_dataloader=[None] * 7)
    status.valid_task_loss_begining = double(observed[0])
    weights = []
    for completed_steps in range(30):
        if completed_steps >= warmup_steps:
            weights.append(status.compute_per_task_weight(completed_steps=completed_steps).double())
        losses = double(observed[completed_steps]) / status.valid_task_loss_begining
        with mock.patch.object(status, "coba_evaluate", lambda *_, losses=losses: losses):
            if completed_steps >= 1:
                status.sample_valid_batch(None, completed_steps)
    settings = {"tau": tau, "history_length": history_length, "warmup_steps": warmup_steps}
    return settings | {"observed": observed, "weights": weights}


def mgda(cls, sequence, i, normalize):
    """Of the first ten calls its weights, and the gradient that it leaves."""

    class Method(cls):
        rep_grad = False

        def get_share_params(self):
            return [self.theta]

        def zero_grad_share_params(self):
            self.theta.grad.zero_()

    _, m, n = sequence["jacobians"].shape
    method = Method()
    method.theta = torch.nn.Parameter(torch.zeros(n))
    method, weights, gradients = in_libmtl(method, m), [], []
    for losses, jacobian in list(zip(sequence["losses"], sequence["jacobians"], strict=True))[:10]:
        method.theta = torch.nn.Parameter(torch.zeros(n))
        weights.append(double(method.backward(double(losses) + double(jacobian) @ method.theta, mgda_gn=normalize)))
        gradients.append(method.theta.grad.clone())
    return {"sequence": i, "normalize": normalize, "weights": weights, "gradients": gradients}


def inverse_dirichlet(module, sequence, i, alpha=0.5):
    """Its standard deviations, and the weights with the first task for the reference."""
    weights, calls, deviations = torch.ones(sequence["losses"].shape[1]), [], []
    for jacobian in sequence["jacobians"]:
        net = torch.nn.Linear(jacobian.shape[1] - 1, 1)
        parameters = torch.cat([net.weight.view(-1), net.bias])
        with mock.patch.object(torch, "float32", torch.float64):
            found = torch.stack([module.loss_grad_std_full(double(row) @ parameters, net) for row in jacobian])
        weights = (1 - alpha) * weights + alpha * found[0] / found
        weights[0] = 1
        deviations.append(found)
        calls.append(weights.clone())
    return {"sequence": i, "alpha": alpha, "deviations": deviations, "weights": calls}


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(record(Path(sys.argv[1])), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
