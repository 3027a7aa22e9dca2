"""Chain: a scalarizer's weights on the gradients, then an aggregator."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.contract import Rowwise, check_is_method, weights_of
from mtlbalance.losses import broadcast_to_rows
from mtlbalance.states import select
from mtlbalance.wrappers.plumbing import check_method, nan_tree_unless, needs_of, state_after, within


class ChainState(NamedTuple):
    """State of :func:`chain`.

    Attributes:
      scalarizer: the state of the scalarizer.
      aggregator: the state of the aggregator.
    """

    scalarizer: Any
    aggregator: Any


@base.memoized
def chain(scalarizer: base.Scalarizer, aggregator: base.Aggregator) -> base.Aggregator[ChainState]:
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
    are: both methods' weights, multiplied. The gradient to the scalarizer's hyperparameters is zero. Where one of its
    weights is not finite, as that of a negative loss in a logarithm, the gradient is not either, and of that task the
    aggregator remembers nothing.

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
    check_is_method("scalarizer", scalarizer, "a Scalarizer", base.Scalarizer)
    check_is_method("aggregator", aggregator, "an Aggregator", base.Aggregator)
    check_method(scalarizer, "chain(learn(scalarizer, optimizer), aggregator)", argument="scalarizer")

    def init(m, params, dtype):
        return ChainState(scalarizer.init(jax.ShapeDtypeStruct((m,), dtype)), aggregator.init((m, params)))

    def factors(state, values, mask):
        # As an aggregator's, its weights are constants of differentiation, on every path.
        weights, first = weights_of(scalarizer, state.scalarizer, jax.lax.stop_gradient(values), mask)
        return jax.lax.stop_gradient(weights), first

    def call(function, state, scale, values, mask):
        """The aggregator's function of what is scaled, without the tasks whose weight is not finite."""
        weights, first = factors(state, values, mask)
        finite = jnp.isfinite(weights)
        ok = jnp.all(finite | ~mask)
        output, second = function(state.aggregator, scale(weights), values=values, mask=mask & finite)
        second = select(ok, second, state.aggregator, new_anyway=aggregator.jacobian_shaped)
        return weights, nan_tree_unless(ok, output), ChainState(first, second)

    def apply(state, jacobian, values, mask):
        return call(aggregator.apply, state, lambda weights: _scale_rows(weights, jacobian), values, mask)[1:]

    def of_scaled(scale, weigh):
        """The same way to weigh, if there is one, for a statistic scaled first; the weights of unscaled gradients."""

        def weigh_scaled(state, statistic, values, mask):
            scales, weights, state = call(weigh, state, lambda scales: scale(scales, statistic), values, mask)
            return scales * weights, state

        return weigh and weigh_scaled

    def visit(state, i, row, values, mask):
        weights, _ = factors(state, values, mask)
        row, mask = _scale_rows(weights[i], row), mask & jnp.isfinite(weights)
        inner, statistic = aggregator.rowwise.visit(state.aggregator, i, row, values=values, mask=mask)
        return state._replace(aggregator=inner), statistic

    def finish(state, statistics, values, mask):
        return call(aggregator.rowwise.finish, state, lambda _: statistics, values, mask)[1:]

    def by_rows(rowwise):
        return Rowwise(
            visit,
            of_scaled(lambda weights, statistics: statistics, rowwise.weigh),
            rowwise.finish and finish,
            rowwise.visits and (lambda state, mask: rowwise.visits(state.aggregator, mask=mask)),
        )

    def end_epoch(state):
        return ChainState(scalarizer.end_epoch(state.scalarizer), aggregator.end_epoch(state.aggregator))

    def observe(state, values, mask):
        hooks = (scalarizer.observe, state.scalarizer), (aggregator.observe, state.aggregator)
        return ChainState(*(hook(inner, values, mask=mask) for hook, inner in hooks))

    of_gramian = aggregator.gramian_weighting
    return base.aggregator(
        init,
        apply=apply,
        weighting=of_scaled(_scale_rows, aggregator.weighting and aggregator.weighting.apply),
        gramian_weighting=of_scaled(_scale_gramian, of_gramian and of_gramian.apply),
        rowwise=aggregator.rowwise and by_rows(aggregator.rowwise),
        end_epoch=end_epoch,
        observe=observe,
        jacobian_shaped=within("aggregator", aggregator.jacobian_shaped),
        reads_losses=True,
        nan_if_nonfinite=False,
        stop_gradient=False,
        needs=needs_of(scalarizer, aggregator),
    )._replace(after_gradient=_after_gradient(scalarizer, aggregator))


def _after_gradient(*parts):
    """What tells each part that wants to know whether a step's gradient was finite; ``None`` if none does."""

    def after_gradient(old, new, *told):
        return ChainState(*(state_after(part, *states, *told) for part, *states in zip(parts, old, new, strict=True)))

    return after_gradient if any(part.after_gradient for part in parts) else None


def _scale_rows(weights, rows):
    return jax.tree.map(lambda x: broadcast_to_rows(weights, x) * x, numerics.wide(rows))


def _scale_gramian(weights, gramian):
    return weights[:, None] * gramian * weights[None, :]
