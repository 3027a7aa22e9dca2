"""The options of a step: which are allowed together, and what they choose by default."""

import functools
import inspect
import math
import numbers
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtlbalance.autodiff.apart import is_one_for_each, of_functions, of_named_losses
from mtlbalance.autodiff.microbatches import of_microbatches
from mtlbalance.autodiff.point import Evaluated, Point, move_axis, n_bytes, of_features, of_losses, of_own_data
from mtlbalance.autodiff.subsets import Subset
from mtlbalance.contract import Aggregator, Scalarizer, check_hooks, has_weights
from mtlbalance.hyperparameters import check_int, reject
from mtlbalance.losses import shape_of, sums
from mtlbalance.parameters import OF_MODULE, check_trainable
from mtlbalance.state_checks import described
from mtlbalance.wrappers.plumbing import check_method

# Bytes of a Jacobian up to which all rows are computed at once, and up to which they may be kept for speed alone.
_SMALL, LARGE = 4 * 2**20, 256 * 2**20


def check_losses_fn(losses_fn: Any, shared: Subset | None, task_axis: int | None) -> None:
    """Raises unless there is a function, or a trunk and heads without what these exclude."""
    is_pair = isinstance(losses_fn, tuple) and len(losses_fn) == 2 and callable(losses_fn[0])
    if is_one_for_each(losses_fn):
        _check_each_function(losses_fn, task_axis)
    elif not is_pair and not callable(losses_fn):
        expected = "a function, a pair of a trunk and heads, or a dict or list of functions, one for each task"
        reject("losses_fn", expected, f"{type(losses_fn).__name__}", TypeError)
    if is_pair and (shared is not None or task_axis is not None):
        reject("losses_fn", "one function with shared= or task_axis=", "a pair of trunk and heads")
    for function in jax.tree.leaves(losses_fn, is_leaf=callable):
        _check_keywords(function)


def _check_each_function(losses_fn: Any, task_axis: int | None) -> None:
    """Raises unless all that is in a tree are functions, whose tasks need no axis of their own."""
    functions = jax.tree.leaves_with_path(losses_fn, is_leaf=lambda x: x is None or callable(x))
    for path, function in functions:
        if not callable(function):
            expected = "a function, as in a dict or list of functions, one for each task"
            reject(f"losses_fn{jax.tree_util.keystr(path)}", expected, f"{type(function).__name__}", TypeError)
    if task_axis is not None:
        reject("losses_fn", "one function for all tasks with task_axis=", f"a {type(losses_fn).__name__} of functions")


def check_nonfinite(nonfinite: Any, rows: int | str | None, method: Scalarizer | Aggregator) -> None:
    """Raises unless it is known what to do, and rows are kept to look at."""
    if nonfinite not in (None, "drop_task"):
        reject("nonfinite", "'drop_task' or None", f"{nonfinite!r}")
    if nonfinite and isinstance(method, Aggregator) and rows in ("two_pass", "stream"):
        reject("rows", "an int, 'vmap' or None with nonfinite='drop_task', which looks at all rows", f"{rows!r}")


