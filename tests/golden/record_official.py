"""Records what the official codes compute, in float64, into ``official_recorded.json``; ``test_official.py`` compares.

Run by hand, with the ``parity`` extra and ``findiff``, which SoftAdapt imports:
``python -m tests.golden.record_official FOLDER``, where FOLDER contains clones of these GitHub repositories, each in a
folder of its name:

* AvivNavon/nash-mtl at cce18403ef55: SI and DWA over a sliding window;
* Cranial-XIX/FAMO at 0a6ad06dbdd5;
* Mikoto10032/AutomaticWeightedLoss at 40b15304762d: revised UW;
* Xi-L/STCH at a510c1e635a8 and median-research-group/LibMTL at 4336804847ea: STCH with its warm-up;
* dr-aheydari/SoftAdapt at 66e7bd6e300c;
* kohpangwei/group_DRO at cbbc1c5b0684 and yifei-he/ExcessMTL at b179956021c9: group DRO;
* rickgroen/cov-weighting at 64c296679cd3;
* tum-pbs/ConFIG at 94862437f451: MinMax and ReLoBRaLo.

The classes themselves are run. The rule of chao1224/Loss-Balanced-Task-Weighting at 63d0db6f8368 stands in the middle
of a training script, ``src/pcba_run.py``, and is stated here anew.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.golden.record import double, positive, short, to_lists, value_and_grad

FILE = Path(__file__).with_name("official_recorded.json")
CPU = torch.device("cpu")


def record(folder, seed=0):
    rng = np.random.default_rng(seed)
    torch.set_default_dtype(torch.float64)
    data = {
        "stch": [
            stch(rng, load(folder / "STCH" / "STCH_MTL", "LibMTL.weighting.STCH"), 1.0, 2, [3, 1, 4, 2, 5, 3]),
            stch(rng, load(folder / "STCH" / "STCH_MTL", "LibMTL.weighting.STCH"), 0.1, 0, 3 * [5]),
            stch(rng, load(folder / "LibMTL", "LibMTL.weighting.STCH"), 1.0, 2, 6 * [4]),
        ],
        "famo": [
            famo(rng, load(folder / "FAMO", "famo"), min_losses, delayed)
            for min_losses in ([0.0, 0.0, 0.0], [-2.1, -21.0, -0.5])
            for delayed in (False, True)
        ],
        "cov_weighting": [
            *[cov_weighting(rng, folder / "cov-weighting", decay, [1, 1, 1, 1]) for decay in (None, 0.9, 0.5, 1.0)],
            # Some losses nearly constant, where what is added to the variance counts.
            cov_weighting(rng, folder / "cov-weighting", None, [0.001, 0.003, 0.1, 1]),
        ],
        "lbtw": [lbtw(rng, alpha, epoch_lengths) for alpha in (0.5, 2.0) for epoch_lengths in ([3, 1, 6, 4], 4 * [5])],
        "softadapt": [
            softadapt(rng, folder / "SoftAdapt", variant, window)
            for variant in ("original", "normalized", "loss_weighted")
            for window in (2, 3, 4, 5, 6, 7)
        ],
        "group_dro": [group_dro(rng, folder, step_size) for step_size in (0.01, 1.0)],
        "minmax": minmax(rng, load(folder / "ConFIG" / "experiments" / "PINN", "lib_pinns.loss_weighter")),
        "relobralo": [
            relobralo(rng, load(folder / "ConFIG" / "experiments" / "PINN", "lib_pinns.loss_weighter"), keeps)
            for keeps in (1.0, 0.0, 0.7)
        ],
        "revised_uw": [revised_uw(rng, load(folder / "AutomaticWeightedLoss", "AutomaticWeightedLoss"), 4)],
        "scale_invariant": [
            scale_invariant(rng, load(folder / "nash-mtl", "methods.weight_methods"), weighted)
            for weighted in (False, True)
        ],
        "sliding_dwa": sliding_dwa(rng, load(folder / "nash-mtl", "methods.weight_methods"), window=5),
    }
    return to_lists(data)


def load(root, name):
    """A module of a clone, without its packages' own ``__init__``: those want data sets and what reads images."""
    top, *_ = name.split(".")
    for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == top]:
        del sys.modules[loaded]
    for parent in Path(name.replace(".", "/")).parents[:-1]:
        package = types.ModuleType(str(parent).replace("/", "."))
        package.__path__ = [str(root / parent)]
        sys.modules[package.__name__] = package
    with mock.patch.object(sys, "path", [str(root), *sys.path]):
        return importlib.import_module(name)


