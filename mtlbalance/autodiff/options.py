"""The options of a step: which are allowed together, and what they choose by default."""

import numbers
from typing import Any

import chex
import jax
import jax.numpy as jnp

from mtlbalance.autodiff.microbatches import of_microbatches
from mtlbalance.autodiff.point import Point, move_axis, n_bytes, of_features, of_losses, of_own_data
from mtlbalance.autodiff.subsets import Subset
from mtlbalance.contract import Aggregator, Scalarizer
from mtlbalance.hyperparameters import check_int, reject
from mtlbalance.losses import shape_of
from mtlbalance.wrappers.plumbing import check_method

# Bytes of a Jacobian up to which all rows are computed at once, and up to which they may be kept for speed alone.
_SMALL, _LARGE = 4 * 2**20, 256 * 2**20


def check_losses_fn(losses_fn: Any, shared: Subset | None, task_axis: int | None) -> None:
    """Raises unless there is a function, or a trunk and heads without what these exclude."""
    is_pair = isinstance(losses_fn, tuple) and len(losses_fn) == 2 and callable(losses_fn[0])
    if not is_pair and not callable(losses_fn):
        reject("losses_fn", "a function, or a pair of a trunk and heads", f"{type(losses_fn).__name__}", TypeError)
    if is_pair and (shared is not None or task_axis is not None):
        reject("losses_fn", "one function with shared= or task_axis=", "a pair of trunk and heads")


def check_is_possible(method: Any, return_weights: bool, decide_on: Subset | None) -> None:
    """Raises unless a step can be taken by the method, and gives what is asked for."""
    check_method(method, "mtl.value_and_grad(losses_fn, mtl.learn(method, optimizer))")
    makes_weights = isinstance(method, Scalarizer) or method.weighting is not None
    for name, given in {"return_weights": return_weights, "decide_on": decide_on is not None}.items():
        if given and not makes_weights:
            reject(name, "a method that makes weights (method.weighting)", "one that makes none")


def check_at(at: str, has_features: bool, *excluded: Any) -> None:
    """Raises if the features are asked for where there are none, or with options that they exclude."""
    if at not in ("parameters", "features"):
        reject("at", "'parameters' or 'features'", f"{at!r}")
    if at == "features" and not (has_features and all(option is None for option in excluded)):
        expected = "'features' only with a pair of trunk and heads, and without rows=, decide_on= and microbatches="
        reject("at", expected, f"{at!r}")


def possible_rows(
    method: Scalarizer | Aggregator, rows: int | str | None, task_axis: int | None, microbatches: int | None
) -> tuple[str, ...]:
    """What ``rows=None`` may choose from; what may be asked for is more."""
    if microbatches is not None:
        check_int("microbatches", microbatches, 1)
    if isinstance(method, Scalarizer):  # which has no rows, and takes any
        check_rows(rows, "vmap", "two_pass", "stream")
        return ("vmap",)
    # With own data a row of the Gramian costs two passes over all data, and all rows of the Jacobian together cost one.
    two_pass = ("two_pass",) if method.gramian_weighting is not None and task_axis is None else ()
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


def cheapest_rows(possible: tuple[str, ...], task_axis: int | None, point: Point, params: chex.ArrayTree) -> int | str:
    """What was fastest where that was measured, of those that take no more memory than may matter."""
    row = n_bytes(params)
    jacobian = point.evaluated.values.size * row
    if jacobian <= _SMALL and "vmap" in possible:
        return "vmap"
    if "stream" in possible:
        return "stream"
    if task_axis is not None:
        return "vmap"  # each row has its own part of the batch: all at once take no more memory
    if "two_pass" in possible:
        # What two passes save is writing and reading the rows. That takes long where they are large for what is
        # computed to make them: where the parameters are large beside the activations.
        n_bytes_kept = point.pull(lambda pullback: pullback.n_bytes_kept)
        return 1 if n_bytes_kept >= 1.5 * row and jacobian <= _LARGE else "two_pass"
    return 1


def evaluate_at(losses_fn, params, args, kwargs, *, has_aux, task_axis, microbatches=None):
    """The losses at some parameters, by the form that the options ask for."""
    form = of_losses
    if isinstance(losses_fn, tuple):
        form = of_features
    elif task_axis is not None:
        form, args = of_own_data, move_axis(args, task_axis)
    point_of = lambda args, totals: form(losses_fn, params, args, kwargs, has_aux=has_aux, totals=totals)
    if microbatches is None:
        return point_of(args, None)
    return of_microbatches(point_of, args, microbatches, axis=0 if task_axis is None else 1)


def check_params(params: chex.ArrayTree, allow_int: bool) -> None:
    """Raises unless all parameters can be differentiated, or are integers that are allowed."""
    for path, leaf in jax.tree.leaves_with_path(params):
        is_array = hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)
        dtype = jnp.result_type(leaf) if is_array else type(leaf).__name__
        may_be = (jnp.inexact, jnp.integer, jnp.bool_) if allow_int else (jnp.inexact,)
        if not is_array or not any(jnp.issubdtype(dtype, kind) for kind in may_be):
            expected = "floating point numbers (real or complex; or allow_int=True, and integers get float0)"
            reject(f"params{jax.tree_util.keystr(path)}", expected, f"dtype {dtype}", TypeError)


def check_per_task(values: chex.Array, state: Any = None) -> None:
    """Raises if there is one loss, a scalar, where the state is not made for that."""
    of_no_task = state is not None and shape_of(state) == ()
    if values.ndim == 0 and not of_no_task:
        expected = "one loss for each task, as in jnp.stack([...]) or a dict"
        reject("losses_fn", expected, "a scalar: do not add the losses up")
