"""DTP: dynamic task prioritization, by a measure of how well each task is done.

Guo et al., "Dynamic Task Prioritization for Multitask Learning", ECCV 2018,
https://doi.org/10.1007/978-3-030-01270-0_17
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import NONNEGATIVE, RATE, check
from mtlbalance.states import running_average, select, zero_counts


class DTPState(NamedTuple):
    """State of :func:`dtp`; every field has one entry per task.

    Attributes:
      kpi: the running average of the task's performance indicator.
      observed: int32, how many were observed.
    """

    kpi: jax.Array
    observed: jax.Array


@base.memoized
def dtp(gamma: Number = 2.0, alpha: Number = 0.1) -> base.Scalarizer[DTPState]:
    r"""Weights each loss by how badly its task is done: a focal loss of a performance indicator (KPI).

    .. math:: \sum_i w_i L_i, \quad w_i = -(1 - \bar\kappa_i)^\gamma \log \bar\kappa_i, \quad
              \bar\kappa_i \leftarrow \alpha \kappa_i + (1 - \alpha) \bar\kappa_i

    The indicator :math:`\kappa`, such as an accuracy, is 1 for a task done perfectly. Give it to ``observe``, in
    place of the losses, as often as you have it: ``state = method.observe(state, accuracies)``. One outside [0, 1]
    makes the task's weight NaN; a loss between 0 and 1 given by mistake is not noticed. The first observed sets the
    average; without any the weights stay 1.

    Any real losses will do. The weights are constants of differentiation with no fixed total: 1 for a task without an
    indicator so far, 0 for one at 1, and up to 87 (in float32) for one at 0.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      There is no official code; the defaults are this library's. The paper's focal weights of single examples are the
      business of the losses.

    Args:
      gamma: focus :math:`\gamma \ge 0` on the tasks done badly. May be traced.
      alpha: weight of the newest indicator in the average, above 0 and at most 1. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`DTPState`.

    Raises:
      ValueError: if ``gamma`` or ``alpha`` is out of bounds.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.dtp(gamma=1.0)
      >>> state = method.observe(method.init(2), jnp.array([0.5, 0.9]))  # accuracies
      >>> weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(state, jnp.array([1.0, 1.0]))
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.3466', '0.0105']

    References:
      Guo et al., `Dynamic Task Prioritization for Multitask Learning
      <https://doi.org/10.1007/978-3-030-01270-0_17>`_, ECCV 2018, section 3.
    """
    check("gamma", gamma, NONNEGATIVE)
    check("alpha", alpha, RATE)

    def init(shape, dtype):
        return DTPState(jnp.zeros(shape, dtype), zero_counts(shape))

    def apply(state, values, mask):
        kpi = state.kpi
        weights = -((1 - kpi) ** gamma) * jnp.log(jnp.maximum(kpi, jnp.finfo(kpi.dtype).tiny))
        weights = numerics.nan_unless((kpi >= 0) & (kpi <= 1), weights)
        weights = jnp.where(state.observed == 0, 1, weights)
        return numerics.weighted_sum(weights, values, mask), state

    def observe(state, values, mask):
        kpi = running_average(state.kpi, values, 1 - alpha, state.observed)
        return select(mask, state._replace(kpi=kpi, observed=optax.safe_increment(state.observed)), state)

    return base.scalarizer(init, apply, observe=observe, needs=("observe",))
