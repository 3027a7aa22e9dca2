"""An aggregator as an optax gradient transformation, and what stands before it in a chain."""

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base
from mtlbalance.boundary import check_rows_of, losses_of, reader
from mtlbalance.contract import check_hooks, check_is_method
from mtlbalance.hyperparameters import check_int, reject
from mtlbalance.losses import check_task_axis, present_rows
from mtlbalance.parameters import check_params_like, check_trainable
from mtlbalance.state_checks import check_like
from mtlbalance.states import init_seen, read_optimizer
from mtlbalance.wrappers.transform_rows import init_rows, update_row


@base.memoized
def aggregate(
    aggregator: base.Aggregator, n_tasks: int, *, hooks: bool = False
) -> optax.GradientTransformationExtraArgs:
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
    raise, as ``adaptive_grad_clip``. :func:`per_task` lets them act on each task's gradient by itself.

    Ordinary transformations go after it. ``optax.MultiSteps``, ``apply_if_finite``, ``conditionally_transform`` and
    ``flatten`` expect updates shaped like the params: they must not surround it, but may follow it in the chain
    (around ``jacobian=`` ``MultiSteps`` would hand on the last micro-batch's alone). Under
    ``optax.inject_hyperparams`` name ``n_tasks`` in ``static_args``.

    Args:
      aggregator: the method.
      n_tasks: the number of tasks, at least 1.
      hooks: whether your loop calls the hooks that the method needs (``aggregator.needs``), on the state that is in the
        chain's; a method that does nothing without them, as ``chain(dwa(), sum())``, is refused otherwise.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: if ``n_tasks`` is not an int, or ``aggregator`` not an :class:`~mtlbalance.Aggregator`.
      ValueError: if the method needs hooks; from ``update``, if the Jacobian does not fit the number of tasks or the
        params, as a plain gradient does not; if it, or the losses, are given in both ways.

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
    check_hooks(aggregator, hooks)
    check_int("n_tasks", n_tasks, 1)

    def init(params):
        return aggregator.init((n_tasks, params))

    # No keyword stands in the signature: solvers that look there, as jinns does, then demand all of them.
    def update(updates, state, params=None, **extra_args):
        if not hasattr(state, "_fields"):  # first: the state and the params may be swapped
            check_like("state", state, jax.eval_shape(lambda: aggregator.init((n_tasks, ()))), by_type_only=True)
        check_trainable("params", params)
        given = {"values": losses_of(extra_args), "mask": extra_args.get("mask")}
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


@base.memoized
def per_task(transformation: optax.GradientTransformation, n_tasks: int) -> optax.GradientTransformationExtraArgs:
    """Lets an optax transformation act on each task's gradient by itself, before :func:`aggregate` in a chain.

    Its ``update`` takes the Jacobian tree, leaves ``[n_tasks, *param.shape]``, and returns another. Each task has a
    state of its own: the transformation's, with a task axis in front of every leaf; that of an absent task stays as it
    was. It is :func:`transform_rows` as a link of the chain, with two differences: the transformation gets the params,
    and complex gradients and narrow dtypes as optax has them.

    Of the extra arguments it reads ``mask=`` and ``values=`` (or ``task_losses=``) as :func:`aggregate` does, and
    hands on the task's own loss as ``value=``, and all others.

    Args:
      transformation: any optax gradient transformation, without a learning rate: ``optax.scale_by_adam()``, and not
        ``optax.adam(1e-3)``, whose updates are turned around already.
      n_tasks: the number of tasks, at least 1.

    Returns:
      An :class:`optax.GradientTransformationExtraArgs`.

    Raises:
      TypeError: if ``n_tasks`` is not an int, or ``transformation`` none of optax; from ``update``, if the state is
        another's.
      ValueError: from ``update``, if the Jacobian does not fit the number of tasks, as a plain gradient does not, or
        comes as ``jacobian=``: the aggregator would take that as it is.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> clip = mtl.per_task(optax.clip_by_global_norm(1.0), n_tasks=2)
      >>> optimizer = optax.chain(clip, mtl.aggregate(aggregation.sum(), n_tasks=2), optax.sgd(1.0))
      >>> params, jacobian = jnp.zeros(2), jnp.array([[300.0, 400.0], [0.3, 0.4]])
      >>> updates, _ = optimizer.update(jacobian, optimizer.init(params), params)
      >>> print([f"{x:.1f}" for x in updates])
      ['-0.9', '-1.2']

    References:
      As :func:`transform_rows`.
    """
    transformation = read_optimizer(transformation, "transformation", "an optax one, such as optax.scale_by_adam()")
    check_int("n_tasks", n_tasks, 1)
    read = reader(lambda state: None)

    def init(params):
        return init_rows(transformation, params, n_tasks)

    def update(updates, state, params=None, **extra_args):
        if extra_args.get("jacobian") is not None:
            expected = "the Jacobian as updates; mtl.aggregate(mtl.transform_rows(...)) takes it besides"
            reject("jacobian", expected, "jacobian=, which the aggregator would take as it is")
        call = read(init_seen(n_tasks), losses_of(extra_args), extra_args.get("mask"), required=False)
        rows = check_task_axis(updates, n_tasks)
        check_like("state", state, jax.eval_shape(lambda rows: init(jax.tree.map(lambda x: x[0], rows)), rows))
        rows = present_rows(rows, call.mask)
        others = {name: x for name, x in extra_args.items() if name not in _READ}

        def update_one(state, row, present, value):
            own = {} if value is None else {"value": value}
            return update_row(transformation, state, row, present, params, **others | own)

        return jax.vmap(update_one)(state, rows, call.mask, call.values)

    return optax.GradientTransformationExtraArgs(init, update)


# What both read of the extra arguments, and no transformation of one gradient.
_READ = "values", "task_losses", "mask", "jacobian"


def _masked_like(updates, jacobian):
    """Without the parameters that ``optax.masked`` has taken out of the updates, and not out of extra arguments."""
    is_masked = lambda x: isinstance(x, optax.MaskedNode)
    if not any(map(is_masked, jax.tree.leaves(updates, is_leaf=is_masked))):
        return jacobian
    return jax.tree.map(lambda u, rows: u if is_masked(u) else rows, updates, jacobian, is_leaf=is_masked)
