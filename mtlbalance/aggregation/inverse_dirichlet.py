"""Inverse-Dirichlet weighting: all gradients with the standard deviation of the one whose entries vary most.

Maddu et al., "Inverse Dirichlet Weighting Enables Reliable Training of Physics Informed Neural Networks", Machine
Learning: Science and Technology 2022, https://arxiv.org/abs/2107.00940
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.gramian import n_entries, squared_norm, total
from mtlbalance.hyperparameters import FRACTION, check
from mtlbalance.names import check_task, index_of
from mtlbalance.states import count_seen, zero_counts


class InverseDirichletState(NamedTuple):
    """State of :func:`inverse_dirichlet`.

    Attributes:
      weights: the smoothed weights, one per task.
      seen: int32, one per task: the calls in which it was present.
    """

    weights: jax.Array
    seen: jax.Array


@base.memoized
def inverse_dirichlet(
    alpha: Number = 0.5, reference: int | str | None = None, *, axis_name: Hashable | None = None
) -> base.Aggregator[InverseDirichletState]:
    r"""Weighs every loss so that its gradient's entries vary as much as those of the gradient that varies most.

    .. math:: w_i \leftarrow (1 - \alpha) w_i + \alpha \frac{\max_j \sigma_j}{\sigma_i}, \qquad
              \sigma_i^2 = \frac{1}{n} \sum_k (g_{ik} - \bar g_i)^2, \qquad g = \sum_i w_i g_i

    with :math:`\bar g_i` the mean of the gradient's n entries. The weights start at 1 and have no fixed total. A task
    keeps its weight while it is absent or the entries of its gradient are all the same, to rounding, and all do while
    that holds for the reference, if there is one. Where the weights need not be new at every step,
    :func:`mtlbalance.amortize` saves the gradients of the single tasks in between: the official code takes new ones
    every 5 epochs.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code has one task, the residual, in the place of the largest: its name is ``reference``, whose weight
      goes to 1, where it is in the code. The standard deviations are with n - 1 there, which cancels.

    Args:
      alpha: :math:`\alpha`, from 0 to 1. May be traced.
      reference: the name of the task whose standard deviation the others get, or its index where losses have no names;
        by default the largest.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`InverseDirichletState`, ``weighting`` and ``rowwise``.

    Raises:
      ValueError: if ``alpha`` is out of bounds; if ``reference`` is no task, or an index where the losses have names.
      TypeError: if ``reference`` is neither an int nor a name.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.inverse_dirichlet()
      >>> rows = jnp.array([[8.0, 0.0], [1.0, 3.0]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(state.weights)
      [1.  2.5]

    References:
      Maddu et al., `Inverse Dirichlet Weighting Enables Reliable Training of Physics Informed Neural Networks
      <https://arxiv.org/abs/2107.00940>`_, Machine Learning: Science and Technology 2022;
      https://github.com/mosaic-group/inverse-dirichlet-pinn.
    """
    check("alpha", alpha, FRACTION)
    if reference is not None:
        check_task("reference", reference)

    def init(m, params, dtype):
        del params
        if reference is not None:
            check_task("reference", reference, m)
        return InverseDirichletState(jnp.ones(m, dtype), zero_counts(m))

    def visit(memory, gradient, task):
        del task
        n = float(max(n_entries(gradient, axis_name), 1))
        mean, deviations = centered(gradient, n)
        _, deviations = centered(deviations, n)  # again, for what was rounded off the mean of many
        deviation = jnp.sqrt(squared_norm(deviations, axis_name) / n)
        # Entries that are all the same would get a weight of their rounding.
        rounding = 10 * jnp.finfo(deviation.dtype).eps * jnp.abs(mean)
        return memory, jnp.where(deviation <= rounding, 0, deviation)

    def centered(tree, n):
        """The mean of a tree's entries, and the tree without it."""
        mean = jnp.asarray(total(tree, axis_name)) / n
        return mean, jax.tree.map(lambda x: x - mean.astype(x.dtype), tree)

    def weigh(state, deviations, values, mask):
        del values
        if reference is None:
            largest = jnp.max(deviations, where=mask, initial=0)
        else:
            largest = deviations[index_of("reference", reference)]  # of an absent task it is zero
        moving = mask & (deviations != 0) & (largest != 0)
        weights = (1 - alpha) * state.weights + alpha * numerics.ratio(largest, deviations)
        weights = jnp.where(moving, weights, state.weights)
        return weights, count_seen(state._replace(weights=weights), mask)

    return base.rowwise_aggregator(init, visit, weigh)
