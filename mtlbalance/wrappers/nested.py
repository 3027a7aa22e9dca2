"""Nested: groups of losses, each under a scalarizer of its own, and one method over the groups."""

from collections.abc import Mapping
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance import base, boundary
from mtlbalance.contract import Nesting, check_is_method
from mtlbalance.gramian import combine_groups, weights_of_groups
from mtlbalance.hyperparameters import reject
from mtlbalance.mapped_axes import varying_as
from mtlbalance.names import Names, compile_with_names, groups_of, with_names
from mtlbalance.state_checks import state_check
from mtlbalance.states import count_seen, zero_counts
from mtlbalance.wrappers.plumbing import check_method, needs_of, state_after


class NestedState(NamedTuple):
    """State of :func:`nested`.

    Attributes:
      seen: int32, one per loss: the calls in which it was present.
      inner: the states of the groups' scalarizers, by name.
      outer: the state of the method over the groups.
    """

    seen: jax.Array
    inner: dict[str, Any]
    outer: Any


@overload
def nested(outer: base.Scalarizer[Any], inner: Mapping[str, base.Scalarizer]) -> base.Scalarizer[NestedState]: ...


@overload
def nested(outer: base.Aggregator[Any], inner: Mapping[str, base.Scalarizer]) -> base.Aggregator[NestedState]: ...


@base.memoized
def nested(
    outer: base.Scalarizer | base.Aggregator, inner: Mapping[str, base.Scalarizer]
) -> base.Scalarizer | base.Aggregator:
    r"""Balances inside of groups of losses, and then the groups.

    .. math:: \mathrm{outer}(S_1, S_2, \ldots), \qquad S_k = \mathrm{inner}_k(L_i,\ i \in \text{group } k)

    The groups are what stands under the losses' first names: ``{"pde": residuals, "bc": {"left": ..., "right": ...}}``
    has two. A group may be an array of any shape: its method sees it raveled, so that numbers per loss are a vector.
    With ``outer=sum()`` the tasks are divided among several methods, some of them with fixed weights. A group is absent
    if all its losses are.

    If ``outer`` is an aggregator its rows are the gradients of the groups' scalars. The weights of the inner
    scalarizers are constants of differentiation there, and it reads the losses. :func:`value_and_grad` computes a row
    for each group; ``apply``, and a wrapper around all this, need one of each loss. With :func:`amortize` inside, as
    ``outer``, ``refresh=False`` takes the groups' weights again, and those inside anew. Parameters that are not
    ``shared`` get the gradient of the plain sum of all losses, not of the groups' scalars.

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
    groups = _Groups(dict(sorted(inner.items())))

    def observe(state, values, mask):
        scalars, present, _ = groups.scalars(state, values, mask)
        of_one = lambda name, places, method: method.observe(state.inner[name], values[places], mask=mask[places])
        new = groups.over(outer.observe, state.outer, scalars, mask=present)
        return state._replace(inner=groups.each(of_one), outer=new)

    def end_epoch(state):
        ended = {name: method.end_epoch(state.inner[name]) for name, method in groups.inner.items()}
        return state._replace(inner=ended, outer=outer.end_epoch(state.outer))

    build = _scalarizer if isinstance(outer, base.Scalarizer) else _aggregator
    hooks = {"observe": observe, "end_epoch": end_epoch, "needs": needs_of(outer, *groups.inner.values())}
    method, init = build(outer, groups, **hooks)
    return method._replace(after_gradient=_after_gradient(outer, groups), nesting=_nesting(outer, groups, init))


class _Groups(NamedTuple):
    """The scalarizers of the groups, sorted by name. The functions are called with the losses' names known."""

    inner: dict[str, base.Scalarizer]

    def each(self, function):
        """The function of every group's name, places and method, with the names inside known."""
        found, results = groups_of("inner", tuple(self.inner)), {}
        for name, method in self.inner.items():
            places, names_inside = found[name]
            with with_names(names_inside):
                results[name] = function(name, np.array(places), method)
        return results

    def over(self, function, *args, **kwargs):
        """A function of the groups' scalars, with their names known."""
        with with_names(Names(tuple(self.inner), len(self.inner))):
            return function(*args, **kwargs)

    def init(self, shape, dtype):
        return self.each(lambda name, places, method: method.init(jax.ShapeDtypeStruct(places.shape, dtype)))

    def scalars(self, state, values, mask):
        """Those of the groups, which are present, and the state with all but ``outer`` new."""
        call = lambda name, places, method: method.apply(state.inner[name], values[places], mask=mask[places])
        scalars, states = zip(*self.each(call).values(), strict=True)
        present = self.each(lambda name, places, method: jnp.any(mask[places]))
        new_state = state._replace(inner=dict(zip(self.inner, states, strict=True)))
        return jnp.stack(scalars), jnp.stack([*present.values()]), count_seen(new_state, mask)

    def inside(self, state, values, mask):
        """The groups' scalars, and the weight of each loss in each group; then as :meth:`scalars`."""

        def scalars_and_rest(values):
            scalars, *rest = self.scalars(state, values, mask)
            return scalars, rest

        scalars, pullback, rest = jax.vjp(scalars_and_rest, values, has_aux=True)
        ones = varying_as(jnp.eye(len(scalars), dtype=scalars.dtype), scalars)
        return scalars, jax.vmap(lambda one: pullback(one)[0])(ones), *rest


