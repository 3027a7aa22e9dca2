"""Learn: a method's learned fields trained inside its own ``apply``."""

from typing import Any, NamedTuple

import jax
import optax

from mtlbalance import base
from mtlbalance.contract import check_is_method
from mtlbalance.hyperparameters import reject
from mtlbalance.states import optimizer_step, read_optimizer
from mtlbalance.wrappers.plumbing import hooks_of


class LearnState(NamedTuple):
    """State of :func:`learn`.

    Attributes:
      inner: the state of the wrapped method.
      opt_state: the state of the optimizer of its learned fields.
    """

    inner: Any
    opt_state: Any


@base.memoized
def learn(method: base.Scalarizer, optimizer: optax.GradientTransformation) -> base.Scalarizer[LearnState]:
    """Trains a method's learned fields inside its own ``apply``, so that it threads like any other method.

    Each ``apply`` returns the scalar at the old fields and the state after one step of ``optimizer`` down the
    scalar's gradient with respect to them. That is what one optimizer over ``(params, state)`` does, for
    optimizers that act leaf by leaf; with a global-norm clip, or weight decay on the parameters, they differ.

    Optimizers that want ``value=``, ``grad=`` or ``value_fn=`` get them. The entries of absent tasks are kept, in
    the fields and in what the optimizer has for each (Adam's moments); shared quantities (a step counter, LAMB's norm)
    advance whenever any task is present. To keep NaN out, wrap the result:
    ``skip_nonfinite(learn(...))``.

    Args:
      method: a scalarizer with ``learned`` fields, such as ``scalarization.uw()``.
      optimizer: any optax optimizer.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`LearnState` and nothing left to learn. The hooks act on
      the inner state.

    Raises:
      TypeError: if ``method`` is none, or ``optimizer`` none of optax.
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
    check_is_method("method", method, "a Scalarizer with learned fields", base.Scalarizer, base.Aggregator)
    if not method.learned:
        found = f"{type(method).__name__} with nothing to learn, which needs no mtl.learn"
        reject("method", "a Scalarizer with learned fields", found)
    optimizer = read_optimizer(optimizer)

    def learned_fields(state):
        return {name: getattr(state, name) for name in method.learned}

    def init(shape, dtype):
        inner = method.init(jax.ShapeDtypeStruct(shape, dtype))
        return LearnState(inner, optimizer.init(learned_fields(inner)))

    def apply(state, values, mask):
        fixed, fixed_values = jax.lax.stop_gradient((state, values))
        fields = learned_fields(fixed.inner)

        def value_fn(fields):
            return method.apply(fixed.inner._replace(**fields), fixed_values, mask=mask)[0]

        new_fields, opt_state = optimizer_step(optimizer, value_fn, fixed.opt_state, fields, mask)
        # Once more, so that the scalar can be differentiated with respect to the values, and to a start in the state.
        scalar, inner = method.apply(state.inner, values, mask=mask)
        return scalar, LearnState(inner._replace(**new_fields), opt_state)

    return base.scalarizer(init, apply, **hooks_of(method))
