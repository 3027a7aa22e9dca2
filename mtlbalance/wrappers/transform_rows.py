"""Transform rows: any optax transformation on each task's gradient, before the aggregator."""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from mtlbalance import base, numerics
from mtlbalance.annotations import ArrayTree
from mtlbalance.complex_parts import join, split
from mtlbalance.contract import Rowwise, check_is_method
from mtlbalance.hyperparameters import reject
from mtlbalance.mapped_axes import varying
from mtlbalance.states import among, on_mesh, read_optimizer, zeros_params
from mtlbalance.wrappers.plumbing import (
    check_method,
    forward_after_gradient,
    hooks_of,
    nan_tree_unless,
    visits_of,
    within,
)

# Parameters of several ranks, and some so large that what is kept of large ones in another form is so here.
_SOME_PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in {"w": (512, 512), "b": (3,)}.items()}


class TransformRowsState(NamedTuple):
    """State of :func:`transform_rows`.

    Attributes:
      inner: the state of the aggregator.
      transformation: the transformation's state, with a task axis in front of every leaf.
    """

    inner: Any
    transformation: Any


@base.memoized
def transform_rows(
    aggregator: base.Aggregator, transformation: optax.GradientTransformation
) -> base.Aggregator[TransformRowsState]:
    r"""Lets an optax transformation act on each task's gradient by itself, before the aggregator.

    .. math:: g = \mathrm{aggregator}(u_1, \ldots, u_m), \qquad u_i, s_i \leftarrow \mathrm{transformation}(g_i, s_i)

    Each task has a state :math:`s_i` of its own: its own moments, and its own count of the calls in which it was
    present. For instance

    * ``transform_rows(aggregation.sum(), optax.scale_by_adam())`` is AdaTask (Yang et al. 2023): no task's moments
      drown in another's. A head, which one task alone moves, has plain Adam, as there;
    * ``transform_rows(aggregation.mean(), optax.scale_by_adam(0.99, 0.99))`` is MultiAdam (Yao et al. 2023), whose
      groups are the tasks here;
    * ``transform_rows(aggregation.sum(), optax.clip_by_global_norm(1.0))``: each gradient clipped to a length of 1;
    * ``transform_rows(aggregation.mgda(), optax.normalize_by_update_norm())`` is LibMTL's MGDA with ``mgda_gn="l2"``,
      and with ``chain(scale_invariant(), mgda())`` for the aggregator that with ``"loss+"``.

    A transformation ends without a learning rate here, as ``optax.scale_by_adam()``, and not ``optax.adam(1e-3)``,
    which turns its updates around: what comes out is still a gradient for the optimizer after it, which is plain
    ``optax.sgd(1e-3)`` for AdaTask.

    The method has no weights, whatever the aggregator has: they would be those of the transformed gradients, and
    useless for the gradients as they are. So it combines the rows itself, and of the ways to a step's rows those are
    left that keep them; an aggregator that combines what it remembers of them still takes them one at a time. What asks
    for weights goes inside: ``transform_rows(prioritize(aggregator, prior), transformation)``.
    :func:`skip_nonfinite` and :func:`skip_zero` go outside, where what they skip does not reach the transformation
    either. ``chain(scalarizer, transform_rows(...))`` transforms the weighted gradients, ``transform_rows(chain(...),
    transformation)`` weighs the transformed ones: after Adam, which takes every factor out, that is the order.

    The transformation gets no params: one that needs them, as ``optax.add_decayed_weights``, goes after the aggregator,
    or into :func:`per_task`, which has them. It gets the task's own loss as ``value=``, where the method is given
    losses, complex gradients as they are, and others in float32 or wider. Its state starts alike for all tasks. Under
    :func:`jax.shard_map` it sees each device's part of a gradient: no norms there. Where what it remembers of a task
    present is not finite any more, the gradient is NaN.

    Args:
      aggregator: any aggregator.
      transformation: any optax gradient transformation that needs no params.

    Returns:
      An :class:`~mtlbalance.Aggregator` without weighting, with state :class:`TransformRowsState`.

    Raises:
      TypeError: if ``aggregator`` is none, or ``transformation`` none of optax.
      ValueError: if the transformation needs params.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> method = mtl.transform_rows(aggregation.sum(), optax.scale_by_adam())
      >>> rows = jnp.array([[300.0, -400.0], [0.3, -0.4]])
      >>> gradient, state = method.apply(method.init((2, 2)), rows, mask=jnp.array([False, True]))
      >>> gradient, state = method.apply(state, rows)
      >>> print([f"{x:.3f}" for x in gradient], state.transformation.count)
      ['2.000', '-2.000'] [1 2]

    References:
      Yang et al., `AdaTask: A Task-aware Adaptive Learning Rate Approach to Multi-task Learning
      <https://arxiv.org/abs/2211.15055>`_, AAAI 2023; Yao et al., `MultiAdam: Parameter-wise Scale-invariant Optimizer
      for Multiscale Training of Physics-informed Neural Networks <https://arxiv.org/abs/2306.02816>`_, ICML 2023.
      Their code: https://github.com/EnnengYang/AdaTask, ``adatask.py``, and https://github.com/i207M/PINNacle,
      ``src/optimizer/multiadam.py``.
    """
    check_is_method("aggregator", aggregator, "an Aggregator", base.Aggregator)
    check_method(aggregator, "transform_rows(aggregator, transformation)", argument="aggregator")
    transformation = read_optimizer(transformation, "transformation", "an optax one, such as optax.scale_by_adam()")
    _check_needs_no_params(transformation)
    visits = visits_of(aggregator)

    def init(m, params, dtype):
        # Complex numbers in one leaf: optax takes their moduli where a method would see two coordinates.
        rows_state = init_rows(transformation, join(zeros_params(params, dtype)), m)
        return TransformRowsState(aggregator.init((m, params)), rows_state)

    def taken_in(state, mask):
        return mask if visits is None else among(visits(state, mask), mask)

    def apply(state, jacobian, values, mask):
        given = state.transformation, numerics.wide(jacobian), taken_in(state, mask), values
        rows, rows_state, finite = jax.vmap(lambda *given: _transform(transformation, *given))(*given)
        gradient, inner = aggregator.apply(state.inner, rows, values=values, mask=mask)
        return _nan_unless(finite, gradient), TransformRowsState(inner, rows_state)

    def visit(state, i, row, values, mask):
        value = None if values is None else values[i]
        old = _entries(state.transformation, i)
        row, new, finite = _transform(transformation, old, numerics.wide(row), taken_in(state, mask)[i], value)
        put = lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, i, 0)
        transformation_state = jax.tree.map(put, state.transformation, new)
        inner, statistic = aggregator.rowwise.visit(state.inner, i, row, values=values, mask=mask)
        spoilt = [~ok for ok in finite]  # so that the zeros which stand for what is not visited say that it is not
        return TransformRowsState(inner, transformation_state), (statistic, spoilt)

    def finish(state, statistics, values, mask):
        statistics, spoilt = statistics
        gradient, inner = aggregator.rowwise.finish(state.inner, statistics, values=values, mask=mask)
        return _nan_unless([~x for x in spoilt], gradient), state._replace(inner=inner)

    combines = aggregator.rowwise is not None and aggregator.rowwise.finish is not None
    method = base.aggregator(
        init,
        apply=apply,
        rowwise=Rowwise(visit, finish=finish, visits=visits) if combines else None,
        jacobian_shaped=within("inner", aggregator.jacobian_shaped) + _fields_by_task(transformation),
        **hooks_of(aggregator) | {"last_weights": None},
    )
    return forward_after_gradient(aggregator, method)


