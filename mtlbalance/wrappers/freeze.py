"""Freeze: a method's present weights as constants."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.contract import check_is_method, weights_of
from mtlbalance.hyperparameters import flatten, per_task, reject
from mtlbalance.losses import like_losses, read_labelled, read_losses
from mtlbalance.names import names_of
from mtlbalance.states import count_seen, init_seen_after


def freeze(
    method: base.Scalarizer | base.Aggregator, state: Any, losses: chex.ArrayTree | None = None
) -> base.Scalarizer:
    r"""The sum of the losses with the weights that a method has now, which do not change any more.

    .. math:: \sum_i w_i L_i

    For what must see one and the same function: a line search, as in ``optax.lbfgs``, a second stage, an evaluation. Of
    an aggregator too this is a scalarizer: the gradient of this sum is the rows combined with these weights.

    The weights are those of a scalarizer for ``losses``, or the last ones of a method that keeps its weights, as
    :func:`amortize` makes every method that has any do. Of a single call ``scalarization.constant(weights)`` does the
    same, with what ``value_and_grad(..., return_weights=True)`` returns.

    Args:
      method: a scalarizer, or a method that keeps its last weights.
      state: its state now.
      losses: for a scalarizer, the losses at which its weights are asked for; not needed where it keeps them.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`, for losses of the same names as ``losses``, or
      without those in the same order. A loss of count 0 in ``losses`` has the weight 0.

    Raises:
      TypeError: if ``method`` is of neither family.
      ValueError: if it keeps no weights, and is not a scalarizer with ``losses``.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = scalarization.geometric_mean()
      >>> frozen = mtl.freeze(method, method.init(2), jnp.array([1.0, 4.0]))
      >>> scalar, _ = frozen.apply(frozen.init(2), jnp.array([1.0, 6.0]))
      >>> print(scalar)  # with weights (1, 1/4)
      2.5
    """
    check_is_method("method", method, "a Scalarizer or an Aggregator", base.Scalarizer, base.Aggregator)
    by_name = None
    if losses is not None and isinstance(method, base.Scalarizer):
        mask, values = read_labelled(losses), like_losses(read_losses("losses", losses), losses)
        by_name = jax.lax.stop_gradient(weights_of(method, state, values, mask)[0])
        weights = flatten("losses", by_name)
    elif method.last_weights is not None:
        weights = method.last_weights(state)
    elif isinstance(method, base.Scalarizer):
        reject("losses", "the losses, for which the method gives its weights", "none")
    else:
        reject("method", "an aggregator that keeps its weights, as mtl.amortize(method)", "one that does not")
    weights = jax.lax.stop_gradient(weights)

    def fixed(mask, dtype):
        return per_task("losses", weights, mask.shape, dtype, scalar=False)

    def apply(state, values, mask):
        return jnp.sum(fixed(mask, values.dtype) * values, where=mask), count_seen(state, mask)

    named = {"losses": by_name} if names_of(by_name).entries else None
    return base.scalarizer(init_seen_after(fixed), apply, per_task=named)
