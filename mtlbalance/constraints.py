"""Losses with bounds, for the methods with multipliers: which are constraints, by how much they are violated."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance.hyperparameters import Bound, is_asking_for_shapes, is_int, reject
from mtlbalance.names import check_task, names_are_known, of_some, positions_of

BOUND = Bound("a number, or infinity (or None, by name) for an objective,", lambda x: x > -np.inf)


class Constraints(NamedTuple):
    """The losses' bounds, constants of differentiation; every field has one entry per task.

    Attributes:
      bounds: infinite for objectives.
      are: which losses are constraints, the others being objectives.
      equality: which of them are to be met exactly.
    """

    bounds: chex.Array
    are: chex.Array
    equality: chex.Array

    def violation(self, values: chex.Array) -> chex.Array:
        """How far the losses are above their bounds; 0 for objectives."""
        return jnp.where(self.are, values - jnp.where(self.are, self.bounds, 0), 0)

    def project(self, multipliers: chex.Array, largest: chex.Numeric) -> chex.Array:
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
    numbers = jax.lax.stop_gradient(of_some("bounds", bounds, shape, dtype, np.inf, BOUND, is_call=is_call))
    exact = np.zeros(shape, bool)
    for task in equality:
        if is_int(task):
            check_task("equality", task, exact.size)
    if not is_asking_for_shapes() and (is_call or names_are_known()):
        for task in equality:
            exact |= np.isin(np.arange(exact.size), positions_of("equality", task)).reshape(shape)
    are = numbers < np.inf
    if exact.any() and not isinstance(are, jax.core.Tracer) and not np.all(are | ~exact):
        reject("equality", "constraints with a finite bound", f"{equality} and the bounds {bounds}")
    return Constraints(numbers, are, jnp.asarray(exact))
