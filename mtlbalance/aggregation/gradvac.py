"""GradVac: gradient vaccine, each gradient turned until its angles to the others are the usual ones.

Wang et al., "Gradient Vaccine: Investigating and Improving Multi-Task Optimization in Massively Multilingual Models",
ICLR 2021, https://arxiv.org/abs/2010.05874
"""

from collections.abc import Hashable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import FRACTION, NONNEGATIVE, check, check_key, key_impl, new_key_data
from mtlbalance.mapped_axes import varying_as
from mtlbalance.states import count_seen, random_orders, zero_counts

# How long a turned gradient may be, in lengths of what it was.
_LONGEST = 2.0


class GradVacState(NamedTuple):
    """State of :func:`gradvac`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      targets: running averages of the cosines between the gradients, shape ``[m, m]``.
      key: uint32, the data of the key for the next draw (:func:`jax.random.key_data`).
    """

    seen: jax.Array
    targets: jax.Array
    key: jax.Array


@base.memoized
def gradvac(
    key: int | chex.PRNGKey = 0,
    beta: Number = 0.5,
    eps: Number = 1e-8,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[GradVacState]:
    r"""The sum of the gradients, each turned towards those that it is less similar to than usual.

    Each gradient :math:`g_i` meets the others in a random order of its own. With the cosine :math:`\phi` of the two,
    as they are then, and its target :math:`\hat\phi_{ij}`,

    .. math:: g_i \leftarrow g_i + \frac{\lVert g_i \rVert \big( \hat\phi_{ij} \sqrt{1 - \phi^2}
              - \phi \sqrt{1 - \hat\phi_{ij}^2} \big)}{\lVert g_j \rVert \sqrt{1 - \hat\phi_{ij}^2}} g_j
              \quad \text{if } \phi < \hat\phi_{ij}, \qquad
              \hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi

    The weights have no fixed total. The targets start at zero, so that the first call is
    :func:`~mtlbalance.aggregation.pcgrad`.

    The turned gradient is :math:`\sin \theta / \sin \hat\theta` times as long, with the angles between the two before
    and after. That has no bound where a target is near 1, as for near-duplicates, and grows again with every other
    gradient. So a gradient that has become more than twice as long as it was is shortened to that, its direction kept:
    the result is at most twice as long as all gradients together. One that vanishes, up to rounding, stays zero.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      As in TorchJD and LibMTL the whole gradient is one group, and ``eps`` is added to the denominators; here after
      scaling by the largest norm, so that the scale of the gradients does not matter. They have no bound on the
      lengths. With a thousand independent directions ours changes nothing: tried with up to 20 tasks, and mean cosines
      of 0 to 0.99. With ten, where cosines change much from call to call, it shortens one turn in 200 of up to 3 tasks,
      and some in most calls of 10 tasks with mean cosines of 0.6: there what the other two give is up to 3 times as
      long as all gradients together.

    Args:
      key: a seed, or a :func:`jax.random.key`, for the orders. To sweep seeds, build the method inside the function
        that is mapped.
      beta: :math:`\beta`, from 0 to 1. May be traced.
      eps: at least 0, relative to the largest norm. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`GradVacState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``beta`` or ``eps`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.gradvac()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.4f}" for x in gradient])
      ['0.5848', '3.8012', '3.8012']

    References:
      Wang et al., `Gradient Vaccine <https://arxiv.org/abs/2010.05874>`_, ICLR 2021, algorithm 1 and eq. 4.
    """
    check_key(key)
    check("beta", beta, FRACTION)
    check("eps", eps, NONNEGATIVE)

    def init(m, params, dtype):
        del params
        return GradVacState(zero_counts(m), jnp.zeros((m, m), dtype), new_key_data(key))

    def weigh(state, gramian, values, mask):
        del values
        m = mask.shape[0]
        gramian = (gramian / numerics.scale(gramian)).astype(state.targets.dtype)
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))

        def turn(i, order, targets):
            def meet(n, carry):
                coefficients, norm, targets = carry
                j = order[n]
                product = jnp.dot(coefficients, gramian[j], precision="highest")
                zero = norms[j] == 0  # towards it nothing turns, or its own weight would be boundless
                length = jnp.where(zero, 1, norms[j])
                cosine = jnp.where(zero | (norm == 0), 0, jnp.clip(product / (norm * length + eps), -1, 1))
                is_met = jnp.arange(m) == j  # not by index: under vmap checkify's index checks fail on that
                target = jnp.sum(targets, where=is_met)
                sine, target_sine = (jnp.sqrt(jnp.maximum(1 - x**2, 0)) for x in (cosine, target))
                # Below its rounding the target's sine is 0, by which nothing can be divided.
                divisor = length * jnp.maximum(target_sine, jnp.finfo(target.dtype).eps) + eps
                added = norm * (target * sine - cosine * target_sine) / divisor
                meets = (j != i) & mask[i] & mask[j]
                turns = meets & ~zero & ~(cosine >= target)  # also where a target is NaN, so that it shows
                coefficients, norm = shortened(coefficients + jnp.where(is_met & turns, added, 0), norms[i])
                new_target = (1 - beta) * target + beta * cosine
                return coefficients, norm, jnp.where(is_met & meets, new_target, targets)

            start = jax.nn.one_hot(i, m, dtype=gramian.dtype), norms[i], targets
            coefficients, _, targets = jax.lax.fori_loop(0, m, meet, varying_as(start, gramian, targets, order))
            return coefficients, targets

        def shortened(coefficients, norm_before):
            norm, longest = jnp.sqrt(numerics.squared_length(gramian, coefficients)), _LONGEST * norm_before
            factor = jnp.where(norm > longest, longest / jnp.where(norm > longest, norm, 1), 1)
            return factor * coefficients, factor * norm

        orders, state = random_orders(state, key_impl(key), m)
        coefficients, targets = jax.vmap(turn)(jnp.arange(m), orders, state.targets)
        weights = jnp.sum(coefficients, axis=0, where=mask[:, None])
        return weights, count_seen(state._replace(targets=targets), mask)

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name)
