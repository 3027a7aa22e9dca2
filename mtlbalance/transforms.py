"""An aggregator as an optax gradient transformation."""

import optax

from mtlbalance import base
from mtlbalance.boundary import check_rows_of
from mtlbalance.hyperparameters import check_int, reject


def aggregate(aggregator: base.Aggregator, n_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Turns an aggregator into the first link of an optax chain.

    Its ``update`` takes the Jacobian tree, leaves ``[n_tasks, *param.shape]``, where others take gradients, and
    returns the gradient. It forwards ``values=`` and ``mask=`` to the method and ignores other extra arguments.
    The state is the aggregator's. For complex parameters conjugate the Jacobian first, or the gradient after it: optax
    goes down along the conjugate of what :func:`jax.grad` returns.

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
      ValueError: from ``update``, if the Jacobian does not fit the number of tasks or the params, as a plain gradient
        does not.

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
    if not isinstance(aggregator, base.Aggregator):
        reject("aggregator", "an mtlbalance.Aggregator", type(aggregator).__name__, TypeError)

    check_int("n_tasks", n_tasks, 1)

    def init(params):
        return aggregator.init((n_tasks, params))

    def update(updates, state, params=None, *, values=None, mask=None, **extra_args):
        del extra_args
        if params is not None:
            check_rows_of(updates, n_tasks, params)
        return aggregator.apply(state, updates, values=values, mask=mask)

    return optax.GradientTransformationExtraArgs(init, update)
