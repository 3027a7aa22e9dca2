"""Records what official codes compute from gradients over many calls, in float64, into ``official_gradients.json``.

``test_gradients.py`` compares. Run by hand, with the ``parity`` extra, ``cvxpy`` and ``scipy``:
``python -m tests.golden.record_gradients FOLDER``, where FOLDER contains clones of these GitHub repositories, each in a
folder of its name:

* median-research-group/LibMTL at 4336804847ea: GradNorm, MoCo, DB-MTL, IMTL;
* tum-pbs/ConFIG at 94862437f451: M-ConFIG and learning-rate annealing;
* NVIDIA/physicsnemo-sym at 9dac911addc2: learning-rate annealing and GradNorm;
* Cranial-XIX/FAMO at 0a6ad06dbdd5: MGDA, CAGrad and IMTL-G of logarithms.

The classes themselves are run. They are given losses that are linear in one parameter vector, which stays at zero: so
the losses and their gradients are exactly those of a sequence. Every method is given the same sequences.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from tests.golden.record import double, positive, short, to_lists
from tests.golden.record_official import CPU, in_libmtl, in_rows, load

FILE = Path(__file__).with_name("official_gradients.json")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def record(folder, seed=0):
    rng = np.random.default_rng(seed)
    torch.set_default_dtype(torch.float64)
    sequences = [sequence(rng, *shape) for shape in ((30, 2, 5), (30, 3, 8), (20, 5, 20))]
    stepped = [("sgd", 0.01), ("adam", 0.025)]
    aggregator = load_aggregators(folder / "physicsnemo-sym")
    weighter = load(folder / "ConFIG" / "experiments" / "PINN", "lib_pinns.loss_weighter")
    momentum = load(folder / "ConFIG", "conflictfree.momentum_operator")
    logarithms = load(folder / "FAMO", "methods.weight_methods")
    names = "GradNorm", "MoCo", "DB_MTL", "IMTL"
    libmtl = {name: getattr(load(folder / "LibMTL", f"LibMTL.weighting.{name}"), name) for name in names}

    def each(run, *arguments):
        return [{"sequence": i} | run(given, *arguments) for i, given in enumerate(sequences)]

    data = {
        "sequences": sequences,
        "gradnorm": [
            case
            for alpha, (name, lr) in zip([1.5, 0.5], stepped, strict=True)
            for case in each(gradnorm, libmtl["GradNorm"], alpha, name, lr)
        ],
        # Losses this small leave the weights nearly equal at the default rate.
        "moco": [
            case
            for settings in ([0.5, 0.5, 0.1, 0.5, 0.0], [0.9, 0.0, 2.0, 0.25, 0.3])
            for case in each(moco, libmtl["MoCo"], *settings)
        ],
        "db_mtl": [case for sigma in (0.0, 0.5) for case in each(db_mtl, libmtl["DB_MTL"], 0.9, sigma)],
        "imtl": [case for name, lr in stepped for case in each(imtl, libmtl["IMTL"], name, lr)],
        "m_config": [
            case
            for betas in ([0.9, 0.999], [0.5, 0.9])
            for case in each(m_config, momentum.PseudoMomentumOperator, *betas)
        ],
        "lr_annealing_of_config": each(lr_annealing_of_config, weighter.LRAWeighter, 0.9),
        "lr_annealing_of_physicsnemo": each(lr_annealing_of_physicsnemo, aggregator.LRAnnealing, 0.01),
        "gradnorm_of_physicsnemo": each(gradnorm_of_physicsnemo, aggregator.GradNorm, 1.0, 0.01),
        "log_mgda": each(log_weighted, logarithms.LOG_MGDA),
        "log_imtl_g": each(log_weighted, logarithms.LOG_IMTLG),
        "log_cagrad": [case for c in (0.4, 0.8) for case in each(log_cagrad, logarithms.LOG_CAGrad, c)],
    }
    return to_lists(data)


def sequence(rng, n_calls, m, n):
    """Losses that fall at different rates, and gradients of which some stay up to 100 times as long as others."""
    falls = np.exp(-np.linspace(0, 0.1, m) * np.arange(n_calls)[:, None])
    losses = short(positive(rng, m, decades=1) * falls * positive(rng, (n_calls, m), decades=0.2))
    lengths = positive(rng, (m, 1), decades=2) * positive(rng, (n_calls, m, 1), decades=0.5)
    return {"losses": losses, "jacobians": short(lengths * rng.normal(size=(n_calls, m, n)))}


def linear_losses(losses, jacobian):
    """A parameter vector and losses that have these gradients with respect to it."""
    theta = torch.nn.Parameter(torch.zeros(jacobian.shape[1]))
    return theta, double(losses) + double(jacobian) @ theta


def calls_of(sequence):
    return zip(sequence["losses"], sequence["jacobians"], strict=True)


# LibMTL. Its trainer has a network; the classes ask it for parameters, and to forget their gradients.


def libmtl_calls(cls, sequence, keywords, after=lambda method: {}, **fields):
    """Of every call its weights, the gradient that it left at the parameters, and what ``after`` does then."""

    class Method(cls):
        rep_grad = False

        def get_share_params(self):
            return [self.theta]

        def zero_grad_share_params(self):
            self.theta.grad.zero_()

    _, m, n = sequence["jacobians"].shape
    method = Method()
    method.theta = torch.nn.Parameter(torch.zeros(n))
    for name, value in fields.items():
        setattr(method, name, value)
    method = in_libmtl(method, m)
    read = after(method)
    for losses, jacobian in calls_of(sequence):
        method.theta, given = linear_losses(losses, jacobian)
        weights = method.backward(given, **keywords)
        yield {"weights": weights, "gradients": method.theta.grad} | {name: step() for name, step in read.items()}


def columns(calls, *names):
    """Each of these numbers over all calls."""
    calls = list(calls)
    return {name: [call[name] for call in calls] for name in names}


def stepping(name, lr):
    """Its learned parameter after a step of a torch optimizer, taken after every call."""

    def after(method):
        optimizer = OPTIMIZERS[name]([method.loss_scale], lr=lr)

        def step():
            optimizer.step()
            optimizer.zero_grad()
            return method.loss_scale.detach().clone()

        return {"learned": step}

    return after


def gradnorm(sequence, cls, alpha, name, lr):
    """The epoch after the first; the losses of the sequence's first call stand for the first epoch's mean."""
    buffer = double(sequence["losses"][0])[:, None]
    calls = libmtl_calls(cls, sequence, {"alpha": alpha}, stepping(name, lr), epoch=1, train_loss_buffer=buffer)
    return {"alpha": alpha, "optimizer": name, "lr": lr} | columns(calls, "gradients", "learned")


def moco(sequence, cls, *settings):
    names = ["beta", "beta_sigma", "gamma", "gamma_sigma", "rho"]
    keywords = {f"MoCo_{name}": value for name, value in zip(names, settings, strict=True)}
    calls = libmtl_calls(cls, sequence, keywords)
    return {"settings": dict(zip(names, settings, strict=True))} | columns(calls, "weights", "gradients")


def db_mtl(sequence, cls, beta, beta_sigma):
    calls = libmtl_calls(cls, sequence, {"DB_beta": beta, "DB_beta_sigma": beta_sigma})
    return {"beta": beta, "beta_sigma": beta_sigma} | columns(calls, "gradients")


def imtl(sequence, cls, name, lr):
    calls = libmtl_calls(cls, sequence, {}, stepping(name, lr))
    return {"optimizer": name, "lr": lr} | columns(calls, "gradients", "learned")


# ConFIG.


def m_config(sequence, cls, beta_1, beta_2):
    """One gradient a call, in turn."""
    m = len(sequence["losses"][0])
    operator = cls(num_vectors=m, beta_1=beta_1, beta_2=beta_2)
    gradients = [
        operator.calculate_gradient(call % m, double(jacobian[call % m]))
        for call, jacobian in enumerate(sequence["jacobians"])
    ]
    return {"beta_1": beta_1, "beta_2": beta_2, "gradients": gradients}


def lr_annealing_of_config(sequence, cls, beta):
    weighter = cls(beta)
    weights = [weighter.get_weights(grads=double(jacobian)).clone() for jacobian in sequence["jacobians"]]
    return {"alpha": 1 - beta, "weights": weights}


# PhysicsNeMo.


def load_aggregators(root):
    """The file alone: of what it imports only the gradient is called, and that is ``torch.autograd.grad``."""
    gradients, folders = (types.ModuleType(f"physicsnemo.sym.{name}") for name in ("eq.derivatives", "hydra"))
    gradients.gradient_autodiff = lambda y, x: torch.autograd.grad(y, x, create_graph=True)
    folders.to_absolute_path = folders.add_hydra_run_path = None
    path = root / "physicsnemo" / "sym" / "loss" / "aggregator.py"
    spec = importlib.util.spec_from_file_location("aggregator", path)
    module = importlib.util.module_from_spec(spec)
    parents = {name: types.ModuleType(name) for name in ("physicsnemo", "physicsnemo.sym", "physicsnemo.sym.eq")}
    with mock.patch.dict(sys.modules, parents | {gradients.__name__: gradients, folders.__name__: folders}):
        spec.loader.exec_module(module)
    return module


def lr_annealing_of_physicsnemo(sequence, cls, alpha):
    theta = torch.nn.Parameter(torch.zeros(sequence["jacobians"].shape[2]))
    method, weights = cls([theta], len(sequence["losses"][0]), alpha=alpha), []
    for step, (losses, jacobian) in enumerate(calls_of(sequence)):
        method(dict(enumerate(double(losses) + double(jacobian) @ theta)), step)
        weights.append(method.lmbda_ema.clone())
    return {"alpha": alpha, "weights": weights}


def gradnorm_of_physicsnemo(sequence, cls, alpha, lr):
    """Its weights and the gradient with respect to their logarithms, which SGD steps down."""
    theta = torch.nn.Parameter(torch.zeros(sequence["jacobians"].shape[2]))
    # It takes the last parameter but one for the last shared layer.
    method = cls([theta, theta], len(sequence["losses"][0]), alpha=alpha)
    optimizer, calls = torch.optim.SGD([method.lmbda], lr=lr), []
    for step, (losses, jacobian) in enumerate(calls_of(sequence)):
        loss = method(dict(enumerate(double(losses) + double(jacobian) @ theta)), step)
        optimizer.zero_grad()
        loss.backward()
        calls.append((torch.exp(method.lmbda), method.lmbda.grad.clone()))
        optimizer.step()
    return {"alpha": alpha, "lr": lr} | in_rows(["weights", "log_weights_grads"], calls)


# FAMO's methods in log space.


def log_weighted(sequence, cls):
    """The weights of the logarithms, MGDA's in float32, and the gradient of the loss that it returns."""
    calls = []
    for given in calls_of(sequence):
        theta, losses = linear_losses(*given)
        method = cls(len(losses), CPU)
        loss, extra = method.get_weighted_loss(losses=losses, shared_parameters=[theta])
        loss.backward()
        calls.append((extra["weights"].double(), theta.grad))
    return in_rows(["weights", "gradients"], calls)


def log_cagrad(sequence, cls, c):
    """The gradient that it writes, before and after its clipping to length 1."""
    calls = []
    for given in calls_of(sequence):
        gradients = []
        for max_norm in (0.0, 1.0):
            theta, losses = linear_losses(*given)
            method = cls(len(losses), CPU, c=c, max_norm=max_norm)
            _, extra = method.backward(losses=losses, shared_parameters=[theta])
            gradients.append(theta.grad)
        calls.append((double(extra["weights"]), *gradients))
    return {"c": c} | in_rows(["weights", "gradients", "clipped"], calls)


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(record(Path(sys.argv[1])), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
