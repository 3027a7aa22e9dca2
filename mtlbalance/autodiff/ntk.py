"""The diagonal of the neural tangent kernel of residuals, and the loss weights made of it.

Wang, Yu and Perdikaris, "When and why PINNs fail to train: a neural tangent kernel perspective", Journal of
Computational Physics 2022, https://arxiv.org/abs/2007.14527
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from mtlbalance import numerics
from mtlbalance.annotations import ArrayTree
from mtlbalance.autodiff.loops import map_rows
from mtlbalance.autodiff.options import check_params
from mtlbalance.autodiff.point import map_each, n_bytes, one_hot
from mtlbalance.autodiff.subsets import Subset, read_option, select_subset, whole
from mtlbalance.gramian import squared_norm
from mtlbalance.hyperparameters import check_int, reject
from mtlbalance.mapped_axes import varying_as
from mtlbalance.meshes import with_tasks_as

# Bytes of the gradients of a block, by default.
_BLOCK = 4 * 2**20


def diag_ntk(
    residuals_fn: Callable[..., Any],
    *,
    block_size: int | None = None,
    pointwise: bool = True,
    shared: Subset | None = None,
) -> Callable[..., Any]:
    r"""The diagonal of the neural tangent kernel: the squared length of each residual's gradient.

    .. math:: K_{ii} = \lVert \nabla_\theta r_i \rVert^2

    ``residuals_fn(params, *points)`` returns residuals before they are squared and averaged: an array, or a tree of
    them, with the points on the first axis of what goes in and of what comes out. Where that is a dict, and every
    positional argument is a dict of the same names, each name has points of its own, as many as it likes; else all
    residuals are at the same points. What is no point goes by keyword.

    The function is called with one point at a time, many side by side: all gradients together take three to four times
    as long as that of the sum of the residuals, and no more memory for more points. So a residual must depend on its
    own point alone. Where it does not, as that of an integral, or where the points are no arguments,
    ``pointwise=False`` pulls every residual back through all points: exact for any function, in a time that grows with
    the square of their number, and memory with it.

    Args:
      residuals_fn: returns real floating point numbers. A point may have several, on further axes.
      block_size: how many points are computed side by side, or residuals with ``pointwise=False``; so many that their
        gradients take 4 MiB by default.
      pointwise: whether residuals are computed point by point.
      shared: the parameters that count, booleans as in :func:`value_and_grad`; all by default.

    Returns:
      A function of the arguments of ``residuals_fn``. It returns the diagonal in the structure and the shapes of the
      residuals, in float32 or wider.

    Raises:
      TypeError: if a parameter or a residual is not floating point, or ``block_size`` is no int.
      ValueError: if there is not one residual of each kind for each point, or an option is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> u = lambda params, x: params["a"] * jnp.sin(x) + params["b"]
      >>> residuals_fn = lambda params, x: {"ics": u(params, x["ics"]), "res": u(params, x["res"]) ** 2}
      >>> params, points = {"a": 1.0, "b": 0.0}, {"ics": jnp.zeros(2), "res": jnp.array([jnp.pi / 2])}
      >>> print(mtl.diag_ntk(residuals_fn)(params, points))
      {'ics': Array([1., 1.], dtype=float32), 'res': Array([8.], dtype=float32)}

    References:
      Wang, Yu and Perdikaris, `When and why PINNs fail to train: a neural tangent kernel perspective
      <https://arxiv.org/abs/2007.14527>`_, Journal of Computational Physics 2022, section 3.
    """
    if not callable(residuals_fn):
        reject("residuals_fn", "a function that returns residuals", type(residuals_fn).__name__, TypeError)
    if block_size is not None:
        check_int("block_size", block_size, 1)

    def diagonal_fn(params, /, *points, **kwargs):
        check_params(params, allow_int=False)
        is_shared = read_option("shared", shared, params)
        restrict = whole if is_shared is None else partial(select_subset, subset=is_shared)
        size = block_size or max(1, _BLOCK // max(n_bytes(params), 1))
        # Under shard_map each device has its own points: their gradients are not to be added up.
        params = varying_as(params, points)

        def residuals_at(params, points):
            return residuals_fn(params, *points, **kwargs)

        def of_name(name):
            """Those of one name, of which one point may be given, the other names' points as they are."""
            replaced = lambda given: [x | {name: point} for x, point in zip(points, given, strict=True)]
            residuals_of = lambda params, given: residuals_at(params, replaced(given))[name]
            return _of_points(residuals_of, params, [x[name] for x in points], restrict, size, f"[{name!r}]")

        if not pointwise:
            return _squared_norms(partial(residuals_at, points=points), params, restrict, size)
        shapes = jax.eval_shape(residuals_at, params, points)
        if isinstance(shapes, dict) and all(isinstance(x, dict) and x.keys() == shapes.keys() for x in points):
            each, top = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=lambda x: x is not shapes)
            return top.unflatten([of_name(key.key) for (key,), _ in each])
        return _of_points(residuals_at, params, points, restrict, size)

    return diagonal_fn


