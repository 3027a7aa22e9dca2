"""GECO: objectives under constraints, with multipliers that grow and shrink by factors.

Rezende and Viola, "Taming VAEs", 2018, https://arxiv.org/abs/1810.00597
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import Number, PerTask
from mtlbalance.constraints import read_constraints
from mtlbalance.hyperparameters import DECAY, NONNEGATIVE, POSITIVE, check
from mtlbalance.names import per_task_with_default
from mtlbalance.states import count_seen, running_average, zero_counts


class GECOState(NamedTuple):
    """State of :func:`geco`; every field has one entry per task.

    Attributes:
      log_multipliers: logarithms of the constraints' multipliers; an objective's stays at its start, and is not used.
      average: running average of by how much a constraint is violated; 0 for objectives.
      seen: int32, the calls in which the task was present.
    """

    log_multipliers: jax.Array
    average: jax.Array
    seen: jax.Array


@base.memoized
def geco(
    bounds: PerTask,
    lr: PerTask | float = 1e-2,
    alpha: Number = 0.99,
    initial_multipliers: PerTask | float = 1.0,
    min_multiplier: Number = 1e-10,
    max_multiplier: Number = 1e10,
) -> base.Scalarizer[GECOState]:
    r"""The sum of some losses, the objectives, while each of the others, the constraints, is to stay below its bound.

    .. math:: \sum_{i \text{ an objective}} L_i + \sum_{i \text{ a constraint}} \lambda_i C_i, \quad
              C_i \leftarrow \alpha C_i + (1 - \alpha)(L_i - c_i), \quad \lambda_i \leftarrow \lambda_i e^{\eta C_i}

    A multiplier is always positive, and is moved by the running average :math:`C`, which starts at the first violation:
    suited to noisy losses, and to multipliers of an unknown order of magnitude. A constraint that is met all the time
    loses its weight step by step, where :func:`lagrangian` has 0. The average is a constant of differentiation, and the
    gradient that of :math:`L_i`: an objective has weight 1, a constraint its multiplier from before the call, with no
    fixed total. Any real losses will do; :math:`\eta` is in units of one over the constraint. An absent constraint
    keeps its multiplier and average.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The paper gives no bounds to the multiplier. A common code of it (Genesis) has these defaults, without which a
      constraint that was met for long would take as long to count again; it also starts at 1 and steps after it weighs.

    Args:
      bounds: :math:`c`, by the losses' names; names left out, ``None`` and infinity are objectives. Or an array of the
        losses' shape, or one number for all. May be traced.
      lr: :math:`\eta \ge 0`, finite: one number, or one per constraint by name. May be traced.
      alpha: decay of the average, at least 0 and below 1. May be traced.
      initial_multipliers: above 0, finite; as ``lr``. May be traced.
      min_multiplier: the least multiplier, above 0, finite. May be traced.
      max_multiplier: the largest multiplier, above 0, finite. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`GECOState`.

    Raises:
      ValueError: if a number is out of bounds; at ``init`` or the first call, if a name is none of the losses'.
      TypeError: if ``bounds`` is ``None``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.geco({"reconstruction": 0.5}, lr=0.1)
      >>> losses = {"kl": jnp.array(3.0), "reconstruction": jnp.array(2.5)}
      >>> scalar, state = method.apply(method.init(losses), losses)
      >>> print(scalar, f"{jnp.exp(state.log_multipliers[1]):.4f}")
      5.0 1.2214

    References:
      Rezende and Viola, `Taming VAEs <https://arxiv.org/abs/1810.00597>`_, 2018, algorithm 1;
      https://github.com/applied-ai-lab/genesis.
    """
    check("alpha", alpha, DECAY)
    check("min_multiplier", min_multiplier, POSITIVE)
    check("max_multiplier", max_multiplier, POSITIVE)

    def init(shape, dtype):
        read_constraints(bounds, (), shape, dtype, is_call=False)
        per_task_with_default("lr", lr, shape, dtype, 0.0, NONNEGATIVE, is_call=False)
        start = per_task_with_default("initial_multipliers", initial_multipliers, shape, dtype, 1.0, POSITIVE)
        return GECOState(jnp.log(start), jnp.zeros(shape, dtype), zero_counts(shape))

    def apply(state, values, mask):
        constraints = read_constraints(bounds, (), mask.shape, values.dtype)
        rate = per_task_with_default("lr", lr, mask.shape, values.dtype, 0.0, NONNEGATIVE)
        violation = constraints.violation(values)
        average = jax.lax.stop_gradient(running_average(state.average, violation, alpha, state.seen))
        weights = jax.lax.stop_gradient(jnp.exp(state.log_multipliers))
        # The value of the average, with the gradient of the violation.
        added = weights * (average + (violation - jax.lax.stop_gradient(violation)))

        lowest, highest = (jnp.log(jnp.asarray(x, values.dtype)) for x in (min_multiplier, max_multiplier))
        log_multipliers = jnp.clip(state.log_multipliers + rate * average, lowest, highest)
        new = count_seen(state, mask)._replace(
            log_multipliers=jnp.where(mask & constraints.constrained, log_multipliers, state.log_multipliers),
            average=jnp.where(mask, average, state.average),
        )
        return jnp.sum(jnp.where(constraints.constrained, added, values), where=mask), new

    return base.scalarizer(init, apply)
