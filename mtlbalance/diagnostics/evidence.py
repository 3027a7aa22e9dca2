"""What several batches say of the tasks: losses, gradients' lengths and angles, and what of it is more than noise.

On the host, in float64: these are a few numbers for each batch.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc

from mtlbalance import aggregation
from mtlbalance.annotations import ArrayTree
from mtlbalance.autodiff import value_and_gramian
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import has_labels, is_counted, read_losses
from mtlbalance.names import names_of

LEAST_BATCHES = 3
ROUNDING = 1e-6  # of float32, in sums of numbers of order 1


class Evidence(NamedTuple):
    """What was seen on n batches of m tasks.

    Attributes:
      tasks: their names, or positions.
      losses: ``[n, m]``.
      norms: of the gradients, ``[n, m]``.
      cosines: between the gradients, ``[n, m, m]``.
      present: which tasks had labels, and a loss and a gradient that were finite, ``[n, m]``.
      nonfinite: which were not finite, ``[n, m]``.
      upgrad: the weights by which :func:`~mtlbalance.aggregation.upgrad` combines the gradients, ``[n, m]``.
    """

    tasks: tuple[str, ...]
    losses: np.ndarray
    norms: np.ndarray
    cosines: np.ndarray
    present: np.ndarray
    nonfinite: np.ndarray
    upgrad: np.ndarray


def collect(
    losses_fn: Callable[..., Any], params: ArrayTree, batches: Iterable[Any], **options: Any
) -> tuple[Evidence, ArrayTree]:
    """What the batches show, and the losses of the last one for their structure."""
    gramian_fn = jax.jit(value_and_gramian(losses_fn, **options))
    method = aggregation.upgrad()
    seen, losses = [], None
    for batch in batches:
        value, gramian = gramian_fn(params, batch)
        before, losses = losses, value[0] if options.get("has_aux") else value
        if before is not None and names_of(before) != names_of(losses):
            due, found = (list(names_of(x).entries) for x in (before, losses))
            reject("losses_fn", f"the tasks {due} for every batch", f"{found}")
        seen.append(_of_batch(losses, gramian, method.gramian_weighting))
    if len(seen) < LEAST_BATCHES:
        reject("batches", f"at least {LEAST_BATCHES}, to know noise by (ten will do)", f"{len(seen)}")
    values, gramians, present, nonfinite, upgrad = (np.stack(part) for part in zip(*seen, strict=True))
    norms = np.sqrt(np.diagonal(gramians, axis1=1, axis2=2))
    units = np.where(norms > 0, norms, 1)
    cosines = np.clip(gramians / units[:, :, None] / units[:, None, :], -1, 1)
    tasks = names_of(losses).entries or tuple(map(str, range(values.shape[1])))
    return Evidence(tasks, values, norms, cosines, present, nonfinite, upgrad), losses


def _of_batch(losses, gramian, weighting):
    labelled = np.concatenate([np.ravel(has_labels(x)) for x in jax.tree.leaves(losses, is_leaf=is_counted)])
    values, products = np.ravel(read_losses("losses_fn", losses)).astype(float), np.asarray(gramian, float)
    nonfinite = labelled & ~(np.isfinite(values) & np.isfinite(np.diagonal(products)))
    present = labelled & ~nonfinite
    weights, _ = weighting.apply(weighting.init(len(gramian)), gramian, mask=jnp.asarray(present))
    # Of rows that are finite the products are too, but for an overflow.
    products = np.nan_to_num(np.where(present[:, None] & present[None, :], products, 0))
    return np.where(present, values, 0), products, present, nonfinite, np.asarray(weights, float)


def mean_and_error(x: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over the batches in which something is there, its standard error, and how many batches that are."""
    n = where.sum(0)
    mean = np.where(where, x, 0).sum(0) / np.maximum(n, 1)
    squares = np.where(where, (x - mean) ** 2, 0).sum(0)
    error = np.sqrt(squares / np.maximum(n - 1, 1) / np.maximum(n, 1))
    return np.where(n > 0, mean, np.nan), np.where(n > 1, error, np.nan), n


def is_beyond(x: np.ndarray, where: np.ndarray, bound: float, level: float) -> np.ndarray:
    """Whether the mean is farther from 0 than ``bound``, by Student's t-test over the batches at that level."""
    mean, error, n = mean_and_error(x, where)
    freedom = np.maximum(n - 1, 1)
    t = np.maximum(np.abs(np.nan_to_num(mean)) - bound, 0) / np.maximum(np.nan_to_num(error), ROUNDING)
    p = betainc(freedom / 2, np.full(t.shape, 0.5), freedom / (freedom + t**2))
    return (n > 1) & (np.asarray(p) < level)


def is_below(x: np.ndarray, where: np.ndarray, bound: float, level: float) -> np.ndarray:
    """Whether the mean is below ``-bound``, as :func:`is_beyond` tests it."""
    return is_beyond(x, where, bound, level) & (mean_and_error(x, where)[0] < 0)


def relative_differences(x: np.ndarray) -> np.ndarray:
    """Of every two tasks' sizes, ``(x_i - x_j) / (x_i + x_j)``: the same at any scale, and no outlier beyond 1."""
    x = np.abs(x)
    total = x[:, :, None] + x[:, None, :]
    return (x[:, :, None] - x[:, None, :]) / np.where(total == 0, 1, total)


def combined(evidence: Evidence, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cosine of each task's gradient with the weighted sum of all, ``[n, m]``, and that sum's norm, ``[n]``.

    Zero where the sum is what rounding leaves of gradients that cancel.
    """
    lengths = np.where(evidence.present, weights, 0) * evidence.norms
    products = np.einsum("bij,bj->bi", evidence.cosines, lengths)
    squares, longest = np.sum(lengths * products, axis=1), np.sum(np.abs(lengths), axis=1)
    norms = np.where(squares > ROUNDING * longest**2, np.sqrt(np.maximum(squares, 0)), 0)
    return np.where(norms[:, None] > 0, products / np.where(norms > 0, norms, 1)[:, None], 0), norms


def angle(evidence: Evidence, weights: np.ndarray, others: np.ndarray) -> float:
    """Degrees between two weighted sums of the gradients, on average; NaN where one of them is zero on every batch."""
    _, norms = combined(evidence, weights)
    cosines, other_norms = combined(evidence, others)
    there = (norms > 0) & (other_norms > 0)
    lengths = np.where(evidence.present, weights, 0) * evidence.norms
    between = np.sum(lengths * cosines, axis=1) / np.where(there, norms, 1)
    angles = np.degrees(np.arccos(np.clip(between, -1, 1)))
    return float(angles[there].mean()) if there.any() else float("nan")


def pairs(tasks: tuple[str, ...]) -> list[tuple[int, int]]:
    """Every pair of tasks once."""
    return list(itertools.combinations(range(len(tasks)), 2))
