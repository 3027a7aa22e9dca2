"""Group DRO: weights that rise exponentially with the losses, for the worst case; and DoReMi, of excess losses.

Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020,
https://arxiv.org/abs/1911.08731; Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining",
NeurIPS 2023, https://arxiv.org/abs/2305.10429
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import FRACTION, POSITIVE, check, per_task
from mtlbalance.states import count_seen, mean_rate, zero_counts


class GroupDROState(NamedTuple):
    """State of :func:`group_dro`; every field has one entry per task.

    Attributes:
      log_weights: logarithms of the weights.
      average: the mean of the weights over the calls in which the task was present; 0 before. It is what DoReMi is
        run for, the mixture of data to train the large model on.
      seen: int32, those calls.
    """

    log_weights: jax.Array
    average: jax.Array
    seen: jax.Array


@base.memoized
def group_dro(
    robust_step_size: Number = 0.01,
    reference: PerTask | None = None,
    smoothing: Number = 0.0,
) -> base.Scalarizer[GroupDROState]:
    r"""Weights on the simplex that follow the largest losses by exponentiated gradient ascent.

    .. math:: \sum_i q_i L_i, \quad
              q_i \leftarrow (1 - c) \frac{q_i e^{\eta s_i}}{\sum_j q_j e^{\eta s_j}} + \frac{c}{m}, \quad
              s_i = L_i \ \text{or} \ \max(L_i - L_i^\mathrm{ref}, 0)

    The weights start equal, are moved by a call's losses before they weigh them, are constants of differentiation and
    sum to 1. Any real losses will do, and they should be of one scale. The weights are kept as logarithms: large
    losses do not overflow. An absent task keeps its weight, the present ones exchange theirs.

    With ``reference``, the losses that a model trained without it reached, it is DoReMi, whose step size is 1 and
    smoothing 1e-4: the tasks are domains of text, and ``state.average`` is the mixture that it finds. That adds up to 1
    where no task was absent.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The code of the ExcessMTL authors, who compare with this method, has weights that sum to m. The official one can
      also adjust for group sizes and divide the losses by their sum: scale yours.

      DoReMi takes the positive part of every token's excess before it adds up a domain's: build the method inside of
      the step with ``reference`` = loss - mean positive excess, of the batch. The average is its algorithm's, of the
      weights after each step; the official code counts the weights before the first one too, divides the weights by the
      domains' shares in sampling, and moves an absent domain by its last excess.

    Args:
      robust_step_size: :math:`\eta > 0`, finite. May be traced.
      reference: :math:`L^\mathrm{ref}`, one number for all or one per task (an array or a tree of the same names); by
        default the losses count as they are. May be traced.
      smoothing: :math:`c`, from 0 to 1, the part of the weights that is shared out equally at each call. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`GroupDROState`.

    Raises:
      ValueError: if ``robust_step_size`` or ``smoothing`` is out of bounds; at ``init``, if ``reference`` has another
        shape than the losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.group_dro(robust_step_size=0.1)
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, 4.0]))
      >>> print([f"{weight:.4f}" for weight in jnp.exp(state.log_weights)])
      ['0.4256', '0.5744']
      >>> method = scalarization.group_dro(1.0, reference={"code": 0.9, "text": 3.9}, smoothing=1e-4)  # DoReMi
      >>> scalar, state = method.apply(method.init(2), {"code": jnp.array(1.0), "text": jnp.array(4.0)})
      >>> print([f"{weight:.4f}" for weight in state.average])  # both exceed their reference by 0.1
      ['0.5000', '0.5000']

    References:
      Sagawa et al., `Distributionally Robust Neural Networks for Group Shifts <https://arxiv.org/abs/1911.08731>`_,
      ICLR 2020, algorithm 1; https://github.com/kohpangwei/group_DRO.

      Xie et al., `DoReMi <https://arxiv.org/abs/2305.10429>`_, NeurIPS 2023, algorithm 1;
      https://github.com/sangmichaelxie/doremi.
    """
    check("robust_step_size", robust_step_size, POSITIVE)
    check("smoothing", smoothing, FRACTION)

    def read_reference(shape, dtype):
        return jax.lax.stop_gradient(per_task("reference", reference, shape, dtype))

    def init(shape, dtype):
        if reference is not None:
            read_reference(shape, dtype)
        equal = jnp.full(shape, -math.log(math.prod(shape)), dtype)
        return GroupDROState(equal, jnp.zeros(shape, dtype), zero_counts(shape))

    def apply(state, values, mask):
        excess = values if reference is None else jnp.maximum(values - read_reference(values.shape, values.dtype), 0)
        log_weights = numerics.exponentiated_step(state.log_weights, robust_step_size * excess, moving=mask)
        log_weights = jnp.where(mask, smooth(log_weights, mask), log_weights)
        rate = mean_rate(state.seen, log_weights.dtype)
        average = jnp.where(mask, state.average + rate * (jnp.exp(log_weights) - state.average), state.average)
        weights = numerics.softmax(log_weights, mask)
        state = GroupDROState(log_weights, average, state.seen)
        return numerics.weighted_sum(weights, values, mask), count_seen(state, mask)

    def smooth(log_weights, mask):
        """The same total, a part of it in equal shares."""
        part = jax.lax.stop_gradient(jnp.asarray(smoothing, log_weights.dtype))
        equal = jax.nn.logsumexp(log_weights, where=mask) - jnp.log(jnp.maximum(jnp.sum(mask), 1)).astype(part.dtype)
        return jnp.logaddexp(jnp.log1p(-part) + log_weights, jnp.log(part) + equal)

    return base.scalarizer(init, apply, per_task={"reference": reference})
