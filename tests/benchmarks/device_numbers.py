"""What ``device.py`` checks: recorded numbers, float32 solvers, weights by TF32 products and of bfloat16 rows."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance import aggregation, solvers
from tests.golden import comparisons

GOLDEN = json.loads(Path(comparisons.__file__).with_name("torchjd.json").read_text())


def correctness(size):
    jobs = [(f"recorded from TorchJD: {kind}", lambda kind=kind: golden(kind, size)) for kind in size.some(RECORDS)]
    jobs += [(f"`{name}`, judged in float64", lambda name=name: solver(name, size)) for name in size.some(JUDGED)]
    weighted = size.some(WEIGHTED)
    jobs += [(f"weights of `{name}`, TF32 products", lambda name=name: precisions(name)) for name in weighted]
    jobs += [(f"weights of `{name}`, bfloat16 rows", lambda name=name: narrow(name)) for name in weighted]
    return ("check", "found", "expected"), jobs


def check_excess_mtl(record):
    for run in record["runs"]:
        comparisons.check_excess_mtl(record["jacobians"], run)


RECORDS = {
    "uw": comparisons.check_uw,
    "imtl_l": comparisons.check_imtl_l,
    "dwa": comparisons.check_dwa,
    "famo": comparisons.check_famo,
    "stateless": comparisons.check_stateless,
    "scalarizers": comparisons.check_baseline_scalarizer,
    "aggregators": comparisons.check_baseline_aggregator,
    "excess_mtl": check_excess_mtl,
}


def golden(kind, size):
    """How many of the records are within the tolerance that the tests give float32 on a CPU; the worst of the rest."""
    check, records = RECORDS[kind], GOLDEN[kind]
    records = records[:: max(len(records) // size.most, 1)][: size.most]
    beyond = []
    for record in records:
        try:
            check(record)
        except AssertionError as error:
            beyond.append(" ".join(str(error).split())[:80])
    found = f"{len(records) - len(beyond)} of {len(records)}"
    return f"{found}: {beyond[0]}" if beyond else found, f"{len(records)} of {len(records)}"


def simplex_gap(gramian, weights):
    """How far the value may be above the least one (Frank and Wolfe), over the mean of the squared norms."""
    gradient = gramian @ weights
    return (gradient @ weights - np.min(gradient)) / np.mean(np.diag(gramian))


def cone_residual(gramian, v):
    """Of ``v >= 1``, ``gramian @ v >= 0`` and one of both equal, over the magnitudes that are added up."""
    return np.max(np.abs(np.minimum(v - 1, gramian @ v / (np.abs(gramian) @ v)))) / np.max(v)


def bargaining_residual(gramian, weights):
    return np.max(np.abs(weights * (gramian @ weights) - 1) / np.maximum(1, weights * (np.abs(gramian) @ weights)))


JUDGED = {
    "solvers.simplex_qp": (solvers.simplex_qp, simplex_gap),
    "solvers.dual_cone": (lambda gramian: solvers.dual_cone(gramian, jnp.ones(len(gramian))), cone_residual),
    "solvers.nash_bargaining": (solvers.nash_bargaining, bargaining_residual),
}


def solver(name, size):
    """The largest residual of the optimality conditions, of forty random problems of 3, 11 and 40 tasks each."""
    solve, judge = JUDGED[name]
    residuals = []
    for m in (3, 11, 40)[: size.methods]:
        rows = np.random.default_rng(m).normal(size=(40, m, 50)).astype(np.float32)
        gramians = rows @ np.swapaxes(rows, 1, 2)
        found = np.asarray(jax.jit(jax.vmap(solve))(gramians), float)
        residuals += map(judge, gramians.astype(float), found)
    return f"{max(residuals):.1e}", "below 1e-5"


WEIGHTED = {
    "excess_mtl": aggregation.excess_mtl,
    "upgrad": aggregation.upgrad,
    "mgda": aggregation.mgda,
    "nash_mtl": aggregation.nash_mtl,
    "aligned_mtl": aggregation.aligned_mtl,
    "gradnorm": aggregation.gradnorm,
    "gradient_shares": lambda: aggregation.gradient_shares(1.0),
}


def weights_of(name, rows):
    """The weights of a second call, in one program."""
    method, losses = WEIGHTED[name](), jnp.arange(1.0, len(rows) + 1)

    @jax.jit
    def second(rows):
        state, both = method.init(rows.shape), jnp.stack([rows[::-1], rows])
        weigh = lambda state, rows: method.weighting.apply(state, rows, values=losses)[::-1]
        return jax.lax.scan(weigh, state, both)[1][1]

    return np.asarray(second(rows), float)


def some_rows():
    rows = np.random.default_rng(0).normal(size=(4, 20_000)) + np.random.default_rng(1).normal(size=20_000)
    return jnp.asarray(rows * [[1.0], [3.0], [0.3], [1.0]], jnp.float32)


def precisions(name):
    """The largest difference of a weight between all digits and what GPUs make of a product by default."""
    found = []
    for precision in "highest", "tensorfloat32":
        with jax.default_matmul_precision(precision):
            found.append(weights_of(name, some_rows()))
    return f"{np.max(np.abs(found[1] - found[0])):.1e}", "0"


def narrow(name):
    """The largest difference between weights of bfloat16 rows and of the same numbers in float32, over the largest."""
    rows = some_rows().astype(jnp.bfloat16)
    found, expected = weights_of(name, rows), weights_of(name, rows.astype(jnp.float32))
    return f"{np.max(np.abs(found - expected)) / np.max(np.abs(expected)):.1e}", "below 1e-5"
