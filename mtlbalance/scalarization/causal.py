"""Causal weights: the residuals of a time wait until those of all earlier times are small.

Wang, Sankaran and Perdikaris, "Respecting causality is all you need for training physics-informed neural networks",
Computer Methods in Applied Mechanics and Engineering 421, 2024, https://arxiv.org/abs/2203.07404
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FRACTION, NONNEGATIVE, check, check_int, is_asking_for_shapes, reject
from mtlbalance.names import known_names
from mtlbalance.states import count_seen, zero_counts


class CausalState(NamedTuple):
    """State of :func:`causal`.

    Attributes:
      seen: int32, one per point: the calls in which it was present.
      min_weight: the smallest weight of a chunk in the last call; near 1 the residuals of all times are small.
      stage: int32, which of several ``tol`` is in force.
    """

    seen: jax.Array
    min_weight: jax.Array
    stage: jax.Array


@base.memoized
def causal(
    tol: Number | Sequence[Number] = 1.0,
    n_chunks: int = 32,
    n_components: int = 1,
    threshold: Number = 0.99,
) -> base.Scalarizer[CausalState]:
    r"""Weights of chunks of time, which fall exponentially with the residuals before them.

    .. math:: \frac{1}{K} \sum_{k=1}^{K} w_k \ell_k, \qquad
              w_k = \exp\Big( - \epsilon \sum_{j<k} \ell_j \Big), \qquad \ell_k = \text{mean of the losses in chunk } k

    The values are pointwise losses, squared residuals :math:`r_i^2`, **sorted by time**: one array, or one with
    several axes of which time is the first. They may be other points in every call. The points present are cut into K
    chunks as :func:`numpy.array_split` cuts them: of lengths that differ by at most one; fewer points than ``n_chunks``
    make one chunk each. The weights are constants of differentiation, 1 for the first chunk. A negative loss makes
    the scalar NaN.

    Of several ``tol`` (:math:`\epsilon`) the next one is in force once every weight is above ``threshold``.

    Of several equations (``n_components``) each has a cumulative loss of its own, the weight of a chunk is the
    smallest that one of them gives it, and the scalar is the sum of the formula above for each.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The paper counts the initial condition into the cumulative losses. Here, as in jaxpi, they are those of the
      values alone: it is a task of its own, under ``mtlbalance.nested``.

    Args:
      tol: :math:`\epsilon`, at least 0, or several that increase, such as ``(0.01, 0.1, 1.0, 10.0, 100.0)``: the
        causality parameter. Numbers that may be traced.
      n_chunks: K, how many chunks.
      n_components: how many equations the points' losses are of: arrays of one length under as many names, or an array
        with a leading axis of that length. Each is sorted by time.
      threshold: which weights let ``tol`` rise, from 0 to 1. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`CausalState`.

    Raises:
      ValueError: if a number is out of bounds, or ``tol`` does not increase; at ``init``, if the losses are not those
        of ``n_components`` equations.
      TypeError: if ``n_chunks`` or ``n_components`` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.causal(tol=1.0, n_chunks=2)
      >>> residuals = jnp.array([1.0, 1.0, 2.0, 2.0])  # the later ones weigh exp(-1)
      >>> scalar, state = method.apply(method.init(4), residuals**2)
      >>> print(f"{scalar:.4f} {state.min_weight:.4f}")
      1.2358 0.3679

    References:
      Wang, Sankaran and Perdikaris, `Respecting causality is all you need for training physics-informed neural networks
      <https://arxiv.org/abs/2203.07404>`_, 2022; https://github.com/PredictiveIntelligenceLab/jaxpi.
    """
    stages = list(tol) if isinstance(tol, tuple | list) or getattr(tol, "ndim", 0) == 1 else [tol]  # type: ignore
    _check_stages(stages)
    check_int("n_chunks", n_chunks, 1)
    check_int("n_components", n_components, 1)
    check("threshold", threshold, FRACTION)

    def init(shape, dtype):
        _check_components(n_components, shape)
        return CausalState(zero_counts(shape), jnp.ones((), dtype), jnp.zeros((), jnp.int32))

    def apply(state, values, mask):
        _check_components(n_components, values.shape)
        values = numerics.nonnegative(values)
        losses, present = (jnp.reshape(x, (n_components, -1)) for x in (jax.lax.stop_gradient(values), mask))
        # XLA takes seconds to count many points that it knows are present, and no time to count others.
        present = jax.lax.optimization_barrier(present)
        chunks, sizes = jax.vmap(lambda mask: _cut(mask, n_chunks))(present)
        places = jnp.ravel(chunks + n_chunks * jnp.arange(n_components)[:, None])
        size = jnp.take_along_axis(sizes, chunks, axis=1)  # of each point's chunk
        parts = jnp.ravel(jnp.where(present, losses / jnp.maximum(size, 1), 0))
        means = jax.ops.segment_sum(parts, places, sizes.size, indices_are_sorted=True).reshape(sizes.shape)
        # Not less each one's own: it may be far larger than those before it, and nothing would be left of them.
        before = numerics.finite(jnp.pad(jnp.cumsum(means[:, :-1], axis=1), ((0, 0), (1, 0))))
        tols = jnp.stack([jnp.asarray(stage, values.dtype) for stage in stages])
        weights = jnp.min(jnp.exp(-tols[state.stage] * before), axis=0, where=sizes > 0, initial=1)

        n_filled = jnp.sum(sizes > 0, axis=1, keepdims=True)
        point_weights = weights[chunks] / jnp.maximum(size * n_filled, 1).astype(values.dtype)
        min_weight = jnp.min(weights)
        rises = (min_weight > threshold) & (state.stage < len(stages) - 1)
        state = state._replace(min_weight=min_weight, stage=state.stage + rises)
        return numerics.weighted_sum(jnp.reshape(point_weights, mask.shape), values, mask), count_seen(state, mask)

    return base.scalarizer(init, apply)


def _cut(present, n_chunks):
    """The chunk of each point, and how many points each has: those present are cut as :func:`numpy.array_split` does.

    A point that is absent gets the chunk of the one present before it, so that the chunks are in order.
    """
    n_present = jnp.sum(present)
    sizes = n_present // n_chunks + (jnp.arange(n_chunks) < n_present % n_chunks)
    place = jnp.maximum(jnp.cumsum(present) - 1, 0)
    return jnp.minimum(jnp.searchsorted(jnp.cumsum(sizes), place, side="right"), n_chunks - 1), sizes


def _check_stages(stages):
    for stage in stages:
        check("tol", stage, NONNEGATIVE)
    known = not any(isinstance(stage, jax.core.Tracer) for stage in stages)
    if not stages or (known and any(first >= second for first, second in pairwise(stages))):
        reject("tol", "a number, or some that increase", f"{stages}")


def _check_components(n_components, shape):
    """Raises unless the losses are those of as many equations: their names must say so, or else their shape."""
    if is_asking_for_shapes():
        return
    n_points, names = math.prod(shape), known_names()
    if names is not None and names.n_leaves > 1 and len(names.entries) == n_points:
        arrays = Counter(_array_of(entry) for entry in names.entries)
        lengths = list(arrays.values())
        is_one_array = n_components == 1 and sum(length > 1 for length in lengths) <= 1
        if not is_one_array and lengths != [lengths[0]] * n_components:
            due = "as many as the losses have names, whose arrays are of one length (of one equation: one array)"
            reject("n_components", due, f"{n_components} for {dict(arrays)}")
    if n_points % n_components or (len(shape) > 1 and n_components not in (1, shape[0])):
        reject("n_components", "the length of the losses' leading axis, or 1", f"{n_components} for shape {shape}")


def _array_of(entry):
    array, _, index = entry.rpartition(".")
    return array if array and index.isdigit() else entry
