"""Losses with their Jacobian, and with its Gramian."""

import operator
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from mtlbalance.autodiff.apart import is_one_for_each
from mtlbalance.autodiff.loops import map_rows
from mtlbalance.autodiff.options import (
    cheapest_rows,
    check_function,
    check_params,
    check_per_task,
    check_rows,
    evaluate_at,
)
from mtlbalance.autodiff.point import Point, one_hot
from mtlbalance.autodiff.subsets import whole, with_float0
from mtlbalance.complex_parts import split
from mtlbalance.gramian import gramian
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import sums
from mtlbalance.mapped_axes import manual_axes, types_tell, varying


def value_and_jac(
    losses_fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    rows: int | Literal["vmap"] | None = None,
    task_axis: int | None = None,
    allow_int: bool = False,
) -> Callable[..., Any]:
    r"""The losses and their Jacobian: for several losses what :func:`jax.value_and_grad` is for one.

    Args:
      losses_fn: returns one loss per task: an array of any shape with m entries, or a tree of named losses of m entries
        together (in the order of :func:`jax.tree.leaves`); they may be :class:`Counted`. With ``task_axis=`` it returns
        the loss of one task. A dict or list of functions has one for each, see :func:`value_and_grad`.
      argnums: which positional arguments to differentiate with respect to, as in :func:`jax.grad`.
      has_aux: ``losses_fn`` returns a pair ``(losses, aux)``.
      rows: how many rows are computed at a time, or ``"vmap"`` for all at once, which takes memory for m backward
        passes. The default is ``"vmap"`` for a Jacobian of up to 4 MiB and 1 beyond, see :func:`value_and_grad`.
      task_axis: every task has its own data, on this axis of every other positional argument; see
        :func:`value_and_grad`.
      allow_int: integer parameters get "gradients" of dtype ``float0``, as in :func:`jax.grad`; without it they raise.

    Returns:
      A function of the arguments of ``losses_fn``. It returns ``(losses, jacobian)``, or ``((losses, aux), jacobian)``.
      The Jacobian has the structure of the parameters and leaves ``[m, *param.shape]``.

    Raises:
      TypeError: if a parameter is not floating point, or a loss is not.
      ValueError: if the losses are a scalar, or an option is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> losses_fn = lambda params, x: {"a": jnp.sum(params["w"] * x), "b": jnp.sum(params["w"] ** 2)}
      >>> losses, jacobian = mtl.value_and_jac(losses_fn)({"w": jnp.array([1.0, 2.0])}, 3.0)
      >>> print(losses["a"], losses["b"])
      9.0 5.0
      >>> print(jacobian["w"])
      [[3. 3.]
       [2. 4.]]
    """
    own_data = task_axis is not None or is_one_for_each(losses_fn)
    check_rows(rows, "vmap")
    check_function(losses_fn, argnums, task_axis)

    def jac_fn(*args, **kwargs):
        point, params = _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int)
        evaluated = point.evaluated
        check_per_task(evaluated)
        chosen = rows or cheapest_rows(("vmap",), own_data, point, params)
        jacobian = point.pull(lambda pullback: pullback.rows(whole, chosen))
        value = (evaluated.losses, evaluated.aux) if has_aux else evaluated.losses
        return value, with_float0(jacobian, params, (evaluated.values.size,))

    return jac_fn


def value_and_gramian(
    losses_fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    rows: int | Literal["vmap", "two_pass"] | None = None,
    task_axis: int | None = None,
    allow_int: bool = False,
) -> Callable[..., Any]:
    r"""The losses and the Gramian :math:`J J^\top` of their Jacobian: the inner products of the tasks' gradients.

    Two passes never store the Jacobian: row i is the pull-back of task i's gradient through the *transposed* pull-back
    (:func:`jax.linear_transpose`), which needs no forward-mode rule. What they keep does not grow with m. They need a
    backward pass that can be transposed: none that clips gradients, or has a ``while_loop`` or a Pallas kernel inside a
    ``custom_vjp``. Where two passes would be the default, rows are then computed and one warning says so. A backward
    pass that is not linear in a way that JAX does not see, as one that adds a constant, needs rows too. Losses or
    parameters narrower than float32 are given rows, whose products are summed in float32; a model of float32
    parameters that computes in bfloat16 inside may have two passes. One that computes in float16 with a loss scale in
    its backward pass needs rows: two passes divide by the scale first, and small gradients underflow.

    Args:
      losses_fn: as in :func:`value_and_jac`.
      argnums: as in :func:`value_and_jac`.
      has_aux: ``losses_fn`` returns a pair ``(losses, aux)``.
      rows: how many rows of the Jacobian are computed at a time; ``"vmap"`` for all at once, ``"two_pass"`` for two
        passes. The default is the cheapest, see :func:`value_and_grad`.
      task_axis: as in :func:`value_and_jac`; there are no two passes with it, nor with a function for each task.
      allow_int: integer parameters do not raise, and count as zero.

    Returns:
      A function of the arguments of ``losses_fn``. It returns ``(losses, gramian)``, or ``((losses, aux), gramian)``;
      the Gramian of shape ``[m, m]`` is in float32 or wider. Under :func:`jax.shard_map` it is that of all parameters,
      split or whole, if the losses are the same on every device by their type; not so with ``check_vma=False``.

    Raises:
      TypeError: as :func:`value_and_jac`.
      ValueError: as :func:`value_and_jac`; and if ``"two_pass"`` is asked for where it is not possible.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> losses_fn = lambda params, x: jnp.stack([jnp.sum(params * x), jnp.sum(params**2)])
      >>> losses, gramian = mtl.value_and_gramian(losses_fn)(jnp.array([1.0, 2.0]), 3.0)
      >>> print(gramian)
      [[18. 18.]
       [18. 20.]]
    """
    own_data = task_axis is not None or is_one_for_each(losses_fn)
    possible = ("vmap",) if own_data else ("vmap", "two_pass")
    check_rows(rows, *possible)
    check_function(losses_fn, argnums, task_axis)

    def gramian_fn(*args, **kwargs):
        point, params = _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int)
        evaluated = point.evaluated
        check_per_task(evaluated)
        chosen = rows or cheapest_rows(possible, own_data, point, params)
        value = (evaluated.losses, evaluated.aux) if has_aux else evaluated.losses
        return value, gramian_at(point, whole, chosen, requested=rows)[0]

    return gramian_fn


