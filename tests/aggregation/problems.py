"""Random Jacobians, Pareto-stationary or not, and methods compiled once for all numbers of tasks."""

import functools
from typing import NamedTuple

import hypothesis
import numpy as np
from hypothesis import strategies as st

from mtlbalance import aggregation
from tests.catalogue import AGGREGATORS

# Compiling is what costs time here: smaller problems are this size by absent tasks, and by columns of zeros.
TASKS, PARAMS = 8, 12
KINDS = "free", "strong", "strictly weak", "non-weak"
METHODS = {
    name: functools.partial(getattr(aggregation, case.name), **given)
    for case in AGGREGATORS
    for name, given in case.variants.items()
}
# Derandomized, so that a run repeats the last one.
examples = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)


class Problem(NamedTuple):
    """A Jacobian and who is present; and a direction in which some task gains and none loses, if one is known."""

    rows: np.ndarray
    mask: np.ndarray
    direction: np.ndarray | None


class Result(NamedTuple):
    """Weights of the tasks present, the gradient, and the length of what is added up: rounding is relative to that.

    A method that makes no weights has none, and may add up the longest row of as many tasks.
    """

    weights: np.ndarray | None
    gradient: np.ndarray
    length: float


def padded(rows, direction=None):
    rows = np.asarray(rows)
    m, n = rows.shape
    whole = np.full((TASKS, PARAMS), 7, np.float32)  # what is absent may be anything
    whole[:m], whole[:m, :n] = 0, rows
    return Problem(whole, np.arange(TASKS) < m, direction)


def jacobian(kind, m, rank, seed, decades=0.0):
    """The Jacobian of m tasks, with singular values from 0.3 to 3; then the rows are scaled over some decades.

    "strong": v J = 0 for some v > 0; "strictly weak": for some v >= 0 that has zeros, but for no v > 0; "non-weak":
    for no v >= 0 but 0. Each needs certain vectors among the left singular ones, or orthogonal to them.
    """
    rng = np.random.default_rng([seed, m, rank])
    v = rng.uniform(0.2, 1, m)
    some = rng.permutation(m) < rng.integers(1, max(m, 2))
    singular = {"strictly weak": [v * some], "non-weak": [v]}.get(kind, [])
    orthogonal = {"strictly weak": [v * ~some], "strong": [v]}.get(kind, [])
    fixed = [x / np.linalg.norm(x) for x in (*singular, *orthogonal)]
    others = np.linalg.qr(np.column_stack([*fixed, rng.normal(size=(m, m - len(fixed)))]))[0][:, len(fixed) :]
    left = np.column_stack([*fixed[: len(singular)], others])[:, :rank]
    right = np.linalg.qr(rng.normal(size=(PARAMS, PARAMS)))[0][:, :rank]
    rows = left * rng.uniform(0.3, 3, rank) @ right.T * 10 ** rng.uniform(0, decades, (m, 1))
    return padded(rows, right[:, 0] if singular else None)


@st.composite
def problems(draw, kinds=KINDS, decades=0.0, independent=False):
    """Up to 8 tasks; "free" ones of any rank, zero included, unless the gradients are to be independent."""
    kind = draw(st.sampled_from(kinds))
    stationary = kind in ("strong", "strictly weak")
    m = draw(st.integers(1 + stationary, TASKS))
    least = 0 if kind in ("free", "strong") else 1
    rank = m if independent else draw(st.integers(least, m - stationary))
    return draw(jacobians(kind=kind, m=m, rank=rank, decades=decades))


@functools.cache
def jacobians(**fixed):
    """By any seed; built by name, so that Hypothesis reports the call and not the matrix.

    Making a strategy takes longer than drawing from it.
    """
    return st.builds(jacobian, seed=st.integers(0, 2**31 - 1), **{x: st.just(y) for x, y in fixed.items()})


def with_new(array, place, new):
    """A copy with something else in one place: NumPy's ``.at[place].set(new)``."""
    array = array.copy()
    array[place] = new
    return array


@functools.cache
def built(name):
    method = METHODS[name]()
    return method, method.init((TASKS, PARAMS))


def losses_of(rows):
    """From 1 to 2, by the gradient's direction."""
    lengths = np.linalg.norm(rows.astype(float), axis=1)
    return np.float32(1 + np.abs(rows[:, 0]) / np.where(lengths > 0, lengths, 1))


def solve(name, rows, mask, before=None):
    """A method's answer to a Jacobian, after a first call with another one if that is given.

    The weights are added up in float64, so that only their own rounding shows.
    """
    method, state = built(name)
    apply = (method.weighting or method).apply
    if before is not None:
        _, state = apply(state, before, values=losses_of(before), mask=mask)
    found, _ = apply(state, rows, values=losses_of(rows), mask=mask)
    rows = np.asarray(rows, float)[mask]
    if method.weighting is None:
        return Result(None, np.asarray(found, float), len(rows) * np.max(np.linalg.norm(rows, axis=1)))
    weights = np.asarray(found, float)[mask]
    return Result(weights, weights @ rows, np.abs(weights) @ np.linalg.norm(rows, axis=1))
