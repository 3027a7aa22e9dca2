"""Records TorchJD's GradDrop and TrimmedMean, in float64, into ``torchjd_coordinatewise.json``.

Run by hand, with the ``parity`` extra: ``python -m tests.golden.record_coordinatewise``. ``test_coordinatewise.py``
compares this library with it. Of GradDrop, whose draws are PyTorch's, the moments of many draws are recorded.
"""

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
import torchjd.aggregation as peer

from tests.golden.record import double, short, to_lists

FILE = Path(__file__).with_name("torchjd_coordinatewise.json")
SIZES = [(1, 0), (2, 0), (3, 0), (3, 1), (5, 1), (5, 2), (8, 1), (8, 3), (11, 3), (20, 4), (40, 1), (40, 10)]
# Named, because a function cannot be held as data; test_coordinatewise.py has the same.
PURITIES = {"identity": lambda p: p, "steep": lambda p: 1 / (1 + torch.exp(-6 * (p - 0.5)))}


def record(seed):
    rng = np.random.default_rng(seed)
    return {
        "torchjd": importlib.metadata.version("torchjd"),
        "seed": seed,
        "trimmed_mean": [case for m, k in SIZES for case in trimmed_means(rng, m, k)],
        "graddrop": [
            graddrop(rng, m, leaks, purity)
            for m in (2, 3, 8)
            for leaks, purity in ((False, "identity"), (True, "identity"), (True, "steep"))
        ],
    }


def trimmed_means(rng, m, k):
    """Entries of any size, and small whole numbers, many of them equal."""
    rows = rng.normal(size=(m, 5)) * 10 ** rng.uniform(-2, 2, size=(m, 1))
    for jacobian in short(rows), rng.integers(-2, 3, size=(m, 5)).astype(np.float32):
        gradient = peer.TrimmedMean(k)(double(jacobian))
        # In full: this library is compared in float64 too.
        yield {"trim_number": k, "jacobian": jacobian, "gradient": [x.hex() for x in gradient.tolist()]}


def graddrop(rng, m, leaks, purity, n_draws=10_000):
    """Means, variances and fourth central moments over the draws; the last two columns are of one sign."""
    jacobian = short(rng.normal(size=(m, 6)))
    jacobian[:, 4:] = np.abs(jacobian[:, 4:]) * np.float32([1, -1])
    leak = short(rng.uniform(size=m)) if leaks else np.zeros(m, np.float32)
    torch.manual_seed(int(rng.integers(2**31)))
    aggregator, matrix = peer.GradDrop(PURITIES[purity], double(leak) if leaks else None), double(jacobian)
    draws = np.array([aggregator(matrix).numpy() for _ in range(n_draws)])
    beside = draws - draws.mean(0)
    return {
        "jacobian": jacobian,
        "leak": leak,
        "f": purity,
        "n_draws": n_draws,
        "mean": draws.mean(0),
        "variance": np.mean(beside**2, axis=0),
        "fourth": np.mean(beside**4, axis=0),
    }


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(to_lists(record(seed=0)), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
