"""What a method makes of one step's losses and rows: weights, or a gradient; or its last weights once more."""

from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance.autodiff.jacobian import gramian_at
from mtlbalance.autodiff.loops import fold, is_traced
from mtlbalance.autodiff.point import Evaluated
from mtlbalance.autodiff.subsets import join_subsets
from mtlbalance.boundary import check_mask_names
from mtlbalance.contract import Scalarizer, weights_of
from mtlbalance.gramian import combine
from mtlbalance.hyperparameters import flatten, reject
from mtlbalance.losses import read_mask, reject_number
from mtlbalance.mapped_axes import manual_axes, types_tell, varying_as
from mtlbalance.names import names_of
from mtlbalance.parameters import check_params_like


class Decision(NamedTuple):
    """A step's weights, or the gradient if the method makes no weights; both where rows were kept.

    ``evaluated`` are the losses that were read with the rows of that gradient.
    """

    evaluated: Evaluated | None
    state: Any
    weights: chex.Array | None
    gradient: Any = None


def decide_by(method, state, point, present, restrict, rows, requested):
    if isinstance(method, Scalarizer):
        weights, state = weights_of(method, state, point.evaluated.named, present)
        return Decision(None, state, flatten("weights", weights))
    mask = None if present is None else jnp.ravel(present)
    if rows == "stream":
        return _decide_by_visits(method.rowwise, state, point, mask, restrict)
    if rows == "two_pass":
        evaluated = point.evaluated
        given = {"values": _vector(evaluated.named), "mask": mask}
        if not all(map(types_tell, manual_axes())):
            # Types do not tell what a transposed pull-back has added up over the devices, either: where the method has
            # to know, its weighting raises for rows of these shapes.
            row = jax.eval_shape(lambda: point.pull(lambda pullback: restrict(pullback.row(0))))
            rows_like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((evaluated.values.size, *x.shape), x.dtype), row)
            jax.eval_shape(partial(method.weighting.apply, state, **given), rows_like)
        gramian, jacobian = gramian_at(point, restrict, rows, requested=requested)
        if jacobian is None:
            weights, state = method.gramian_weighting.apply(state, gramian, **given)
        else:  # its weighting knows over which axes the parameters are split
            weights, state = method.weighting.apply(state, jacobian, **given)
        gradient = None if jacobian is None else combine(weights, jacobian, mask)
        return Decision(evaluated, state, weights, gradient)
    if rows == "features":
        evaluated, jacobian = point.evaluate_and_pull(lambda pullback: pullback.features[0])
    else:
        evaluated, jacobian = point.evaluate_and_pull(lambda pullback: pullback.rows(restrict, rows))
    given = {"values": _vector(evaluated.named), "mask": mask}
    if method.weighting is not None:
        weights, state = method.weighting.apply(state, jacobian, **given)
        gradient = None if rows == "features" else combine(weights, jacobian, mask)
        return Decision(evaluated, state, weights, gradient)
    # Of one scalar parameter the Jacobian is a vector, which looks like the losses: a tree of it does not.
    is_vector = not method.jacobian_shaped and jax.tree_util.all_leaves([jacobian]) and jacobian.ndim == 1
    gradient, state = method.apply(state, (jacobian,) if is_vector else jacobian, **given)
    gradient = gradient[0] if is_vector else gradient
    if rows == "features":
        of_sum = ones(evaluated.values, present)
        gradient = point.pull(lambda pullback: restrict(pullback.features[1](gradient, of_sum, present)))
    return Decision(evaluated, state, None, gradient)


def _decide_by_visits(rowwise, state, point, mask, restrict):
    """Rows come and go, and the state is changed in place."""
    evaluated = point.evaluated
    given = {"values": _vector(evaluated.named), "mask": mask}
    n_tasks = evaluated.values.size
    indices, n_visits = jnp.arange(n_tasks), n_tasks
    if rowwise.visits is not None:
        indices = rowwise.visits(state, mask=mask)
        # `optimization_barrier` stops XLA unrolling a one-trip loop, which would copy the state. The trip count must
        # not depend on the state: under vmap the loop would select between two states.
        n_visits = jax.lax.optimization_barrier(jnp.asarray(indices.size))

    def row(i):
        return point.pull(lambda pullback: restrict(pullback.row(i)))

    def visit(i, state):
        return rowwise.visit(state, i, row(i), **given)

    def step(n, carry):
        state, statistics = carry
        state, statistic = visit(indices[n], state)
        return state, jax.tree.map(lambda all, one: all.at[indices[n]].set(one), statistics, statistic)

    visited, statistic = jax.eval_shape(visit, 0, state)
    state = jax.tree.map(varying_as, state, visited)
    start = jax.tree.map(lambda x: varying_as(jnp.zeros((n_tasks, *x.shape), x.dtype), x), statistic)
    state, statistics = fold(step, n_visits, (state, start), given=given)
    if rowwise.weigh is not None:
        weights, state = rowwise.weigh(state, statistics, **given)
        return Decision(evaluated, state, weights)
    gradient, state = rowwise.finish(state, statistics, **given)
    like = jax.eval_shape(row, 0)
    check_params_like("the gradient of finish", gradient, like)
    gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, like)
    return Decision(evaluated, state, None, gradient)


def decide_or_repeat(method, state, point, present, refresh, decide):
    """The decision anew, or the last weights again."""
    evaluated = point.evaluated
    if method.last_weights is None:
        expected = "a method that keeps its last weights, mtl.amortize(method), outside of mtl.chain"
        reject("refresh", expected, "one that does not")
    is_boolean = isinstance(refresh, bool) or (hasattr(refresh, "dtype") and jnp.issubdtype(refresh.dtype, jnp.bool_))
    if not is_boolean or jnp.shape(refresh):
        reject("refresh", "one boolean", f"{refresh!r}", TypeError)
    last = method.last_weights(state)
    if last.size != evaluated.values.size:
        reject_number("values", last.shape, evaluated.values.shape, names_of(evaluated.named).entries)

    def anew():
        decision = decide()
        return decision.state, decision.weights.astype(last.dtype)

    def again():
        return state, last if present is None else jnp.where(jnp.reshape(present, last.shape), last, 0)

    if isinstance(refresh, bool | np.bool_) or not is_traced(refresh, state, evaluated.values, present):
        return Decision(None, *(anew() if refresh else again()))
    return Decision(None, *jax.lax.cond(refresh, anew, again))


def balanced(pullback, weights, present, is_shared):
    """The gradient with these weights, where parameters are shared; elsewhere that of the sum."""
    gradient = pullback.weighted(weights, present)
    if is_shared is None:
        return gradient
    return join_subsets(is_shared, gradient, pullback.weighted(ones(weights, present), present))


def _vector(losses):
    """What an aggregator takes: named losses, or a vector."""
    return jnp.ravel(losses) if jax.tree_util.all_leaves([losses]) else losses


def ones(like, present):
    """The weights of the sum."""
    return jnp.ones_like(like) if present is None else present.astype(like.dtype)


def read_present(mask: chex.ArrayTree | None, evaluated: Evaluated) -> jax.Array | None:
    """Which tasks are present, by the mask and the counts; ``None`` where neither says anything."""
    if mask is None:
        return evaluated.present
    check_mask_names(mask, evaluated.losses)
    mask = read_mask(mask, evaluated.losses, evaluated.values.shape)
    return mask if evaluated.present is None else mask & evaluated.present
