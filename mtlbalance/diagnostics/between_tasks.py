"""How the tasks' gradients relate to each other, from their inner products."""

import jax
import jax.numpy as jnp

from mtlbalance import numerics
from mtlbalance.annotations import ArrayTree
from mtlbalance.diagnostics.reading import by_pair, by_task, clip_cosines, read_gramian_of


def cosine_similarities(
    gramian: ArrayTree, losses: ArrayTree | None = None, *, mask: ArrayTree | None = None
) -> ArrayTree:
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
    present, gramian = read_gramian_of(gramian, losses, mask)
    _, norms, cosines = numerics.cosines(gramian, present)
    return by_pair(clip_cosines(cosines, jnp.isinf(norms[:, None]) | jnp.isinf(norms[None, :])), losses)


def conflicts(gramian: ArrayTree, losses: ArrayTree | None = None, *, mask: ArrayTree | None = None) -> ArrayTree:
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
    _, gramian = read_gramian_of(gramian, losses, mask)
    return by_pair(gramian < 0, losses)


def magnitude_ratios(
    gramian: ArrayTree, losses: ArrayTree | None = None, *, mask: ArrayTree | None = None
) -> ArrayTree:
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
    present, gramian = read_gramian_of(gramian, losses, mask)
    nonzero, norms, _ = numerics.cosines(gramian, present)
    norms = jnp.where(nonzero, norms, 0)
    mean = jnp.sum(norms) / jnp.maximum(jnp.sum(present), 1)
    mean = numerics.nan_unless(~jnp.isinf(mean), mean)
    return by_task(norms / jnp.where(mean == 0, 1, mean), losses)


def alignment(gramian: ArrayTree, losses: ArrayTree | None = None, *, mask: ArrayTree | None = None) -> jax.Array:
    r"""How well all tasks' gradients agree on a direction, in one number: of two tasks the cosine of their angle.

    .. math:: a = 2 \, \Big\lVert \frac{1}{m} \sum_i \frac{g_i}{\lVert g_i \rVert} \Big\rVert^2 - 1 \in [-1, 1]

    1 is one direction for all. Gradients that are orthogonal to each other have 2 / m - 1, and -1 is what cancels. A
    gradient of zero, as small as :func:`cosine_similarities` says, has no direction and is left out; where all are
    zero, the score is too.

    Args:
      gramian: as in :func:`cosine_similarities`.
      losses: as in :func:`cosine_similarities`; for their counts.
      mask: as in :func:`cosine_similarities`.

    Returns:
      The score in float32 or wider, a scalar. NaN if a gradient is not finite, or its square overflows.

    Raises:
      TypeError: as :func:`cosine_similarities`.
      ValueError: as :func:`cosine_similarities`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import diagnostics, gramian
      >>> inner_products = gramian.gramian(jnp.array([[1.0, 0.0], [-3.0, 4.0]]))
      >>> print(f"{diagnostics.alignment(inner_products):.2f}")
      -0.60

    References:
      Wang et al., `Gradient Alignment in Physics-informed Neural Networks: A Second-Order Optimization Perspective
      <https://arxiv.org/abs/2502.00604>`_, 2025.
    """
    present, gramian = read_gramian_of(gramian, losses, mask)
    nonzero, norms, cosines = numerics.cosines(gramian, present)
    n_directions = jnp.sum(nonzero)
    mean = jnp.sum(cosines) / jnp.square(jnp.maximum(n_directions, 1))
    score = clip_cosines(2 * mean - 1, jnp.any(jnp.isinf(norms)))
    return jnp.where(n_directions == 0, 0, score)
