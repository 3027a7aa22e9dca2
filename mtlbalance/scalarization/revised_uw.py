"""Revised UW: uncertainty weighting with a regularizer that is never negative.

Liebel and Körner, "Auxiliary Tasks in Multi-task Learning", 2018, https://arxiv.org/abs/1805.06334
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONZERO, POSITIVE, check, per_task


class RevisedUWState(NamedTuple):
    r"""State of :func:`revised_uw`.

    Attributes:
      sigma: the uncertainties :math:`\sigma`, one per task. Learned.
    """

    sigma: jax.Array


@base.memoized
def revised_uw(initial_sigma: PerTask | float = 1.0, max_weight: Number = 1e8) -> base.Scalarizer[RevisedUWState]:
    r"""Weights each loss by a learned uncertainty, with a regularizer of at least zero.

    .. math:: \sum_i \frac{L_i}{2 \sigma_i^2} + \log(1 + \sigma_i^2)

    For a fixed loss the optimum is :math:`\sigma^2 = (L + \sqrt{L^2 + 8 L}) / 4`. Losses must be positive: a loss of
    zero, or a negative one, has its optimum at :math:`\sigma = 0`, and drives the weight :math:`1 / (2 \sigma^2)` to
    ``max_weight``, where it stays. The weights sum to m/2 at the start. Neither weight decay nor a large learning rate
    should push :math:`\sigma` across zero.

    The uncertainties are trained by gradient, in one of two ways: differentiate with respect to the state and give it
    to your optimizer together with the parameters, or wrap the method in :func:`mtlbalance.learn`. A bare ``apply``
    returns them as they were: in a loop of these alone nothing is learned.

    Args:
      initial_sigma: start of :math:`\sigma`, not zero: one real number, or one per task (an array or a tree of the
        same names). May be traced.
      max_weight: the largest weight that a loss may have, above 0 and finite: a task whose loss is zero does not go
        beyond it, and returns when it has a loss again, if the optimizer is one as Adam: after a step of plain SGD its
        weight is 0. The default is that of a loss of 5e-17. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`RevisedUWState` and ``learned=("sigma",)``.

    Raises:
      ValueError: if ``max_weight`` is out of bounds; at ``init``, if ``initial_sigma`` is zero or has another shape
        than the losses.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.revised_uw()
      >>> grad_fn = jax.value_and_grad(method.apply, has_aux=True)  # to the state
      >>> (scalar, state), grads = grad_fn(method.init(2), jnp.array([1.0, 4.0]))
      >>> print(f"{scalar:.4f}", grads.sigma)
      3.8863 [ 0. -3.]

    References:
      Liebel and Körner, `Auxiliary Tasks in Multi-task Learning <https://arxiv.org/abs/1805.06334>`_, 2018;
      https://github.com/Mikoto10032/AutomaticWeightedLoss (third party).
    """
    check("max_weight", max_weight, POSITIVE)

    def init(shape, dtype):
        return RevisedUWState(per_task("initial_sigma", initial_sigma, shape, dtype, bound=NONZERO))

    def apply(state, values, mask):
        least = jnp.sqrt(jnp.asarray(0.5 / max_weight, values.dtype))
        # Where the gradient at the bound, -L / sigma**3 + 2 sigma / (1 + sigma**2), is negative.
        returns = values * (1 + least**2) > 2 * least**4
        sigma = numerics.magnitude(state.sigma)
        sigma, bounded = numerics.held(sigma, lambda sigma: jnp.maximum(sigma, least), returns)
        return jnp.sum(0.5 / jnp.square(bounded) * values + _log1p_square(sigma), where=mask), state

    return base.scalarizer(init, apply, learned=("sigma",), per_task={"initial_sigma": initial_sigma})


def _log1p_square(x):
    """The logarithm of ``1 + x**2`` where the square may overflow: after a loss of 1e30 x may be anywhere."""
    size = jax.lax.stop_gradient(jnp.maximum(jnp.abs(x), 1))
    return 2 * jnp.log(size) + jnp.log1p(jnp.square(x / size) + (jnp.square(1 / size) - 1))
