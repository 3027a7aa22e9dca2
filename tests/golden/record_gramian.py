"""Records TorchJD's Gramian methods, in float64, into ``torchjd_gramian.json``; ``test_gramian_methods.py`` compares.

Run by hand, with the ``parity`` extra: ``python -m tests.golden.record_gramian``. TorchJD does not always agree with
itself: how far its result in float64 is from that in float32, and from that under noise of the size of float32's
rounding, is recorded too, and printed for every method.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
import torchjd.aggregation as peer
from torchjd.linalg import QuadprogProjector

from tests.golden.gramian_equations import RESIDUALS, disagreement, unstable
from tests.golden.record import double, short, to_lists

FILE = Path(__file__).with_name("torchjd_gramian.json")
SIZES = (1, 2, 3, 5, 8, 11, 20, 40)
METHODS = {
    "upgrad": peer.UPGrad,
    "dual_proj": peer.DualProj,
    "mgda": lambda: peer.MGDA(epsilon=1e-6, max_iters=2000),
    "cagrad": lambda: peer.CAGrad(c=0.5),
    "imtl_g": peer.IMTLG,
    "aligned_mtl": peer.AlignedMTL,
    "aligned_mtl_median": lambda: peer.AlignedMTL(scale_mode="median"),
    "aligned_mtl_rmse": lambda: peer.AlignedMTL(scale_mode="rmse"),
    "config": peer.ConFIG,
    "fairgrad": lambda: peer.FairGrad(alpha=1.0),
    "krum": lambda: peer.Krum(n_byzantine=1, n_selected=2),
    "pcd": peer.PCD,
    "pcgrad": peer.PCGrad,
    "gradvac": peer.GradVac,
}
RANDOM = ("pcgrad", "gradvac")  # comparable where there is but one order


def jacobian(rng, m, kind):
    n = m + 4
    rank = (m + 1) // 2
    if kind == "deficient":  # in whole numbers: rounding would make the rows independent again
        return (rng.integers(-3, 4, size=(m, rank)) @ rng.integers(-3, 4, size=(rank, n))).astype(np.float32)
    if kind == "rounded":  # as here
        return (rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))).astype(np.float32)
    rows = rng.normal(size=(m, n)) + (0.5 if kind == "aligned" else 0.0)
    return short(rows * 10 ** rng.uniform(-1.5, 1.5, size=(m, 1)) if kind == "scales" else rows)


def record(seed):
    rng, more = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    cases = [(kind, jacobian(rng, m, kind)) for m in SIZES for kind in ("generic", "aligned", "deficient", "scales")]
    cases += [("rounded", jacobian(more, m, "rounded")) for m in SIZES]
    sequence = [jacobian(rng, 2, kind) for kind in 5 * ["generic"] + 5 * ["scales"]]
    gradvac = peer.GradVac()
    products = [short(rng.normal(size=(4, 4)) + 2 * np.eye(4)) for _ in range(10)]  # of two batches: not symmetric
    gramians = [short(rows @ rows.T) for rows in rng.normal(size=(10, 4, 9))]
    return {
        "cases": [{"kind": kind, "jacobian": rows, "methods": dict(results(rows))} for kind, rows in cases],
        "modo": weights_of(peer.MoDoWeighting(), products),
        "sdmgrad": weights_of(peer.SDMGradWeighting(), products),
        "cr_mogm": weights_of(peer.CRMOGMWeighting(peer.IMTLGWeighting()), gramians),
        "gradvac_sequence": {"jacobians": sequence, "gradients": [gradvac(double(rows)) for rows in sequence]},
        "pcd": [
            pcd_sequence(more, 3),
            pcd_sequence(more, 4, beta=0.5),
            pcd_sequence(more, 5, tau=[0.0, 0.1, 0.3, 0.6]),
        ],
        "keywords": [keywords(jacobian(more, 4, kind)) for kind in ("generic", "aligned")],
    }


def weights_of(weighting, matrices):
    return {"matrices": matrices, "weights": [weighting(double(matrix)).clone() for matrix in matrices]}


def keywords(rows):
    """Results with preferences and thresholds that are not the default ones."""
    preference = torch.tensor([0.1, 0.4, 2.0, 0.7], dtype=torch.float64)
    methods = {
        "upgrad": peer.UPGrad(preference),
        "dual_proj": peer.DualProj(preference),
        "aligned_mtl": peer.AlignedMTL(preference),
        "config": peer.ConFIG(preference),
        "upgrad, norm_eps": peer.UPGrad(projector=QuadprogProjector(norm_eps=1e9, reg_eps=1e-4)),
        "upgrad, reg_eps": peer.UPGrad(projector=QuadprogProjector(norm_eps=1e-4, reg_eps=1e-2)),
        "aligned_mtl, rmse": peer.AlignedMTL(preference, scale_mode="rmse"),
        "pcd, tau": peer.PCD(tau=0.5),
        "cagrad, c": peer.CAGrad(c=1.5),
        "fairgrad, alpha": peer.FairGrad(alpha=2.0),
    }
    gradients = {name: method(double(rows)) for name, method in methods.items()}
    weighting = peer.SDMGradWeighting(lr=0.1, pref_vector=preference)
    gradients["sdmgrad, lr"] = weighting(double(rows @ rows.T)) @ double(rows)
    return {"preference": preference, "jacobian": rows, "gradients": gradients}


def pcd_sequence(rng, m, tau=0.02, beta=0.999):
    """Ten calls with gradients whose norms change from call to call."""
    method = peer.PCD(torch.tensor(tau, dtype=torch.float64) if isinstance(tau, list) else tau, beta)
    jacobians = [jacobian(rng, m, "scales") for _ in range(10)]
    gradients = [method(double(rows)) for rows in jacobians]
    return {"tau": tau, "beta": beta, "jacobians": jacobians, "gradients": gradients}


def results(rows):
    m = len(rows)
    noisy = rows * (1 + 6e-8 * np.random.default_rng(m).uniform(-1, 1, rows.shape))
    for name, make in METHODS.items():
        if (name == "krum" and m < 4) or (name in RANDOM and m > 2):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gradient, single, noised = (make()(x) for x in (double(rows), torch.tensor(rows), double(noisy)))
            result = {"gradient": gradient}
            for source, other in ("in_float32", single), ("under_noise", noised):
                difference = torch.linalg.norm(gradient - other.double()) / np.linalg.norm(rows)
                result[f"difference_{source}"] = float(difference)
            if name == "fairgrad":  # which may stop far from a solution, at the same point each time
                weights = make().gramian_weighting(double(rows) @ double(rows).T)
                result["residual"] = RESIDUALS[name](rows.astype(float), weights.numpy())
        yield name, result


def print_table(cases):
    print(f"{'method':20}{'matrices':>10}{'unstable':>10}{'worst difference':>18}")
    for name in METHODS:
        found = [case["methods"][name] for case in cases if name in case["methods"]]
        n_unstable, worst = sum(map(unstable, found)), max(map(disagreement, found))
        print(f"{name:20}{len(found):10}{n_unstable:10}{worst:18.1e}")


if __name__ == "__main__":
    recorded = to_lists(record(seed=0))
    with FILE.open("w") as file:
        json.dump(recorded, file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
    print_table(recorded["cases"])
