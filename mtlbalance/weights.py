"""Transformations of a method's weights in optax's own form, for :func:`mtlbalance.transform_weights`.

They are :class:`optax.GradientTransformationExtraArgs`, links of ``optax.chain`` beside optax's own. ``mask=``, which
:func:`~mtlbalance.transform_weights` gives them, says which tasks are present; without it all are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FINITE, check, check_count, reject


def normalize(total: Number = 1.0) -> optax.GradientTransformationExtraArgs:
    r"""Weights of a fixed total: :math:`w_i \, T / \sum_j w_j`. Weights of total 0 stay as they are.

    Args:
      total: T, any finite number. May be traced.

    Returns:
      A transformation without state.

    Raises:
      ValueError: if ``total`` is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import weights
      >>> transformation = weights.normalize(2.0)
      >>> print(transformation.update(jnp.array([1.0, 3.0]), transformation.init(jnp.zeros(2)))[0])
      [0.5 1.5]
    """
    check("total", total, FINITE)

    def scale(updates, mask):
        found = _total(updates, mask)
        # Divided first: no product of large weights and a large total overflows.
        return jax.tree.map(lambda w: jnp.where(found == 0, w, w / jnp.where(found == 0, 1, found) * total), updates)

    return _stateless(scale)


def clip(lower: Number, upper: Number) -> optax.GradientTransformationExtraArgs:
    """Each weight within bounds, an absent task's as it is. The total changes: :func:`normalize` goes after it.

    Args:
      lower: the least. May be traced.
      upper: the largest, at least ``lower``. May be traced.

    Returns:
      A transformation without state.

    Raises:
      ValueError: if a bound is not finite, or ``upper`` below ``lower``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import weights
      >>> transformation = weights.clip(0.1, 2.0)
      >>> print(transformation.update(jnp.array([0.0, 1.0, 3.0]), transformation.init(jnp.zeros(3)))[0])
      [0.1 1.  2. ]
    """
    for name, bound in {"lower": lower, "upper": upper}.items():
        check(name, bound, FINITE)
    if not isinstance(lower, jax.core.Tracer) and not isinstance(upper, jax.core.Tracer) and lower > upper:
        reject("upper", f"at least lower, {lower}", f"{upper}")

    def bound(updates, mask):
        return jax.tree.map(lambda w: jnp.where(_among(mask), jnp.clip(w, lower, upper), w), updates)

    return _stateless(bound)


class WarmUpState(NamedTuple):
    """State of :func:`warm_up`.

    Attributes:
      count: int32 scalar: the calls so far.
    """

    count: jax.Array


def warm_up(n_steps: int | jax.Array) -> optax.GradientTransformationExtraArgs:
    """Equal weights in the first calls, of the total that the method's have; then the method's.

    The method is called from the first one on: what it remembers is as old as the training.

    Args:
      n_steps: the number of calls with equal weights, at least 0. May be traced.

    Returns:
      A transformation with state :class:`WarmUpState`.

    Raises:
      TypeError: if ``n_steps`` is no integer.
      ValueError: if it is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import weights
      >>> transformation = weights.warm_up(1)
      >>> state = transformation.init(jnp.zeros(2))
      >>> for _ in range(2):
      ...     updates, state = transformation.update(jnp.array([0.25, 0.75]), state)
      ...     print(updates)
      [0.5 0.5]
      [0.25 0.75]
    """
    check_count("n_steps", n_steps, 0)

    def init(params):
        del params
        return WarmUpState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, mask=None, **extra_args):
        del params, extra_args
        number = _total(jax.tree.map(jnp.ones_like, updates), mask)
        equal = _total(updates, mask) / jnp.maximum(number, 1)
        is_equal = _among(mask, state.count < n_steps)
        chosen = jax.tree.map(lambda w: jnp.where(is_equal, equal.astype(w.dtype), w), updates)
        return chosen, WarmUpState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _among(mask, condition=True):
    """The entries of tasks present, if the condition holds."""
    return condition if mask is None else mask & condition


def _total(updates, mask):
    """The sum over the tasks present: of an absent one there may be an average, for when it is back."""
    return sum(jnp.sum(w, where=_among(mask)) for w in jax.tree.leaves(updates))


def _stateless(change):
    """The transformation of ``(updates, mask) -> updates``."""

    def update(updates, state, params=None, *, mask=None, **extra_args):
        del params, extra_args
        return change(updates, mask), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