def ntk_weights(diagonal: ArrayTree, *, of_means: bool = False) -> ArrayTree:
    r"""Loss weights of which all residuals are trained at the same pace, from the diagonal of their tangent kernel.

    .. math:: w_i = \frac{\sum_j \operatorname{tr} K_{jj}}{\operatorname{tr} K_{ii}}

    Constants of differentiation, of no fixed total. For ``scalarization.constant(weights)``; new every so many steps,
    as ``jax.lax.cond`` can have it, with ``optax.incremental_update(new, weights, 0.1)`` for a running average.

    Note:
      The paper and its official code have the traces, and take the weights as they come, every 100 steps or so. jaxpi
      has means over the points in their place, ``of_means=True``, and divides the sum by the number of losses: weights
      that do not depend on how many points there are; of these it takes a running average with momentum 0.9, every
      1000 steps.

    Args:
      diagonal: what :func:`diag_ntk` returns; one weight is made for each array in it.
      of_means: whether its means count in place of its sums, and the mean of these in place of their sum.

    Returns:
      One number for each array of the diagonal, in its structure. Where an array is all zeros it is 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> diagonal = {"ics": jnp.array([1.0, 3.0]), "res": jnp.array([2.0, 4.0, 6.0])}
      >>> print(mtl.ntk_weights(diagonal))
      {'ics': Array(4., dtype=float32), 'res': Array(1.3333334, dtype=float32)}
      >>> print(mtl.ntk_weights(diagonal, of_means=True))
      {'ics': Array(1.5, dtype=float32), 'res': Array(0.75, dtype=float32)}

    References:
      Wang, Yu and Perdikaris, `When and why PINNs fail to train: a neural tangent kernel perspective
      <https://arxiv.org/abs/2007.14527>`_, Journal of Computational Physics 2022, algorithm 1;
      https://github.com/PredictiveIntelligenceLab/PINNsNTK; https://github.com/PredictiveIntelligenceLab/jaxpi.
    """
    traces = jax.tree.map(jnp.mean if of_means else jnp.sum, jax.lax.stop_gradient(diagonal))
    # Of the largest: neither a sum nor a ratio is beyond the range then.
    largest = numerics.scale(jnp.stack(jax.tree.leaves(traces)))
    traces = jax.tree.map(lambda trace: trace / largest, traces)
    paces = jax.tree.leaves(traces)
    total = sum(paces) / (len(paces) if of_means else 1)
    return jax.tree.map(lambda trace: numerics.ratio(total, trace), traces)


def _of_points(residuals_of, params, points, restrict, block_size, name=""):
    """For residuals of which each depends on its own point."""
    n = _n_points(points, name)
    _check_first_axis(jax.eval_shape(residuals_of, params, points), n, name)

    def at_point(point):
        alone = jax.tree.map(lambda x: x[None], point)

        def residuals_there(params):
            residuals = residuals_of(params, alone)
            _check_first_axis(residuals, 1, name)
            return jax.tree.map(lambda x: x[0], residuals)

        return _squared_norms(residuals_there, params, restrict, None)

    n_blocks = -(-n // block_size)
    if n_blocks == 1:
        return jax.vmap(at_point)(points)
    blocks = jax.tree.map(lambda x: _cut(x, n_blocks, block_size), points)
    diagonal = map_rows(jax.vmap(at_point), blocks, batch_size=1, given=params)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:n], diagonal)


def _cut(x, n_blocks, block_size):
    """Blocks of every so many points, so that points that are split over devices stay where they are."""
    missing = -len(x) % n_blocks
    try:
        filled = jnp.concatenate([x, x[:missing]]) if missing else x  # the results of these are dropped
        return jnp.moveaxis(filled.reshape(-1, n_blocks, *x.shape[1:]), 1, 0)
    except Exception as error:  # on an Explicit mesh
        expected = "one that divides the number of points and is divisible by that of the devices"
        found = f"{block_size}, which makes {n_blocks} blocks of {jax.typeof(x)}"
        raise ValueError(f"block_size: expected {expected}, found {found}") from error


def _squared_norms(residuals_of, params, restrict, block_size):
    """Of each residual's gradient, pulled back so many at a time."""
    residuals, pull = jax.vjp(residuals_of, params)
    leaves, treedef = jax.tree.flatten(residuals)

    def of_leaf(k):
        def squared_norm_of(i):
            cotangents = [jnp.zeros_like(x) for x in leaves]
            cotangents[k] = with_tasks_as(one_hot(i, leaves[k]), leaves[k])
            cotangents = [varying_as(x, like) for x, like in zip(cotangents, leaves, strict=True)]
            return squared_norm(restrict(pull(treedef.unflatten(cotangents))[0]))

        n = leaves[k].size
        if n == 1:
            squared_norms = squared_norm_of(0)  # a quarter faster than with an axis of one
        else:
            squared_norms = map_each(squared_norm_of, jnp.arange(n), block_size or "vmap", leaves[k])
        return squared_norms.reshape(leaves[k].shape)

    for path, x in jax.tree.leaves_with_path(residuals):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            expected = "floating point numbers (of complex ones the real and the imaginary part)"
            reject(f"residuals_fn{jax.tree_util.keystr(path)}", expected, f"dtype {x.dtype}", TypeError)
    return treedef.unflatten(map(of_leaf, range(len(leaves))))


def _n_points(points, name):
    """How many there are, which all arrays must agree in."""
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(points)}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        expected = "as many points on the first axis of every positional argument, or names that are those of residuals"
        found = f"shapes {jax.tree.map(jnp.shape, [*points])}"
        reject(f"points{name}", f"{expected} (what is no point goes by keyword)", found)
    ((n,),) = lengths
    return n


def _check_first_axis(residuals, n, name):
    """Raises unless there is one of each for each point."""
    for path, x in jax.tree.leaves_with_path(residuals):
        if x.shape[:1] != (n,):
            expected = f"residuals of {n} points on the first axis, as they are given (else: pointwise=False)"
            reject(f"residuals_fn{name}{jax.tree_util.keystr(path)}", expected, f"shape {x.shape}")
