"""What a method's plain functions are given of a call's Jacobian, and an ``apply`` for those that weigh.

An absent task's row of the Jacobian may be anything, NaN too. A copy of the Jacobian with zeros there would cost as
much as the method, so each path leaves such rows out where it reads them: what is made here has fused selections alone.
"""

import jax
import jax.numpy as jnp

from mtlbalance import returned
from mtlbalance.gramian import combine, gramian_of_tasks
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import present_rows, state_dtype


def derive(apply, weighting, gramian_weighting, *, axis_name, zero_absent, stop_gradient):
    """The paths through the whole Jacobian, from the functions that a builder was given.

    Returns:
      ``apply``, ``(state, rows, call) -> (gradient, new_state)``; the name of what weighs, and that, if anything does;
      and ``statistic_of``, ``(call, rows)`` to what it is given.
    """
    name, statistic_of = "weighting", rows_of_present if zero_absent else rows_as_given
    if weighting is None and gramian_weighting is not None:
        name, weighting, statistic_of = "gramian_weighting", gramian_weighting, gramian_of_present(axis_name)
    if apply is not None:
        rows_of = rows_of_present if zero_absent else rows_as_given
        whole = lambda state, rows, call: apply(state, rows_of(call, rows), call.values, call.mask)
    elif weighting is not None:
        whole = combined(name, weighting, statistic_of, stop_gradient)
    else:
        reject("aggregator", "one of apply, weighting and gramian_weighting", "none", TypeError)
    return whole, name, weighting, statistic_of


def rows_as_given(call, rows):
    """All rows, for a wrapper that gives them to the method inside, and the mask with them."""
    del call
    return rows


def rows_of_present(call, rows):
    """The rows; those of absent tasks are zero."""
    return rows if call.all_present else present_rows(rows, call.mask)


def gramian_of_present(axis_name):
    """What makes the Gramian of the rows, zero in the rows and columns of absent tasks."""
    return lambda call, rows: gramian_of_tasks(rows, len(call.mask), axis_name, present_or_none(call))


def present_or_none(call):
    """The mask; ``None`` where it is known while tracing that all tasks are present."""
    return None if call.all_present else call.mask


def combined(name, weigh, statistic_of, stop_gradient):
    """The ``apply`` that combines the rows with the weights of the plain function of this name."""

    def apply(state, rows, call):
        # The weights are constants of differentiation: an outer grad never enters a solver.
        statistic = statistic_of(call, jax.lax.stop_gradient(rows))
        output = weigh(state, statistic, call.values, call.mask)
        weights, new_state = returned.weights_and_state(name, output, call.mask.shape)
        weights = finish_weights(weights, call.mask, state_dtype(state, rows), stop_gradient)
        return combine(weights, rows, present_or_none(call)), new_state

    return apply


def finish_weights(weights, mask, dtype, stop_gradient=True):
    """The weights, 0 for absent tasks; constants of differentiation if ``stop_gradient``."""
    weights = jnp.where(mask, weights, 0).astype(dtype)
    return jax.lax.stop_gradient(weights) if stop_gradient else weights
