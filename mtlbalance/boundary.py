"""How a method's plain functions become the public ones: what a call is given is read, and what it returns settled."""

from functools import partial, wraps

import jax
import jax.numpy as jnp

from mtlbalance import returned
from mtlbalance.annotations import AggregatorApply, EndEpoch, Observe, WeightingApply, documented
from mtlbalance.complex_parts import entries, is_parts, join, join_like, split, split_params
from mtlbalance.contract import Rowwise
from mtlbalance.given import finish_weights
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import (
    broadcast_to_rows,
    check_task_axis,
    read_call,
    read_row,
    state_dtype,
)
from mtlbalance.meshes import explicit_mesh, with_whole_tasks
from mtlbalance.names import compile_with_names, names_of
from mtlbalance.numerics import nan_unless
from mtlbalance.parameters import check_params_like
from mtlbalance.states import like_jacobian, read_field, select

_ROWS_DUE = "leaves [m, *param.shape], one row per task, as mtl.value_and_jac returns"


def reader(check, *, required=False):
    """What reads one call, as :func:`read_call` does, after ``check`` has seen the state."""

    def read(state, values, mask, *, required=required):
        check(state)
        check_mask_names(mask, values)
        names = names_of(mask if values is None else values).entries
        return read_call(state, values, mask, required=required, names=names)

    return read


def check_mask_names(mask, values):
    """Raises for a mask by names where the losses have none: their order would be the sorted one."""
    given = names_of(mask)
    if given.n_leaves > 1 and (values is None or not names_of(values).entries):
        of_none, of_unnamed = "values= with the losses' names, or one array", "one array: the losses have no names"
        reject("mask", of_none if values is None else of_unnamed, f"{list(given.entries)}")


def checked(check, function):
    """A function of the state alone, if there is one, after ``check`` has seen the state."""

    if function is None:
        return None

    @wraps(function)
    def checked_function(state):
        check(state)
        return function(state)

    return checked_function


def for_each_task(function, mask):
    """A function of one task's arguments, mapped over those of all tasks."""
    if explicit_mesh(mask) is None:
        return jax.vmap(function)
    # Under vmap a mask on an Explicit mesh does not select among arrays that are split (JAX 0.10).
    return lambda *given: jax.lax.map(lambda one: function(*one), given)


def nan_if_nonfinite(name, function):
    """The plain function of this name, with NaN for its weights, or its gradient, where what it is given is not finite.

    That is a Gramian, or the visits' statistics, of the tasks present. Here, once for all methods: solvers, thresholds
    and comparisons make zeros and other finite numbers of NaN. It is not for weights that do not depend on what is
    given, as the mean's, nor where a method inside sees to it.
    """

    @wraps(function)
    def shows_it(state, given, values, mask):
        output = function(state, given, values, mask)
        if name == "finish":
            output, new_state = returned.gradient_and_state(name, output, state)
        else:
            output, new_state = returned.weights_and_state(name, output, mask.shape)
        for leaf in jax.tree.leaves(given):
            ok = jnp.all(jnp.isfinite(leaf) | ~broadcast_to_rows(mask, leaf))
            output = jax.tree.map(partial(nan_unless, ok), output)
        return output, new_state

    return shows_it


def public_apply(plain, read, settled, jacobian_shaped=(), per_task=None):
    """An aggregator's ``apply`` from one of a call and its rows."""

    def apply(state, jacobian, *, values=None, mask=None):
        call = read(state, values, mask)
        if not jacobian_shaped and _is_vector(jacobian):
            jacobian = _not_differentiated(jnp.asarray(jacobian))
        rows = read_rows(call, jacobian, state, jacobian_shaped)
        gradient, new_state = returned.gradient_and_state("apply", plain(state, rows, call), state, rows)
        gradient = join_like(zero_if_none(call, gradient), jacobian)
        return gradient, settled("apply", call, new_state, state)

    return documented(_refuses_losses(compile_with_names(apply, per_task)), AggregatorApply)