def in_libmtl(method, n_tasks):
    """An instance of one of LibMTL's classes, with what its trainer would set."""
    method.task_num, method.device = n_tasks, CPU
    method.init_param()
    return method


def backward_and_grad(backward, losses):
    """The scalar that a function calls ``backward`` on, and its gradient."""
    losses, scalars, original = double(losses).requires_grad_(), [], torch.Tensor.backward

    def keep(scalar):
        scalars.append(scalar.detach())
        original(scalar)

    with mock.patch.object(torch.Tensor, "backward", keep):
        backward(losses)
    (scalar,) = scalars
    return scalar, losses.grad


def in_rows(names, calls):
    return dict(zip(names, zip(*calls, strict=True), strict=True))


def stch(rng, module, mu, n_warmup_epochs, epoch_lengths):
    method = in_libmtl(module.STCH(), n_tasks=3)
    calls = []
    for method.epoch, epoch_length in enumerate(epoch_lengths):
        for _ in range(epoch_length):
            losses = positive(rng, 3, decades=2)
            backward = lambda losses: method.backward(losses, STCH_mu=mu, STCH_warmup_epoch=n_warmup_epochs)
            calls.append((losses, *backward_and_grad(backward, losses)))
    settings = {"mu": mu, "n_warmup_epochs": n_warmup_epochs, "epoch_lengths": epoch_lengths}
    return settings | in_rows(["losses", "values", "losses_grads"], calls)


def famo(rng, module, min_losses, delayed):
    """Fifty calls with its own defaults. Delayed as in its toy problem: updated by the losses of the next iterate."""
    method = module.FAMO(n_tasks=3, device=CPU)
    method.set_min_losses(double(min_losses))
    rates = np.linspace(-0.3, 0.1, 3)
    calls = []
    for step in range(50):
        distances = positive(rng, 3, decades=1)
        losses = short(min_losses + distances)
        after = short(min_losses + distances * np.exp(rates + 0.1 * rng.normal(size=3)))
        if delayed and step > 0:
            method.update(double(losses))
        value, losses_grad = value_and_grad(method.get_weighted_loss, losses)
        if not delayed:
            method.update(double(after))
        calls.append((losses, after, value, losses_grad, torch.softmax(method.w.detach(), 0)))
    (group,) = method.w_opt.param_groups
    settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], "delayed": delayed, "min_losses": min_losses}
    return settings | in_rows(["losses", "after", "values", "losses_grads", "weights"], calls)


def cov_weighting(rng, root, decay, decades):
    module = load(root, "losses.covweighting_loss")
    arguments = types.SimpleNamespace(
        device=CPU, mean_sort="full" if decay is None else "decay", mean_decay_param=1.0 if decay is None else decay
    )
    # Its 32 losses are computed from images: ours are handed through in their place.
    with (
        mock.patch.object(sys.modules["losses.base_loss"], "NUM_LOSSES", len(decades)),
        mock.patch.object(module.BaseLoss, "forward", lambda self, losses, target: list(losses)),
    ):
        method = module.CoVWeightingLoss(arguments)
        method.to_train()
        for name in ("running_mean_L", "running_mean_l", "running_S_l"):
            setattr(method, name, getattr(method, name).double())  # it asks for float32
        calls = []
        for _ in range(30):
            losses = positive(rng, len(decades), np.array(decades))
            calls.append((losses, *value_and_grad(lambda losses: method(losses, None), losses)))
    return {"decay": decay, "decades": decades} | in_rows(["losses", "values", "losses_grads"], calls)


def lbtw(rng, alpha, epoch_lengths):
    calls = []
    for epoch_length in epoch_lengths:
        epoch = positive(rng, (epoch_length, 3), decades=2)
        for losses in epoch:
            progress = (losses.astype(float) / epoch[0]) ** alpha
            calls.append((losses, 3 * progress / np.sum(progress)))
    return {"alpha": alpha, "epoch_lengths": epoch_lengths} | in_rows(["losses", "weights"], calls)


