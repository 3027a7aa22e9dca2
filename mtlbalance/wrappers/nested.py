"""Nested: groups of losses, each under a scalarizer of its own, and one method over the groups."""

from collections.abc import Mapping
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance import base, boundary, numerics
from mtlbalance.contract import Nesting, check_is_method
from mtlbalance.gramian import combine
from mtlbalance.hyperparameters import reject
from mtlbalance.mapped_axes import varying_as
from mtlbalance.names import Names, compile_with_names, groups_of, with_names
from mtlbalance.state_checks import state_check
from mtlbalance.states import count_seen, zero_counts
from mtlbalance.wrappers.plumbing import check_method, state_after


class NestedState(NamedTuple):
    """State of :func:`nested`.

    Attributes:
      seen: int32, one per loss: the calls in which it was present.
      inner: the states of the groups' scalarizers, by name.
      outer: the state of the method over the groups.
    """

    seen: chex.Array
    inner: dict[str, chex.ArrayTree]
    outer: chex.ArrayTree


@base.memoized
def nested(
    outer: base.Scalarizer | base.Aggregator, inner: Mapping[str, base.Scalarizer]
) -> base.Scalarizer | base.Aggregator:
    r"""Balances inside of groups of losses, and then the groups.

    .. math:: \mathrm{outer}(S_1, S_2, \ldots), \qquad S_k = \mathrm{inner}_k(L_i,\ i \in \text{group } k)

    The groups are what stands under the losses' first names: ``{"pde": residuals, "bc": {"left": ..., "right": ...}}``
    has two. A group may be an array, of any length. With ``outer=sum()`` the tasks are divided among several methods,
    some of them with fixed weights. A group is absent if all its losses are.

    If ``outer`` is an aggregator its rows are the gradients of the groups' scalars. The weights of the inner
    scalarizers are constants of differentiation there, and it reads the losses. :func:`value_and_grad` computes a row
    for each group; ``apply``, and a wrapper around all this, need one of each loss. With :func:`amortize` inside, as
    ``outer``, ``refresh=False`` takes the groups' weights again, and those inside anew.

    It needs the losses' names: ``init`` gets the losses, or ``grad_fn.init`` makes the state. :func:`carry_over` and
    :func:`aggregate`, which know the number of tasks alone, cannot serve it.

    Args:
      outer: a method without learned fields; an aggregator makes weights, and remembers no gradients.
      inner: a scalarizer without learned fields for each group, by its name.

    Returns:
      A method of the family of ``outer`` with state :class:`NestedState`. The hooks act on all methods; ``outer``
      observes the groups' scalars. Around it :func:`amortize` takes all weights again, those inside too.

    Raises:
      TypeError: if a method is of the wrong family.
      ValueError: if one has learned fields, or ``outer`` does not fit; when it is used, if the groups are not the
        losses'.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.nested(scalarization.geometric_mean(), {"pde": scalarization.mean(), "bc": scalarization.sum()})
      >>> losses = {"pde": jnp.array([1.0, 3.0]), "bc": jnp.array([4.0, 4.0])}
      >>> scalar, state = method.apply(method.init(losses), losses)
      >>> print(f"{scalar:.1f}")  # of 2 and 8
      4.0
    """
    check_method(outer, "nested(learn(outer, optimizer), inner)", makes_weights=True, argument="outer")
    if outer.jacobian_shaped:
        reject("outer", "an aggregator that remembers no gradients", f"jacobian_shaped={outer.jacobian_shaped}")
    if not isinstance(inner, Mapping) or not inner:
        reject("inner", 'a dict from groups to scalarizers, such as {"pde": scalarization.mean()}', f"{inner!r}")
    for name, method in inner.items():
        argument = f"inner[{name!r}]"
        check_is_method(argument, method, "a Scalarizer", base.Scalarizer)
        check_method(method, f"inner={{{name!r}: learn(method, optimizer)}}", argument=argument)
    names = Names(tuple(sorted(inner)), len(inner))

    def each(function):
        """The function of every group's name, places and method, with the names inside known."""
        found = groups_of("inner", names.entries)
        results = {}
        for name in names.entries:
            places, names_inside = found[name]
            with with_names(names_inside):
                results[name] = function(name, np.array(places), inner[name])
        return results

    def over_groups(function, *args, **kwargs):
        with with_names(names):
            return function(*args, **kwargs)

    def start(shape, dtype):
        return each(lambda name, places, method: method.init(jax.ShapeDtypeStruct(places.shape, dtype)))

    def scalars(state, values, mask):
        call = lambda name, places, method: method.apply(state.inner[name], values[places], mask=mask[places])
        results = each(call)
        present = each(lambda name, places, method: jnp.any(mask[places]))
        stack = lambda x: jnp.stack([x[name] for name in names.entries])
        groups = stack({name: scalar for name, (scalar, _) in results.items()})
        new_state = state._replace(inner={name: new for name, (_, new) in results.items()})
        return groups, stack(present), count_seen(new_state, mask)

    def observe(state, values, mask):
        groups, present, _ = scalars(state, values, mask)
        observe_one = lambda name, places, method: method.observe(state.inner[name], values[places], mask=mask[places])
        return state._replace(
            inner=each(observe_one), outer=over_groups(outer.observe, state.outer, groups, mask=present)
        )

    def end_epoch(state):
        ended = {name: inner[name].end_epoch(state.inner[name]) for name in names.entries}
        return state._replace(inner=ended, outer=outer.end_epoch(state.outer))

    def inside(state, values, mask):
        """The groups' scalars, the weight of each loss in each group, which groups are present, and the new state."""

        def groups_and_rest(values):
            groups, *rest = scalars(state, values, mask)
            return groups, rest

        groups, pullback, (present, new_state) = jax.vjp(groups_and_rest, jax.lax.stop_gradient(values), has_aux=True)
        ones = varying_as(jnp.eye(len(inner), dtype=groups.dtype), groups)
        return groups, jax.vmap(lambda one: pullback(one)[0])(ones), present, new_state

    def nesting(init):
        check = state_check(init, (init,), None if isinstance(outer, base.Scalarizer) else ())
        read = boundary.reader(check, required=True)

        def groups(state, values, *, mask=None):
            call = read(state, values, mask)
            scalars, weights, present, new_state = inside(state, call.values, call.mask)
            named = {name: scalars[i] for i, name in enumerate(names.entries)}
            return named, weights, present, boundary.settle("apply", call, new_state, state)

        return Nesting(outer, compile_with_names(groups, losses_at=1, check=check))

    hooks = {"observe": observe, "end_epoch": end_epoch}
    after_gradient = _after_gradient(outer, inner, names.entries, each)
    if isinstance(outer, base.Scalarizer):

        def init(shape, dtype):
            groups = over_groups(outer.init, jax.ShapeDtypeStruct((len(inner),), dtype))
            return NestedState(zero_counts(shape), start(shape, dtype), groups)

        def apply(state, values, mask):
            groups, present, new_state = scalars(state, values, mask)
            scalar, outer_state = over_groups(outer.apply, state.outer, groups, mask=present)
            return scalar, new_state._replace(outer=outer_state)

        method = base.scalarizer(init, apply, **hooks)
        return method._replace(after_gradient=after_gradient, nesting=nesting(init))

    def init_rows(m, params, dtype):
        groups = over_groups(outer.init, (len(inner), params))
        return NestedState(zero_counts(m), start((m,), dtype), groups)

    method = _nested_aggregator(outer, init_rows, inside, over_groups, hooks)
    return method._replace(after_gradient=after_gradient, nesting=nesting(init_rows))


