"""LibMTL's rules, given the tasks' gradients, against ours: what stands between the backward passes and the optimizer.

Run by hand: ``python tests/benchmarks/libmtl_rules.py FOLDER``, where FOLDER contains a clone of
median-research-group/LibMTL named ``LibMTL``. Needs the ``parity`` extra, for some rules ``scipy``, ``cvxpy`` and
``qpsolvers[quadprog]``, and a machine with nothing else to do. The rules' own classes run; only their backward passes
are taken away. The hyperparameters are LibMTL's defaults, and the gradients those of ``gramian_methods.py``.
"""

import argparse
import collections
import sys
import types
import warnings
from importlib import import_module
from pathlib import Path

import torch
from gramian_methods import WHOLE, jacobians, ours
from interleave import REST, Row, compared, interleave

from mtlbalance import aggregation

SHAPES = [(3, 10**5), (11, 10**5)]
# LibMTL's class and what its trainer hands it; ours.
RULES = {
    "MGDA": ({"mgda_gn": "none"}, aggregation.mgda),
    "PCGrad": ({}, aggregation.pcgrad),
    "GradVac": ({"GradVac_beta": 0.5, "GradVac_group_type": 0}, aggregation.gradvac),
    "CAGrad": ({"calpha": 0.5, "rescale": 1}, lambda: aggregation.cagrad(0.5)),
    "Nash_MTL": ({"update_weights_every": 1, "optim_niter": 20, "max_norm": 1.0}, aggregation.nash_mtl),
    "Aligned_MTL": ({}, aggregation.aligned_mtl),
    "FairGrad": ({"FairGrad_alpha": 1.0}, aggregation.fairgrad),
    "ExcessMTL": ({"robust_step_size": 1e-2}, lambda: aggregation.excess_mtl(1e-2)),
    "UPGrad": ({"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4}, aggregation.upgrad),
}


def load(folder, name):
    """A rule of the clone, without its package's ``__init__``: that wants data sets and what reads images."""
    for package in "LibMTL", "LibMTL.weighting":
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = [str(folder / "LibMTL" / package.replace(".", "/"))]
    return getattr(import_module(f"LibMTL.weighting.{name}"), name)


def theirs(cls, keywords, matrices):
    """A call of the rule, which finds the gradients where its trainer's network would have left them."""
    _, m, n = matrices.shape
    tensors = collections.deque(torch.tensor(matrix) for matrix in matrices)
    theta = torch.nn.Parameter(torch.zeros(n))
    theta.grad = torch.zeros(n)

    class Rule(cls):
        rep_grad, task_num, device = False, m, torch.device("cpu")
        encoder = torch.nn.Identity()  # ExcessMTL's weighted sum is one more backward pass, which is not counted

        def get_share_params(self):
            return [theta]

        def zero_grad_share_params(self):
            theta.grad.zero_()

        def _compute_grad(self, losses, mode, rep_grad=False):
            tensors.rotate()
            return tensors[0].clone()  # some rules change it

    rule = Rule()
    rule.init_param()
    losses = torch.ones(m, requires_grad=True)
    return lambda: rule.backward(losses, **keywords)


def measure(rounds, quick=False, *, folder):
    warnings.simplefilter("ignore")
    for m, n in SHAPES[:1] if quick else SHAPES:
        matrices, group = jacobians(m, n, independent=False)[WHOLE], f"LibMTL's rules, {m} tasks x {n:,} parameters"
        for name, (keywords, method) in RULES.items():
            try:
                call = theirs(load(folder, name), keywords, matrices)
                call()
            except Exception as error:  # whatever a peer's rule raises: that it does not run is the result
                row = Row(group, name, "LibMTL", note=f"does not run: {first_sentence(error)}")
            else:
                times = interleave({"ours": ours(method(), matrices), "LibMTL": call}, rounds, REST)
                row = compared(group, name, "LibMTL", times["ours"], times["LibMTL"])
            print(line(row), flush=True)
            yield row


def first_sentence(error):
    return str(error).strip().partition("\n")[0].partition(". ")[0]


def line(row):
    if row.note:
        return f"{row.group} {row.what:12} {row.note}"
    times = f"{1e3 * row.ours:8.3f} ms {1e3 * row.theirs:8.3f} ms"
    return f"{row.group} {row.what:12} {times} {row.median:8.2f}x {row.minima:8.2f}x"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    collections.deque(measure(arguments.rounds, folder=arguments.folder), maxlen=0)
