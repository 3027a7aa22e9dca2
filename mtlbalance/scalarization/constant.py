"""Constant: fixed weights chosen by the user."""

import chex
import jax.numpy as jnp

from mtlbalance import base, inputs
from mtlbalance.baselines import SeenState, count_seen


def constant(weights: chex.ArrayTree) -> base.Scalarizer:
    r"""The losses weighted by fixed numbers.

    .. math:: \sum_i w_i L_i

    Any real losses will do. The weights are taken as they are: their total is yours.

    Args:
      weights: one real number per task: an array of the losses' shape, or a tree of the same names. May be
        traced, so that ``vmap`` sweeps weightings.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Raises:
      ValueError: at ``init``, if ``weights`` has another shape than the losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.constant({"depth": 0.5, "segmentation": 2.0})
      >>> losses = {"depth": jnp.array(4.0), "segmentation": jnp.array(1.5)}
      >>> scalar, state = method.apply(method.init(losses), losses)
      >>> print(scalar)
      5.0
    """

    def init(shape, dtype):
        inputs.per_task("weights", weights, shape, dtype, scalar=False)
        return SeenState(jnp.zeros(shape, jnp.int32))

    def apply(state, values, mask):
        fixed = inputs.per_task("weights", weights, values.shape, values.dtype, scalar=False)
        return jnp.sum(fixed * values, where=mask), count_seen(state, mask)

    return base.scalarizer(init, apply)
