"""Each task's gradient apart from the others': functions of single tasks, named losses, and tasks that go bad alone."""

import itertools
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from mtlbalance.autodiff.loops import is_traced
from mtlbalance.autodiff.point import (
    Point,
    Pullback,
    check_no_aux,
    n_bytes,
    one_value,
    point_at,
    present_only,
    with_aux,
    without_float0,
)
from mtlbalance.autodiff.subsets import whole
from mtlbalance.gramian import combine
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import check_losses, is_counted
from mtlbalance.mapped_axes import manual_axes, on_all_devices, types_tell, varying, varying_as
from mtlbalance.state_checks import in_words


def is_one_for_each(losses_fn: Any) -> bool:
    """Whether this is a tree of functions, one for each task, and not one for all, or a trunk and heads."""
    is_tree = isinstance(losses_fn, Mapping | list) and not callable(losses_fn)
    return is_tree and any(map(callable, jax.tree.leaves(losses_fn, is_leaf=callable)))


def of_functions(loss_fns, params, args, kwargs, *, has_aux, totals=None) -> Point:
    """For a tree of loss functions, one for each task; every positional argument is a tree of their parts."""
    paths, functions = zip(*jax.tree.leaves_with_path(loss_fns, is_leaf=callable), strict=True)
    tasks = jax.tree.structure(loss_fns, is_leaf=callable)
    parts = [_parts(f"args[{i}]", loss_fns, x) for i, x in enumerate(args)]

    def of_task(path, function, total, *part):
        name = f"losses_fn{jax.tree_util.keystr(path)}"

        def value_of(params):
            loss, aux = with_aux(function(params, *part, **kwargs), has_aux, name)
            return one_value(name, loss, total), (loss, aux)

        return jax.vjp(value_of, params, has_aux=True)

    totals = [None] * len(functions) if totals is None else tasks.flatten_up_to(totals)
    values, pulls, outputs = zip(*map(of_task, paths, functions, totals, *parts), strict=True)
    pull = lambda k, cotangent: without_float0(pulls[k](cotangent)[0], params)
    losses, aux = (tasks.unflatten(parts) for parts in zip(*outputs, strict=True))
    return _each_alone(values, pull, (losses, aux if has_aux else None), n_bytes(pulls))


def of_named_losses(losses_fn, params, args, kwargs, *, has_aux, totals=None) -> Point:
    """For a function that returns all losses in a tree, one number each: the gradient of each alone.

    The losses are linearized together. Transposed for one of them, the others' share of the backward pass is not
    there: to a pull-back of all it would be zero times what may be infinite.
    """
    leaves, treedef = jax.tree.flatten(params)
    is_trained = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in leaves]  # not integers
    trained = [x for x, yes in zip(leaves, is_trained, strict=True) if yes]

    def with_others(trained, other):
        given = iter(trained)
        return treedef.unflatten([next(given) if yes else other(x) for x, yes in zip(leaves, is_trained, strict=True)])

    def values_of(*trained):
        losses, aux = with_aux(losses_fn(with_others(trained, lambda x: x), *args, **kwargs), has_aux)
        if not has_aux:
            check_no_aux(losses)
        return _each_value(losses, totals), (losses, aux)

    values, linear, outputs = jax.linearize(values_of, *trained, has_aux=True)

    def pull(k, cotangent):
        transposed = jax.linear_transpose(lambda *tangents: linear(*tangents)[k], *trained)
        return with_others(transposed(cotangent), lambda x: jnp.zeros(jnp.shape(x)))

    return _each_alone(values, pull, outputs, n_bytes(linear))


def rows_apart(point: Point, n: int | str) -> tuple[Point, jax.Array]:
    """The point with all rows computed, which its pull-backs are made of; and the tasks of which all is finite.

    Args:
      point: one whose rows are computed apart from each other.
      n: how many at a time.
    """
    evaluated, jacobian = point.evaluate_and_pull(lambda pullback: pullback.rows(whole, n))

    def weighted(weights, present=None):
        return combine(jnp.ravel(weights), jacobian, None if present is None else jnp.ravel(present))

    row = lambda i: jax.tree.map(lambda x: x[i], jacobian)
    kept = Pullback(weighted, row, lambda restrict, n: restrict(jacobian), 0)
    finite = jnp.isfinite(evaluated.values) & _finite_rows(jacobian)
    return Point(evaluated, lambda read: (evaluated, read(kept))), _agreed(finite, evaluated.values)


