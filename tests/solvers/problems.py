"""Random Gramians of every kind that is hard, and what a float64 judge needs of them."""

import jax
import numpy as np

SIZES = (1, 2, 3, 5, 8, 11, 20, 40)
PER_SIZE = 125
# Compiling is what costs time here, so small problems share one size, by masks, and large ones another.
PADDED = {11: SIZES[:6], 40: SIZES[6:]}


def _copies(rows, rng, sign):
    """The second half of the rows, replaced by multiples of the first and a little of what they were."""
    half = max(1, len(rows) // 2)
    source, little = rng.integers(half, size=len(rows) - half), rng.choice([0, 10 ** rng.uniform(-6, -1)])
    rows[half:] = sign * rng.uniform(0.1, 10) * rows[source] + little * rows[half:]
    return rows


def _balanced(rows, rng):
    """Moved so that some weighted mean of the rows is zero: Pareto-stationary."""
    weights = rng.uniform(0.1, 1, len(rows))
    return rows - np.outer(weights, weights @ rows) / (weights @ weights)


def _scaled(rows, rng, decades):
    return rows * 10 ** rng.uniform(0, decades, (len(rows), 1))


def _low_rank(rows, rng):
    rank = max(1, len(rows) // 3)
    return rng.normal(size=(len(rows), rank)) @ rows[:rank]


KINDS = {
    "generic": lambda rows, rng: rows,
    "norms over 1e3": lambda rows, rng: _scaled(rows, rng, 3),
    "norms over 1e6": lambda rows, rng: _scaled(rows, rng, 6),
    "near-duplicates": lambda rows, rng: _copies(rows, rng, 1),
    "opposite pairs": lambda rows, rng: _copies(rows, rng, -1),
    "zero rows": lambda rows, rng: rows * (rng.random((len(rows), 1)) < 0.6),
    "rank-deficient": _low_rank,
    "Pareto-stationary": _balanced,
    "Pareto-stationary, norms over 1e6": lambda rows, rng: _scaled(_balanced(rows, rng), rng, 6),
}


def gramians(size, seed=0, count=PER_SIZE, kinds=tuple(KINDS), dtype="float32"):
    """``count`` Gramians of gradients of 50 numbers, one kind after the other."""
    rng = np.random.default_rng([seed, size])
    rows = [KINDS[kinds[i % len(kinds)]](rng.normal(size=(size, 50)), rng).astype(dtype) for i in range(count)]
    return np.stack([row @ row.T for row in rows])


def padded(matrices, vectors, size):
    """The same problems with absent entries behind, and their masks; what is absent may be anything."""
    more = size - matrices.shape[1]
    matrices = np.pad(matrices, [(0, 0), (0, more), (0, more)], constant_values=7)
    mask = np.pad(np.ones_like(vectors, bool), [(0, 0), (0, more)])
    return matrices, np.pad(vectors, [(0, 0), (0, more)], constant_values=-7), mask


def in_float64(solve, *args):
    with jax.enable_x64(True):
        return np.asarray(solve(*(np.asarray(x, bool if x.dtype == bool else float) for x in args)))


def norms_and_cosines(gramian):
    """In float64, the cosines without what rounding put below zero: there a quadratic program has no least value."""
    norms = np.sqrt(np.diag(gramian).astype(float))
    divisors = np.where(norms > 0, norms, 1)
    values, vectors = np.linalg.eigh(gramian.astype(float) / divisors[:, None] / divisors)
    return norms, (vectors * np.maximum(values, 0)) @ vectors.T


def convex(gramian):
    norms, cosines = norms_and_cosines(gramian)
    return cosines * norms[:, None] * norms
