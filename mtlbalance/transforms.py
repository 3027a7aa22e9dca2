"""An aggregator as an optax gradient transformation."""

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base
from mtlbalance.boundary import check_rows_of
from mtlbalance.contract import check_is_method
from mtlbalance.hyperparameters import check_int, reject
from mtlbalance.parameters import check_params_like, check_trainable
from mtlbalance.state_checks import check_like


@base.memoized
def aggregate(aggregator: base.Aggregator, n_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Turns an aggregator into the first link of an optax chain.

    Its ``update`` takes the Jacobian tree, leaves ``[n_tasks, *param.shape]``, where others take gradients, and
    returns the gradient. The state is the aggregator's. For complex parameters conjugate the Jacobian first, or the
    gradient after it: optax goes down along the conjugate of what :func:`jax.grad` returns. Of the extra arguments it
    reads these, and ignores others:

    * ``values=``, or by its other name ``task_losses=``: the losses, for methods that read them. Where they are named,
      row i is that of ``jax.tree.leaves(values)[i]``.
    * ``mask=``: which tasks are present.
    * ``jacobian=``: the Jacobian, where a solver owns the loop and calls ``update`` with the plain gradient. This
      is then replaced, whatever stood before in the chain has done to it, by one of the params' dtype. Under
      ``optax.masked`` and ``optax.partition`` the part that they let through is taken of the whole Jacobian.

    Before it in the chain stands only what treats every number by itself, such as ``optax.clip``, ``optax.scale`` and
    ``optax.zero_nans``: others take the rows of all tasks for one gradient, as ``clip_by_global_norm`` does, or
    raise, as ``adaptive_grad_clip``. For each task by itself ``vmap`` them: ::

        each = lambda rows, params: jax.vmap(lambda row: clip.update(row, clip.init(params), params)[0])(rows)
        optimizer = optax.chain(optax.stateless(each), mtl.aggregate(aggregator, n_tasks=2), optax.adam(1e-3))

    Ordinary transformations go after it. ``optax.MultiSteps``, ``apply_if_finite``, ``conditionally_transform`` and
    ``flatten`` expect updates shaped like the params: they must not surround it, but may follow it in the chain
    (around ``jacobian=`` ``MultiSteps`` would hand on the last micro-batch's alone). Under
    ``optax.inject_hyperparams`` name ``n_tasks`` in ``static_args``.

    Args:
      aggregator: the method.
      n_tasks: the number of tasks, at least 1.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: if ``n_tasks`` is not an int, or ``aggregator`` not an :class:`~mtlbalance.Aggregator`.
      ValueError: from ``update``, if the Jacobian does not fit the number of tasks or the params, as a plain gradient
        does not; if it, or the losses, are given in both ways.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> optimizer = optax.chain(mtl.aggregate(aggregation.excess_mtl(), n_tasks=2), optax.sgd(0.1))
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> task_losses = lambda params: jnp.stack([jnp.sum(params["w"] ** 2), jnp.sum(params["w"])])
      >>> jacobian, state = jax.jacrev(task_losses)(params), optimizer.init(params)
      >>> updates, _ = optimizer.update(jacobian, state, params)
      >>> print(updates["w"])
      [-0.15 -0.25]

      From a solver that has the plain gradient, and gives other things as extra arguments:

      >>> gradient = jax.grad(lambda params: task_losses(params).sum())(params)
      >>> updates, _ = optimizer.update(gradient, state, params, jacobian=jacobian, task_losses=task_losses(params))
      >>> print(updates["w"])
      [-0.15 -0.25]
    """
    check_is_method("aggregator", aggregator, "an mtlbalance.Aggregator", base.Aggregator)
    check_int("n_tasks", n_tasks, 1)

    def init(params):
        return aggregator.init((n_tasks, params))

    # No keyword stands in the signature: solvers that look there, as jinns does, then demand all of them.
    def update(updates, state, params=None, **extra_args):
        if not hasattr(state, "_fields"):  # first: the state and the params may be swapped
            check_like("state", state, jax.eval_shape(lambda: aggregator.init((n_tasks, ()))), by_type_only=True)
        check_trainable("params", params)
        given = {"values": _losses_of(extra_args), "mask": extra_args.get("mask")}
        jacobian = extra_args.get("jacobian")
        rows = updates if jacobian is None else _masked_like(updates, jacobian)
        if params is not None:
            check_rows_of(rows, n_tasks, params)
        gradient, state = aggregator.apply(state, rows, **given)
        if jacobian is not None:
            check_params_like("updates (beside jacobian= the plain gradient)", updates, rows, skip=1)
            like = updates if params is None else params
            gradient = jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), gradient, like)
        return gradient, state

    return optax.GradientTransformationExtraArgs(init, update)


def _losses_of(extra_args):
    """The losses, by one of their two names."""
    values, task_losses = extra_args.get("values"), extra_args.get("task_losses")
    if values is not None and task_losses is not None:
        reject("task_losses", "the losses as values= or as task_losses=", "both")
    return task_losses if values is None else values


def _masked_like(updates, jacobian):
    """Without the parameters that ``optax.masked`` has taken out of the updates, and not out of extra arguments."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    if not any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked))):
        return jacobian
    return jax.tree.map(lambda u, rows: u if is_masked(u) else rows, updates, jacobian, is_leaf=is_masked)
