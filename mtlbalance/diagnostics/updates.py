"""How an update relates to the tasks' gradients: what it does to each loss."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from mtlbalance.annotations import ArrayTree
from mtlbalance.diagnostics.reading import by_task, clip_cosines, read_rows
from mtlbalance.gramian import gramian as inner_products


def directional_derivatives(
    jacobian: ArrayTree,
    updates: ArrayTree,
    losses: ArrayTree | None = None,
    *,
    mask: ArrayTree | None = None,
    axis_name: Hashable | None = None,
) -> ArrayTree:
    r"""How much each loss changes, to first order, when an update is added to the parameters.

    .. math:: d_i = g_i^\top u

    Positive means that the update goes against the task: its loss rises. The combined gradient of a method without
    conflict has none of these, but what an optimizer makes of it (momentum, Adam's division, weight decay) may. Where
    the Jacobian is not at hand, one forward pass gives the same:
    ``jax.jvp(lambda params: losses_fn(params, batch), (params,), (updates,))[1]``.

    Args:
      jacobian: tree with leaves ``[m, *param.shape]``, as :func:`~mtlbalance.value_and_jac` gives it.
      updates: what :func:`optax.apply_updates` adds, shaped like the parameters; a plain gradient step is
        ``-learning_rate * gradient``, of complex parameters the conjugate of that. For a Jacobian of a part of them
        ``mtl.subset(updates, mask)``.
      losses: as in :func:`cosine_similarities`.
      mask: as in :func:`cosine_similarities`.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split, as in
        :func:`mtlbalance.gramian.gramian`.

    Returns:
      The changes in float32 or wider, shape ``[m]``; given losses, in their structure.

    Raises:
      TypeError: if the Jacobian is not floating point, or the mask has other than booleans.
      ValueError: if the updates are not shaped like the Jacobian's rows, or the losses or the mask are for another
        number of tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import diagnostics
      >>> jacobian = {"w": jnp.array([[1.0, 0.0], [-3.0, 4.0]])}
      >>> print(diagnostics.directional_derivatives(jacobian, {"w": jnp.array([-0.5, -0.25])}))
      [-0.5  0.5]
    """
    _, jacobian, updates = read_rows(jacobian, updates, losses, mask)
    return by_task(_changes(jacobian, updates, axis_name), losses)


def update_cosines(
    jacobian: ArrayTree,
    updates: ArrayTree,
    losses: ArrayTree | None = None,
    *,
    mask: ArrayTree | None = None,
    axis_name: Hashable | None = None,
) -> ArrayTree:
    r"""The cosine of the angle between an update and each task's gradient.

    .. math:: c_i = \frac{g_i^\top u}{\lVert g_i \rVert \lVert u \rVert} \in [-1, 1]

    These are :func:`directional_derivatives` freed of the gradient's and the update's length: -1 is straight down the
    task's loss, above 0 goes against it. Where either is zero, as small as :func:`cosine_similarities` says, it is 0.

    Args:
      jacobian: as in :func:`directional_derivatives`.
      updates: as in :func:`directional_derivatives`.
      losses: as in :func:`cosine_similarities`.
      mask: as in :func:`cosine_similarities`.
      axis_name: as in :func:`directional_derivatives`.

    Returns:
      The cosines in float32 or wider, shape ``[m]``; given losses, in their structure.

    Raises:
      TypeError: as :func:`directional_derivatives`.
      ValueError: as :func:`directional_derivatives`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import diagnostics
      >>> jacobian = {"w": jnp.array([[1.0, 0.0], [-3.0, 4.0]])}
      >>> cosines = diagnostics.update_cosines(jacobian, {"w": jnp.array([0.1, 0.0])}, {"lift": 0.5, "drag": 2.0})
      >>> print({name: f"{cosine:.2f}" for name, cosine in cosines.items()})
      {'drag': '1.00', 'lift': '-0.60'}
    """
    present, jacobian, updates = read_rows(jacobian, updates, losses, mask)
    norms = jnp.sqrt(jax.vmap(lambda row: _inner_product(row, row, axis_name))(jacobian))
    norm = jnp.sqrt(_inner_product(updates, updates, axis_name))
    nonzero = present & (norms != 0) & (norm != 0)
    products = _changes(jacobian, updates, axis_name)
    cosines = products / jnp.where(nonzero, norms, 1) / jnp.where(norm == 0, 1, norm)
    return by_task(clip_cosines(jnp.where(nonzero, cosines, 0), jnp.isinf(norms) | jnp.isinf(norm)), losses)


def _inner_product(x, y, axis_name):
    """The inner product of two trees shaped like the parameters."""
    one_row = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
    return inner_products(one_row(x), one_row(y), axis_name=axis_name)[0, 0]


def _changes(jacobian, updates, axis_name):
    # Under vmap one contraction: the update is not copied for every row.
    return jax.vmap(lambda row: _inner_product(row, updates, axis_name))(jacobian)
