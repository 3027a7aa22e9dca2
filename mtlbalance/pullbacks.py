"""The losses at one point, and the gradients that can be pulled back from there: what :mod:`autodiff` is made of.

A ``Through`` is a function of a function: ``through(use)`` is ``(outcome, use(pullback))``. With micro-batches it adds
up what ``use`` makes of each one's pull-back, so ``use`` must be linear in that.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtlbalance import inputs
from mtlbalance.gramian import combine


class Outcome(NamedTuple):
    """What the losses function returned, and the losses as methods read them.

    Attributes:
      losses: as they were returned.
      aux: the auxiliary output, ``None`` without one.
      values: the losses as one array, in float32 or wider.
      present: which tasks have labels, of the same shape; ``None`` where no loss is counted.
    """

    losses: chex.ArrayTree
    aux: Any
    values: chex.Array
    present: chex.Array | None


class Pullback(NamedTuple):
    """Gradients at one point, shaped like the parameters.

    Attributes:
      weighted: ``(weights, present=None) -> gradient`` of the weighted sum of the losses; both shaped like the values.
      row: ``(i) -> gradient`` of one task's loss; ``i`` may be traced.
      rows: ``(keep, n) -> Jacobian`` of ``keep(gradient)``: n rows at a time, or all at once (``"vmap"``).
      kept: bytes that the backward pass keeps of the forward pass, parameters included.
      features: the Jacobian of the features, and the pull-back from them to all parameters; of :func:`of_features`.
    """

    weighted: Callable[..., Any]
    row: Callable[..., Any]
    rows: Callable[..., Any]
    kept: int
    features: tuple[Any, Callable[..., Any]] | None = None


Through = Callable[..., tuple[Outcome, Any]]


def of_losses(losses_fn, params, args, kwargs, *, has_aux, totals=None) -> Through:
    """For a function that returns the losses of all tasks."""

    def read(params):
        losses, aux = _with_aux(losses_fn(params, *args, **kwargs), has_aux)
        return _values(losses, totals), (losses, aux)

    values, pull, outputs = jax.vjp(read, params, has_aux=True)
    weighted = _weighted(pull, values, params)
    row = lambda i: weighted(one_hot(i, values))
    rows = lambda keep, batch_size: _map(lambda i: keep(row(i)), jnp.arange(values.size), batch_size)
    return _at(values, outputs, Pullback(weighted, row, rows, n_bytes(pull)))


def of_own_data(loss_fn, params, args, kwargs, *, has_aux, totals=None) -> Through:
    """For the loss function of one task, with a leading task axis on every positional argument."""

    def read(params, task):
        part, total = task
        loss, aux = _with_aux(loss_fn(params, *part, **kwargs), has_aux)
        return _one_value("losses_fn", loss, total), (loss, aux)

    def gradient(task):
        row, _ = jax.grad(read, has_aux=True, allow_int=True)(params, task)
        return _without_float0(row, params)

    tasks = args, totals
    values, pull, outputs = jax.vjp(lambda params: jax.vmap(read, (None, 0))(params, tasks), params, has_aux=True)
    row = lambda i: gradient(jax.tree.map(lambda x: x[i], tasks))
    # Not pulled back from one-hot weights: that would differentiate every task's data for every row.
    rows = lambda keep, batch_size: _map(lambda task: keep(gradient(task)), tasks, batch_size)
    return _at(values, outputs, Pullback(_weighted(pull, values, params), row, rows, n_bytes(pull)))


def of_features(trunk, heads, params, args, kwargs, *, has_aux, totals=None) -> Through:
    """For a trunk, and a tree of heads, one for each task; the parameters are a pair."""
    names = jax.tree.structure(heads, is_leaf=callable)
    pair, (trunk_params, head_params) = pair_of(params), params

    def of_trunk(params):
        return _with_aux(trunk(params, *args, **kwargs), has_aux)

    features, pull_features, trunk_aux = jax.vjp(of_trunk, trunk_params, has_aux=True)
    for path, x in jax.tree.leaves_with_path(features):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            where, expected = f"the trunk's features{jax.tree_util.keystr(path)}", "floating point numbers"
            inputs.reject(where, f"{expected} (heads get the trunk's arguments too)", f"dtype {x.dtype}", TypeError)

    def of_head(head, params, total):
        def read(params, features):
            loss, aux = _with_aux(head(params, features, *args, **kwargs), has_aux)
            return _one_value("heads", loss, total), (loss, aux)

        value, pull, output = jax.vjp(read, params, features, has_aux=True)
        gradient, row = pull(jnp.ones_like(value))
        return value, output, _without_float0(gradient, params), row

    each = jax.tree.leaves(heads, is_leaf=callable), _split("params[1]", names, head_params), _split("", names, totals)
    values, outputs, head_gradients, rows_of_features = zip(*map(of_head, *each), strict=True)
    values, jacobian = jnp.stack(values), jax.tree.map(lambda *rows: jnp.stack(rows), *rows_of_features)
    losses, aux = (names.unflatten(parts) for parts in zip(*outputs, strict=True))

    def from_features(gradient, weights, present=None):
        (of_trunk,) = pull_features(gradient)
        of_heads = map(_scaled, weights, _present_only(list(head_gradients), present))
        return pair.unflatten((_without_float0(of_trunk, trunk_params), names.unflatten(of_heads)))

    def weighted(weights, present=None):
        rows = jacobian if present is None else inputs.present_rows(jacobian, present)
        return from_features(combine(weights, rows), weights, present)

    row = lambda i: from_features(jax.tree.map(lambda x: x[i], jacobian), one_hot(i, values))
    rows = lambda keep, batch_size: _map(lambda i: keep(row(i)), jnp.arange(values.size), batch_size)
    pullback = Pullback(weighted, row, rows, n_bytes(pull_features), (jacobian, from_features))
    return _at(values, (losses, (trunk_aux, aux) if has_aux else None), pullback)


def of_microbatches(through_of, args, n: int, axis: int) -> Through:
    """For a batch cut in ``n``: sums and counts are added up, and what is made of the pull-backs.

    Args:
      through_of: ``(args, totals) -> Through`` for one micro-batch.
      args: trees of arrays that all have the batch on this ``axis``.
      n: number of micro-batches.
      axis: the batch's.
    """
    if not jax.tree.leaves(args):
        inputs.reject("microbatches", "the batch as positional arguments after the state", "none")
    parts = jax.tree.map(lambda x: _cut(x, n, axis), args)
    first = jax.tree.map(lambda x: x[0], parts)

    def outputs_of(part, totals=None, use=lambda pullback: ()):
        outcome, result = through_of(part, totals)(use)
        return (_counted(outcome.losses), outcome.values, result), outcome.aux

    def add_up(part_of, parts):
        """Sums over the micro-batches, in float32 or wider, and the stacked auxiliary outputs."""
        dtypes, _ = jax.eval_shape(part_of, first)
        # With its sharding, which on an Explicit mesh is part of the carry's type.
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x.dtype), device=x.sharding), dtypes)

        def step(total, part):
            new, aux = part_of(part)
            return jax.tree.map(lambda x, y: x + y, total, new), aux

        total, aux = jax.lax.scan(step, start, parts)
        return jax.tree.map(lambda x, like: x.astype(like.dtype), total, dtypes), aux

    # The counts alone: where they depend on labels only, XLA removes the model from this pass.
    template = jax.eval_shape(lambda part: through_of(part, None)(lambda _: ())[0].losses, first)
    (counted, *_), _ = add_up(outputs_of, parts)
    totals = jax.tree.map(lambda x: x.count, counted, is_leaf=inputs.is_counted)

    def through(use):
        (counted, values, result), aux = add_up(lambda part: outputs_of(part, totals, use), parts)
        restore = lambda like, x: x if inputs.is_counted(like) else x.sum / n
        losses = jax.tree.map(restore, template, counted, is_leaf=inputs.is_counted)
        return Outcome(losses, aux, values, inputs.read_labelled(losses)), result

    return through


def move_axis(args: chex.ArrayTree, axis: int) -> chex.ArrayTree:
    """Every array with its task axis in front; they must agree in its length."""
    inputs.check_int("task_axis", axis, -64)
    for path, x in jax.tree.leaves_with_path(args):
        if not -jnp.ndim(x) <= axis < jnp.ndim(x):
            where = f"argument {jax.tree_util.keystr(path)}"
            inputs.reject(where, f"a task axis {axis} (keyword arguments need none)", f"shape {jnp.shape(x)}")
    args = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), args)
    lengths = {len(x) for x in jax.tree.leaves(args)}
    if len(lengths) != 1:
        inputs.reject("task_axis", "positional arguments with as many tasks each", f"{sorted(lengths)}")
    return args


def pair_of(params: chex.ArrayTree) -> Any:
    """The outermost structure of the parameters of a trunk and heads, which must be a pair."""
    if not isinstance(params, tuple | list) or len(params) != 2:
        inputs.reject("params", "a pair: the trunk's, and a tree with those of each head", type(params).__name__)
    return jax.tree.structure(params, is_leaf=lambda x: x is not params)


def n_bytes(tree: chex.ArrayTree) -> int:
    """The bytes of all arrays together."""
    return sum(jnp.size(x) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))


def _at(values, outputs, pullback):
    losses, aux = outputs
    outcome = Outcome(losses, aux, values, inputs.read_labelled(losses))
    return lambda use: (outcome, use(pullback))


def _with_aux(output, has_aux):
    if not has_aux:
        return output, None
    if not (isinstance(output, tuple) and len(output) == 2):
        inputs.reject("losses_fn", "a pair (losses, aux) with has_aux=True", type(output).__name__, TypeError)
    return output


def _weighted(pull, values, params):
    def weighted(weights, present=None):
        del present  # one backward pass for all: what is not finite in an absent task's comes through
        (gradient,) = pull(jnp.reshape(weights, values.shape).astype(values.dtype))
        return _without_float0(gradient, params)

    return weighted


def _without_float0(gradient, params):
    """JAX's gradients of integers are of a type without arithmetic: zeros serve the methods."""
    leaf = lambda g, p: jnp.zeros(jnp.shape(p)) if g.dtype == jax.dtypes.float0 else g
    return jax.tree.map(leaf, gradient, params)


