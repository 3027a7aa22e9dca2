"""Lagrangian: objectives under constraints, with multipliers that climb while their constraint is violated.

Platt and Barr, "Constrained Differential Optimization", NeurIPS 1987,
https://proceedings.neurips.cc/paper/1987/hash/a87ff679a2f3e71d9181a67b7542122c-Abstract.html
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import Number, PerTask
from mtlbalance.constraints import check_equality, read_constraints
from mtlbalance.hyperparameters import FINITE, NONNEGATIVE, POSITIVE_OR_INFINITE, Bound, check
from mtlbalance.names import per_task_with_default
from mtlbalance.states import count_seen, zero_counts

SMOOTHING = Bound("a number above -1 and below 1", lambda x: (x > -1) & (x < 1))


class LagrangianState(NamedTuple):
    """State of :func:`lagrangian`; every field has one entry per task.

    Attributes:
      multipliers: of the constraints; an objective's stays at its start, and is not used.
      smoothed: the violations' running average, for the proportional term.
      seen: int32, the calls in which the task was present.
    """

    multipliers: jax.Array
    smoothed: jax.Array
    seen: jax.Array


@base.memoized
def lagrangian(
    bounds: PerTask,
    lr: PerTask | float = 1e-2,
    damping: PerTask | float = 0.0,
    kappa_p: Number = 0.0,
    nu: Number = 0.0,
    initial_multipliers: PerTask | float = 0.0,
    max_multiplier: Number = 1e12,
    equality: tuple[str | int, ...] = (),
    simultaneous: bool = False,
) -> base.Scalarizer[LagrangianState]:
    r"""The sum of some losses, the objectives, while each of the others, the constraints, is to stay below its bound.

    .. math:: \sum_{i \text{ an objective}} L_i + \sum_{i \text{ a constraint}} \lambda_i (L_i - c_i), \quad
              \lambda_i \leftarrow \max\big(0,\ \lambda_i + \eta\,(L_i - c_i)\big)

    An objective has weight 1. A constraint has its multiplier for a weight: exactly 0 where it has always been met,
    more and more while it is violated, and in the end what its bound costs: the objective's derivative by it, with the
    sign reversed. The weights have no fixed total. Any real losses will do; :math:`\eta` is in units of the objective
    over the constraint's squared. For a lower bound :math:`L \ge c` give :math:`-L` and :math:`-c`.

    Descent on the model and ascent on the multipliers may circle about the solution instead of going there, as they do
    where the front between the losses is concave. Against that there are two terms, both 0 by default:

    * ``damping`` :math:`d` adds :math:`d/2\,(L_i - c_i)^2`: the modified differential method of multipliers (MDMM), or
      augmented Lagrangian. The weight of an inequality becomes :math:`\max(0, \lambda_i + d\,(L_i - c_i))`.
    * ``kappa_p`` adds a proportional term to the multiplier's step (nuPI), :math:`\eta \kappa_p (\xi_t - \xi_{t-1})`,
      with :math:`\xi_t = \nu \xi_{t-1} + (1 - \nu)(L_i - c_i)`. With :math:`\nu = 0` it acts much as :math:`d = \eta
      \kappa_p`, without a part in the scalar; nearer 1 it smooths noise, and damps less.

    By how much a constraint's loss still swings, half its range in the last 500 of 4,000 steps of gradient descent:

    ==========================================  ======  =====  =============  ==========================
    problem                                     lr      plain  ``damping=3``  ``kappa_p=3 / lr, nu=0``
    ==========================================  ======  =====  =============  ==========================
    convex, the nearest point of a half-plane   1       0.000  0.000          0.000
    the same, ``simultaneous=True``             1       0.141  0.000          0.000
    concave, two losses from 0 to 1             0.03    0.480  0.000          0.000
    the same                                    0.1     0.367  0.000          0.000
    the same                                    1       0.078  0.000          0.000
    ==========================================  ======  =====  =============  ==========================

    An absent constraint keeps its multiplier. A multiplier is moved by a call's losses before it weighs them, at the
    cost of a second pass over micro-batches; not so with ``simultaneous``, without damping.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      Cooper has the multiplier's step after the weighing (``SimultaneousOptimizer``), or before it
      (``AlternatingDualPrimalOptimizer``): it costs the same, and damps. Here the latter is the default. The damping of
      an inequality is that of Cooper's ``AugmentedLagrangian`` (Nocedal and Wright, eq. 17.65), in which the slack
      variable is eliminated; the code of mdmm trains it, or damps above the bound only. As in nuPI's code the
      first call has no proportional term, and :math:`\xi_0 = 0`.

    Args:
      bounds: :math:`c`, by the losses' names; names left out, ``None`` and infinity are objectives. Or an array of the
        losses' shape, or one number for all. May be traced.
      lr: :math:`\eta \ge 0`, finite: one number, or one per constraint by name. May be traced.
      damping: :math:`d \ge 0`, finite, in the same way. May be traced.
      kappa_p: :math:`\kappa_p \ge 0`, finite. May be traced.
      nu: :math:`\nu`, above -1 and below 1. May be traced.
      initial_multipliers: at least 0, or any number where there is an equality; as ``lr``. May be traced.
      max_multiplier: the largest magnitude of a multiplier, above 0: where a constraint cannot be met it would grow
        without end. May be traced.
      equality: the constraints to be met exactly, :math:`L_i = c_i`, by name, or by index where losses have none. Their
        multipliers, and weights, are of either sign.
      simultaneous: whether the multipliers from before the call weigh its losses.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`LagrangianState`.

    Raises:
      ValueError: if a number is out of bounds; at ``init`` or the first call, if a name or an index is none of the
        losses', or an ``equality`` has no bound that is known to be finite.
      TypeError: if ``bounds`` is ``None``, or ``equality`` is not a tuple of names or indices.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.lagrangian({"kl": 0.5}, lr=0.1)
      >>> losses = {"kl": jnp.array(2.5), "reward": jnp.array(-4.0)}
      >>> scalar, state = method.apply(method.init(losses), losses)
      >>> print(f"{scalar:.2f}", state.multipliers)
      -3.60 [0.2 0. ]

    References:
      Platt and Barr, `Constrained Differential Optimization
      <https://proceedings.neurips.cc/paper/1987/hash/a87ff679a2f3e71d9181a67b7542122c-Abstract.html>`_, NeurIPS 1987;
      Sohrabi et al., `On PI Controllers for Updating Lagrange Multipliers in Constrained Optimization
      <https://arxiv.org/abs/2406.04558>`_, ICML 2024; https://github.com/cooper-org/cooper;
      https://github.com/crowsonkb/mdmm.
    """
    check("kappa_p", kappa_p, NONNEGATIVE)
    check("nu", nu, SMOOTHING)
    check("max_multiplier", max_multiplier, POSITIVE_OR_INFINITE)
    check_equality(equality)
    of_start = FINITE if equality else NONNEGATIVE
    is_damped = not (isinstance(damping, int | float) and damping == 0)

    def init(shape, dtype):
        read_constraints(bounds, equality, shape, dtype, is_call=False)
        per_task_with_default("lr", lr, shape, dtype, 0.0, NONNEGATIVE, is_call=False)
        per_task_with_default("damping", damping, shape, dtype, 0.0, NONNEGATIVE, is_call=False)
        start = per_task_with_default("initial_multipliers", initial_multipliers, shape, dtype, 0.0, of_start)
        return LagrangianState(start, jnp.zeros(shape, dtype), zero_counts(shape))

    def apply(state, values, mask):
        shape, dtype = mask.shape, values.dtype
        constraints = read_constraints(bounds, equality, shape, dtype)
        rate = per_task_with_default("lr", lr, shape, dtype, 0.0, NONNEGATIVE)
        penalties = per_task_with_default("damping", damping, shape, dtype, 0.0, NONNEGATIVE)
        violation = constraints.violation(values)
        smoothed = jnp.where(state.seen == 0, 0, nu * state.smoothed + (1 - nu) * violation)
        moved = state.multipliers + rate * (violation + kappa_p * (smoothed - state.smoothed))
        moving = mask & constraints.constrained
        new = count_seen(state, mask)._replace(
            multipliers=jnp.where(moving, constraints.project(moved, max_multiplier), state.multipliers),
            smoothed=jnp.where(moving, smoothed, state.smoothed),
        )
        weighing = (state if simultaneous else new).multipliers
        # Without damping the simultaneous form must not read the losses for its weights: micro-batches then run once.
        undamped = jax.lax.stop_gradient(weighing) * violation
        added = constraints.augmented(violation, weighing, penalties) if is_damped else undamped
        return jnp.sum(jnp.where(constraints.constrained, added, values), where=mask), jax.lax.stop_gradient(new)

    return base.scalarizer(init, apply)
