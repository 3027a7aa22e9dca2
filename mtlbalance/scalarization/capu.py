"""PECANN-CAPU: an augmented Lagrangian whose penalties adapt to each constraint, and wait for the descent.

Hu, Basir and Senocak, "Conditionally adaptive augmented Lagrangian method for physics-informed learning of forward and
inverse problems", Computer Methods in Applied Mechanics and Engineering 456, 2026, https://arxiv.org/abs/2508.15695
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import Number, PerTask
from mtlbalance.constraints import read_constraints
from mtlbalance.hyperparameters import DECAY, NONNEGATIVE, POSITIVE_OR_INFINITE, check
from mtlbalance.names import per_task_with_default
from mtlbalance.states import count_seen, zero_counts


class CAPUState(NamedTuple):
    """State of :func:`capu`; every field has one entry per task. Objectives have no use for the first three.

    Attributes:
      multipliers: of the constraints.
      penalties: of the constraints.
      squares: running average of the squared violation, from 0.
      last: what each loss added to the augmented Lagrangian when the task was present last.
      seen: int32, the calls in which the task was present.
    """

    multipliers: jax.Array
    penalties: jax.Array
    squares: jax.Array
    last: jax.Array
    seen: jax.Array


@base.memoized
def capu(
    bounds: PerTask,
    eta: PerTask | float = 0.01,
    zeta: Number = 0.99,
    omega: Number = 0.999,
    initial_multipliers: PerTask | float = 1.0,
    initial_penalties: PerTask | float = 1.0,
    max_multiplier: Number = 1e12,
) -> base.Scalarizer[CAPUState]:
    r"""The sum of some losses, the objectives, while each of the others, the constraints, is to stay below its bound.

    .. math:: \mathcal{L} = \sum_{i \text{ an objective}} L_i + \sum_{i \text{ a constraint}} \lambda_i C_i +
              \frac{\mu_i}{2} C_i^2, \quad C_i = L_i - c_i

    At every call :math:`v_i \leftarrow \zeta v_i + (1 - \zeta) C_i^2`. Where the descent has come to rest,
    :math:`\mathcal L \ge \mathcal L_{\text{last}} - (1 - \omega) |\mathcal L_{\text{last}}|`, the multipliers step by
    their penalties, and these may grow:

    .. math:: \lambda_i \leftarrow \lambda_i + \mu_i C_i, \quad
              \mu_i \leftarrow \max\Big(\mu_i, \frac{\eta_i}{\sqrt{v_i + 10^{-16}}}\Big)

    Made for physics-informed networks, whose boundary conditions and data are constraints with the bound 0: their
    multipliers and penalties grow for as long as there is a rest, and want an optimizer that bears it (Adam, L-BFGS).
    Where a loss may be on both sides of its bound, waiting for rest can keep an oscillation alive: take ``omega=0``, or
    :func:`lagrangian`. An objective has weight 1, a constraint :math:`\max(0, \lambda_i + \mu_i C_i)`, with no fixed
    total. A call moves the multipliers, which are at least 0, before they weigh its losses. An absent constraint keeps
    all it has; whether the descent rests is seen from the tasks present that were there before.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The code has equalities, of losses that are at least 0 with the bound 0: there that is the same. Its rest is
      :math:`\mathcal L \ge \omega \mathcal L_{\text{last}}`, again the same unless both are negative. It measures its
      first constraints after its first step, where a call here measures what it is given.

    Args:
      bounds: :math:`c`, by the losses' names; names left out, ``None`` and infinity are objectives. Or an array of the
        losses' shape, or one number for all. May be traced.
      eta: :math:`\eta \ge 0`, finite: one number, or one per constraint by name. May be traced. The code has 0.01 for
        what may be met slowly, and 1.
      zeta: :math:`\zeta`, at least 0 and below 1. May be traced.
      omega: :math:`\omega \ge 0`, finite. May be traced.
      initial_multipliers: at least 0, finite; as ``eta``. May be traced.
      initial_penalties: at least 0, finite; as ``eta``. May be traced.
      max_multiplier: the largest multiplier, above 0. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`CAPUState`.

    Raises:
      ValueError: if a number is out of bounds; at ``init`` or the first call, if a name is none of the losses'.
      TypeError: if ``bounds`` is ``None``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.capu({"boundary": 0.0})
      >>> losses = {"boundary": jnp.array(0.5), "equation": jnp.array(2.0)}
      >>> state = method.init(losses)
      >>> for _ in range(2):
      ...     scalar, state = method.apply(state, losses)
      >>> print(scalar, state.multipliers)  # 2 + 1.5 / 2 + 1 / 8
      2.875 [1.5 1. ]

    References:
      Hu et al., `Conditionally adaptive augmented Lagrangian method for physics-informed learning of forward and
      inverse problems <https://arxiv.org/abs/2508.15695>`_, 2026; https://github.com/HiPerSimLab/PECANN-CAPU.
    """
    check("zeta", zeta, DECAY)
    check("omega", omega, NONNEGATIVE)
    check("max_multiplier", max_multiplier, POSITIVE_OR_INFINITE)

    def init(shape, dtype):
        read_constraints(bounds, (), shape, dtype, is_call=False)
        per_task_with_default("eta", eta, shape, dtype, 0.0, NONNEGATIVE, is_call=False)
        multipliers = per_task_with_default("initial_multipliers", initial_multipliers, shape, dtype, 1.0, NONNEGATIVE)
        penalties = per_task_with_default("initial_penalties", initial_penalties, shape, dtype, 1.0, NONNEGATIVE)
        zeros = jnp.zeros(shape, dtype)
        return CAPUState(multipliers, penalties, zeros, zeros, zero_counts(shape))

    def apply(state, values, mask):
        constraints = read_constraints(bounds, (), mask.shape, values.dtype)
        growth = per_task_with_default("eta", eta, mask.shape, values.dtype, 0.0, NONNEGATIVE)
        violation = constraints.violation(values)

        def terms(state):
            added = constraints.augmented(violation, state.multipliers, state.penalties)
            return jnp.where(constraints.constrained, added, values)

        before, known = terms(state), mask & (state.seen > 0)
        last = jnp.sum(state.last, where=known)
        rests = jnp.sum(before, where=known) >= last - (1 - omega) * jnp.abs(last)  # omega * last, if that is positive
        moving, measured = known & constraints.constrained & rests, mask & constraints.constrained
        squares = jnp.where(measured, zeta * state.squares + (1 - zeta) * violation**2, state.squares)
        stepped = constraints.project(state.multipliers + state.penalties * violation, max_multiplier)
        grown = jnp.maximum(state.penalties, growth / jnp.sqrt(squares + 1e-16))
        new = count_seen(state, mask)._replace(
            multipliers=jnp.where(moving, stepped, state.multipliers),
            penalties=jnp.where(moving, grown, state.penalties),
            squares=squares,
            last=jnp.where(mask, before, state.last),
        )
        return jnp.sum(terms(new), where=mask), jax.lax.stop_gradient(new)

    return base.scalarizer(init, apply)
