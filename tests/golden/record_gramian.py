"""Records TorchJD's Gramian methods, in float64, into ``torchjd_gramian.json``; ``test_gramian_methods.py`` compares.

Run by hand, with the ``parity`` extra: ``python -m tests.golden.record_gramian``. TorchJD does not always agree with
itself: how far its result in float32 is from that in float64 is recorded too.
"""

import json
import warnings
from pathlib import Path

import numpy as np
import torch
import torchjd.aggregation as peer

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
    if kind == "deficient":  # in whole numbers: rounding would make the rows independent again
        rank = (m + 1) // 2
        return (rng.integers(-3, 4, size=(m, rank)) @ rng.integers(-3, 4, size=(rank, n))).astype(np.float32)
    rows = rng.normal(size=(m, n)) + (0.5 if kind == "aligned" else 0.0)
    return short(rows * 10 ** rng.uniform(-1.5, 1.5, size=(m, 1)) if kind == "scales" else rows)


def record(seed):
    rng = np.random.default_rng(seed)
    cases = []
    for m in SIZES:
        for kind in ("generic", "aligned", "deficient", "scales"):
            rows = jacobian(rng, m, kind)
            cases.append({"kind": kind, "jacobian": rows, "methods": dict(results(rows))})
    sequence = [jacobian(rng, 2, kind) for kind in 5 * ["generic"] + 5 * ["scales"]]
    gradvac = peer.GradVac()
    products = [short(rng.normal(size=(4, 4)) + 2 * np.eye(4)) for _ in range(10)]  # of two batches: not symmetric
    gramians = [short(rows @ rows.T) for rows in rng.normal(size=(10, 4, 9))]
    return {
        "cases": cases,
        "modo": weights_of(peer.MoDoWeighting(), products),
        "sdmgrad": weights_of(peer.SDMGradWeighting(), products),
        "cr_mogm": weights_of(peer.CRMOGMWeighting(peer.IMTLGWeighting()), gramians),
        "gradvac_sequence": {"jacobians": sequence, "gradients": [gradvac(double(rows)) for rows in sequence]},
    }


def weights_of(weighting, matrices):
    return {"matrices": matrices, "weights": [weighting(double(matrix)).clone() for matrix in matrices]}


def results(rows):
    m = len(rows)
    for name, make in METHODS.items():
        if (name == "krum" and m < 4) or (name in RANDOM and m > 2):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gradient = make()(double(rows))
            single = make()(torch.tensor(rows)).double()
        difference = torch.linalg.norm(gradient - single) / np.linalg.norm(rows)
        yield name, {"gradient": gradient, "difference_in_float32": float(difference)}


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(to_lists(record(seed=0)), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
