"""The last link of an optax chain: an update that hurts no task to first order."""

from collections.abc import Hashable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from mtlbalance import numerics
from mtlbalance.boundary import check_rows_of, losses_of, reader
from mtlbalance.complex_parts import join_like, split
from mtlbalance.gramian import combine, gramian, total
from mtlbalance.hyperparameters import check_int, reject
from mtlbalance.losses import broadcast_to_rows, present_rows
from mtlbalance.names import check_task, index_of, names_of, with_names
from mtlbalance.parameters import check_params_like
from mtlbalance.solvers import priority_constrained
from mtlbalance.states import init_seen


def project_update(
    n_tasks: int, protect: int | str | None = None, *, axis_name: Hashable | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Projects an update on the cone of those that raise no task's loss to first order.

    .. math:: \min_v \lVert v - u \rVert \quad\text{where}\quad g_i^\top v \le 0 \text{ for every task } i

    An aggregator's gradient may conflict with no task, and the update that an optimizer makes of it does so all the
    same: momentum remembers other gradients, and Adam scales every coordinate by itself. This is the projection that
    methods such as :func:`~mtlbalance.aggregation.dual_proj` make, of the update itself, so it stands last in the
    chain. An update that hurts nobody is left as it is. Of two opposite gradients nothing remains along them.

    Its ``update`` takes the gradients as the extra argument ``jacobian=``, leaves ``[n_tasks, *param.shape]``, as
    :func:`mtlbalance.value_and_jac` returns them. With :func:`aggregate` first in the chain it serves both, and the
    updates are a plain gradient, such as the sum of its rows. It also reads ``mask=``, which tasks are present, and
    ``values=`` (or ``task_losses=``), the losses, for their names and counts. The row of an absent task may be
    anything. Of a gradient its direction counts alone, whatever its length. Updates of a narrow dtype are rounded to it
    in the end.

    Args:
      n_tasks: the number of tasks, at least 1.
      protect: one task alone, by its name, or by its index where losses have no names: then v is the projection on a
        half-space. All tasks by default.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split, as in
        :func:`mtlbalance.gramian.gramian`.

    Returns:
      A transformation without state.

    Raises:
      TypeError: if an argument has another type.
      ValueError: if ``n_tasks`` is below 1; from ``update``, if there is no ``jacobian=``, if it does not fit the
        updates, or if it, the mask or the losses do not fit the number of tasks.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> optimizer = optax.chain(optax.sgd(1.0), mtl.project_update(n_tasks=2))
      >>> jacobian, params = jnp.array([[4.0, 0.0], [-1.0, 1.0]]), jnp.zeros(2)
      >>> updates, _ = optimizer.update(jacobian.sum(0), optimizer.init(params), params, jacobian=jacobian)
      >>> print([f"{x:.3f}" for x in updates])  # (-3, -1) would raise the second loss
      ['-2.000', '-2.000']
    """
    check_int("n_tasks", n_tasks, 1)
    read = reader(lambda state: None)
    if protect is not None:
        check_task("protect", protect, n_tasks)

    def update(updates, state, params=None, *, jacobian=None, mask=None, **extra_args):
        del params
        if jacobian is None:
            reject("jacobian", "the gradients of the tasks, as in update(grads, state, params, jacobian=...)", "none")
        check_params_like("updates", updates, jacobian, skip=1)
        check_rows_of(jacobian, n_tasks, updates)
        values = losses_of(extra_args)
        limits = read(init_seen(n_tasks), values, mask).mask
        if protect is not None:
            with with_names(names_of(values)):
                limits &= jnp.arange(n_tasks) == index_of("protect", protect)
        return _projected(updates, jacobian, limits, axis_name), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@partial(jax.jit, static_argnums=3)  # a bare call is one compiled program
def _projected(updates, jacobian, limits, axis_name):
    """The nearest update that raises the loss of none of the tasks in ``limits``."""
    rows = _directions(numerics.wide(split(present_rows(jacobian, limits))), axis_name)
    descent = numerics.wide(split(jax.tree.map(lambda u: -jnp.conj(u), updates)))
    # Twice: of an update that all but vanishes the first leaves what is rounding beside the one that was given.
    products = gramian(rows, axis_name=axis_name)
    for _ in range(2):
        descent = _project(descent, rows, products, limits, axis_name)
    descent = join_like(descent, updates)
    return jax.tree.map(lambda d, u: -jnp.conj(d).astype(u.dtype), descent, updates)


def _directions(rows, axis_name):
    """The rows over about their largest entries: their products neither overflow nor vanish."""
    largest = lambda row: jax.tree.map(lambda x: jnp.max(jnp.abs(x), initial=0), row)
    sizes = jax.vmap(lambda row: numerics.scale(total(largest(row), axis_name)))(rows)
    return jax.tree.map(lambda x: x / broadcast_to_rows(sizes, x).astype(x.dtype), rows)


def _project(descent, rows, products, limits, axis_name):
    """The nearest direction along which none of these rows decreases."""
    along = jax.vmap(lambda row: total(jax.tree.map(jnp.multiply, row, descent), axis_name))(rows)
    square = total(jax.tree.map(jnp.square, descent), axis_name)
    with_descent = jnp.block([[square[None, None], along[None, :]], [along[:, None], products]])
    multipliers = priority_constrained(with_descent, 0.0, jnp.append(True, limits))[1:]
    return jax.tree.map(lambda d, g: d + g.astype(d.dtype), descent, combine(multipliers, rows))
