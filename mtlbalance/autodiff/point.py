"""The losses evaluated at one point, and the gradients that can be pulled back from there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtlbalance.autodiff.loops import map_rows
from mtlbalance.gramian import combine
from mtlbalance.hyperparameters import check_int, is_number, reject
from mtlbalance.losses import as_counted, is_counted, like_losses, read_labelled, read_losses
from mtlbalance.mapped_axes import varying_as
from mtlbalance.meshes import with_tasks_as, with_whole_tasks
from mtlbalance.numerics import all_finite


class Evaluated(NamedTuple):
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

    @property
    def named(self) -> chex.ArrayTree:
        """The values in the losses' structure, so that a method knows their names."""
        return like_losses(self.values, self.losses)


class Pullback(NamedTuple):
    """Gradients at one point, shaped like the parameters.

    Attributes:
      weighted: ``(weights, present=None) -> gradient`` of the weighted sum of the losses; both shaped like the values.
      row: ``(i) -> gradient`` of one task's loss; ``i`` may be traced.
      rows: ``(restrict, n) -> Jacobian`` of ``restrict(gradient)``: n rows at a time, or all at once (``"vmap"``).
      n_bytes_kept: of what the backward pass keeps of the forward pass, parameters included.
      features: the Jacobian of the features, and the pull-back from them to all parameters; of :func:`of_features`.
      finite_heads: which tasks' gradients of the features, and of their heads, are finite; of :func:`of_features`.
    """

    weighted: Callable[..., Any]
    row: Callable[..., Any]
    rows: Callable[..., Any]
    n_bytes_kept: int
    features: tuple[Any, Callable[..., Any]] | None = None
    finite_heads: Callable[..., Any] | None = None


class Point(NamedTuple):
    """The parameters and data of one step.

    Attributes:
      evaluated: the losses there.
      evaluate_and_pull: ``(read) -> (evaluated, read(pullback))``. With micro-batches that is one pass over all of
        them, and what ``read`` makes of each one's pull-back is added up: so ``read`` must be linear in it.
    """

    evaluated: Evaluated
    evaluate_and_pull: Callable[..., tuple[Evaluated, Any]]

    def pull(self, read: Callable[[Pullback], Any]) -> Any:
        """What ``read`` makes of the pull-back."""
        return self.evaluate_and_pull(read)[1]


def of_losses(losses_fn, params, args, kwargs, *, has_aux, totals=None) -> Point:
    """For a function that returns the losses of all tasks."""

    def values_of(params):
        losses, aux = with_aux(losses_fn(params, *args, **kwargs), has_aux)
        if not has_aux:
            check_no_aux(losses)
        return _values(losses, totals), (losses, aux)

    values, pull, outputs = jax.vjp(values_of, params, has_aux=True)
    weighted = _weighted(pull, values, params)
    row = lambda i: weighted(one_hot(i, values))
    rows = lambda restrict, n: map_each(lambda i: restrict(row(i)), jnp.arange(values.size), n, values)
    return point_at(values, outputs, Pullback(weighted, row, rows, n_bytes(pull)))


def of_own_data(loss_fn, params, args, kwargs, *, has_aux, totals=None) -> Point:
    """For the loss function of one task, with a leading task axis on every positional argument."""

    def value_of(params, task):
        part, total = task
        loss, aux = with_aux(loss_fn(params, *part, **kwargs), has_aux)
        return one_value("losses_fn", loss, total), (loss, aux)

    def gradient(task):
        row, _ = jax.grad(value_of, has_aux=True, allow_int=True)(params, task)
        return without_float0(row, params)

    def values_of(params):
        values, outputs = jax.vmap(value_of, (None, 0))(params, tasks)
        return with_whole_tasks(values), outputs

    # The totals have come to all devices, and go back to where each task's data is.
    tasks = args, jax.tree.map(lambda x: with_tasks_as(x, jax.tree.leaves(args)[0]), totals)
    values, pull, outputs = jax.vjp(values_of, params, has_aux=True)
    # Side by side the tasks may lie on several devices, one after the other they come to all.
    on_all = jax.tree.map(lambda x: with_whole_tasks(jnp.asarray(x), 1), tasks)
    row = lambda i: gradient(jax.tree.map(lambda x: x[i], on_all))

    def rows(restrict, n):
        # Not pulled back from one-hot weights: that would differentiate every task's data for every row.
        jacobian = map_each(lambda task: restrict(gradient(task)), tasks if n == "vmap" else on_all, n, values)
        return jax.tree.map(lambda x: with_whole_tasks(x, 1), jacobian)

    return point_at(values, outputs, Pullback(_weighted(pull, values, params), row, rows, n_bytes(pull)))