def softadapt(rng, root, variant, window):
    """Three windows and the weights after each."""
    package = load(root, "softadapt.algorithms")
    name = {"original": "SoftAdapt", "normalized": "NormalizedSoftAdapt", "loss_weighted": "LossWeightedSoftAdapt"}
    method = getattr(package, name[variant])(beta=0.1)
    windows = positive(rng, (3, window, 3), decades=2)
    weights = [method.get_component_weights(*double(losses.T), verbose=False) for losses in windows]
    return {"variant": variant, "windows": windows, "weights": weights}


def group_dro(rng, folder, step_size):
    """The official weights, and those of the ExcessMTL authors."""
    losses = positive(rng, (30, 3), decades=1)
    groups = types.SimpleNamespace(n_groups=3, group_counts=lambda: torch.ones(3), group_str=str)
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        module = load(folder / "group_DRO", "loss")
        official = module.LossComputer(None, is_robust=True, dataset=groups, alpha=0.2, step_size=step_size)
    excess_mtl = in_libmtl(load(folder / "ExcessMTL" / "LibMTL", "LibMTL.weighting.GroupDRO").GroupDRO(), n_tasks=3)
    backward = lambda losses: excess_mtl.backward(losses, robust_step_size=step_size)
    robust_loss = lambda losses: official.compute_robust_loss(losses, None)[0]
    return {
        "robust_step_size": step_size,
        "losses": losses,
        "official": in_rows(["values", "losses_grads"], [value_and_grad(robust_loss, call) for call in losses]),
        "excess_mtl": in_rows(["values", "losses_grads"], [backward_and_grad(backward, call) for call in losses]),
    }


def minmax(rng, module):
    method, losses = module.MinMaxWeighter(lr=1e-3), positive(rng, (40, 3), decades=1)
    return {"lr": 1e-3, "losses": losses, "logits": [method.get_weights(double(call)).clone() for call in losses]}


def relobralo(rng, module, probability):
    """``keeps`` are its draws, one for each call but the first."""
    losses = positive(rng, (30, 3), decades=0.5)
    keeps = (rng.uniform(size=30) < probability).astype(int)
    method = module.ReLoWeighter(beta=0.9, tau=0.5)
    with mock.patch.object(np.random, "binomial", side_effect=[[draw] for draw in keeps[1:]]):
        weights = [method.get_weights(double(call)) for call in losses]
    return {"temperature": 0.5, "alpha": 0.9, "keeps": keeps.tolist(), "losses": losses, "weights": weights}


def revised_uw(rng, module, n_tasks):
    sigma = short(positive(rng, n_tasks, decades=1) * rng.choice([-1, 1], size=n_tasks))
    losses = positive(rng, n_tasks, decades=4)
    method = module.AutomaticWeightedLoss(n_tasks)
    method.params.data = double(sigma)
    value, losses_grad = value_and_grad(lambda losses: method(*losses), losses)
    grads = {"losses_grad": losses_grad, "learned_grad": method.params.grad}
    return {"learned": sigma, "losses": losses, "value": value} | grads


def scale_invariant(rng, module, weighted):
    losses, weights = positive(rng, 5, decades=4), short(rng.normal(size=5)) if weighted else np.ones(5, np.float32)
    arguments = {"task_weights": double(weights)} if weighted else {}
    method = module.ScaleInvariantLinearScalarization(5, CPU, **arguments)
    value, losses_grad = value_and_grad(lambda losses: method.get_weighted_loss(losses)[0], losses)
    return {"weights": weights, "losses": losses, "value": value, "losses_grad": losses_grad}


def sliding_dwa(rng, module, window):
    method = module.DynamicWeightAverage(3, CPU, iteration_window=window)
    losses = positive(rng, (5 * window, 3), decades=1)
    calls = [value_and_grad(lambda losses: method.get_weighted_loss(losses)[0], call) for call in losses]
    return {"window": window, "temperature": method.temp, "losses": losses} | in_rows(["values", "losses_grads"], calls)


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(record(Path(sys.argv[1])), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
