"""How a method's plain functions become the public ones: what a call is given is read, and what it returns settled."""

import jax
import jax.numpy as jnp

from mtlbalance import returned
from mtlbalance.contract import Hook, Rowwise
from mtlbalance.gramian import combine, gramian_of_tasks
from mtlbalance.losses import read_call, read_row, read_statistics, state_dtype
from mtlbalance.names import knows_names, names_of
from mtlbalance.states import select


def reader(check, *, required=False):
    """What reads one call, as :func:`read_call` does, after ``check`` has seen the state."""

    def read(state, values, mask, *, required=required):
        check(state)
        names = names_of(mask if values is None else values).entries
        return read_call(state, values, mask, required=required, names=names)

    return read


def checked(check, function):
    """A function of the state alone, if there is one, after ``check`` has seen the state."""

    def checked_function(state):
        check(state)
        return function(state)

    return function and checked_function


def of_gramian(gramian_weighting, axis_name):
    """The plain weighting of the Jacobian from that of its Gramian."""

    def weighting(state, jacobian, values, mask):
        output = gramian_weighting(state, gramian_of_tasks(jacobian, len(mask), axis_name), values, mask)
        return returned.weights_and_state("gramian_weighting", output, mask.shape)

    return weighting


def combined(weighting):
    """The plain ``apply`` that combines the rows with the weights of a weighting."""

    def apply(state, jacobian, values, mask):
        # The weights are constants of differentiation: an outer grad never enters a solver.
        given = state, jax.lax.stop_gradient(jacobian), values, mask
        weights, new_state = returned.weights_and_state("weighting", weighting(*given), mask.shape)
        return combine(finish_weights(weights, mask, state_dtype(state, jacobian)), jacobian), new_state

    return apply


def public_weigh(name, weigh, read_statistic, read, settled, per_task=None):
    """A weighting's ``apply`` from the plain function of this name."""

    def apply(state, statistic, *, values=None, mask=None):
        call = read(state, values, mask)
        statistic = jax.lax.stop_gradient(read_statistic(call, statistic))
        output = weigh(state, statistic, call.values, call.mask)
        weights, new_state = returned.weights_and_state(name, output, call.mask.shape)
        weights = finish_weights(weights, call.mask, state_dtype(state, statistic))
        return weights, settled(name, call, new_state, state)

    return knows_names(apply, per_task)


def public_rowwise(rowwise, read, settled, per_task=None):
    """A :class:`~mtlbalance.Rowwise` of public functions from one of plain ones."""

    def public_visit(state, i, row, *, values=None, mask=None):
        call = read(state, values, mask)
        row = jax.lax.stop_gradient(read_row(call.mask[i], row))
        return jax.lax.stop_gradient(rowwise.visit(state, i, row, call.values, call.mask))

    def public_finish(state, statistics, *, values=None, mask=None):
        call = read(state, values, mask)
        output = rowwise.finish(state, read_statistics(call, statistics), call.values, call.mask)
        gradient, new_state = returned.gradient_and_state("finish", output, state)
        return jax.lax.stop_gradient(zero_if_none(call, gradient)), settled("finish", call, new_state, state)

    def public_visits(state, *, values=None, mask=None):
        return rowwise.visits(state, read(state, values, mask, required=False).mask)

    return Rowwise(
        knows_names(public_visit, per_task),
        public_weigh("weigh", rowwise.weigh, read_statistics, read, settled, per_task) if rowwise.weigh else None,
        knows_names(public_finish, per_task) if rowwise.finish else None,
        knows_names(public_visits, per_task) if rowwise.visits else None,
    )


def public_hooks(check, end_epoch, observe, jacobian_shaped=(), per_task=None) -> tuple[Hook, Hook]:
    """``end_epoch`` and ``observe``, the identity where there is none."""

    def public_end_epoch(state):
        return _constants_like("end_epoch", end_epoch(state), state)

    def public_observe(state, values, *, mask=None):
        call = reader(check)(state, values, mask)
        return settle("observe", call, observe(state, call.values, call.mask), state, jacobian_shaped)

    return (
        jax.jit(checked(check, public_end_epoch)) if end_epoch else lambda state: state,
        knows_names(public_observe, per_task, losses_at=1) if observe else lambda state, values, *, mask=None: state,
    )


def zero_if_none(call, gradient):
    """The gradient; zero with no task present."""
    if call.all_present:
        return gradient
    return select(jnp.any(call.mask), gradient, jax.tree.map(jnp.zeros_like, gradient))


def finish_weights(weights, mask, dtype):
    """The weights as constants of differentiation, 0 for absent tasks."""
    return jax.lax.stop_gradient(jnp.where(mask, weights, 0).astype(dtype))


def settle(name, call, new_state, state, jacobian_shaped=()):
    """The new state that the function of this name made; the old one with no task present: then nothing has happened.

    Jacobian-shaped leaves see to that row by row: selecting between two whole ones would hold both in memory.
    """
    new_state = _constants_like(name, new_state, state)
    if call.all_present:
        return new_state
    return select(jnp.any(call.mask), new_state, state, new_anyway=jacobian_shaped)


def _constants_like(name, new_state, state):
    """The new state in the old one's dtypes, a constant of differentiation."""
    returned.check_same(f"the new state of {name}", new_state, state)
    return jax.lax.stop_gradient(jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), new_state, state))