def of_features(trunk_and_heads, params, args, kwargs, *, has_aux, totals=None) -> Point:
    """For a trunk, and a tree of heads, one for each task; the parameters are a pair."""
    trunk, heads = trunk_and_heads
    names = jax.tree.structure(heads, is_leaf=callable)
    pair, (trunk_params, head_params) = pair_of(params), params

    def of_trunk(params):
        return with_aux(trunk(params, *args, **kwargs), has_aux)

    features, pull_features, trunk_aux = jax.vjp(of_trunk, trunk_params, has_aux=True)
    for path, x in jax.tree.leaves_with_path(features):
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            where, hint = f"the trunk's features{jax.tree_util.keystr(path)}", "heads get the trunk's arguments too"
            expected = f"floating point numbers ({hint}; of a pair (features, aux): has_aux=True)"
            reject(where, expected, f"dtype {jnp.result_type(x)}", TypeError)

    def of_head(head, params, total):
        def value_of(params, features):
            loss, aux = with_aux(head(params, features, *args, **kwargs), has_aux)
            return one_value("heads", loss, total), (loss, aux)

        value, pull, output = jax.vjp(value_of, params, features, has_aux=True)
        gradient, row = pull(jnp.ones_like(value))
        return value, output, without_float0(gradient, params), row

    each = jax.tree.leaves(heads, is_leaf=callable), _split("params[1]", names, head_params), _split("", names, totals)
    values, outputs, head_gradients, rows_of_features = zip(*map(of_head, *each), strict=True)
    values, jacobian = jnp.stack(values), jax.tree.map(lambda *rows: jnp.stack(rows), *rows_of_features)
    losses, aux = (names.unflatten(parts) for parts in zip(*outputs, strict=True))

    def from_features(gradient, weights, present=None):
        (of_trunk,) = pull_features(gradient)
        of_heads = map(_scaled, weights, present_only(list(head_gradients), present))
        return pair.unflatten((without_float0(of_trunk, trunk_params), names.unflatten(of_heads)))

    def weighted(weights, present=None):
        return from_features(combine(weights, jacobian, present), weights, present)

    def row(i):
        alone = one_hot(i, values)
        # Of the other heads nothing is in a row, where zero times what they have may be NaN.
        return from_features(jax.tree.map(lambda x: x[i], jacobian), alone, alone.astype(bool))

    rows = lambda restrict, n: map_each(lambda i: restrict(row(i)), jnp.arange(values.size), n, values)
    finite = lambda: jnp.stack([*map(all_finite, zip(head_gradients, rows_of_features, strict=True))])
    pullback = Pullback(weighted, row, rows, n_bytes(pull_features), (jacobian, from_features), finite)
    return point_at(values, (losses, (trunk_aux, aux) if has_aux else None), pullback)


def move_axis(args: chex.ArrayTree, axis: int) -> chex.ArrayTree:
    """Every array with its task axis in front; they must agree in its length."""
    check_int("task_axis", axis, -64)
    for path, x in jax.tree.leaves_with_path(args):
        if not -jnp.ndim(x) <= axis < jnp.ndim(x):
            where = f"argument {jax.tree_util.keystr(path)}"
            reject(where, f"a task axis {axis} (keyword arguments need none)", f"shape {jnp.shape(x)}")
    args = jax.tree.map(lambda x: jnp.moveaxis(x, axis, 0), args)
    lengths = {len(x) for x in jax.tree.leaves(args)}
    if len(lengths) != 1:
        reject("task_axis", "positional arguments with as many tasks each", f"{sorted(lengths)}")
    return args


def pair_of(params: chex.ArrayTree) -> Any:
    """The outermost structure of the parameters of a trunk and heads, which must be a pair."""
    if not isinstance(params, tuple | list) or len(params) != 2:
        reject(
            "params",
            "a pair, as losses_fn is one: the trunk's, and a tree with those of each head",
            type(params).__name__,
        )
    return jax.tree.structure(params, is_leaf=lambda x: x is not params)


def n_bytes(tree: chex.ArrayTree) -> int:
    """The bytes of all arrays together."""
    return sum(jnp.size(x) * jnp.result_type(x).itemsize for x in jax.tree.leaves(tree))


