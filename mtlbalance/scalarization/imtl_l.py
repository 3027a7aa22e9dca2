"""IMTL-L: impartial multi-task learning on the losses, one learned log-scale per task.

Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021, https://openreview.net/forum?id=IMPnRXEWpvr
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import POSITIVE, check, per_task


class IMTLLState(NamedTuple):
    """State of :func:`imtl_l`.

    Attributes:
      log_scale: the log-scales :math:`s`, one per task. Learned.
    """

    log_scale: jax.Array


@base.memoized
def imtl_l(initial_log_scale: PerTask | float = 0.0, max_weight: Number = 1e12) -> base.Scalarizer[IMTLLState]:
    r"""Scales each loss towards 1 by a learned factor.

    .. math:: \sum_i e^{s_i} L_i - s_i

    For a fixed loss the optimum is :math:`s_i = -\log L_i`, where the scaled loss is 1. Losses must be positive: a
    loss of zero, or a negative one, has no optimum, and drives the weight :math:`e^{s_i}` to ``max_weight``, where it
    stays. The weights sum to m at the start. At :math:`s` it equals twice :func:`~mtlbalance.scalarization.uw` at
    :math:`-s`.

    The log-scales are trained by gradient, in one of two ways: differentiate with respect to the state and give it to
    your optimizer together with the parameters, or wrap the method in :func:`mtlbalance.learn`. A bare ``apply``
    returns them as they were: in a loop of these alone nothing is learned.

    Args:
      initial_log_scale: start of :math:`s`: one real number, or one per task (an array or a tree of the same names).
        May be traced.
      max_weight: the largest weight that a loss may have, above 0 and finite: a task whose loss is zero does not go
        beyond it, and returns when it has a loss again, if the optimizer is one as Adam: after a step of plain SGD its
        weight is 0. The default is that of a loss of 1e-12. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`IMTLLState` and ``learned=("log_scale",)``.

    Raises:
      ValueError: if ``max_weight`` is out of bounds; at ``init``, if ``initial_log_scale`` has another shape than the
        losses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.imtl_l()
      >>> grad_fn = jax.value_and_grad(method.apply, has_aux=True)  # to the state
      >>> (scalar, state), grads = grad_fn(method.init(3), jnp.array([1.0, 2.0, 4.0]))
      >>> print(scalar, grads.log_scale)
      7.0 [0. 1. 3.]

    References:
      Liu et al., `Towards Impartial Multi-Task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021,
      section 3.2.
    """
    check("max_weight", max_weight, POSITIVE)

    def init(shape, dtype):
        return IMTLLState(per_task("initial_log_scale", initial_log_scale, shape, dtype))

    def apply(state, values, mask):
        bound = lambda log_scale: jnp.minimum(log_scale, jnp.log(jnp.asarray(max_weight, values.dtype)))
        log_scale, bounded = numerics.held(state.log_scale, bound, returns=max_weight * values > 1)
        return jnp.sum(jnp.exp(bounded) * values - log_scale, where=mask), state

    return base.scalarizer(init, apply, learned=("log_scale",), per_task={"initial_log_scale": initial_log_scale})
