"""Transform weights: any optax transformation on the weights of a method."""

from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base
from mtlbalance.states import read_optimizer, updated, zero_counts
from mtlbalance.wrappers.plumbing import Method, check_method, reweighted


class TransformWeightsState(NamedTuple):
    """State of :func:`transform_weights`.

    Attributes:
      inner: the state of the wrapped method.
      transformation: the state of the transformation.
      not_taken: int32 scalar: the calls whose weights, or losses, were not finite, and so not seen by it; ``None``
        where nothing is remembered of any call.
      last_weights: the transformed weights of the last call that decided, where the method inside keeps its own; else
        ``None``.
    """

    inner: Any
    transformation: Any
    not_taken: jax.Array
    last_weights: jax.Array | None


@overload
def transform_weights(
    method: base.Scalarizer[Any], transformation: optax.GradientTransformation
) -> base.Scalarizer[TransformWeightsState]: ...


@overload
def transform_weights(
    method: base.Aggregator[Any], transformation: optax.GradientTransformation
) -> base.Aggregator[TransformWeightsState]: ...


@base.memoized
def transform_weights(method: Method, transformation: optax.GradientTransformation) -> Method:
    r"""Lets an optax transformation act on a method's weights, as it does on gradients elsewhere.

    .. math:: w \leftarrow \mathrm{transformation}(\hat w)

    where :math:`\hat w` are the method's own weights, those of absent tasks 0. It is on every path: whatever the rows
    are combined with, and whatever ``weighting`` returns. For instance

    * ``optax.ema(0.9)``: their running average, :func:`~mtlbalance.aggregation.cr_mogm` but for how it starts;
    * ``optax.scale_by_schedule(schedule)``: a factor for all that changes with the calls;
    * ``optax.clip_by_global_norm(1.0)``: weights of a bounded length;
    * ``optax.chain(mtl.weights.warm_up(1000), mtl.weights.clip(0.1, 10.0), mtl.weights.normalize(1.0))``: equal
      weights at first, then each within bounds, of total 1.

    A scalarizer becomes the sum of the losses with the transformed weights, which are constants of differentiation: of
    one that learns, as ``learn(uw(), optimizer)``, the learning goes on inside. What the transformation has for each
    task is kept for an absent one; what it has for all, such as a count of calls, goes on. It gets no params, and
    ``mask=`` as an extra argument. Weights that are not finite, or come with losses that are not, are transformed too,
    for the output to show them, but not remembered; :func:`skip_nonfinite` goes around this wrapper, for what it takes
    back to be forgotten here too. In a chain what ``optax.ema`` has of an absent task counts for what comes after it,
    as in the length that a clip sees; those of ``mtl.weights`` leave it out.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Args:
      method: a scalarizer without learned fields, or an aggregator that makes weights.
      transformation: any optax gradient transformation that needs no params.

    Returns:
      A method of the same family with the same paths and state :class:`TransformWeightsState`.

    Raises:
      TypeError: if ``method`` is of neither family, or ``transformation`` none of optax.
      ValueError: if it has learned fields, or makes no weights; in a call, from optax, if the transformation needs
        params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> method = mtl.transform_weights(aggregation.mgda(), mtl.weights.normalize(2.0))
      >>> gradient, state = method.apply(method.init((2, 2)), jnp.array([[1.0, 0.0], [0.0, 2.0]]))
      >>> print([f"{x:.2f}" for x in gradient])
      ['1.60', '0.80']
    """
    check_method(method, "transform_weights(learn(method, optimizer), ...)", makes_weights=True)
    transformation = read_optimizer(transformation, "transformation", "an optax transformation, such as optax.ema(0.9)")

    def start(shape, dtype, inner):
        last_weights = method.last_weights and method.last_weights(inner)
        own = transformation.init({"weights": jnp.zeros(shape, dtype)})
        remembers = jax.tree.leaves((own, last_weights))
        return TransformWeightsState(inner, own, zero_counts(()) if remembers else None, last_weights)

    def transform(state, weights, mask):
        given = {"weights": jnp.where(mask, weights, 0)}
        changed, transformation_state = updated(transformation, given, state.transformation, None, mask, mask=mask)
        changed = jnp.where(mask, changed["weights"], 0).astype(weights.dtype)
        new = state._replace(transformation=transformation_state)
        if state.last_weights is not None:
            new = new._replace(last_weights=jnp.where(mask, changed, state.last_weights))
        return changed, new

    last_weights = method.last_weights and (lambda state: state.last_weights)
    return reweighted(method, start, transform, last_weights=last_weights)
