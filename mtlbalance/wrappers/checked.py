"""Checked: errors that say which task's loss or gradient went bad, by :mod:`jax.experimental.checkify`."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import checkify

from mtlbalance import base
from mtlbalance.contract import Aggregator, Rowwise, Scalarizer, check_is_method
from mtlbalance.names import known_names
from mtlbalance.states import among
from mtlbalance.wrappers.plumbing import state_after

# Of whatever state: it is that of the method inside.
AnyMethod = TypeVar("AnyMethod", bound=Scalarizer[Any] | Aggregator[Any])


@base.memoized
def checked(method: AnyMethod) -> AnyMethod:
    """A method that says which task's loss or gradient is not finite, and what of its own is not.

    It computes what the method computes, with the same state. Its checks are those of
    :mod:`jax.experimental.checkify`, which turns a step with them into one that returns an error beside its output::

        step = jax.jit(checkify.checkify(step))
        error, output = step(params, state, batch)
        error.throw()  # raises for the first check that failed, if one did

    Checked are, in this order, each loss and each gradient (a row of the Jacobian, or the Gramian's diagonal) of the
    tasks present, then what comes out: the scalar, the weights or the gradient, and each field of the new state,
    numbers that were infinite before left out. An error has the name of the loss where losses have names, and its index
    always. In :func:`mtlbalance.value_and_grad` the gradient that a step ends with is checked, too: a scalarizer sees
    losses alone, and whose gradient it was is not known there.

    It is for finding out, not for a long run: a check is computed at every call, and what shall go on in spite of a bad
    step is for :func:`skip_nonfinite`. It goes outside of all other wrappers; inside of one that leaves bad tasks out
    there is nothing to find.

    Note:
      Without ``checkify`` around it a call raises JAX's own error, that a ``check`` "was not functionalized". Sweep by
      :func:`jax.lax.map`: ``checkify`` takes no ``vmap`` of the loops in ``upgrad``, ``cagrad`` and ``epo``, and JAX
      0.10 no ``vmap`` of what ``checkify`` made of them.

      All rows of a Jacobian come through one backward pass, in which zero times infinity is NaN: a gradient that is not
      finite, of a loss that is, may make those of other tasks so, and then the first of them is named.

      ``checkify.checkify(step, errors=checkify.all_checks)`` looks at each operation too: of the methods here none
      makes NaN, or divides by zero, on its way to finite numbers.

    Args:
      method: a method of either family.

    Returns:
      A method of the same family with the same paths, hooks and state.

    Raises:
      TypeError: if ``method`` is of neither family.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.experimental import checkify
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.checked(scalarization.dwa())
      >>> step = jax.jit(checkify.checkify(method.apply))
      >>> error, _ = step(method.init(2), {"cls": jnp.nan, "box": 1.0})
      >>> print(error.get().partition(" (`check`")[0])
      loss 'cls' (task 1): expected a finite number, found nan

    References:
      https://docs.jax.dev/en/latest/debugging/checkify_guide.html
    """
    check_is_method("method", method, "a Scalarizer or an Aggregator", Scalarizer, Aggregator)

    def end_epoch(state):
        return _check_state(method.end_epoch(state), state)

    def observe(state, values, mask):
        _check_losses(values, mask)
        return _check_state(method.observe(state, values, mask=mask), state)

    def after_gradient(old, new, finite, dropped=None):
        checkify.check(jnp.all(finite), "gradient of the step: expected finite numbers, found others")
        return _check_state(state_after(method, old, new, finite, dropped), old)

    hooks = {"end_epoch": end_epoch, "observe": observe, "last_weights": method.last_weights, "needs": method.needs}
    build = _checked_scalarizer if isinstance(method, Scalarizer) else _checked_aggregator
    return build(method, hooks)._replace(after_gradient=after_gradient)


def _checked_scalarizer(method, hooks):
    def init(shape, dtype):
        return method.init(jax.ShapeDtypeStruct(shape, dtype))

    def apply(state, values, mask):
        _check_losses(values, mask)
        scalar, new_state = method.apply(state, values, mask=mask)
        _check_all("scalar", scalar)
        return scalar, _check_state(new_state, state)

    return base.scalarizer(init, apply, learned=method.learned, **hooks)


def _checked_aggregator(method, hooks):
    rowwise = method.rowwise
    visits = rowwise and rowwise.visits and (lambda state, mask: rowwise.visits(state, mask=mask))

    def checked_path(function, check_given, check_output):
        def path(state, given, values, mask):
            _check_losses(values, mask)
            check_given(given, mask if visits is None else among(visits(state, mask), mask))
            output, new_state = function(state, given, values=values, mask=mask)
            check_output(output, mask)
            return output, _check_state(new_state, state)

        return function and path

    def visit(state, i, row, values, mask):
        _check_losses(values, mask)
        is_visited = mask & (jnp.arange(len(mask)) == i)
        _check_rows(jnp.where(is_visited, _n_nonfinite(row), 0), is_visited)
        return rowwise.visit(state, i, row, values=values, mask=mask)

    def gradient(output, mask):
        del mask
        _check_all("gradient", output)

    of_rows = lambda jacobian, mask: _check_rows(jax.vmap(_n_nonfinite, axis_size=len(mask))(jacobian), mask)
    of_gramian = lambda gramian, mask: _check_each(_SQUARE, jnp.diagonal(gramian), mask)
    nothing, weights = (lambda given, mask: None), partial(_check_each, _WEIGHT)
    apply_of = lambda path: path and path.apply
    return base.aggregator(
        lambda m, params, dtype: method.init((m, params)),
        apply=checked_path(method.apply, of_rows, gradient),
        weighting=checked_path(apply_of(method.weighting), of_rows, weights),
        gramian_weighting=checked_path(apply_of(method.gramian_weighting), of_gramian, weights),
        rowwise=rowwise
        and Rowwise(
            visit,
            checked_path(rowwise.weigh, nothing, weights),
            checked_path(rowwise.finish, nothing, gradient),
            visits,
        ),
        jacobian_shaped=method.jacobian_shaped,
        nan_if_nonfinite=False,
        stop_gradient=False,
        **hooks,
    )


_LOSS = "{task}: expected a finite number, found {x}"
_ROW = "gradient of {task}: expected finite numbers, found {x} that are not"
_SQUARE = "squared length of the gradient of {task}: expected a finite number, found {x}"
_WEIGHT = "weight of {task}: expected a finite number, found {x}"


def _check_losses(values, mask):
    if values is not None:
        _check_each(_LOSS, values, mask)


def _check_rows(n_nonfinite, mask):
    _check_each(_ROW, n_nonfinite, mask, bad=n_nonfinite > 0)


def _check_each(message, x, mask, bad=None):
    """One number per task, of the tasks in ``mask``: the first that is ``bad``, not finite by default, is an error."""
    x, mask = jnp.ravel(x), jnp.ravel(mask)
    bad = mask & (~jnp.isfinite(x) if bad is None else bad)
    names = known_names()
    for i, name in enumerate(names.entries if names else ()):
        task = f"loss {name!r} (task {i})".replace("{", "{{").replace("}", "}}")
        checkify.check(~bad[i], message.replace("{task}", task), x=x[i])
    if not (names and names.entries):
        # One check for all, however many, with the index among what it shows.
        i = jnp.argmax(bad)
        shown = jnp.sum(x, where=jnp.arange(len(x)) == i)
        checkify.check(~jnp.any(bad), message.replace("{task}", "loss of task {i}"), i=i, x=shown)


def _check_all(what, tree):
    for path, leaf in jax.tree.leaves_with_path(tree):
        n, name = _n_nonfinite(leaf), f"{what}{jax.tree_util.keystr(path)}".replace("{", "{{").replace("}", "}}")
        checkify.check(n == 0, f"{name}: expected finite numbers, found {{n}} of {leaf.size} that are not", n=n)


def _check_state(new, old):
    """The new state, of which every number must be finite unless it was infinite before: by design, if at all."""
    kept = jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(old), new, jnp.zeros_like(new)), new, old)
    _check_all("new state", kept)
    return new


def _n_nonfinite(tree):
    return sum((jnp.sum(~jnp.isfinite(x)) for x in jax.tree.leaves(tree)), jnp.zeros((), jnp.int32))
