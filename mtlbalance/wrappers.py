"""Methods in, a method out."""

import math
from collections.abc import Hashable
from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import optax

from mtlbalance import base, inputs
from mtlbalance.baselines import optimizer_step

Method = TypeVar("Method", base.Scalarizer, base.Aggregator)


class LearnState(NamedTuple):
    """State of :func:`learn`.

    Attributes:
      inner: the state of the wrapped method.
      opt_state: the state of the optimizer of its learned fields.
    """

    inner: chex.ArrayTree
    opt_state: chex.ArrayTree


class SkipNonfiniteState(NamedTuple):
    """State of :func:`skip_nonfinite`.

    Attributes:
      inner: the state of the wrapped method.
      nonfinite: int32, one per task: the calls in which its loss or gradient was not finite.
      skipped: int32 scalar: the calls of ``apply`` that left ``inner`` as it was, whatever the reason.
    """

    inner: chex.ArrayTree
    nonfinite: chex.Array
    skipped: chex.Array


class AmortizeState(NamedTuple):
    """State of :func:`amortize`.

    Attributes:
      last_weights: the weights of the last call that decided, one per task; equal ones of total 1 before it.
      inner: the state of the wrapped method.
    """

    last_weights: chex.Array
    inner: chex.ArrayTree


class ChainState(NamedTuple):
    """State of :func:`chain`.

    Attributes:
      scalarizer: the state of the scalarizer.
      aggregator: the state of the aggregator.
    """

    scalarizer: chex.ArrayTree
    aggregator: chex.ArrayTree


def learn(method: base.Scalarizer, optimizer: optax.GradientTransformation) -> base.Scalarizer:
    """Trains a method's learned fields inside its own ``apply``, so that it threads like any other method.

    Each ``apply`` returns the scalar at the old fields and the state after one step of ``optimizer`` down the
    scalar's gradient with respect to them. That is what one optimizer over ``(params, state)`` does, for
    optimizers that act leaf by leaf; with a global-norm clip, or weight decay on the parameters, they differ.

    Optimizers that want ``value=``, ``grad=`` or ``value_fn=`` get them. The entries of absent tasks are kept, in
    the fields and in what the optimizer has for each (Adam's moments); what it has for all of them, such as a step
    counter or a norm (LAMB), goes on with any task present. To keep NaN out, wrap the result:
    ``skip_nonfinite(learn(...))``.

    Args:
      method: a scalarizer with ``learned`` fields, such as ``scalarization.uw()``.
      optimizer: any optax optimizer.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`LearnState` and nothing left to learn. The hooks act on
      the inner state.

    Raises:
      ValueError: if ``method`` has no learned fields.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.learn(scalarization.uw(), optax.sgd(0.1))
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, 4.0]))
      >>> print(scalar, state.inner.log_var)
      2.5 [0.   0.15]
    """
    if not getattr(method, "learned", ()):
        inputs.reject("method", "a Scalarizer with learned fields", f"learned={getattr(method, 'learned', None)}")
    optimizer = optax.with_extra_args_support(optimizer)

    def learned_fields(state):
        return {name: optax.tree.get(state, name) for name in method.learned}

    def init(shape, dtype):
        inner = method.init(jax.ShapeDtypeStruct(shape, dtype))
        return LearnState(inner, optimizer.init(learned_fields(inner)))

    def apply(state, values, mask):
        state, fixed_values = jax.lax.stop_gradient((state, values))
        fields = learned_fields(state.inner)

        def value_fn(fields):
            return method.apply(optax.tree.set(state.inner, **fields), fixed_values, mask=mask)[0]

        new_fields, opt_state = optimizer_step(optimizer, value_fn, state.opt_state, fields, mask)
        # Once more, so that the scalar can be differentiated with respect to the values.
        scalar, inner = method.apply(state.inner, values, mask=mask)
        return scalar, LearnState(optax.tree.set(inner, **new_fields), opt_state)

    return base.scalarizer(init, apply, **_plain_hooks(method))


