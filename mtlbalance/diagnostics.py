"""What to log: how the tasks' gradients relate to each other and to an update, and the weights losses really have.

Pure functions of what a training step has at hand, for inside its ``jit`` or after it. Given ``losses``, they answer in
the losses' structure: per task a tree like it, per pair of tasks a tree of such trees, as :func:`jax.hessian` does. An
absent task (``mask``, or a :class:`~mtlbalance.Counted` loss of count 0) has zeros, and counts in no mean; its row of
the Jacobian or the Gramian may be anything.
"""

from collections.abc import Hashable

import chex
import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.complex_parts import is_complex, split
from mtlbalance.contract import check_is_method, weights_of
from mtlbalance.gramian import gramian as inner_products
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import (
    Call,
    check_task_axis,
    like_losses,
    read_gramian,
    read_jacobian,
    read_labelled,
    read_losses,
    read_mask,
    sums,
)
from mtlbalance.parameters import check_params_like


def cosine_similarities(
    gramian: chex.Array, losses: chex.ArrayTree | None = None, *, mask: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    r"""The cosine of the angle between every two tasks' gradients.

    .. math:: c_{ij} = \frac{g_i^\top g_j}{\lVert g_i \rVert \lVert g_j \rVert} \in [-1, 1]

    A gradient of zero has no direction: its cosines are 0, with itself too. In float32 that is any gradient whose norm
    is below about 1e-19, as its square underflows; from 2e19 on squares overflow, and its cosines are NaN.

    Args:
      gramian: the inner products of the tasks' gradients, shape ``[m, m]``, as :func:`~mtlbalance.value_and_gramian` or
        :func:`mtlbalance.gramian.gramian` of a Jacobian gives them.
      losses: the losses, for their names, shapes and counts.
      mask: which tasks are present: booleans of the losses' shapes; all by default.

    Returns:
      The cosines in float32 or wider, shape ``[m, m]``; given losses, in their structure, ``cosines["a"]["b"]``.

    Raises:
      TypeError: if the Gramian is not a floating point array, or the mask has other than booleans.
      ValueError: if the Gramian is not square, or the losses or the mask are for another number of tasks.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import diagnostics, gramian
      >>> inner_products = gramian.gramian(jnp.array([[1.0, 0.0], [-3.0, 4.0]]))
      >>> cosines = diagnostics.cosine_similarities(inner_products, {"lift": 0.5, "drag": 2.0})
      >>> print(f"{cosines['lift']['drag']:.2f}")
      -0.60
    """
    present, gramian = _read_gramian(gramian, losses, mask)
    _, norms, cosines = numerics.cosines(gramian, present)
    return _by_pair(_clip_cosines(cosines, jnp.isinf(norms[:, None]) | jnp.isinf(norms[None, :])), losses)


def conflicts(
    gramian: chex.Array, losses: chex.ArrayTree | None = None, *, mask: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    r"""Which pairs of tasks conflict: a small step down either's gradient raises the other's loss.

    .. math:: g_i^\top g_j < 0

    That is the pairs on which :func:`~mtlbalance.aggregation.pcgrad` acts. Gradients that are orthogonal but for
    rounding may come out either way: to leave them out, compare :func:`cosine_similarities` with a threshold.

    Args:
      gramian: as in :func:`cosine_similarities`.
      losses: as in :func:`cosine_similarities`.
      mask: as in :func:`cosine_similarities`.

    Returns:
      Booleans, shape ``[m, m]``; given losses, in their structure, ``conflicting["a"]["b"]``. No task conflicts with
      itself; every pair counts twice.

    Raises:
      TypeError: as :func:`cosine_similarities`.
      ValueError: as :func:`cosine_similarities`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import diagnostics, gramian
      >>> inner_products = gramian.gramian(jnp.array([[1.0, 0.0], [-3.0, 4.0], [1.0, 1.0]]))
      >>> print(diagnostics.conflicts(inner_products))
      [[False  True False]
       [ True False False]
       [False False False]]
    """
    _, gramian = _read_gramian(gramian, losses, mask)
    return _by_pair(gramian < 0, losses)


def magnitude_ratios(
    gramian: chex.Array, losses: chex.ArrayTree | None = None, *, mask: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    r"""The norm of each task's gradient over the mean norm, as GradNorm compares them.

    .. math:: r_i = \lVert g_i \rVert \Big/ \frac{1}{m} \sum_j \lVert g_j \rVert

    The ratios of the tasks present add up to their number; where all gradients are zero, the ratios are too. A gradient
    that is not finite, or whose square overflows, makes all of them NaN.

    Args:
      gramian: as in :func:`cosine_similarities`.
      losses: as in :func:`cosine_similarities`.
      mask: as in :func:`cosine_similarities`.

    Returns:
      The ratios in float32 or wider, shape ``[m]``; given losses, in their structure.

    Raises:
      TypeError: as :func:`cosine_similarities`.
      ValueError: as :func:`cosine_similarities`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import diagnostics, gramian
      >>> inner_products = gramian.gramian(jnp.array([[1.0, 0.0], [-1.8, 2.4]]))
      >>> print(diagnostics.magnitude_ratios(inner_products))
      [0.5 1.5]

    References:
      Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks
      <https://arxiv.org/abs/1711.02257>`_, ICML 2018.
    """
    present, gramian = _read_gramian(gramian, losses, mask)
    nonzero, norms, _ = numerics.cosines(gramian, present)
    norms = jnp.where(nonzero, norms, 0)
    mean = jnp.sum(norms) / jnp.maximum(jnp.sum(present), 1)
    mean = jnp.where(jnp.isinf(mean), jnp.nan, mean)
    return _by_task(norms / jnp.where(mean == 0, 1, mean), losses)


def directional_derivatives(
    jacobian: chex.ArrayTree,
    updates: chex.ArrayTree,
    losses: chex.ArrayTree | None = None,
    *,
    mask: chex.ArrayTree | None = None,
    axis_name: Hashable | None = None,
) -> chex.ArrayTree:
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
    _, jacobian, updates = _read_rows(jacobian, updates, losses, mask)
    return _by_task(_changes(jacobian, updates, axis_name), losses)


def update_cosines(
    jacobian: chex.ArrayTree,
    updates: chex.ArrayTree,
    losses: chex.ArrayTree | None = None,
    *,
    mask: chex.ArrayTree | None = None,
    axis_name: Hashable | None = None,
) -> chex.ArrayTree:
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
    present, jacobian, updates = _read_rows(jacobian, updates, losses, mask)
    norms = jnp.sqrt(jax.vmap(lambda row: _inner_product(row, row, axis_name))(jacobian))
    norm = jnp.sqrt(_inner_product(updates, updates, axis_name))
    nonzero = present & (norms != 0) & (norm != 0)
    products = _changes(jacobian, updates, axis_name)
    cosines = products / jnp.where(nonzero, norms, 1) / jnp.where(norm == 0, 1, norm)
    return _by_task(_clip_cosines(jnp.where(nonzero, cosines, 0), jnp.isinf(norms) | jnp.isinf(norm)), losses)


def effective_weights(
    scalarizer: base.Scalarizer, state: chex.ArrayTree, values: chex.ArrayTree, *, mask: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    r"""The weights that a scalarizer gives the tasks' gradients, whatever its formula.

    .. math:: w_i = \frac{\partial \ell}{\partial L_i}, \qquad \nabla \ell = \sum_i w_i \nabla L_i

    They are what ``mtl.value_and_grad(..., return_weights=True)`` returns. The state is read only: evaluating changes
    nothing. For an aggregator there are ``return_weights=True`` and ``method.weighting.apply``.

    Args:
      scalarizer: the method.
      state: its state before ``apply``.
      values: the losses, as ``apply`` takes them. A :class:`~mtlbalance.Counted` one's weight is that of its
        value.
      mask: as ``apply`` takes it.

    Returns:
      One weight per task in float32 or wider, in the structure of ``values``; 0 for absent tasks.

    Raises:
      TypeError: if the method is no scalarizer; and as ``apply``.
      ValueError: as ``apply``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import diagnostics, scalarization
      >>> method = scalarization.geometric_mean()
      >>> losses = {"a": jnp.array(1.0), "b": jnp.array(4.0)}
      >>> weights = diagnostics.effective_weights(method, method.init(losses), losses)
      >>> print({name: f"{weight:.2f}" for name, weight in weights.items()})
      {'a': '1.00', 'b': '0.25'}
    """
    expected = "a Scalarizer (an aggregator's weights: method.weighting.apply)"
    check_is_method("scalarizer", scalarizer, expected, base.Scalarizer)
    array, present = read_losses("values", values), read_labelled(values)
    if mask is not None:
        mask = read_mask(mask, values, array.shape)
        present = mask if present is None else mask & present
    return weights_of(scalarizer, state, like_losses(array, values), present)[0]


def _read_gramian(gramian, losses, mask):
    if not hasattr(gramian, "shape"):
        reject("gramian", "an array (of a Jacobian: mtl.gramian.gramian(jacobian))", type(gramian).__name__, TypeError)
    if gramian.ndim != 2 or gramian.shape[0] != gramian.shape[1]:
        hint = " (of a Jacobian: mtl.gramian.gramian(jacobian))"
        reject("gramian", f"a square matrix, a row and a column per task{hint}", f"shape {gramian.shape}")
    call = _read_call(len(gramian), losses, mask)
    return call.mask, read_gramian(call, gramian)


def _read_rows(jacobian, updates, losses, mask):
    leaves = jax.tree.leaves(jacobian)
    if not leaves or not jnp.shape(leaves[0]):
        reject("jacobian", "leaves with a leading axis, one row per task", f"{jax.tree.map(jnp.shape, jacobian)}")
    call = _read_call(len(leaves[0]), losses, mask)
    check_params_like("updates", updates, check_task_axis(jacobian, len(leaves[0])), skip=1)
    # Products of one dtype: an update rounded to the Jacobian's bfloat16 or float16 could underflow.
    dtypes = jax.tree.map(jnp.result_type, jacobian, updates)
    cast = lambda tree: jax.tree.map(lambda x, dtype: jnp.asarray(x, dtype), tree, dtypes)
    # The gradient is the conjugate of the steepest ascent: with it an update has the products of its conjugate.
    conjugate = jax.tree.map(lambda x: jnp.conj(x) if is_complex(x) else x, cast(updates))
    return call.mask, read_jacobian(call, cast(jacobian)), split(conjugate)


def _read_call(m, losses, mask):
    """Which of the m tasks are present, as one vector."""
    labelled = None if losses is None else read_labelled(losses)
    present, shape = jnp.ones(m, bool) if labelled is None else jnp.ravel(labelled), (m,)
    if losses is not None:
        leaves, treedef = jax.tree.flatten(sums(losses))
        n = sum(map(jnp.size, leaves))
        if n != m:
            reject("losses", f"{m} numbers, one per task of the gradients", f"{n}")
        shape = jnp.shape(leaves[0]) if jax.tree_util.treedef_is_leaf(treedef) else shape
    if mask is not None:
        present &= jnp.ravel(read_mask(mask, losses, shape))
    return Call(None, present, mask is None and labelled is None)


def _inner_product(x, y, axis_name):
    """The inner product of two trees shaped like the parameters."""
    one_row = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
    return inner_products(one_row(x), one_row(y), axis_name=axis_name)[0, 0]


def _changes(jacobian, updates, axis_name):
    # Under vmap one contraction: the update is not copied for every row.
    return jax.vmap(lambda row: _inner_product(row, updates, axis_name))(jacobian)


def _clip_cosines(cosines, overflown):
    # Over an infinite norm finite products would be 0, and look orthogonal; rounding leads beyond 1.
    return jnp.clip(jnp.where(overflown, jnp.nan, cosines), -1, 1)


def _by_task(vector, losses):
    return vector if losses is None else like_losses(vector, losses)


def _by_pair(matrix, losses):
    if losses is None:
        return matrix
    by_column = jax.vmap(lambda row: like_losses(row, losses))(matrix)
    rows = like_losses(jnp.arange(len(matrix)), losses)
    return jax.tree.map(lambda i: jax.tree.map(lambda leaf: leaf[i], by_column), rows)
