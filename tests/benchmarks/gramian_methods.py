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
from interleave import REST, Row, compared, interleave

from mtlbalance import aggregation, base
from mtlbalance.states import SeenState

SHAPES = [(3, 10**5), (11, 10**5), (3, 2 * 10**6), (40, 10**5)]
N_MATRICES = 3
NO_METHOD = "(no method)"
WHOLE, WITHOUT = "whole", "without the Gramian"
WITHOUT_METHOD = {
    WHOLE: "the Gramian and the weighted sum alone",
    WITHOUT: "a bare call, m x m numbers",
}
HEADER = f"{'ours':>10} {'TorchJD':>10} {'TorchJD / ours':>19} {'of minima':>11}"


def methods(m):
    """Name to our aggregator and what makes TorchJD's, with the same hyperparameters: some want a solver installed."""
    wrong = min(2, m - 3)
    return {
        NO_METHOD: (first_row(), lambda: lambda rows: (rows @ rows.T)[0] @ rows),
        "upgrad": (aggregation.upgrad(), peer.UPGrad),
        "dual_proj": (aggregation.dual_proj(), peer.DualProj),
        "mgda": (aggregation.mgda(), peer.MGDA),
        "pcgrad": (aggregation.pcgrad(), peer.PCGrad),
        "gradvac": (aggregation.gradvac(), peer.GradVac),
        "cagrad": (aggregation.cagrad(0.5), lambda: peer.CAGrad(0.5)),
        "nash_mtl": (aggregation.nash_mtl(), lambda: peer.NashMTL(m)),
        "aligned_mtl": (aggregation.aligned_mtl(), peer.AlignedMTL),
        "imtl_g": (aggregation.imtl_g(), peer.IMTLG),
        "fairgrad": (aggregation.fairgrad(), lambda: peer.FairGrad(1.0)),
        "config": (aggregation.config(), peer.ConFIG),
        "krum": (aggregation.krum(wrong), lambda: peer.Krum(wrong)),
        "pcd": (aggregation.pcd(), peer.PCD),
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
    return {WHOLE: mixtures @ vectors, WITHOUT: np.float32(n**0.5) * mixtures}


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


def measure(rounds, quick=False, independent=False, only=None):
    """Rows, of every method and shape; prints them on the way."""
    for m, n in SHAPES[:1] if quick else SHAPES:
        yield from compare(m, n, rounds, independent, ("upgrad", "krum", NO_METHOD) if quick else only)


def compare(m, n, rounds, independent, only):
    for what, matrices in jacobians(m, n, independent).items():
        group, rows = f"Gramian methods, {m} tasks x {n:,} parameters, {what}", []
        print(f"\n{group}\n{'':14} {HEADER}")
        for name, (method, make) in methods(m).items():
            if name in (only or methods(m)):
                named = (WITHOUT_METHOD[what], f"{m} x {n if what == WHOLE else m:,}")
                row = one_row(*(named if name == NO_METHOD else (group, name)), method, make, matrices, rounds)
                rows += [row] if name != NO_METHOD and not row.note else []
                print(line(name, row), flush=True)
                yield row
        if rows:
            print(f"{'geometric mean':14} {statistics.geometric_mean(row.median for row in rows):41.2f}x")


def one_row(group, what, method, make, matrices, rounds):
    try:
        aggregator = make()
    except ImportError as error:
        return Row(group, what, "TorchJD", note=f"not run: {error}")
    functions = {"ours": ours(method, matrices), "TorchJD": theirs(aggregator, matrices)}
    times = interleave(functions, rounds, REST)
    return compared(group, what, "TorchJD", times["ours"], times["TorchJD"])


def line(name, row):
    if row.note:
        return f"{name:14} {row.note}"
    return f"{name:14} {1e3 * row.ours:10.3f} {1e3 * row.theirs:10.3f} {row.median:18.2f}x {row.minima:10.2f}x"


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
    collections.deque(measure(arguments.rounds, independent=arguments.independent, only=arguments.methods), maxlen=0)