def heads_apart(point: Point, restrict: Callable[..., Any], n: int | str | None) -> tuple[Point, jax.Array]:
    """As :func:`rows_apart` for a trunk and heads, which are apart already.

    Args:
      point: one of a trunk and heads.
      restrict: from a gradient to what the method sees of it.
      n: how many rows to compute at a time; ``None`` if the method needs none, and only the heads are looked at.
    """
    evaluated, pullback = point.evaluated, point.pull(lambda pullback: pullback)
    finite = jnp.isfinite(evaluated.values) & pullback.finite_heads()
    if n is not None:
        jacobian = pullback.rows(restrict, n)
        finite &= _finite_rows(jacobian)
        pullback = pullback._replace(rows=lambda restrict, n: jacobian)
    return Point(evaluated, lambda read: (evaluated, read(pullback))), _agreed(finite, evaluated.values)


def _each_alone(values, pull, outputs, n_bytes_kept):
    """The point of one value for each task, and ``pull(k, cotangent)``, the pull-back of that of task k."""

    def gradient(k, weight=1.0):
        return pull(k, varying_as(jnp.asarray(weight, values[k].dtype), values[k]))

    def weighted(weights, present=None):
        gradients = present_only([gradient(k, weights[k]) for k in range(len(values))], present)
        return reduce(partial(jax.tree.map, jnp.add), gradients)

    def row(i):
        if not is_traced(i):
            return gradient(int(i))
        return jax.lax.switch(i, [partial(gradient, k) for k in range(len(values))])

    def rows(restrict, n):
        del n  # one program for each, in an order that is the compiler's
        gradients = [restrict(gradient(k)) for k in range(len(values))]
        return jax.tree.map(lambda *rows: jnp.stack(rows), *gradients)

    return point_at(jnp.stack(values), outputs, Pullback(weighted, row, rows, n_bytes_kept))


def _each_value(losses, totals):
    """One number for each leaf."""
    check_losses("losses_fn", losses)
    leaves, tree = jax.tree.flatten(losses, is_leaf=is_counted)
    due = "losses in a dict or list, one number each (of one array nothing can be told apart in the backward pass; see"
    due += " also a dict of functions, task_axis=, trunk and heads), for nonfinite='drop_task'"
    if jax.tree_util.treedef_is_leaf(tree):
        reject("losses_fn", due, "one array of losses" if jnp.ndim(jax.tree.leaves(losses)[0]) else "a scalar")
    for path, x in jax.tree.leaves_with_path(losses):
        if jnp.ndim(x):
            reject(f"losses_fn{jax.tree_util.keystr(path)}", due, f"shape {jnp.shape(x)}")
    totals = [None] * len(leaves) if totals is None else tree.flatten_up_to(totals)
    return tuple(map(partial(one_value, "losses_fn"), leaves, totals))


def _parts(name, functions, given):
    """What is given for each function, of a tree whose top is theirs."""
    if callable(functions):
        return [given]
    at_top = lambda x: x is not functions
    try:
        parts = jax.tree.structure(functions, is_leaf=at_top).flatten_up_to(given)
    except ValueError:
        expected = f"a part for each task, {in_words(functions)} as the functions are (what is the same for all: by "
        return reject(name, f"{expected}keyword)", in_words(given))
    entries = jax.tree.leaves_with_path(functions, is_leaf=at_top)
    each = [_parts(f"{name}{jax.tree_util.keystr(path)}", f, x) for (path, f), x in zip(entries, parts, strict=True)]
    return list(itertools.chain.from_iterable(each))


def _finite_rows(jacobian):
    of_leaf = lambda x: jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim)))
    return reduce(jnp.logical_and, map(of_leaf, jax.tree.leaves(jacobian)), True)


def _agreed(finite, values):
    """On every device that has a part of what is finite or not."""
    axes = [name for name in manual_axes() if not types_tell(name) or name in varying(finite) - varying(values)]
    return on_all_devices(finite, axes)