def _scaled(weight, gradient):
    return jax.tree.map(lambda x: (weight * x).astype(x.dtype), gradient)


def _present_only(gradients, present):
    """The tasks' gradients, zero for those that are absent: there they may be anything."""
    if present is None:
        return gradients
    keep = lambda there, gradient: jax.tree.map(lambda x: jnp.where(there, x, 0), gradient)
    return [keep(there, gradient) for there, gradient in zip(present, gradients, strict=True)]


def one_hot(i: chex.Numeric, values: chex.Array) -> chex.Array:
    """Weights of one for a task and zero for the others, shaped like the values."""
    return jnp.reshape(jnp.arange(values.size) == i, values.shape).astype(values.dtype)


def _map(fun, xs, batch_size):
    n = len(jax.tree.leaves(xs)[0])
    if batch_size == "vmap" or batch_size >= n:
        return jax.vmap(fun)(xs)
    return jax.lax.map(fun, xs, batch_size=None if batch_size == 1 else batch_size)


def _values(losses, totals):
    if totals is not None:
        # A micro-batch's part of the value: its sum over the count of the whole batch.
        losses = jax.tree.map(lambda x, n: x._replace(count=n), _counted(losses), totals, is_leaf=inputs.is_counted)
    return inputs.read_losses("losses_fn", losses)


