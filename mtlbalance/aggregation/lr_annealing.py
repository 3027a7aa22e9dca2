"""Learning-rate annealing: weights that lift the other losses' gradients to the size of one loss's.

Wang, Teng and Perdikaris, "Understanding and Mitigating Gradient Flow Pathologies in Physics-Informed Neural Networks",
SIAM Journal on Scientific Computing 2021, https://arxiv.org/abs/2001.04536
"""

from collections.abc import Hashable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.complex_parts import moduli
from mtlbalance.gramian import n_entries, total
from mtlbalance.hyperparameters import FRACTION, check, reject
from mtlbalance.mapped_axes import over_devices
from mtlbalance.names import check_task, index_of
from mtlbalance.states import count_seen, zero_counts


class LRAnnealingState(NamedTuple):
    """State of :func:`lr_annealing`.

    Attributes:
      weights: the smoothed weights, one per task; 1 for the reference.
      seen: int32, one per task: the calls in which it was present.
    """

    weights: jax.Array
    seen: jax.Array


@base.memoized
def lr_annealing(
    reference: int | str = 0,
    alpha: Number = 0.1,
    statistic: Literal["max", "mean"] = "max",
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[LRAnnealingState]:
    r"""Weighs every loss so that its gradient's mean entry reaches the reference's largest one.

    .. math:: w_i \leftarrow (1 - \alpha) w_i + \alpha \frac{\max_k |g_{rk}|}{\frac{1}{n} \sum_k |w_i g_{ik}|}
              \quad (i \ne r), \qquad w_r = 1, \qquad g = \sum_i w_i g_i

    The reference r is the residual of a physics-informed network, the others are its boundary and initial conditions.
    The weights start at 1 and have no fixed total. A task keeps its weight while its gradient or the reference's is
    zero or absent. Where the weights need not be new at every step, :func:`mtlbalance.amortize` saves the gradients of
    the single tasks in between: the official code takes new ones every 10 steps.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code leaves biases out, and takes the mean of the layers' means. Other codes have
      :math:`|g_{ik}|` in the denominator, without the weight; at rest their weights are the square of these.

    Args:
      reference: the name of the task whose weight is 1, or its index where losses have no names.
      alpha: :math:`\alpha`, from 0 to 1. May be traced.
      statistic: of the reference's entries: ``"max"``, or ``"mean"``, as in PhysicsNeMo.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`LRAnnealingState`, ``weighting`` and ``rowwise``.

    Raises:
      ValueError: if an argument is out of bounds; if ``reference`` is no task, or an index where the losses have names.
      TypeError: if ``reference`` is neither an int nor a name.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.lr_annealing(alpha=0.5)
      >>> rows = jnp.array([[8.0, 0.0], [1.0, 1.0]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(state.weights)
      [1.  4.5]

    References:
      Wang, Teng and Perdikaris, `Understanding and Mitigating Gradient Flow Pathologies in Physics-Informed Neural
      Networks <https://arxiv.org/abs/2001.04536>`_, SIAM Journal on Scientific Computing 2021, algorithm 1;
      https://github.com/PredictiveIntelligenceLab/GradientPathologiesPINNs.
    """
    check_task("reference", reference)
    check("alpha", alpha, FRACTION)
    if statistic not in ("max", "mean"):
        reject("statistic", "'max' or 'mean'", f"{statistic!r}")

    def init(m, params, dtype):
        del params
        check_task("reference", reference, m)
        return LRAnnealingState(jnp.ones(m, dtype), zero_counts(m))

    def visit(memory, gradient, task):
        del task
        sizes = moduli(gradient)
        largest = jnp.max(jnp.stack([jnp.max(x, initial=0) for x in jax.tree.leaves(sizes)] or [jnp.zeros(())]))
        mean = jnp.asarray(total(sizes, axis_name)) / float(max(n_entries(sizes, axis_name), 1))
        return memory, (over_devices(jax.lax.pmax, largest, axis_name), mean)

    def weigh(state, statistics, values, mask):
        del values
        largest, means = statistics
        at = index_of("reference", reference)
        size = (largest if statistic == "max" else means)[at]
        nonzero = mask & (means != 0) & (size != 0)  # of an absent reference the size is zero
        target = numerics.ratio(size, state.weights * means)
        weights = jnp.where(nonzero, (1 - alpha) * state.weights + alpha * target, state.weights)
        weights = weights.at[at].set(1)
        return weights, count_seen(state._replace(weights=weights), mask)

    return base.rowwise_aggregator(init, visit, weigh)