def skip_nonfinite(method: Method, *, axis_name: Hashable | None = None) -> Method:
    """Keeps a method's state from being poisoned by a loss or gradient that is not finite.

    On such a call the state stays as it was, and the output and its gradient are NaN, so that
    ``optax.apply_if_finite`` after it drops the update too. A gradient whose norm is beyond 1e16 counts as not finite,
    so that a million squares add up in float32. A call that would turn a finite number of the state into one that is
    not is skipped as well.

    Rows of Jacobian-shaped fields are kept one by one: where one task's loss or gradient is not finite, the other
    tasks' rows still take theirs in, as they must when rows are visited one at a time and never seen together. What
    becomes too large only inside the method, as a gradient times a scalarizer's weight in :func:`chain`, gets into
    them: there guard both parts, ``chain(skip_nonfinite(scalarizer), skip_nonfinite(aggregator))``.

    Args:
      method: a method of either family.
      axis_name: under :func:`jax.shard_map`, the axis over which every parameter of an aggregator is split.

    Returns:
      A method of the same family with the same paths and state :class:`SkipNonfiniteState`.

    Raises:
      TypeError: if ``method`` is of neither family.
      ValueError: if it has learned fields: :func:`learn` goes inside.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.skip_nonfinite(scalarization.dwa())
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, jnp.nan]))
      >>> print(scalar, state.nonfinite, state.skipped, state.inner.count)
      nan [0 1] 1 [0 0]
    """
    _check_method(method, "skip_nonfinite")
    return _skip_scalarizer(method) if isinstance(method, base.Scalarizer) else _skip_aggregator(method, axis_name)


def amortize(method: Method) -> Method:
    """Keeps a method's last weights, so that :func:`mtlbalance.value_and_grad` may use them again.

    Its ``grad_fn(..., refresh=False)`` then takes one backward pass and leaves the state as it is, averages and random
    keys included; ``refresh=True``, or a call without it, takes the method's weights and keeps them. ``refresh`` may be
    traced: ``step % 1000 == 0`` inside ``scan``. Under ``vmap`` keep it unbatched, or both ways are computed: it is an
    argument for that reason, and no counter in the state. The first step should refresh: until then the weights are
    equal and sum to 1.

    An absent task keeps its last weight for the time when it is back; in between it has none. A learned method goes
    inside: ``amortize(learn(uw(), optimizer))``; :func:`skip_nonfinite` goes outside.

    Args:
      method: a scalarizer without learned fields, or an aggregator that makes weights.

    Returns:
      A method of the same family with the same paths and state :class:`AmortizeState`.

    Raises:
      TypeError: if ``method`` is of neither family.
      ValueError: if it has learned fields, or makes no weights.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> method = mtl.amortize(aggregation.mgda())
      >>> losses_fn = lambda params, scale: scale * jnp.array([1.0, 2.0]) * params
      >>> grad_fn = mtl.value_and_grad(losses_fn, method)
      >>> params, state = jnp.ones(2), method.init((2, 2))
      >>> (losses, state), grads = grad_fn(params, state, 1.0, refresh=True)
      >>> (losses, state), grads = grad_fn(params, state, jnp.array([1.0, 9.0]), refresh=False)
      >>> print([f"{x:.2f}" for x in state.last_weights], [f"{x:.2f}" for x in grads])
      ['0.80', '0.20'] ['0.80', '3.60']
    """
    _check_method(method, "amortize")
    return _amortize_scalarizer(method) if isinstance(method, base.Scalarizer) else _amortize_aggregator(method)


