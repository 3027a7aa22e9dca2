"""UW: uncertainty weighting, one learned log-variance per task.

Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
Semantics", CVPR 2018, https://arxiv.org/abs/1705.07115
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.hyperparameters import per_task, reject


class UWState(NamedTuple):
    """State of :func:`uw`.

    Attributes:
      log_var: the log-variances :math:`s`, one per task. Learned.
    """

    log_var: chex.Array


@base.memoized
def uw(initial_log_var: chex.ArrayTree | float = 0.0, classification: chex.ArrayTree | bool = False) -> base.Scalarizer:
    r"""Weights each loss by a learned uncertainty.

    .. math:: \sum_i a_i e^{-s_i} L_i + \tfrac{1}{2} s_i

    with :math:`a_i` 1/2 for a regression (a squared error) and 1 for a classification (a cross entropy). For a fixed
    loss the optimum is :math:`s_i = \log 2 a_i L_i`. Losses must be positive: a loss of zero drives :math:`s_i`
    towards minus infinity and a negative one has no optimum. The weights sum to m/2 at the start, if all are
    regressions.

    The log-variances are trained by gradient, in one of two ways: differentiate with respect to the state and give it
    to your optimizer together with the parameters, or wrap the method in :func:`mtlbalance.learn`. A bare ``apply``
    returns them as they were: in a loop of these alone nothing is learned.

    Note:
      By default every task is a regression, and :math:`s` starts at 0, as in TorchJD. LibMTL starts at -0.5.

    Args:
      initial_log_var: start of :math:`s`: one real number, or one per task (an array or a tree of the same names).
        May be traced.
      classification: which tasks are classifications: one boolean for all, or one per task.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`UWState` and ``learned=("log_var",)``.

    Raises:
      ValueError: at ``init``, if ``initial_log_var`` or ``classification`` has another shape than the losses.
      TypeError: if ``classification`` is not boolean.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.uw()
      >>> grad_fn = jax.value_and_grad(method.apply, has_aux=True)  # to the state
      >>> (scalar, state), grads = grad_fn(method.init(3), jnp.array([1.0, 2.0, 4.0]))
      >>> print(scalar, grads.log_var)
      3.5 [ 0.  -0.5 -1.5]

    References:
      Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses <https://arxiv.org/abs/1705.07115>`_,
      CVPR 2018, eqs. 7 and 10 with :math:`s = \log \sigma^2`.
    """
    for leaf in jax.tree.leaves(classification):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.bool_):
            reject("classification", "booleans", f"dtype {jnp.result_type(leaf)}", TypeError)

    def factor(shape, dtype):
        return 0.5 + 0.5 * per_task("classification", classification, shape, dtype)

    def init(shape, dtype):
        factor(shape, dtype)
        return UWState(per_task("initial_log_var", initial_log_var, shape, dtype))

    def apply(state, values, mask):
        log_var = state.log_var
        weights = factor(values.shape, values.dtype) * jnp.exp(-log_var)
        return jnp.sum(weights * values + 0.5 * log_var, where=mask), state

    return base.scalarizer(
        init,
        apply,
        learned=("log_var",),
        per_task={"initial_log_var": initial_log_var, "classification": classification},
    )
