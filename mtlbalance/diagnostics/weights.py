"""The weights that losses really have."""

from mtlbalance import base
from mtlbalance.annotations import ArrayTree
from mtlbalance.contract import check_is_method, weights_of
from mtlbalance.losses import like_losses, read_labelled, read_losses, read_mask


def effective_weights(
    scalarizer: base.Scalarizer, state: ArrayTree, values: ArrayTree, *, mask: ArrayTree | None = None
) -> ArrayTree:
    r"""The weights that a scalarizer gives the tasks' gradients, whatever its formula.

    .. math:: w_i = \frac{\partial \ell}{\partial L_i}, \qquad \nabla \ell = \sum_i w_i \nabla L_i

    They are what ``mtl.value_and_grad(..., return_weights=True)`` returns. The state is read only: evaluating changes
    nothing. For an aggregator there are ``return_weights=True`` and ``method.weighting.apply``.

    Args:
      scalarizer: the method.
      state: its state before ``apply``.
      values: the losses, as ``apply`` takes them. A :class:`~mtlbalance.Counted` one's weight is that of its
        value.
      mask: as ``apply`` takes it.

    Returns:
      One weight per task in float32 or wider, in the structure of ``values``; 0 for absent tasks.

    Raises:
      TypeError: if the method is no scalarizer; and as ``apply``.
      ValueError: as ``apply``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import diagnostics, scalarization
      >>> method = scalarization.geometric_mean()
      >>> losses = {"a": jnp.array(1.0), "b": jnp.array(4.0)}
      >>> weights = diagnostics.effective_weights(method, method.init(losses), losses)
      >>> print({name: f"{weight:.2f}" for name, weight in weights.items()})
      {'a': '1.00', 'b': '0.25'}
    """
    expected = "a Scalarizer (an aggregator's weights: method.weighting.apply)"
    check_is_method("scalarizer", scalarizer, expected, base.Scalarizer)
    array, present = read_losses("values", values), read_labelled(values)
    if mask is not None:
        mask = read_mask(mask, values, array.shape)
        present = mask if present is None else mask & present
    return weights_of(scalarizer, state, like_losses(array, values), present)[0]
