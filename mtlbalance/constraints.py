"""Losses with bounds, for the methods with multipliers: which are constraints, how far they are violated."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance.hyperparameters import Bound, is_asking_for_shapes, is_int, reject
from mtlbalance.names import check_task, known_names, per_task_with_default, positions_of

BOUND = Bound("a number, or infinity (or None, by name) for an objective,", lambda x: x > -np.inf)


class Constraints(NamedTuple):
    """The losses' bounds, constants of differentiation; every field has one entry per task.

    Attributes:
      bounds: infinite for objectives.
      constrained: which losses are constraints, the others being objectives.
      equality: which of them are to be met exactly.
    """

    bounds: chex.Array
    constrained: chex.Array
    equality: chex.Array

    def violation(self, values: chex.Array) -> jax.Array:
        """How far the losses are above their bounds; 0 for objectives."""
        return jnp.where(self.constrained, values - jnp.where(self.constrained, self.bounds, 0), 0)

    def augmented(self, violation: chex.Array, multipliers: chex.Array, penalties: chex.Array) -> jax.Array:
        """What each adds to an augmented Lagrangian: ``multiplier * violation + penalty / 2 * violation**2``.

        Its derivative is ``multiplier + penalty * violation``. Of an inequality that is no less than 0: where it would
        be, the violation counts as the one at which it is 0, as if a slack variable had been minimized.
        """
        multipliers, penalties = jax.lax.stop_gradient((multipliers, penalties))
        has_least = ~self.equality & (penalties >= jnp.finfo(penalties.dtype).tiny)  # XLA takes less for 0
        least = jnp.where(has_least, -multipliers / jnp.where(has_least, penalties, 1), -jnp.inf)
        violation = jnp.maximum(violation, least)
        return multipliers * violation + (penalties / 2 * violation) * violation  # in this order no square of 0 * inf

    def project(self, multipliers: chex.Array, largest: chex.Numeric) -> jax.Array:
        """The nearest multipliers: at least 0 of inequalities, and at most ``largest``."""
        return jnp.clip(multipliers, jnp.where(self.equality, -largest, 0), largest)


def check_equality(equality: tuple[str | int, ...]) -> None:
    """Raises unless this is a tuple, or list, of names or indices."""
    if not isinstance(equality, tuple | list) or not all(isinstance(x, str) or is_int(x) for x in equality):
        reject("equality", "a tuple of names or indices of losses", f"{equality!r}", TypeError)


def read_constraints(
    bounds: chex.ArrayTree,
    equality: tuple[str | int, ...],
    shape: tuple[int, ...],
    dtype: chex.ArrayDType,
    *,
    is_call: bool = True,
) -> Constraints:
    """What ``bounds`` and ``equality`` say of losses of this shape.

    Args:
      bounds: a number for each loss, infinite or ``None`` for objectives, or by the names of the constraints alone.
      equality: those that are to be met exactly.
      shape: of the losses.
      dtype: of what is returned.
      is_call: whether the losses' names must be known by now.

    Raises:
      ValueError: if a bound is minus infinity or NaN, a name or index is none of the losses', or an equality has no
        bound.
      TypeError: if there are no bounds.
    """
    if bounds is None:
        reject("bounds", 'upper bounds by the names of the constraints, such as {"kl": 0.1}', "None", TypeError)
    numbers = per_task_with_default("bounds", bounds, shape, dtype, np.inf, BOUND, is_call=is_call)
    numbers = jax.lax.stop_gradient(numbers)
    exact = np.zeros(shape, bool)
    for task in equality:
        if is_int(task):
            check_task("equality", task, exact.size)
    if not is_asking_for_shapes() and (is_call or known_names() is not None):
        for task in equality:
            exact |= np.isin(np.arange(exact.size), positions_of("equality", task)).reshape(shape)
    constrained = numbers < np.inf
    if exact.any() and not isinstance(constrained, jax.core.Tracer) and not np.all(constrained | ~exact):
        reject("equality", "constraints with a finite bound", f"{equality} and the bounds {bounds}")
    return Constraints(numbers, constrained, jnp.asarray(exact))
