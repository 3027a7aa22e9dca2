"""Every Gramian method against TorchJD's: whole calls, and calls in which the Gramian costs next to nothing.

Run by hand: ``python tests/benchmarks/gramian_methods.py``. Needs the ``parity`` extra, and a machine with nothing else
to do. The gradients are random mixtures of random vectors, as many as there are tasks, and so conflict as those of a
training do; ``--independent`` takes the random vectors themselves, which are all but orthogonal and leave TorchJD's
active-set solvers next to nothing to do. Without the Gramian there are as many parameters as tasks, and rows with the
same norms and angles. Every call takes the next of three matrices, so that no solver starts at its solution.
"""

import argparse
import collections
import itertools
import statistics
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation as peer
from interleave import interleave, median_of_ratios

from mtlbalance import aggregation, base
from mtlbalance.states import SeenState

SHAPES = [(3, 10**5), (11, 10**5), (3, 2 * 10**6), (40, 10**5)]
N_MATRICES = 3
NO_METHOD = "(no method)"
HEADER = f"{'ours':>10} {'TorchJD':>10} {'TorchJD / ours':>19} {'of minima':>11}"


def methods(m):
    """Name to our aggregator and TorchJD's, with the same hyperparameters."""
    wrong = min(2, m - 3)
    return {
        NO_METHOD: (first_row(), lambda rows: (rows @ rows.T)[0] @ rows),
        "upgrad": (aggregation.upgrad(), peer.UPGrad()),
        "dual_proj": (aggregation.dual_proj(), peer.DualProj()),
        "mgda": (aggregation.mgda(), peer.MGDA()),
        "pcgrad": (aggregation.pcgrad(), peer.PCGrad()),
        "gradvac": (aggregation.gradvac(), peer.GradVac()),
        "cagrad": (aggregation.cagrad(0.5), peer.CAGrad(0.5)),
        "nash_mtl": (aggregation.nash_mtl(), peer.NashMTL(m)),
        "aligned_mtl": (aggregation.aligned_mtl(), peer.AlignedMTL()),
        "imtl_g": (aggregation.imtl_g(), peer.IMTLG()),
        "fairgrad": (aggregation.fairgrad(), peer.FairGrad(1.0)),
        "config": (aggregation.config(), peer.ConFIG()),
        "krum": (aggregation.krum(wrong), peer.Krum(wrong)),
        "pcd": (aggregation.pcd(), peer.PCD()),
    }


def first_row():
    """What every method does with the Jacobian, and nothing else: the weights are the Gramian's first row."""

    def init(m, params, dtype):
        del params, dtype
        return SeenState(jnp.zeros(m, jnp.int32))

    def weigh(state, gramian, values, mask):
        del values, mask
        return gramian[0], state

    return base.aggregator(init, gramian_weighting=weigh)


def jacobians(m, n, independent):
    """Jacobians of n parameters, and some of m parameters whose rows have the same norms and angles."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(N_MATRICES, m, n)).astype(np.float32)
    mixtures = np.stack(N_MATRICES * [np.eye(m)]) if independent else rng.normal(size=(N_MATRICES, m, m))
    mixtures = mixtures.astype(np.float32)
    return {"whole": mixtures @ vectors, "without the Gramian": np.float32(n**0.5) * mixtures}


def ours(method, matrices):
    """A function that makes the next call of a training, with the state donated."""
    apply, state = jax.jit(method.apply, donate_argnums=0), method.init(matrices.shape[1:])
    arguments = itertools.cycle([jnp.array(matrix) for matrix in matrices])

    def call():
        nonlocal state
        output, state = apply(state, next(arguments))
        jax.block_until_ready((output, state))

    return call


def theirs(method, matrices):
    arguments = itertools.cycle([torch.tensor(matrix) for matrix in matrices])
    return lambda: method(next(arguments))


def compare(m, n, arguments):
    ratios = collections.defaultdict(list)
    for what, matrices in jacobians(m, n, arguments.independent).items():
        print(f"\n{m} tasks, {n} parameters, {what}\n{'':14} {HEADER}")
        for name, (method, aggregator) in methods(m).items():
            if name not in (arguments.methods or methods(m)):
                continue
            functions = {"ours": ours(method, matrices), "TorchJD": theirs(aggregator, matrices)}
            times = interleave(functions, arguments.rounds)
            if name != NO_METHOD:
                ratios[what].append(median_of_ratios(times["TorchJD"], times["ours"]))
            print(line(name, times), flush=True)
        print(f"{'geometric mean':14} {statistics.geometric_mean(ratios[what]):41.2f}x")


def line(name, times):
    ours, theirs = min(times["ours"]), min(times["TorchJD"])
    ratio = median_of_ratios(times["TorchJD"], times["ours"])
    return f"{name:14} {1e3 * ours:10.3f} {1e3 * theirs:10.3f} {ratio:18.2f}x {theirs / ours:10.2f}x"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2, help="TorchJD's threads")
    parser.add_argument("--independent", action="store_true", help="rows that are all but orthogonal")
    parser.add_argument("--methods", nargs="*", help="all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # cvxpy's, of inaccurate solutions
    print(
        "Shortest times in ms; TorchJD / ours: the median of the rounds' ratios, and the ratio of the shortest times."
    )
    for m, n in SHAPES:
        compare(m, n, arguments)
