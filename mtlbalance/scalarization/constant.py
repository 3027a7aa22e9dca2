"""Constant: fixed weights chosen by the user."""

import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import PerTask
from mtlbalance.hyperparameters import FINITE, per_task
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def constant(weights: PerTask) -> base.Scalarizer[SeenState]:
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

    def fixed_weights(mask, dtype):
        return per_task("weights", weights, mask.shape, dtype, scalar=False, bound=FINITE)

    def apply(state, values, mask):
        fixed = fixed_weights(mask, values.dtype)
        return jnp.sum(fixed * values, where=mask), count_seen(state, mask)

    return base.scalarizer(init_seen_after(fixed_weights), apply, per_task={"weights": weights})
