"""Every way to weights from a Gramian, for 2 to 1,000 tasks: milliseconds and megabytes of temporaries.

Run by hand: ``python tests/benchmarks/solvers.py``, on a machine with nothing else to do; the table it prints is that
of ``solvers.md``. The Gramians are those of random mixtures of random gradients, which conflict. Past ``--longest``
seconds a method's larger problems are compiled for their temporaries, and not run.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mtlbalance import aggregation, solvers

SIZES = (2, 8, 32, 128, 512, 1000)
GROWTH = 64  # of the time from one size to the next at most, for guessing whether it is worth the wait


def methods():
    """Name to aggregator: every one with a ``gramian_weighting`` that computes anything."""
    return {
        "mgda": aggregation.mgda(),
        "upgrad": aggregation.upgrad(),
        "dual_proj": aggregation.dual_proj(),
        "cagrad": aggregation.cagrad(0.5),
        "nash_mtl": aggregation.nash_mtl(),
        "fairgrad": aggregation.fairgrad(alpha=2.0),
        "pcd": aggregation.pcd(),
        "config": aggregation.config(),
        "imtl_g": aggregation.imtl_g(),
        "aligned_mtl": aggregation.aligned_mtl(),
        "pcgrad": aggregation.pcgrad(key=0),
        "gradvac": aggregation.gradvac(key=0),
        "krum": aggregation.krum(0),
    }


def functions(m):
    """Name to a function of the Gramian: the solvers bare, then the methods."""
    bare = {
        "solvers.simplex_qp": solvers.simplex_qp,
        "solvers.dual_cone": lambda gramian: solvers.dual_cone(gramian, jnp.ones(m)),
        "solvers.cagrad_dual": lambda gramian: solvers.cagrad_dual(gramian, 0.5),
        "solvers.alpha_fair": lambda gramian: solvers.alpha_fair(gramian, 2.0),
        "solvers.nash_bargaining": solvers.nash_bargaining,
        "solvers.priority_constrained": lambda gramian: solvers.priority_constrained(gramian, 0.3),
    }
    return bare | {name: weights_of(method, m) for name, method in methods().items() if m > 2 or name != "krum"}


def weights_of(method, m):
    state = method.init((m, jnp.zeros(m)))
    return lambda gramian: method.gramian_weighting.apply(state, gramian)[0]


def measure(function, gramian, run):
    """Megabytes of temporaries, and if ``run`` the median of five times in ms, or one time if that is over a second."""
    compiled = jax.jit(function).lower(gramian).compile()
    megabytes = compiled.memory_analysis().temp_size_in_bytes / 1e6
    return megabytes, 1e3 * seconds(lambda: jax.block_until_ready(compiled(gramian))) if run else None


def seconds(call):
    times = []
    while len(times) < 5 and sum(times) < 5:
        before = time.perf_counter()
        call()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def main(sizes, longest, only):
    cells, last = {}, {}
    for m in sizes:
        mixtures = np.random.default_rng(m).normal(size=(m, m)).astype(np.float32)
        gramian = jnp.asarray(mixtures @ mixtures.T)
        for name, function in tqdm(functions(m).items(), desc=f"{m} tasks", leave=False):
            if only and name not in only:
                continue
            megabytes, ms = measure(function, gramian, last.get(name, 0) * GROWTH < 1e3 * longest)
            last[name] = last.get(name, 0) * GROWTH if ms is None else ms
            cells[name, m] = f"{'not run' if ms is None else f'{ms:.3g}'}, {megabytes:.2g}"
    names = dict.fromkeys(name for name, _ in cells)
    print(f"| tasks | {' | '.join(map(str, sizes))} |\n|---|{'---|' * len(sizes)}")
    for name in names:
        print(f"| {name} | {' | '.join(cells.get((name, m), '') for m in sizes)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--longest", type=float, default=120, help="seconds that one call may be expected to take")
    parser.add_argument("--only", nargs="*", help="all by default")
    arguments = parser.parse_args()
    main(arguments.sizes, arguments.longest, arguments.only)
