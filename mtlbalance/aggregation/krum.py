"""Krum: the gradients that have the nearest neighbours, so that a few wrong ones do no harm.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
https://arxiv.org/abs/1703.02757
"""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.hyperparameters import check_int, reject
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def krum(n_byzantine: int, n_selected: int = 1, *, axis_name: Hashable | None = None) -> base.Aggregator[SeenState]:
    r"""The mean of the gradients that are nearest to their neighbours (Multi-Krum).

    .. math:: g = \frac{1}{k} \sum_{i \in S} g_i, \quad
              s_i = \sum_{j \in N_i} \lVert g_i - g_j \rVert

    where :math:`N_i` are the m - f - 2 gradients nearest to :math:`g_i`, and :math:`S` are the k gradients with the
    smallest scores :math:`s_i`, of equal ones the first. The weights are 1/k or 0 and sum to 1. With tasks absent
    there are fewer neighbours, but at least one if two tasks are present; only tasks present are selected, all of them
    if they are fewer than k.

    Gradients too long to be squared, beyond 1e19 in float32, are far from all others, and so are those that are not
    finite. Where such a one is selected the weights are NaN. Where none is, its weight is zero; but zero times NaN is
    NaN, and so what is not finite shows in the gradient.

    Note:
      The distances are TorchJD's. The paper has their squares.

    Args:
      n_byzantine: how many gradients may be wrong, :math:`f \ge 0`.
      n_selected: how many are averaged, :math:`k \ge 1`.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if an argument is out of bounds; at ``init``, with fewer than f + 3 or fewer than k tasks.
      TypeError: if an argument is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.krum(n_byzantine=1)
      >>> rows = jnp.array([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [-9.0, 5.0]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(gradient)
      [1. 0.]

    References:
      Blanchard et al., `Machine Learning with Adversaries <https://arxiv.org/abs/1703.02757>`_, NeurIPS 2017, section
      4.
    """
    check_int("n_byzantine", n_byzantine, 0)
    check_int("n_selected", n_selected, 1)

    def check_number(mask, dtype):
        del dtype
        m = len(mask)
        for name, least in ("n_byzantine", n_byzantine + 3), ("n_selected", n_selected):
            if m < least:
                reject("number of tasks", f"at least {least} with this {name}", f"{m}")

    def weigh(state, gramian, values, mask):
        del values
        m, n_present = mask.shape[0], jnp.sum(mask)
        squares = jnp.diagonal(gramian)
        distances = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None, :] - 2 * gramian, 0))
        distances = jnp.where(jnp.isnan(distances), jnp.inf, distances)  # of what is not finite, or too long to square
        neighbours = mask[:, None] & mask[None, :] & ~jnp.eye(m, dtype=bool)
        nearest = -jax.lax.top_k(jnp.where(neighbours, -distances, -jnp.inf), m - n_byzantine - 2)[0]
        n_nearest = jnp.clip(n_present - n_byzantine - 2, 1, n_present - 1)
        scores = jnp.sum(nearest, axis=1, where=jnp.arange(nearest.shape[1]) < n_nearest)
        negative_scores, best = jax.lax.top_k(jnp.where(mask, -scores, -jnp.inf), n_selected)
        n_best = jnp.minimum(n_selected, n_present)
        is_selected = jnp.arange(n_selected) < n_best
        weights = jnp.zeros(m, gramian.dtype).at[best].set(is_selected / jnp.maximum(n_best, 1).astype(gramian.dtype))
        ok = jnp.all(jnp.isfinite(negative_scores) | ~is_selected)
        return numerics.nan_unless(ok, weights), count_seen(state, mask)

    return base.aggregator(
        init_seen_after(check_number), gramian_weighting=weigh, nan_if_nonfinite=False, axis_name=axis_name
    )
