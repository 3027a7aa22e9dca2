"""Freeze: a method's present weights as constants."""

from typing import Any

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import ArrayTree
from mtlbalance.contract import check_is_method, weights_of
from mtlbalance.gramian import weights_of_groups
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import like_losses, read_labelled, read_losses
from mtlbalance.scalarization.constant import constant
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def freeze(
    method: base.Scalarizer | base.Aggregator, state: Any, losses: ArrayTree | None = None
) -> base.Scalarizer[SeenState]:
    r"""The sum of the losses with the weights that a method has now, which do not change any more.

    .. math:: \sum_i w_i L_i

    For what must see one and the same function: a line search, as in ``optax.lbfgs``, a second stage, an evaluation. Of
    an aggregator too this is a scalarizer: the gradient of this sum is the rows combined with these weights.

    The weights are those that a scalarizer gives ``losses``, where a task that is absent from them has 0 from then on;
    or the last ones of a method that keeps its weights, as :func:`amortize` makes every method do that has any. If it
    stands inside of :func:`nested`, as ``outer``, the weights inside of the groups are those for ``losses``. With
    weights at hand, as ``value_and_grad(..., return_weights=True)`` returns them, there is
    :func:`~mtlbalance.scalarization.constant`.

    Args:
      method: a scalarizer, or a method that keeps its last weights.
      state: its state now.
      losses: for a scalarizer, or inside of groups, the losses at which weights are asked for; not needed where all
        are kept.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`, for losses of the same names; of kept weights,
      which know no names, for as many in the same order.

    Raises:
      TypeError: if ``method`` is of neither family.
      ValueError: if it keeps no weights, and is not a scalarizer with ``losses``; from ``init`` and ``apply``, if the
        losses there are others, or a weight is not finite.

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
    if losses is not None and isinstance(method, base.Scalarizer):
        values = like_losses(read_losses("losses", losses), losses)
        weights, _ = weights_of(method, state, values, read_labelled(losses))
        return constant(jax.lax.stop_gradient(weights))
    nesting = method.nesting
    if losses is not None and nesting is not None and nesting.outer.last_weights is not None:
        values = like_losses(read_losses("losses", losses), losses)
        _, inside, present, _ = nesting.groups(state, values, mask=read_labelled(losses))
        weights = weights_of_groups(nesting.outer.last_weights(state.outer), inside, present)
        return constant(like_losses(jax.lax.stop_gradient(weights), losses))
    if method.last_weights is None:
        if isinstance(method, base.Scalarizer):
            reject("losses", "the losses, for which the method gives its weights", "none")
        reject("method", "an aggregator that keeps its weights, as mtl.amortize(method)", "one that does not")
    last = jnp.copy(method.last_weights(state))  # the state may be donated
    return _constant_by_position(jax.lax.stop_gradient(last))


def _constant_by_position(weights):
    def fixed_weights(mask, dtype):
        if mask.shape != weights.shape:
            reject("losses", f"as many as there are frozen weights, shape {weights.shape}", f"shape {mask.shape}")
        return weights.astype(dtype)

    def apply(state, values, mask):
        return jnp.sum(fixed_weights(mask, values.dtype) * values, where=mask), count_seen(state, mask)

    return base.scalarizer(init_seen_after(fixed_weights), apply)