def init_rows(transformation: Any, params: ArrayTree, m: int) -> ArrayTree:
    """The transformation's state for each of m tasks, each leaf sharded as the one for the params, on every device."""

    def leaf(x):
        x = jnp.asarray(x)
        rows = jnp.broadcast_to(x, (m, *x.shape))
        sharding = None if isinstance(x, jax.core.Tracer) else x.sharding
        if on_mesh(sharding):
            return jax.device_put(rows, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)))
        return rows

    return jax.tree.map(leaf, transformation.init(params))


def update_row(
    transformation: Any, state: ArrayTree, row: ArrayTree, present: jax.Array, params: Any, **extra_args: Any
) -> tuple[ArrayTree, ArrayTree]:
    """What the transformation makes of one task's gradient, and the task's state: as it was where it is absent."""
    row, new = transformation.update(row, state, params, **extra_args)
    return row, jax.tree.map(lambda new, old: jnp.where(present, jnp.asarray(new, old.dtype), old), new, state)


def _transform(transformation, state, row, present, value):
    """As :func:`update_row`; and whether what each leaf remembers of a task present is finite, if it started so.

    Where it is not, as Adam's squares of a long gradient, the update may be zero for ever after.
    """
    extra_args, row = {} if value is None else {"value": value}, join(row)
    new_row, state = update_row(transformation, state, row, present, None, **extra_args)
    remembered = zip(jax.tree.leaves(state), jax.tree.leaves(transformation.init(row)), strict=True)
    is_finite = lambda x, start: jnp.all(jnp.isfinite(x) | ~jnp.isfinite(start)) | ~present
    return split(new_row), state, [is_finite(x, start) for x, start in remembered if _is_inexact(x)]


