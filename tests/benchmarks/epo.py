"""EPO's weights against the official program, which LibMOON runs too (cvxpy with GLPK, on the host).

Run by hand: ``python tests/benchmarks/epo.py FOLDER``, where FOLDER contains a clone of dbmptr/EPOSearch. Given losses
and a Gramian: one call, and 200 preferences at once, which there is a loop. Needs ``cvxpy`` and ``cvxopt`` too.
"""

import argparse
import collections
import importlib.util
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from interleave import compared, interleave

from mtlbalance import aggregation

N_PREFERENCES, N_CALLS = 200, 20
PEER = "EPOSearch, LibMOON"
FILE = Path("EPOSearch") / "toy_experiments" / "solvers" / "epo_lp.py"


def measure(rounds, quick=False, *, folder):
    warnings.simplefilter("ignore")
    spec = importlib.util.spec_from_file_location("epo_lp", folder / FILE)
    epo_lp = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(epo_lp)
    for m in (3,) if quick else (2, 3, 8, 20):
        yield from compare(epo_lp, m, rounds)


def compare(module, m, rounds):
    rng = np.random.default_rng(m)
    rows = rng.normal(size=(N_PREFERENCES, m, 20))
    gramians, losses = rows @ rows.transpose(0, 2, 1), rng.uniform(0.1, 1, (N_PREFERENCES, m))
    preferences = rng.uniform(0.1, 1, (N_PREFERENCES, m))
    given = [jnp.asarray(x, jnp.float32) for x in (preferences, gramians, losses)]
    programs = [module.EPO_LP(m, None, preference) for preference in preferences]

    @jax.jit
    def ours(preference, gramian, losses):
        weighting = aggregation.epo(preference).gramian_weighting
        return weighting.apply(weighting.init(m), gramian, values=losses)[0]

    of_all = jax.jit(jax.vmap(ours))
    first = [x[0] for x in given]
    theirs = lambda i: programs[i].get_alpha(losses[i], gramians[i], C=True)
    functions = {
        "ours": lambda: [ours(*first).block_until_ready() for _ in range(N_CALLS)],
        "theirs": lambda: [theirs(0) for _ in range(N_CALLS)],
        "ours, all": lambda: of_all(*given).block_until_ready(),
        "theirs, all": lambda: [theirs(i) for i in range(N_PREFERENCES)],
    }
    np.testing.assert_allclose(of_all(*given), functions["theirs, all"](), atol=1e-4)
    times = interleave(functions, rounds)
    for end, n, n_calls in ("", 1, N_CALLS), (", all", N_PREFERENCES, 1):
        here, there = ([seconds / n_calls for seconds in times[f"{whose}{end}"]] for whose in ("ours", "theirs"))
        row = compared(f"EPO's weights, {n} preferences" if n > 1 else "EPO's weights", f"{m} tasks", PEER, here, there)
        print(
            f"{m} tasks, {n:3} preferences: {1e3 * row.ours:8.3f} ms, theirs {1e3 * row.theirs:8.2f} ms,"
            f" {row.median:7.1f} times as fast (median), {row.minima:7.1f} (minima)",
            flush=True,
        )
        yield row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    collections.deque(measure(arguments.rounds, folder=arguments.folder), maxlen=0)
