"""GLS: the geometric mean of the losses.

Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for Multi-Task
Learning", CVPR Workshops 2019, https://arxiv.org/abs/1904.08492
"""

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def geometric_mean() -> base.Scalarizer[SeenState]:
    r"""The geometric mean of the losses (geometric loss strategy, GLS).

    .. math:: \Big( \prod_i L_i \Big)^{1/m}

    The weight of a loss, the gradient, is :math:`(\prod_j L_j)^{1/m} / (m L_i)`: scaling one loss scales the gradient
    of the parameters as a whole and changes nothing else. Losses must be positive: where one is zero (or below the
    smallest normal number) the scalar is zero, and so are all weights by convention: training stops there, and
    :func:`mtlbalance.skip_zero` goes on without that task. Where one is negative the scalar and the weights are NaN.

    Note:
      At a zero loss the weights are NaN in TorchJD, and a negative loss is an error, which a compiled program cannot
      raise.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`SeenState`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import scalarization
      >>> method = scalarization.geometric_mean()
      >>> scalar, state = method.apply(method.init(2), jnp.array([2.0, 8.0]))
      >>> print(scalar)
      4.0

    References:
      Chennupati et al., `MultiNet++ <https://arxiv.org/abs/1904.08492>`_, CVPR Workshops 2019, eq. 2.
    """

    def apply(state, values, mask):
        zero = mask & (jnp.abs(values) < jnp.finfo(values.dtype).tiny)
        mean = jnp.exp(numerics.mean(jnp.log(jnp.where(zero, 1, values)), mask))
        # A product: it lets NaN through.
        return mean * jnp.where(jnp.any(zero), 0, 1), count_seen(state, mask)

    return base.scalarizer(init_seen, apply)