def chain(scalarizer: base.Scalarizer, aggregator: base.Aggregator) -> base.Aggregator:
    r"""Multiplies each gradient by the weight that a scalarizer gives its loss, and aggregates the products.

    .. math:: g = \mathrm{aggregator}(w_1 g_1, \ldots, w_m g_m), \qquad
              w = \frac{\partial\, \mathrm{scalarizer}(L)}{\partial L}

    For methods that balance twice, or in another space. The weights of
    :func:`~mtlbalance.scalarization.scale_invariant` are one over the losses, and so the gradients those of their
    logarithms:

    * ``chain(learn(imtl_l(), optimizer), imtl_g())`` is the whole of IMTL (Liu et al. 2021),
    * ``chain(scale_invariant(), db_mtl(beta=0.9))`` the whole of DB-MTL (Lin et al. 2023),
    * ``chain(scale_invariant(), mgda())`` the log-space MGDA of the code of FAMO (Liu et al. 2023).

    The method reads the losses: give them as ``values=``. The weights that it returns are for the gradients as they
    are: both methods' weights, multiplied.

    Args:
      scalarizer: a method without learned fields (:func:`learn` trains those).
      aggregator: any aggregator; it gets the losses too, as they are.

    Returns:
      An :class:`~mtlbalance.Aggregator` with the aggregator's paths and state :class:`ChainState`. The hooks act on
      both.

    Raises:
      TypeError: if a method is of the other family; if a call has no ``values``.
      ValueError: if the scalarizer has learned fields.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation, scalarization
      >>> method = mtl.chain(scalarization.scale_invariant(), aggregation.mgda())
      >>> rows = jnp.array([[6.0, 0.0], [0.0, 1.0]])
      >>> gradient, state = method.apply(method.init((2, 2)), rows, values=jnp.array([3.0, 0.5]))
      >>> print([f"{x:.3f}" for x in gradient])  # between (2, 0) and (0, 2)
      ['1.000', '1.000']

    References:
      Liu et al., `Towards Impartial Multi-Task Learning <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021,
      algorithm 1, with the losses and then the gradients balanced.
    """
    if not isinstance(scalarizer, base.Scalarizer):
        inputs.reject("scalarizer", "a Scalarizer", type(scalarizer).__name__, TypeError)
    if not isinstance(aggregator, base.Aggregator):
        inputs.reject("aggregator", "an Aggregator", type(aggregator).__name__, TypeError)
    if scalarizer.learned:
        expected = "a method with nothing left to learn, as in chain(learn(scalarizer, optimizer), aggregator)"
        inputs.reject("scalarizer", expected, f"learned={scalarizer.learned}")
    return _chain(scalarizer, aggregator)


def _amortize_scalarizer(method):
    def init(shape, dtype):
        inner = method.init(jax.ShapeDtypeStruct(shape, dtype))
        return AmortizeState(jnp.full(shape, 1 / math.prod(shape), dtype), inner)

    def apply(state, values, mask):
        inner_apply = lambda values: method.apply(state.inner, values, mask=mask)
        weights, _ = jax.grad(inner_apply, has_aux=True)(jax.lax.stop_gradient(values))
        scalar, inner = inner_apply(values)
        return scalar, _remember(state, weights, mask, inner)

    return base.scalarizer(init, apply, **_plain_hooks(method))


def _amortize_aggregator(method):
    if method.weighting is None:
        inputs.reject("method", "an aggregator that makes weights", "one without a weighting")

    def init(m, params, dtype):
        return AmortizeState(jnp.full(m, 1 / m, dtype), method.init((m, params)))

    def remembering(weigh):
        def weigh_and_remember(state, statistic, values, mask):
            weights, inner = weigh(state.inner, statistic, values=values, mask=mask)
            return weights, _remember(state, weights, mask, inner)

        return weigh_and_remember

    def visit(state, i, row, values, mask):
        inner, statistic = method.rowwise.visit(state.inner, i, row, values=values, mask=mask)
        return state._replace(inner=inner), statistic

    return base.aggregator(
        init,
        weighting=remembering(method.weighting.apply),
        gramian_weighting=method.gramian_weighting and remembering(method.gramian_weighting.apply),
        rowwise=method.rowwise and base.Rowwise(visit, remembering(method.rowwise.weigh)),
        **_plain_hooks(method),
        jacobian_shaped=method.jacobian_shaped,
    )


def _remember(state, weights, mask, inner):
    return AmortizeState(jnp.where(mask, weights, state.last_weights), inner)