def _after_gradient(outer, inner, entries, each):
    """What tells the guards of the groups and of the method over them of a step; ``None`` without a guard."""

    def after_gradient(old, new, finite, dropped=None):
        of_inner, of_outer = dict.fromkeys(entries), None
        if dropped is not None:  # places need the losses' names, which who asks by hand does not give
            of_inner = each(lambda name, places, method: dropped[places])
            of_outer = jnp.stack([jnp.any(of_inner[name]) for name in entries])
        after = lambda name: state_after(inner[name], old.inner[name], new.inner[name], finite, of_inner[name])
        states = {name: after(name) for name in entries}
        return new._replace(inner=states, outer=state_after(outer, old.outer, new.outer, finite, of_outer))

    return after_gradient if any(method.after_gradient for method in (outer, *inner.values())) else None


def _nested_aggregator(outer, init, inside, over_groups, hooks):
    """The method of rows that are there for all losses; a training step computes a row for each group alone."""

    def of_groups(weigh, of_group):
        def weigh_nested(state, statistic, values, mask):
            groups, within, present, new_state = inside(state, values, mask)
            weights, outer_state = over_groups(
                weigh, state.outer, of_group(within, statistic), values=groups, mask=present
            )
            weights = jnp.matmul(jnp.where(present, weights, 0), within, precision="highest")
            return weights, new_state._replace(outer=outer_state)

        return weigh and weigh_nested

    def combine_rows(within, jacobian):
        # Wide, or the sums are rounded to the leaves' dtype: weights of small losses are beyond float16's range.
        jacobian = numerics.wide(jacobian)
        return jax.vmap(lambda weights: combine(weights, jacobian))(within)

    def combine_gramian(within, gramian):
        return jnp.linalg.multi_dot([within, gramian, within.T], precision="highest")

    of_gramian = outer.gramian_weighting
    return base.aggregator(
        init,
        weighting=of_groups(outer.weighting.apply, combine_rows),
        gramian_weighting=of_groups(of_gramian and of_gramian.apply, combine_gramian),
        reads_losses=True,
        nan_if_nonfinite=False,
        **hooks,
    )