def _check_keywords(function):
    """Raises if it could not be given an argument, as the step takes it for itself."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # it has none that can be read
        return
    by_keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    given = function.keywords if isinstance(function, functools.partial) else {}
    for parameter in list(parameters)[1:]:  # the first are the parameters of the model
        if parameter.name in ("mask", "refresh") and parameter.kind in by_keyword and parameter.name not in given:
            expected = "no parameter mask or refresh, which grad_fn(..., mask=, refresh=) takes for the tasks"
            hint = "rename it, or wrap the function in one that calls it otherwise"
            reject("losses_fn", f"{expected} ({hint})", f"a parameter {parameter.name!r}")


def check_function(losses_fn: Any, argnums: Any, task_axis: int | None) -> None:
    """Raises unless there is a function, or one for each task, and positions of arguments and not these themselves."""
    if is_one_for_each(losses_fn):
        _check_each_function(losses_fn, task_axis)
    elif not callable(losses_fn):
        expected = "a function that returns the losses, or a dict or list of functions, one for each task"
        reject("losses_fn", expected, f"{type(losses_fn).__name__}", TypeError)
    for i in argnums if isinstance(argnums, tuple | list) else (argnums,):
        if not hasattr(i, "__index__"):
            expected = "positions of arguments (the arguments are given to the function that comes back)"
            reject("argnums", expected, f"{type(i).__name__}", TypeError)


def check_is_possible(method: Any, return_weights: bool, decide_on: Subset | None, hooks: bool) -> None:
    """Raises unless a step can be taken by the method, and gives what is asked for."""
    check_method(method, "mtl.value_and_grad(losses_fn, mtl.learn(method, optimizer))")
    check_hooks(method, hooks)
    for name, given in {"return_weights": return_weights, "decide_on": decide_on is not None}.items():
        if given and not has_weights(method):
            expected = f"a method that makes weights (method.weighting), or a call without {name}="
            reject(name, expected, "a method that makes none")


def check_at(at: str, has_features: bool, *excluded: Any) -> None:
    """Raises if the features are asked for where there are none, or with options that they exclude."""
    if at not in ("parameters", "features"):
        reject("at", "'parameters' or 'features'", f"{at!r}")
    if at == "features" and not (has_features and all(option is None for option in excluded)):
        expected = "'features' only with a pair of trunk and heads, and without rows=, decide_on= and microbatches="
        reject("at", expected, f"{at!r}")


def possible_rows(
    method: Scalarizer | Aggregator, rows: int | str | None, own_data: bool, microbatches: int | None
) -> tuple[str, ...]:
    """What ``rows=None`` may choose from; what may be asked for is more."""
    if microbatches is not None:
        check_int("microbatches", microbatches, 1)
    if isinstance(method, Scalarizer):  # which has no rows, and takes any
        check_rows(rows, "vmap", "two_pass", "stream")
        return ("vmap",)
    # With own data a row of the Gramian costs two passes over all data, and all rows of the Jacobian together cost one.
    two_pass = ("two_pass",) if method.gramian_weighting is not None and not own_data else ()
    stream = ("stream",) if method.rowwise is not None else ()
    check_rows(rows, "vmap", *two_pass, *stream)
    if method.rowwise is not None and method.rowwise.visits is not None:
        return ("stream",)  # some rows of the many
    # With micro-batches every further pass computes the model again.
    return ("vmap",) if microbatches is not None else ("vmap", *two_pass, *stream)


def check_rows(rows: int | str | None, *names: str) -> None:
    """Raises unless rows are a number of at least 1, or one of these, or ``None``."""
    if isinstance(rows, numbers.Integral) and not isinstance(rows, bool):
        check_int("rows", rows, 1)
    elif rows not in (*names, None):
        reject("rows", f"an int or one of {', '.join(map(repr, (*names, None)))}", f"{rows!r}")


def cheapest_rows(
    possible: tuple[str, ...], own_data: bool, point: Point, params: chex.ArrayTree, small: int | None = None
) -> int | str:
    """What was fastest where that was measured, of those that take no more memory than may matter.

    ``small`` are the bytes of a Jacobian that is kept without further ado, 4 MiB by default.
    """
    row = n_bytes(params)
    jacobian = point.evaluated.values.size * row
    if jacobian <= (_SMALL if small is None else small) and "vmap" in possible:
        return "vmap"
    if "stream" in possible:
        return "stream"
    if own_data:
        return "vmap"  # each row has its own part of the batch: all at once take no more memory
    if "two_pass" in possible:
        # What two passes save is writing and reading the rows. That takes long where they are large for what is
        # computed to make them: where the parameters are large beside the activations.
        n_bytes_kept = point.pull(lambda pullback: pullback.n_bytes_kept)
        return 1 if n_bytes_kept >= 1.5 * row and jacobian <= LARGE else "two_pass"
    return 1


def evaluate_at(losses_fn, params, args, kwargs, *, has_aux, task_axis, microbatches=None, apart=False):
    """The losses at some parameters, by the form that the options ask for; ``apart``: each row can be had alone."""
    form = of_named_losses if apart else of_losses
    if isinstance(losses_fn, tuple):
        form = of_features
    elif is_one_for_each(losses_fn):
        form = of_functions
    elif task_axis is not None:
        form, args = of_own_data, move_axis(args, task_axis)
    point_of = lambda args, totals: form(losses_fn, params, args, kwargs, has_aux=has_aux, totals=totals)
    if microbatches is None:
        return point_of(args, None)
    return of_microbatches(point_of, args, microbatches, axis=0 if task_axis is None else 1)


def check_params(params: chex.ArrayTree, allow_int: bool) -> None:
    """Raises unless all parameters can be differentiated, or are integers or random keys that are allowed."""
    check_trainable("params", params)
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        may_be = (jnp.inexact, jnp.integer, jnp.bool_, jax.dtypes.prng_key) if allow_int else (jnp.inexact,)
        if not any(jnp.issubdtype(dtype, kind) for kind in may_be):
            hint = "or allow_int=True, for gradients of integers of type float0"
            if jnp.issubdtype(dtype, jax.dtypes.prng_key):
                hint = f"no random keys: {OF_MODULE}"
            expected = f"real or complex floating point numbers ({hint})"
            reject(f"params{jax.tree_util.keystr(path)}", expected, f"dtype {dtype}", TypeError)


def check_state(state: Any) -> None:
    """Raises if what stands between the parameters and the batch is no state, before the losses meet it."""
    if not hasattr(state, "_fields") or isinstance(state, Scalarizer | Aggregator):
        expected = "what grad_fn.init(params, *batch) returned, in its place: grad_fn(params, state, *batch)"
        reject("state", expected, described(state), TypeError)


def check_per_task(evaluated: Evaluated, state: Any = None) -> None:
    """Raises if there is one loss, a scalar, where the state is not made for that; or more than one a task."""
    values, losses = evaluated.values, evaluated.losses
    of_no_task = bool(jax.tree.leaves(state)) and shape_of(state) == ()
    if values.ndim == 0 and not of_no_task:
        expected = "one loss for each task, as in jnp.stack([...]) or a dict"
        reject("losses_fn", expected, "a scalar: do not add the losses up")
    if state is None or values.shape == shape_of(state):
        return
    n_tasks, expected = math.prod(shape_of(state)), f"as many losses as the state is for, shape {shape_of(state)}"
    n_losses = lambda losses: sum(map(jnp.size, jax.tree.leaves(sums(losses))))
    if type(losses) is tuple and len(losses) == 2 and n_losses(losses[0]) == n_tasks:
        reject("losses_fn", f"{expected}, or has_aux=True", "a pair, which looks like (losses, aux)")
    if values.size > n_tasks and n_tasks in (len(jax.tree.leaves(sums(losses))), *values.shape):
        found = f"shapes {jax.tree.map(jnp.shape, sums(losses))}"
        reject("losses_fn", f"{expected}: each the mean over its examples", found)
