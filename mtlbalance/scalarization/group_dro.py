"""Group DRO: weights that rise exponentially with the losses, for the worst case.

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020,
https://arxiv.org/abs/1911.08731
"""

import math
from typing import NamedTuple

import chex
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.hyperparameters import POSITIVE, check


class GroupDROState(NamedTuple):
    """State of :func:`group_dro`.

    Attributes:
      log_weights: logarithms of the weights, one per task.
    """

    log_weights: chex.Array


@base.memoized
def group_dro(robust_step_size: chex.Numeric = 0.01) -> base.Scalarizer:
    r"""Weights on the simplex that follow the largest losses by exponentiated gradient ascent.

    .. math:: \sum_i q_i L_i, \quad q_i \leftarrow \frac{q_i e^{\eta L_i}}{\sum_j q_j e^{\eta L_j}}

    The weights start equal, are moved by a call's losses before they weigh them, are constants of differentiation and
    sum to 1. Any real losses will do, and they should be of one scale. The weights are kept as logarithms: large
    losses do not overflow. An absent task keeps its weight, the present ones exchange theirs.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The code of the ExcessMTL authors, who compare with this method, has weights that sum to m. The official one can
      also adjust for group sizes and divide the losses by their sum: scale yours.

    Args:
      robust_step_size: :math:`\eta > 0`, finite. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`GroupDROState`.

    Raises:
      ValueError: if ``robust_step_size`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.group_dro(robust_step_size=0.1)
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, 4.0]))
      >>> print([f"{weight:.4f}" for weight in jnp.exp(state.log_weights)])
      ['0.4256', '0.5744']

    References:
      Sagawa et al., `Distributionally Robust Neural Networks for Group Shifts <https://arxiv.org/abs/1911.08731>`_,
      ICLR 2020, algorithm 1; https://github.com/kohpangwei/group_DRO.
    """
    check("robust_step_size", robust_step_size, POSITIVE)

    def init(shape, dtype):
        return GroupDROState(jnp.full(shape, -math.log(math.prod(shape)), dtype))

    def apply(state, values, mask):
        log_weights = numerics.exponentiated_step(state.log_weights, robust_step_size * values, moving=mask)
        weights = numerics.softmax(log_weights, mask)
        return numerics.weighted_sum(weights, values, mask), GroupDROState(log_weights)

    return base.scalarizer(init, apply)