def _chain(scalarizer, aggregator):
    def init(m, params, dtype):
        return ChainState(scalarizer.init(jax.ShapeDtypeStruct((m,), dtype)), aggregator.init((m, params)))

    def factors(state, values, mask):
        weigh = jax.grad(lambda values: scalarizer.apply(state.scalarizer, values, mask=mask), has_aux=True)
        return weigh(jax.lax.stop_gradient(values))

    def scale_rows(weights, rows):
        wide = lambda x: x.astype(jnp.result_type(jnp.float32, x))
        return jax.tree.map(lambda x: inputs.rows(weights, x) * wide(x), rows)

    def apply(state, jacobian, values, mask):
        weights, first = factors(state, values, mask)
        scaled = scale_rows(weights, jacobian)
        gradient, second = aggregator.apply(state.aggregator, scaled, values=values, mask=mask)
        return jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, jacobian), ChainState(first, second)

    def of_scaled(scale, weigh):
        """The same way to weigh, for a statistic that is scaled first; the weights of unscaled gradients."""

        def weigh_scaled(state, statistic, values, mask):
            scales, first = factors(state, values, mask)
            given = {"values": values, "mask": mask}
            weights, second = weigh(state.aggregator, scale(scales, statistic), **given)
            return scales * weights, ChainState(first, second)

        return weigh_scaled

    def visit(state, i, row, values, mask):
        weights, _ = factors(state, values, mask)
        row = scale_rows(weights[i], row)
        inner, statistic = aggregator.rowwise.visit(state.aggregator, i, row, values=values, mask=mask)
        return state._replace(aggregator=inner), statistic

    def finish(state, statistics, values, mask):
        _, first = factors(state, values, mask)
        gradient, second = aggregator.rowwise.finish(state.aggregator, statistics, values=values, mask=mask)
        return gradient, ChainState(first, second)

    def by_rows(rowwise):
        as_it_is = lambda weights, statistics: statistics
        return base.Rowwise(
            visit,
            rowwise.weigh and of_scaled(as_it_is, rowwise.weigh),
            rowwise.finish and finish,
            rowwise.visits and (lambda state, mask: rowwise.visits(state.aggregator, mask=mask)),
        )

    def end_epoch(state):
        return ChainState(scalarizer.end_epoch(state.scalarizer), aggregator.end_epoch(state.aggregator))

    def observe(state, values, mask):
        hooks = (scalarizer.observe, state.scalarizer), (aggregator.observe, state.aggregator)
        return ChainState(*(hook(inner, values, mask=mask) for hook, inner in hooks))

    of_jacobian, of_gramian = aggregator.weighting, aggregator.gramian_weighting
    scale_gramian = lambda weights, gramian: weights[:, None] * gramian * weights
    return base.aggregator(
        init,
        apply=apply,
        weighting=of_jacobian and of_scaled(scale_rows, of_jacobian.apply),
        gramian_weighting=of_gramian and of_scaled(scale_gramian, of_gramian.apply),
        rowwise=aggregator.rowwise and by_rows(aggregator.rowwise),
        end_epoch=end_epoch,
        observe=observe,
        jacobian_shaped=aggregator.jacobian_shaped,
        reads_losses=True,
    )


def _check_method(method, wrapper):
    if getattr(method, "learned", ()):
        expected = f"a method with nothing left to learn, as in {wrapper}(learn(method, optimizer))"
        inputs.reject("method", expected, f"learned={method.learned}")
    if not isinstance(method, base.Scalarizer | base.Aggregator):
        inputs.reject("method", "a Scalarizer or an Aggregator", type(method).__name__, TypeError)


def _plain_hooks(method):
    """Those of the wrapped method, on the inner state."""

    def end_epoch(state):
        return state._replace(inner=method.end_epoch(state.inner))

    def observe(state, values, mask):
        return state._replace(inner=method.observe(state.inner, values, mask=mask))

    return {"end_epoch": end_epoch, "observe": observe}


def _skip_scalarizer(method):
    def init(shape, dtype):
        return _guarded(method.init(jax.ShapeDtypeStruct(shape, dtype)), shape)

    def apply(state, values, mask):
        scalar, inner = method.apply(state.inner, values, mask=mask)
        state, ok = _advance(state, inner, jnp.isfinite(values) | ~mask)
        # The product makes the gradient NaN too, where the values themselves would not.
        return scalar * jnp.where(ok, 1, jnp.nan), state

    return base.scalarizer(init, apply, **_inner_hooks(method))