def _nesting(outer, groups, init):
    """For a training step."""
    is_scalarizer = isinstance(outer, base.Scalarizer)
    check = state_check(init, (init,), jacobian_shaped=None if is_scalarizer else ())
    read = boundary.reader(check, required=True)

    def public_groups(state, values, *, mask=None):
        call = read(state, values, mask)
        values = call.values if is_scalarizer else jax.lax.stop_gradient(call.values)
        scalars, weights, present, new_state = groups.inside(state, values, call.mask)
        named = dict(zip(groups.inner, scalars, strict=True))
        return named, weights, present, boundary.settle("apply", call, new_state, state)

    return Nesting(outer, compile_with_names(public_groups, losses_at=1, check=check))


def _after_gradient(outer, groups):
    """What tells the guards of the groups and of the method over them of a step; ``None`` without a guard."""

    def after_gradient(old, new, finite, dropped=None):
        of_inner, of_outer = dict.fromkeys(groups.inner), None
        if dropped is not None:  # places need the losses' names, which who asks by hand does not give
            of_inner = groups.each(lambda name, places, method: dropped[places])
            of_outer = jnp.stack([jnp.any(x) for x in of_inner.values()])
        after = lambda name, method: state_after(method, old.inner[name], new.inner[name], finite, of_inner[name])
        states = {name: after(name, method) for name, method in groups.inner.items()}
        return new._replace(inner=states, outer=state_after(outer, old.outer, new.outer, finite, of_outer))

    return after_gradient if any(method.after_gradient for method in (outer, *groups.inner.values())) else None


def _scalarizer(outer, groups, **hooks):
    def init(shape, dtype):
        of_groups = groups.over(outer.init, jax.ShapeDtypeStruct((len(groups.inner),), dtype))
        return NestedState(zero_counts(shape), groups.init(shape, dtype), of_groups)

    def apply(state, values, mask):
        scalars, present, new_state = groups.scalars(state, values, mask)
        scalar, outer_state = groups.over(outer.apply, state.outer, scalars, mask=present)
        return scalar, new_state._replace(outer=outer_state)

    return base.scalarizer(init, apply, **hooks), init


def _aggregator(outer, groups, **hooks):
    """Of rows that are there for all losses: a training step computes one for each group alone."""

    def init(m, params, dtype):
        of_groups = groups.over(outer.init, (len(groups.inner), params))
        return NestedState(zero_counts(m), groups.init((m,), dtype), of_groups)

    def of_losses(weigh, of_group):
        def weigh_nested(state, statistic, values, mask):
            scalars, inside, present, new_state = groups.inside(state, jax.lax.stop_gradient(values), mask)
            statistic = of_group(inside, statistic)
            weights, outer_state = groups.over(weigh, state.outer, statistic, values=scalars, mask=present)
            return weights_of_groups(weights, inside, present), new_state._replace(outer=outer_state)

        return weigh and weigh_nested

    def combine_gramian(inside, gramian):
        return jnp.linalg.multi_dot([inside, gramian, inside.T], precision="highest")

    of_gramian = outer.gramian_weighting
    method = base.aggregator(
        init,
        weighting=of_losses(outer.weighting.apply, combine_groups),
        gramian_weighting=of_losses(of_gramian and of_gramian.apply, combine_gramian),
        reads_losses=True,
        nan_if_nonfinite=False,
        **hooks,
    )
    return method, init