def _nan_unless(finite, gradient):
    """The gradient; NaN unless all are, but for what is split over devices beside a parameter that each has whole."""

    def leaf(x):
        known = [jnp.all(ok) for ok in finite if varying(ok) <= varying(x)]
        return nan_tree_unless(reduce(jnp.logical_and, known, jnp.array(True)), x)

    return jax.tree.map(leaf, gradient)


def _entries(state, i):
    """One task's entries in buffers of their own.

    The loop of one step sees to that. XLA reads a slice again wherever it is used, and lest the state was written to
    before, it copies all of it first.
    """
    one = jax.lax.optimization_barrier(jnp.int32(1))  # or the loop is unrolled
    first = jax.tree.map(lambda x: x[0], state)
    entry = lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
    return jax.lax.fori_loop(0, one, lambda _, given: jax.tree.map(entry, state), first)


def _is_inexact(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


# What a transformation is like is asked of it, on shapes alone.


def _check_needs_no_params(transformation):
    """Raises for one that cannot do without params, and could with them."""

    def runs(params):
        def update(rows):
            return transformation.update(rows, transformation.init(rows), params and rows, value=jnp.zeros(()))

        return _shapes(update) is not None

    if not runs(None) and runs(_SOME_PARAMS):
        expected = "one that needs no params, which an aggregator does not have (it goes after the aggregator, or into "
        reject("transformation", f"{expected}mtl.per_task before mtl.aggregate, which has them)", "one that needs them")


def _fields_by_task(transformation):
    """The fields of the state that are shaped like the Jacobian, and all that has one entry per task."""
    state = _shapes(transformation.init)
    if state is not None and not jax.tree.leaves(state):
        return ()
    shape = lambda tree: jax.tree.map(jnp.shape, tree)
    is_like = lambda x: jax.tree.structure(x) == jax.tree.structure(_SOME_PARAMS) and shape(x) == shape(_SOME_PARAMS)
    # Of masked parameters it has a part, which only its user knows.
    parts = jax.tree.leaves_with_path(state, is_leaf=lambda x: is_like(x) or isinstance(x, optax.MaskedState))
    like = [jax.tree_util.keystr(path, simple=True, separator=".") for path, x in parts if is_like(x)]
    return *(".".join(filter(None, ("transformation", name))) for name in like), "transformation.*"


def _shapes(function: Callable[..., Any]) -> Any:
    """What a function makes of some parameters, as shapes; ``None`` where it raises, as one for certain parameters."""
    try:
        return jax.eval_shape(function, _SOME_PARAMS)
    except Exception:  # whatever it is that such a function raises
        return None