def _one_value(name, loss, total):
    value = _values(loss, total)
    if value.ndim:
        inputs.reject(name, "one loss for each task, a scalar", f"shape {value.shape}")
    return value


def _counted(losses):
    """Every loss with its count: one for each that has none."""

    def leaf(x):
        if inputs.is_counted(x):
            count = jnp.asarray(x.count)  # in a dtype in which the counts of all micro-batches can be added up
            return inputs.Counted(jnp.where(inputs.is_there(x), x.sum, 0), count.astype(_wide(count.dtype)))
        return inputs.Counted(jnp.asarray(x), jnp.ones(jnp.shape(x), jnp.int32))

    return jax.tree.map(leaf, losses, is_leaf=inputs.is_counted)


def _wide(dtype):
    return jnp.result_type(jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.int32, dtype)


def _split(name, names, tree):
    if tree is None:
        return [None] * names.num_leaves
    try:
        return names.flatten_up_to(tree)
    except ValueError:
        inputs.reject(name, f"one entry for each head, {names}", f"{jax.tree.structure(tree)}")


def _cut(x, n, axis):
    size = jnp.shape(x)[axis] if jnp.ndim(x) > axis else None
    if size is None or size % n:
        expected = f"a batch on axis {axis} of every positional argument, divisible by {n}"
        inputs.reject("microbatches", expected, f"shape {jnp.shape(x)}")
    # Every n-th example, so that a batch that is split over devices needs no transfer.
    try:
        x = jnp.reshape(x, (*x.shape[:axis], size // n, n, *x.shape[axis + 1 :]))
    except Exception as error:  # on an Explicit mesh
        expected = "at most as many as each device has examples"
        raise ValueError(f"microbatches: expected {expected}, found {n} of {jax.typeof(x)}") from error
    return jnp.moveaxis(x, axis + 1, 0)
