"""SDMGrad: a min-norm direction held near a preferred one, from double-sampled gradients.

Xiao, Ban and Ji, "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic Algorithms", NeurIPS
2023, https://arxiv.org/abs/2305.18409
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import DECAY, NONNEGATIVE, POSITIVE, check, check_int, preference
from mtlbalance.mapped_axes import varying_as


class SDMGradState(NamedTuple):
    """State of :func:`sdmgrad`.

    Attributes:
      weights: one per task, before the preference is mixed in.
    """

    weights: jax.Array


@base.memoized
def sdmgrad(
    lr: Number = 10.0,
    momentum: Number = 0.5,
    n_iter: int = 20,
    lambda_: Number = 0.3,
    pref_vector: PerTask | None = None,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[SDMGradState]:
    r"""Weights of a regularized min-norm problem, improved at every call by projected gradient steps with momentum.

    .. math:: \frac{w + \lambda p}{1 + \lambda}, \quad
              v \leftarrow \beta v + A (w + \lambda p), \quad w \leftarrow \Pi_\Delta (w - \eta v)

    where :math:`A` is :math:`J_1 J_2^\top` divided by the square of the gradients' mean norm (the mean root of its
    diagonal). The product should be made of the Jacobians of two independent batches and given to
    ``gramian_weighting``. The weights are then used for the losses of a third batch, as in the example. ``apply`` has
    one Jacobian, :math:`J_1 = J_2`. :math:`w` starts equal, each call goes on from the last one's, and :math:`v` from
    zero. The weights sum to 1 if the preference does.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code has :math:`\lambda = 0.6` by default, and 0.3 in its scripts, as TorchJD. TorchJD adds 1e-8 to
      the squared mean norm. With the usual step size the steps overshoot where gradients conflict, and what the last of
      them return depends on rounding, and so on the order of the tasks; 0.1 settles.

    Args:
      lr: step size :math:`\eta > 0`. May be traced.
      momentum: :math:`\beta`, at least 0 and below 1. May be traced.
      n_iter: steps per call, at least 1.
      lambda_: :math:`\lambda \ge 0`. May be traced.
      pref_vector: preference :math:`p`, one real number per task: an array or a tree of names; 1/m each by default.
        May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SDMGradState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if an argument is out of bounds; at ``init``, if there is not one preference per task.
      TypeError: if ``n_iter`` is not an int.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> from mtlbalance.gramian import gramian
      >>> method = aggregation.sdmgrad(lr=0.1)
      >>> def losses(params, batch):
      ...     return jnp.stack([jnp.mean((params - batch) ** 2), jnp.mean((params + batch) ** 2)])
      >>> params, batch_1, batch_2, batch_3 = jnp.array([[0.5, 1.0], [2.0, 1.0], [3.0, 1.0], [1.0, 2.0]])
      >>> jacobian_1, jacobian_2 = (jax.jacrev(losses)(params, batch) for batch in (batch_1, batch_2))
      >>> inner_products = gramian(jacobian_1, jacobian_2)
      >>> weights, state = method.gramian_weighting.apply(method.gramian_weighting.init(2), inner_products)
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.6427', '0.3573']
      >>> gradient = jax.grad(lambda params: weights @ losses(params, batch_3))(params)

    References:
      Xiao et al., `Direction-oriented Multi-objective Learning <https://arxiv.org/abs/2305.18409>`_, NeurIPS 2023,
      algorithm 1; https://github.com/OptMN-Lab/sdmgrad.
    """
    check("lr", lr, POSITIVE)
    check("momentum", momentum, DECAY)
    check_int("n_iter", n_iter, 1)
    check("lambda_", lambda_, NONNEGATIVE)

    def init(m, params, dtype):
        del params
        preference(pref_vector, jnp.ones(m, bool), dtype)
        return SDMGradState(jnp.full(m, 1 / m, dtype))

    def weigh(state, gramian, values, mask):
        del values
        gramian = gramian.astype(state.weights.dtype)
        preferred = preference(pref_vector, mask, gramian.dtype)
        mean_norm = numerics.mean(jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0)), mask)
        scaled = gramian / jnp.where(mean_norm > 0, mean_norm, 1) / jnp.where(mean_norm > 0, mean_norm, 1)

        def step(_, carry):
            weights, velocity = carry
            velocity = momentum * velocity + jnp.dot(scaled, weights + lambda_ * preferred, precision="highest")
            return numerics.simplex_step(weights, lr * velocity, mask), velocity

        start = numerics.normalize(state.weights, mask), jnp.zeros_like(preferred)
        weights, _ = jax.lax.fori_loop(0, n_iter, step, varying_as(start, scaled, start))
        state = SDMGradState(jnp.where(mask, weights, state.weights))
        return (weights + lambda_ * preferred) / (1 + lambda_), state

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name, per_task={"pref_vector": pref_vector})
