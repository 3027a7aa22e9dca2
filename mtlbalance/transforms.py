"""An aggregator as an optax gradient transformation."""

import optax

from mtlbalance import base
from mtlbalance.contract import check_is_method
from mtlbalance.hyperparameters import check_int
from mtlbalance.losses import check_params_like
from mtlbalance.parameters import check_trainable


@base.memoized
def aggregate(aggregator: base.Aggregator, n_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Turns an aggregator into the first link of an optax chain.

    Its ``update`` takes the Jacobian tree, leaves ``[n_tasks, *param.shape]``, where others take gradients, and
    returns the gradient. It forwards ``values=`` and ``mask=`` to the method and ignores other extra arguments.
    The state is the aggregator's.

    Per-task transformations go before it, ordinary ones after it. ``optax.MultiSteps``, ``apply_if_finite``,
    ``conditionally_transform`` and ``flatten`` expect updates shaped like the params: they must not surround it,
    but may follow it in the chain. Under ``optax.inject_hyperparams`` name ``n_tasks`` in ``static_args``.

    Args:
      aggregator: the method.
      n_tasks: the number of tasks, at least 1.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: if ``n_tasks`` is not an int, or ``aggregator`` not an :class:`~mtlbalance.Aggregator`.
      ValueError: from ``update``, if the Jacobian does not fit the number of tasks or the params.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> optimizer = optax.chain(mtl.aggregate(aggregation.excess_mtl(), n_tasks=2), optax.sgd(0.1))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> task_losses = lambda params: jnp.stack([jnp.sum(params["w"] ** 2), jnp.sum(params["w"])])
      >>> updates, state = optimizer.update(jax.jacrev(task_losses)(params), optimizer.init(params), params)
      >>> print(updates["w"])
      [-0.15 -0.25]
    """
    check_is_method("aggregator", aggregator, "an mtlbalance.Aggregator", base.Aggregator)
    check_int("n_tasks", n_tasks, 1)

    def init(params):
        return aggregator.init((n_tasks, params))

    def update(updates, state, params=None, *, values=None, mask=None, **extra_args):
        del extra_args
        check_trainable("params", params)
        gradient, state = aggregator.apply(state, updates, values=values, mask=mask)
        if params is not None:
            check_params_like("jacobian", gradient, params)
        return gradient, state

    return optax.GradientTransformationExtraArgs(init, update)
