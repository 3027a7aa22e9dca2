"""PBI: penalty-based boundary intersection, along a preferred direction and little beside it.

Zhang and Li, "MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition", IEEE Transactions on
Evolutionary Computation 11(6), 2007, https://doi.org/10.1109/TEVC.2007.892759
"""

import jax.numpy as jnp
import numpy as np

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONNEGATIVE, Bound, check, per_task
from mtlbalance.states import SeenState, count_seen, init_seen_after


@base.memoized
def pbi(theta: Number, weights: PerTask, reference: PerTask | float = 0.0) -> base.Scalarizer[SeenState]:
    r"""The losses' length along a preferred direction, plus a penalty on their distance from it.

    .. math:: d_1 + \theta \sqrt{d_2^2 + 10^{-12}}, \quad d_1 = (L - z) \cdot \hat w, \quad
              d_2 = \lVert (L - z) - d_1 \hat w \rVert, \quad \hat w = w / \lVert w \rVert

    The losses should be at least :math:`z`. The weights, the gradient, have no fixed total and may be negative: a
    loss may have to rise for the losses to reach the preferred ray. The constant keeps the gradient finite on the
    ray, where it moves the scalar by at most :math:`10^{-6}\,\theta`.

    Note:
      The constant is TorchJD's. The paper has none. Where no task with a preference above zero is present, the
      direction is zero; TorchJD has NaN.

    Args:
      theta: penalty :math:`\theta \ge 0`. May be traced. The paper has 5.
      weights: preference :math:`w`, one number of at least 0 per task and not all zero: an array of the losses'
        shape, or a tree of the same names. May be traced.
      reference: ideal point :math:`z`, one real number for all tasks or one for each. May be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Raises:
      ValueError: if ``theta`` is out of bounds; at ``init``, if ``weights`` are, or if they or ``reference`` have
        another shape than the losses.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.pbi(theta=5.0, weights=jnp.array([1.0, 0.0]))
      >>> scalar, state = method.apply(method.init(2), jnp.array([2.0, 3.0]))
      >>> print(f"{scalar:.4f}")
      17.0000

    References:
      Zhang and Li, `MOEA/D <https://doi.org/10.1109/TEVC.2007.892759>`_, 2007, section II-C.
    """
    check("theta", theta, NONNEGATIVE)

    def preferences(mask, dtype):
        bound = Bound("a number of at least 0, not all of them 0,", lambda w: (w >= 0) & np.any(w > 0))
        preferred = per_task("weights", weights, mask.shape, dtype, scalar=False, bound=bound)
        return preferred, per_task("reference", reference, mask.shape, dtype)

    def apply(state, values, mask):
        preferred, ideal = preferences(mask, values.dtype)
        direction = numerics.unit(jnp.where(mask, preferred, 0))
        shifted = jnp.where(mask, values - ideal, 0)
        along = jnp.sum(shifted * direction)
        beside = shifted - along * direction
        # The root of the sum of their squares and 1e-12, divided by the largest so that no square overflows.
        scale = jnp.maximum(numerics.scale(beside), 1e-6)
        distance = scale * jnp.sqrt(jnp.sum(jnp.square(beside / scale)) + jnp.square(1e-6 / scale))
        return along + theta * distance, count_seen(state, mask)

    return base.scalarizer(init_seen_after(preferences), apply, per_task={"weights": weights, "reference": reference})