def public_weigh(name, weigh, read_statistic, read, settled, per_task=None, stop_gradient=True):
    """A weighting's ``apply`` from the plain function of this name."""

    def apply(state, statistic, *, values=None, mask=None):
        call = read(state, values, mask)
        statistic = jax.lax.stop_gradient(read_statistic(call, statistic, state))
        output = weigh(state, statistic, call.values, call.mask)
        weights, new_state = returned.weights_and_state(name, output, call.mask.shape)
        weights = finish_weights(weights, call.mask, state_dtype(state, statistic), stop_gradient)
        return weights, settled(name, call, new_state, state)

    return documented(_refuses_losses(compile_with_names(apply, per_task)), WeightingApply)


def public_rowwise(rowwise, read, settled, jacobian_shaped=(), per_task=None):
    """A :class:`~mtlbalance.Rowwise` of public functions from one of plain ones."""

    def public_visit(state, i, row, *, values=None, mask=None):
        call = read(state, values, mask)
        row = jax.lax.stop_gradient(read_row(call.mask[i], row))
        check_remembered("row", row, state, jacobian_shaped, skip=1)
        return jax.lax.stop_gradient(rowwise.visit(state, i, row, call.values, call.mask))

    def public_finish(state, statistics, *, values=None, mask=None):
        call = read(state, values, mask)
        output = rowwise.finish(state, read_statistics(call, statistics), call.values, call.mask)
        gradient, new_state = returned.gradient_and_state("finish", output, state)
        gradient = join(zero_if_none(call, gradient))
        return jax.lax.stop_gradient(gradient), settled("finish", call, new_state, state)

    def public_visits(state, *, values=None, mask=None):
        return rowwise.visits(state, read(state, values, mask, required=False).mask)

    return Rowwise(
        compile_with_names(public_visit, per_task),
        rowwise.weigh and public_weigh("weigh", rowwise.weigh, without_state(read_statistics), read, settled, per_task),
        compile_with_names(public_finish, per_task) if rowwise.finish else None,
        compile_with_names(public_visits) if rowwise.visits else None,
    )


def public_hooks(check, end_epoch, observe, jacobian_shaped=(), per_task=None) -> tuple[EndEpoch, Observe]:
    """``end_epoch`` and ``observe``, the identity where there is none."""

    def public_end_epoch(state):
        return _constants_like("end_epoch", end_epoch(state), state)

    def public_observe(state, values, *, mask=None):
        call = reader(check, required=True)(state, values, mask)
        return settle("observe", call, observe(state, call.values, call.mask), state, jacobian_shaped)

    compiled = compile_with_names
    after_epoch = compiled(checked(check, public_end_epoch)) if end_epoch else lambda state: state
    after_step = (
        compiled(public_observe, per_task, losses_at=1, check=check)
        if observe
        else lambda state, values, *, mask=None: state
    )
    return documented(after_epoch, EndEpoch, "end_epoch"), documented(after_step, Observe, "observe")


def read_rows(call, jacobian, state, jacobian_shaped):
    """The Jacobian that a call is given, if it is of the state's parameters, as far as that knows them.

    Its leaves are arrays, complex ones split, with the rows of absent tasks as they are.
    """
    rows = split(check_task_axis(jacobian, len(call.mask)))
    check_remembered("jacobian", rows, state, jacobian_shaped)
    return rows


def statistic_reader(statistic_of, jacobian_shaped):
    """A reader of the Jacobian that makes of it what the weighting is of."""
    return lambda call, jacobian, state: statistic_of(call, read_rows(call, jacobian, state, jacobian_shaped))


def without_state(read):
    """A reader of what says nothing of the parameters, in the form of :func:`read_rows`."""
    return lambda call, statistic, state: read(call, statistic)


def check_remembered(name, rows, state, jacobian_shaped, skip=0):
    """Raises unless gradients have the shapes of those that the state remembers, after ``skip`` axes."""
    for field in like_jacobian(jacobian_shaped):
        check_rows_like(name, rows, read_field(state, field), skip)


