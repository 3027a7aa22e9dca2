"""Gradient shares: every gradient over its running length, times the share that it is given. EnCodec's balancer.

Défossez et al., "High Fidelity Neural Audio Compression", TMLR 2023, https://arxiv.org/abs/2210.13438
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, gramian, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import FRACTION, NONNEGATIVE, POSITIVE, check, per_task, reject
from mtlbalance.states import count_seen, unbiased_average, zero_counts


class GradientSharesState(NamedTuple):
    """State of :func:`gradient_shares`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      norms: running averages of the gradients' lengths, one per task.
    """

    seen: jax.Array
    norms: jax.Array


@base.memoized
def gradient_shares(
    shares: PerTask,
    total: Number = 1.0,
    decay: Number = 0.999,
    *,
    per_example: bool = False,
    axis_name: Hashable | None = None,
) -> base.Aggregator[GradientSharesState]:
    r"""Gives every gradient its share of the total length, whatever the losses' scales.

    .. math:: g = \sum_i R \frac{s_i}{\sum_j s_j} \frac{g_i}{n_i}, \qquad
              n_i \leftarrow \beta n_i + (1 - \beta) \lVert g_i \rVert

    where :math:`n_i` is without bias towards its start, and the shares are divided among the tasks present. A loss that
    is multiplied by a number changes nothing; one that goes to zero does, slowly: its gradient is measured by what it
    was. It needs lengths alone, and is at its best where one backward pass gives them all: at the output of a generator
    or an encoder, ``at="features"`` of :func:`mtlbalance.value_and_grad`, or on the last layer, with ``decide_on=``.
    The weights have no fixed total. A task without any gradient so far has weight 0.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The paper has the length of the whole gradient; the official code, of a gradient at the features, the mean over
      the batch of each example's: ``per_example=True``, in which :math:`R` is an example's too. It adds 1e-12 to
      :math:`n_i`, and knows no absent tasks.

    Args:
      shares: :math:`s_i \ge 0`: one number for all tasks, an array for losses without names, or a tree of the losses'
        names. May be traced.
      total: :math:`R > 0`, the length that all gradients have together. May be traced.
      decay: :math:`\beta`, from 0 to 1; at 1, :math:`n_i` is the mean of all lengths so far. May be traced.
      per_example: whether :math:`\lVert g_i \rVert` is the mean of the lengths of the parts of each example, which lie
        along the first axis of the features. Only with ``at="features"``.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split, or examples with
        ``per_example``; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`GradientSharesState`, ``weighting``, ``rowwise``, and
      ``gramian_weighting`` unless ``per_example``.

    Raises:
      ValueError: if ``total`` or ``decay`` is out of bounds; at ``init``, if ``shares`` are, or if they are not one
        number per task; with ``per_example``, if the features do not share a first axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.gradient_shares(jnp.array([1.0, 3.0]))
      >>> rows = jnp.array([[200.0, 0.0], [0.0, 0.1]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(gradient)
      [0.25 0.75]

    References:
      Défossez et al., `High Fidelity Neural Audio Compression <https://arxiv.org/abs/2210.13438>`_, TMLR 2023, the
      balancer; https://github.com/facebookresearch/encodec.
    """
    check("total", total, POSITIVE)
    check("decay", decay, FRACTION)

    def read_shares(m, dtype):
        return per_task("shares", shares, (m,), dtype, bound=NONNEGATIVE)

    def init(m, params, dtype):
        read_shares(m, dtype)
        if per_example:
            _check_examples("params", params)
        return GradientSharesState(zero_counts(m), jnp.zeros(m, dtype))

    def weigh(state, norms, values, mask):
        del values
        averages = jnp.where(mask, unbiased_average(state.norms, norms, decay, state.seen), state.norms)
        share = jnp.where(mask, read_shares(len(mask), averages.dtype), 0)
        share = share / numerics.scale(share)
        share = share / jnp.where(jnp.any(share != 0), jnp.sum(share), 1)
        weights = jnp.where(averages == 0, 0, total * share / jnp.where(averages == 0, 1, averages))
        return weights, count_seen(state._replace(norms=averages), mask)

    def weigh_squares(state, squares, values, mask):
        return weigh(state, jnp.sqrt(squares), values, mask)

    def visit(memory, gradient, task):
        del task
        _check_examples("row", gradient)
        of_examples = sum(jnp.sum(x**2, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(gradient))
        norms = jnp.sqrt(of_examples)
        return memory, gramian.total(norms, axis_name) / max(gramian.n_entries(norms, axis_name), 1)

    keywords = {"axis_name": axis_name, "per_task": {"shares": shares}}
    if per_example:
        return base.rowwise_aggregator(init, visit, weigh, **keywords)
    return base.norms_aggregator(init, weigh_squares, **keywords)


def _check_examples(name, tree):
    shapes = [jnp.shape(x) for x in jax.tree.leaves(tree)]
    if len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        reject(name, "with per_example features that share a first axis, one entry per example", f"shapes {shapes}")