def _skip_aggregator(method, axis_name):
    def init(m, params, dtype):
        del dtype
        return _guarded(method.init((m, params)), (m,))

    def finite_row(row):
        wide = jax.tree.map(lambda x: x.astype(jnp.result_type(jnp.float32, x)), row)
        return _leaves_room(base.squared_norm(wide, axis_name))

    def finite_rows(jacobian, mask):
        return jax.vmap(finite_row, axis_size=len(mask))(jacobian) | ~mask

    def finite_diagonal(gramian, mask):
        return _leaves_room(jnp.diagonal(gramian)) | ~mask

    def finite_losses(values, mask):
        return jnp.ones_like(mask) if values is None else jnp.isfinite(values) | ~mask

    def taken_in(state, mask):
        if method.rowwise is None or method.rowwise.visits is None:
            return mask
        return jnp.zeros_like(mask).at[method.rowwise.visits(state.inner, mask=mask)].set(True)

    def advance(state, inner, output, finite):
        state, ok = _advance(state, inner, finite, method.jacobian_shaped, axis_name)
        return jax.tree.map(lambda x: jnp.where(ok, x, jnp.nan), output), state

    def guarded(apply, finite_tasks):
        def guarded_apply(state, statistic, values, mask):
            # What is not finite is absent for the method: in its rows it would stay.
            finite = finite_tasks(statistic, mask) | ~taken_in(state, mask)
            finite &= finite_losses(values, mask)
            output, inner = apply(state.inner, statistic, values=values, mask=mask & finite)
            return advance(state, inner, output, finite)

        return guarded_apply

    def visit(state, i, row, values, mask):
        finite = finite_row(row)
        mask = mask.at[i].set(mask[i] & finite) & finite_losses(values, mask)
        inner, statistic = method.rowwise.visit(state.inner, i, row, values=values, mask=mask)
        return state._replace(inner=inner), (statistic, ~finite)

    def after_visits(last):
        def guarded_last(state, statistics, values, mask):
            statistics, nonfinite = statistics
            finite = (~nonfinite | ~mask) & finite_losses(values, mask)
            output, inner = last(state.inner, statistics, values=values, mask=mask & finite)
            return advance(state, inner, output, finite)

        return last and guarded_last

    def by_rows(rowwise):
        visits = rowwise.visits and (lambda state, mask: rowwise.visits(state.inner, mask=mask))
        return base.Rowwise(visit, after_visits(rowwise.weigh), after_visits(rowwise.finish), visits)

    of_gramian = method.gramian_weighting
    return base.aggregator(
        init,
        apply=guarded(method.apply, finite_rows),
        weighting=method.weighting and guarded(method.weighting.apply, finite_rows),
        gramian_weighting=of_gramian and guarded(of_gramian.apply, finite_diagonal),
        rowwise=method.rowwise and by_rows(method.rowwise),
        **_inner_hooks(method, axis_name),
        jacobian_shaped=method.jacobian_shaped,
    )


def _guarded(inner, shape):
    return SkipNonfiniteState(inner, jnp.zeros(shape, jnp.int32), jnp.zeros((), jnp.int32))


def _advance(state, inner, finite, jacobian_shaped=(), axis_name=None):
    """The state after a call in which the tasks in ``finite`` were so, and whether its inner state has moved."""
    ok = jnp.all(finite) & _stays_finite(inner, state.inner, jacobian_shaped, axis_name)
    inner = base.select(ok, inner, state.inner, new_anyway=jacobian_shaped)
    nonfinite = jnp.where(finite, state.nonfinite, optax.safe_increment(state.nonfinite))
    skipped = jnp.where(ok, state.skipped, optax.safe_increment(state.skipped))
    return SkipNonfiniteState(inner, nonfinite, skipped), ok


def _stays_finite(new_state, state, jacobian_shaped=(), axis_name=None):
    """Whether every finite number outside the Jacobian-shaped fields is still so, on every device."""
    ok = jnp.array(True)
    for (path, new), old in zip(jax.tree.leaves_with_path(new_state), jax.tree.leaves(state), strict=True):
        if not base.is_in(jacobian_shaped, path):
            # What was infinite before may be so by design: the best value so far of a line search.
            ok &= jnp.all(jnp.isfinite(new) | ~jnp.isfinite(old))
    return ok if axis_name is None else jax.lax.psum(1 - ok.astype(jnp.int32), axis_name) == 0


def _leaves_room(squared_norm):
    """Whether a gradient is finite, and small enough that 2**20 of its squares can be added up."""
    return jnp.isfinite(2**20 * squared_norm)


def _inner_hooks(method, axis_name=None):
    jacobian_shaped = getattr(method, "jacobian_shaped", ())

    def observe(state, values, mask):
        inner = method.observe(state.inner, values, mask=mask)
        ok = jnp.all(jnp.isfinite(values) | ~mask)
        ok &= _stays_finite(inner, state.inner, jacobian_shaped, axis_name)
        return state._replace(inner=base.select(ok, inner, state.inner))

    return _plain_hooks(method) | {"observe": observe}