def gramian_at(
    point: Point, restrict: Callable[..., Any], rows: int | str, *, requested: int | str | None
) -> tuple[jax.Array, chex.ArrayTree | None]:
    """The Gramian; and the Jacobian if it was kept, if only because two passes turned out impossible.

    Args:
      point: the losses at the parameters.
      restrict: from a gradient to what of it counts.
      rows: how they are computed.
      requested: whether that was asked for, or ``None``: then what is not possible is replaced with a warning.
    """
    if rows == "two_pass":
        # Split: the transposed of a complex pull-back is not its conjugate transposed.
        gradient_of = lambda weights: split(restrict(point.pull(lambda pullback: pullback.weighted(weights))))
        obstacle, by_design = _obstacle_to_two_passes(gradient_of, point.evaluated)
        if obstacle is None:
            return _two_pass_gramian(gradient_of, point.evaluated.values), None
        if requested == rows:
            reject("rows", "'vmap' or an int", f"'two_pass': {obstacle}")
        if not by_design:
            found = f"{obstacle}, so its rows are computed one at a time"
            warnings.warn(f"the Jacobian: {found}; rows=1 asks for that without this warning", stacklevel=2)
        rows = 1
    jacobian = point.pull(lambda pullback: pullback.rows(restrict, rows))
    return gramian(jacobian, axis_name=_axes_of_parts(point.evaluated.values)), jacobian


def _axes_of_parts(values):
    """The axes of :func:`jax.shard_map` along which the losses are the same: gradients that vary are parts there.

    Over these a transposed pull-back adds up by itself.
    """
    return tuple(name for name in manual_axes() if types_tell(name) and name not in varying(values))


def _two_pass_gramian(gradient_of, values):
    r"""Row i is :math:`J J^\top e_i`: a gradient pulled back, and that through the transposed pull-back."""
    row = lambda i: gradient_of(one_hot(i, values))
    products = lambda i: _inner_products(gradient_of, row(i), values)
    half = map_rows(products, jnp.arange(values.size), batch_size=1, given=values)
    return (half + half.T) / 2


def _inner_products(gradient_of, row, values):
    """One gradient's inner products with all."""
    # What a weight depends on is not left to the default of GPU and TPU, TF32 or bfloat16.
    with jax.default_matmul_precision("highest"):
        return jnp.ravel(jax.linear_transpose(gradient_of, values)(row)[0])


def _obstacle_to_two_passes(gradient_of, evaluated):
    """Why there can be none, and whether that is so by design; or ``None``."""
    row = jax.eval_shape(gradient_of, evaluated.values)
    narrow = {str(x.dtype) for x in jax.tree.leaves((row, sums(evaluated.losses))) if jnp.finfo(x.dtype).bits < 32}
    if narrow:
        return f"the products of {', '.join(sorted(narrow))} gradients would be as coarse as these", True
    try:
        jax.eval_shape(lambda row: _inner_products(gradient_of, row, evaluated.values), row)
    except Exception as error:  # whatever the operation without a transpose raises
        first_line, *_ = f"{error}".splitlines() or [""]
        return f"the backward pass cannot be transposed ({type(error).__name__}: {first_line})", False
    return None, False


def _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int):
    """The pull-backs with respect to some arguments, and those arguments."""
    single = not isinstance(argnums, tuple | list)
    indices = [operator.index(i) for i in ((argnums,) if single else argnums)]
    if not all(-len(args) <= i < len(args) for i in indices) or len({i % len(args) for i in indices}) < len(indices):
        reject("argnums", f"different positions among {len(args)} positional arguments", f"{argnums}")
    indices = [i % len(args) for i in indices]
    params = args[indices[0]] if single else tuple(args[i] for i in indices)
    check_params(params, allow_int)
    others = [x for i, x in enumerate(args) if i not in indices]

    def call(losses_fn, params, /, *others, **kwargs):
        given = list(others)
        for i, x in sorted(zip(indices, (params,) if single else params, strict=True), key=lambda pair: pair[0]):
            given.insert(i, x)
        return losses_fn(*given, **kwargs)

    of_params = jax.tree.map(lambda function: partial(call, function), losses_fn, is_leaf=callable)
    return evaluate_at(of_params, params, others, kwargs, has_aux=has_aux, task_axis=task_axis), params
