"""Trimmed mean: in every coordinate the mean of what is left without the largest and the smallest entries.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
https://arxiv.org/abs/1803.01498
"""

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.hyperparameters import check_int, reject
from mtlbalance.states import SeenState, count_seen, init_seen_after

# Up to so many tasks the program sorts by comparisons written out one by one: each takes 1 to 2 ms to compile, and for
# 128 tasks XLA no longer makes one pass of them.
_WRITTEN_OUT = 64


@base.memoized
def trimmed_mean(trim_number: int) -> base.Aggregator[SeenState]:
    r"""In every coordinate, the mean of the gradients without the k largest and the k smallest.

    .. math:: g = \frac{1}{m - 2k} \sum_{i = k + 1}^{m - k} g_{(i)}

    where :math:`g_{(1)} \le \dots \le g_{(m)}` are the entries of one coordinate in order of size. Up to k gradients
    may be anything, infinite or NaN (which counts as larger than any number): the result stays between the smallest
    and the largest entry of the others, if what is kept can be added up. With tasks absent as many are trimmed of those
    present; where less than 2k + 1 are, as many as leave one or two. An outer derivative goes through the entries that
    are kept.

    There are no weights of the tasks: each coordinate keeps tasks of its own. With more than 64 tasks it takes several
    times as long on a CPU: up to there every leaf's comparisons are compiled one by one, half a second for 40 tasks.

    Note:
      The paper gives the share of the gradients trimmed on either side, :math:`\beta = k / m`.

    Args:
      trim_number: how many are trimmed on either side, :math:`k \ge 0`.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`. It works on each coordinate alone: under
      :func:`jax.shard_map` too.

    Raises:
      ValueError: if ``trim_number`` is negative; at ``init``, with fewer than 2k + 1 tasks.
      TypeError: if ``trim_number`` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.trimmed_mean(trim_number=1)
      >>> rows = jnp.array([[1.0, 0.0], [2.0, 0.5], [3.0, 1.0], [-9.0, jnp.inf]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(gradient)
      [1.5  0.75]

    References:
      Yin et al., `Byzantine-Robust Distributed Learning <https://arxiv.org/abs/1803.01498>`_, ICML 2018, definition 2.
    """
    check_int("trim_number", trim_number, 0)

    def check_number(mask, dtype):
        del dtype
        if len(mask) < 2 * trim_number + 1:
            least = f"at least {2 * trim_number + 1} with this trim_number"
            reject("number of tasks", least, f"{len(mask)}")

    def apply(state, jacobian, values, mask):
        del values
        order, n_present = jnp.arange(mask.shape[0]), jnp.sum(mask)
        n_trimmed = jnp.clip((n_present - 1) // 2, 0, trim_number)
        kept = (order >= n_trimmed) & (order < n_present - n_trimmed)
        n_kept = jnp.maximum(n_present - 2 * n_trimmed, 1)

        def leaf(x):
            # Row by row, here and below: of the whole leaf XLA's CPU backend would store every step.
            rows = [row.astype(jnp.result_type(jnp.float32, x)) for row in x]
            n_nan = sum(jnp.isnan(row).astype(jnp.int32) for row in rows)
            # What is absent comes last, and so does NaN, which no comparison would put anywhere.
            rows = [jnp.where(jnp.isnan(row) | ~mask[i], jnp.inf, row) for i, row in enumerate(rows)]
            # The sum of what is kept: in a difference of sums an outlier of 1e30 would leave nothing else.
            total = sum(jnp.where(kept[i], row, 0) for i, row in enumerate(_in_order(rows)))
            return numerics.nan_unless(n_nan <= n_trimmed, total / n_kept).astype(x.dtype)

        return jax.tree.map(leaf, jacobian), count_seen(state, mask)

    return base.aggregator(init_seen_after(check_number), apply=apply)


def _in_order(rows):
    """The rows with the entries of each coordinate in order of size."""
    if len(rows) > _WRITTEN_OUT:
        return list(jnp.sort(jnp.stack(rows), axis=0))
    # In this form the comparisons of all rows are one pass over the memory. XLA's sort of short columns takes more than
    # twice the time of PyTorch's on a CPU, and these a tenth of it or less.
    size = 1 << (len(rows) - 1).bit_length()
    for i, j in _comparisons(range(size)):
        if j < len(rows):  # the rows up to the power of two would be infinite, and stay where they are
            swapped = rows[i] > rows[j]
            rows[i], rows[j] = jnp.where(swapped, rows[j], rows[i]), jnp.where(swapped, rows[i], rows[j])
    return rows


def _comparisons(places):
    """The pairs to compare one after the other, so as to sort a power of two of them (Batcher's odd-even merge)."""
    if len(places) < 2:
        return []
    half = len(places) // 2
    return _comparisons(places[:half]) + _comparisons(places[half:]) + _merging(places)


def _merging(places):
    """Those that sort a whole of which either half is in order: its even and its odd places, then neighbours."""
    if len(places) == 2:
        return [tuple(places)]
    neighbours = zip(places[1:-1:2], places[2::2], strict=True)
    return [*_merging(places[::2]), *_merging(places[1::2]), *neighbours]
