"""UW: uncertainty weighting, one learned log-variance per task.

Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
Semantics", CVPR 2018, https://arxiv.org/abs/1705.07115
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import POSITIVE, check, per_task, reject


class UWState(NamedTuple):
    """State of :func:`uw`.

    Attributes:
      log_var: the log-variances :math:`s`, one per task. Learned.
    """

    log_var: jax.Array


@base.memoized
def uw(
    initial_log_var: PerTask | float = 0.0,
    classification: PerTask | bool = False,
    max_weight: Number = 1e12,
) -> base.Scalarizer[UWState]:
    r"""Weights each loss by a learned uncertainty.

    .. math:: \sum_i a_i e^{-s_i} L_i + \tfrac{1}{2} s_i

    with :math:`a_i` 1/2 for a regression (a squared error) and 1 for a classification (a cross entropy). For a fixed
    loss the optimum is :math:`s_i = \log 2 a_i L_i`. Losses must be positive: a loss of zero, or a negative one, has no
    optimum, and drives the weight :math:`a_i e^{-s_i}` to ``max_weight``, where it stays. The weights sum to m/2 at the
    start, if all are regressions. For weights of at most :math:`a_i`, that is :math:`s \ge 0`, train by
    ``optax.chain(optax.adam(1e-2), optax.keep_params_nonnegative())``.

    The log-variances are trained by gradient, in one of two ways: differentiate with respect to the state and give it
    to your optimizer together with the parameters, or wrap the method in :func:`mtlbalance.learn`. A bare ``apply``
    returns them as they were: in a loop of these alone nothing is learned.

    Note:
      By default every task is a regression, and :math:`s` starts at 0, as in TorchJD. LibMTL starts at -0.5.

    Args:
      initial_log_var: start of :math:`s`: one real number, or one per task (an array or a tree of the same names).
        May be traced.
      classification: which tasks are classifications: one boolean for all, or one per task.
      max_weight: the largest weight that a loss may have, above 0 and finite: a task whose loss is zero does not go
        beyond it, and returns when it has a loss again, if the optimizer is one as Adam: after a step of plain SGD its
        weight is 0. The default is that of a loss of 1e-12. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`UWState` and ``learned=("log_var",)``.

    Raises:
      ValueError: if ``max_weight`` is out of bounds; at ``init``, if ``initial_log_var`` or ``classification`` has
        another shape than the losses.
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
    check("max_weight", max_weight, POSITIVE)

    def factor(shape, dtype):
        return 0.5 + 0.5 * per_task("classification", classification, shape, dtype)

    def init(shape, dtype):
        factor(shape, dtype)
        return UWState(per_task("initial_log_var", initial_log_var, shape, dtype))

    def apply(state, values, mask):
        factors = factor(values.shape, values.dtype)
        bound = lambda log_var: jnp.maximum(log_var, jnp.log(factors / max_weight))
        log_var, bounded = numerics.held(state.log_var, bound, returns=max_weight * values > 0.5)
        return jnp.sum(factors * jnp.exp(-bounded) * values + 0.5 * log_var, where=mask), state

    return base.scalarizer(
        init,
        apply,
        learned=("log_var",),
        per_task={"initial_log_var": initial_log_var, "classification": classification},
    )