def check_rows_like(name, rows, like, skip=0):
    """Raises unless gradients have the shapes of others, after ``skip`` axes of these."""
    # One leaf for a complex number: what is remembered of it may be its modulus.
    rows, like = entries(rows), entries(like)
    expected, found = ([jnp.shape(x) for x in jax.tree.leaves(tree)] for tree in (like, rows))
    no_rows = found != expected and found == [shape[1:] for shape in expected]
    if not skip and (no_rows or (_is_vector(rows) and not _is_vector(like))):
        what = "a plain gradient" if no_rows else "a vector, such as the losses themselves"
        reject(name, f"{_ROWS_DUE}: shapes {expected}", f"{what}, shapes {found}")
    check_params_like(name, rows, like, skip)


def check_kinds(name, rows, like):
    """Raises unless gradients have complex numbers where others have them, both in their parts."""
    kinds, others = jax.tree.leaves_with_path(rows, is_leaf=is_parts), jax.tree.leaves(like, is_leaf=is_parts)
    for (path, x), other in zip(kinds, others, strict=True):
        found, expected = ("complex numbers" if is_parts(leaf) else "real numbers" for leaf in (x, other))
        if found != expected:
            reject(f"{name}{jax.tree_util.keystr(path)}", f"{expected}, as the parameters are", found, TypeError)


def losses_of(extra_args):
    """The losses among the extra arguments of optax's ``update``, by one of their two names."""
    values, task_losses = extra_args.get("values"), extra_args.get("task_losses")
    if values is not None and task_losses is not None:
        reject("task_losses", "the losses as values= or as task_losses=", "both")
    return task_losses if values is None else values


def check_rows_of(jacobian, m, params):
    """Raises unless a Jacobian has one row per task, and its leaves are those of the parameters."""
    rows = split(check_task_axis(jacobian, m))
    leaf = lambda x: jax.ShapeDtypeStruct((m, *jnp.shape(x)), jnp.result_type(x))
    like = split_params(jax.tree.map(leaf, params))
    check_rows_like("jacobian", rows, like)
    check_kinds("jacobian", rows, like)


def read_statistics(call, statistics):
    """Checks that the visits' statistics are stacked, one per task."""
    for leaf in jax.tree.leaves(statistics):
        if jnp.shape(leaf)[:1] != call.mask.shape:
            reject("statistics", f"a leading axis of {call.mask.shape[0]}, one per task", f"shape {jnp.shape(leaf)}")
    return jax.tree.map(lambda x: with_whole_tasks(jnp.asarray(x), 1), statistics)


def zero_if_none(call, gradient):
    """The gradient; zero with no task present."""
    if call.all_present:
        return gradient
    return select(jnp.any(call.mask), gradient, jax.tree.map(jnp.zeros_like, gradient))


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


# The Jacobian of one parameter that is a scalar by itself is a vector. So are the losses, given by mistake.


def _refuses_losses(compiled):
    """A function of the Jacobian that refuses the losses in its place, where both are given."""

    @wraps(compiled)
    def public(*args, values=None, **others):
        if values is not None and any(x is values for x in (*args, *others.values())):
            reject("jacobian", _ROWS_DUE, "the losses themselves, which are given as values too")
        return compiled(*args, values=values, **others)

    return public


def _is_vector(jacobian):
    return jax.tree_util.all_leaves([jacobian]) and jnp.ndim(jacobian) == 1


@jax.custom_jvp
def _not_differentiated(vector):
    return vector


@_not_differentiated.defjvp
def _refuse(primals, tangents):
    del tangents
    hint = "; mtl.value_and_grad makes both the rows and the gradient. One scalar parameter: {'x': jacobian}"
    found = f"a vector that is differentiated, shape {primals[0].shape}: the losses, inside jax.grad"
    reject("jacobian", f"{_ROWS_DUE}{hint}", found)