def point_at(values, outputs, pullback) -> Point:
    """The point where the losses were evaluated once."""
    losses, aux = outputs
    evaluated = Evaluated(losses, aux, values, read_labelled(losses))
    return Point(evaluated, lambda read: (evaluated, read(pullback)))


def with_aux(output, has_aux, name="losses_fn"):
    """The losses, and the auxiliary output, ``None`` without one."""
    if not has_aux:
        return output, None
    if not (isinstance(output, tuple) and len(output) == 2):
        reject(name, "a pair (losses, aux) with has_aux=True", type(output).__name__, TypeError)
    return output


def check_no_aux(losses):
    """Raises for a pair of which the second is not an array: more likely an auxiliary output than a loss."""
    if type(losses) is tuple and len(losses) == 2:
        second = losses[1]
        is_array = jax.tree_util.all_leaves([second]) and is_number(second)
        if not is_counted(second) and not (is_array and jnp.issubdtype(jnp.result_type(second), jnp.floating)):
            expected = "losses alone (two groups of them under names), or has_aux=True for a pair (losses, aux)"
            found = f"dtype {jnp.result_type(second)}" if is_array else f"a {type(second).__name__}"
            reject("losses_fn", expected, f"a pair of which the second is {found}", TypeError)


def _weighted(pull, values, params):
    def weighted(weights, present=None):
        del present  # one backward pass for all: what is not finite in an absent task's comes through
        (gradient,) = pull(varying_as(jnp.reshape(weights, values.shape).astype(values.dtype), values))
        return without_float0(gradient, params)

    return weighted


def without_float0(gradient, params):
    """JAX's gradients of integers are of a type without arithmetic: zeros serve the methods."""
    leaf = lambda g, p: jnp.zeros(jnp.shape(p)) if g.dtype == jax.dtypes.float0 else g
    return jax.tree.map(leaf, gradient, params)


def _scaled(weight, gradient):
    return jax.tree.map(lambda x: (weight * x).astype(x.dtype), gradient)


def present_only(gradients, present):
    """The tasks' gradients, zero for those that are absent: there they may be anything."""
    if present is None:
        return gradients
    or_zero = lambda is_present, gradient: jax.tree.map(lambda x: jnp.where(is_present, x, 0), gradient)
    return list(map(or_zero, present, gradients))


def one_hot(i: chex.Numeric, values: chex.Array) -> jax.Array:
    """Weights of one for a task and zero for the others, shaped like the values."""
    return jnp.reshape(jnp.arange(values.size) == i, values.shape).astype(values.dtype)


def map_each(fun: Callable[..., Any], xs: Any, batch_size: Any, values: chex.Array) -> Any:
    """The function of each of ``xs``, one for each value: so many at a time, or all at once (``"vmap"``)."""
    if batch_size == "vmap" or batch_size >= values.size:
        return jax.vmap(fun)(xs)
    if batch_size == 1:
        return map_rows(fun, xs, batch_size, given=values)
    # Batches of leaves without entries cannot be put together: these are made here.
    leaves, treedef = jax.tree.flatten(jax.eval_shape(fun, jax.tree.map(lambda x: x[0], xs)))
    with_entries = lambda x: [leaf for leaf in jax.tree.leaves(fun(x)) if leaf.size]
    mapped = iter(map_rows(with_entries, xs, batch_size, given=values))
    empty = lambda x: jnp.zeros((values.size, *x.shape), x.dtype)
    return treedef.unflatten([next(mapped) if x.size else empty(x) for x in leaves])


def _values(losses, totals):
    if totals is not None:
        # A micro-batch's part of the value: its sum over the count of the whole batch.
        losses = jax.tree.map(lambda x, n: x._replace(count=n), as_counted(losses), totals, is_leaf=is_counted)
    return read_losses("losses_fn", losses)


def one_value(name, loss, total):
    """The loss of one task as a number."""
    expected = "one loss for each task, a scalar"
    if type(loss) is tuple and len(loss) == 2:
        reject(name, f"{expected} (or has_aux=True for a pair (loss, aux))", "a pair")
    value = _values(loss, total)
    if value.ndim:
        reject(name, expected, f"shape {value.shape}")
    return value


def _split(name, names, tree):
    if tree is None:
        return [None] * names.num_leaves
    try:
        return names.flatten_up_to(tree)
    except ValueError:
        reject(name, f"one entry for each head, {names}", f"{jax.tree.structure(tree)}")
