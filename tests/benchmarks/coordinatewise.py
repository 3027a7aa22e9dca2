"""GradDrop and the trimmed mean against TorchJD's: whole calls.

Run by hand: ``python tests/benchmarks/coordinatewise.py``. Needs the ``parity`` extra, and a machine with nothing else
to do. Beside them a plain sum of the rows, which must move the same memory.
"""

import argparse
import collections

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation as peer
from gramian_methods import ours
from interleave import HEADER, REST, compared, interleave, median_of_ratios, row

from mtlbalance import aggregation

SHAPES = [(3, 10**5), (8, 10**6), (11, 10**5), (40, 10**5)]
TRIMMED = {3: (1,), 8: (1,), 11: (1, 3), 40: (1, 10)}


def floor(matrix):
    add, jacobian = jax.jit(lambda rows: sum(list(rows))), jnp.array(matrix)
    return lambda: jax.block_until_ready(add(jacobian))


def measure(rounds, quick=False):
    for m, n in SHAPES[:1] if quick else SHAPES:
        yield from compare(m, n, rounds)


def compare(m, n, rounds):
    matrix = np.random.default_rng(0).normal(size=(m, n)).astype(np.float32)
    tensor = torch.tensor(matrix)
    methods = {f"trimmed_mean, k = {k}": (aggregation.trimmed_mean(k), peer.TrimmedMean(k)) for k in TRIMMED[m]}
    methods["graddrop"] = aggregation.graddrop(), peer.GradDrop()
    print(f"\n{m} tasks, {n} parameters\n{HEADER} {'of the floor':>13}")
    for name, (method, aggregator) in methods.items():
        functions = {
            "ours": ours(method, matrix[None]),
            "TorchJD": lambda aggregator=aggregator: aggregator(tensor),
            "floor": floor(matrix),
        }
        times = interleave(functions, rounds, REST)
        of_floor = median_of_ratios(times["ours"], times["floor"])
        print(f"{row(name, times['ours'], times['TorchJD'], 1)} {of_floor:12.2f}x", flush=True)
        group = "GradDrop" if name == "graddrop" else "trimmed mean"
        yield compared(group, f"{m} x {n:,} {name}", "TorchJD", times["ours"], times["TorchJD"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2, help="TorchJD's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    collections.deque(measure(arguments.rounds), maxlen=0)
