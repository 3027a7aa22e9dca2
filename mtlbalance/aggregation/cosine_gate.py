"""Cosine gate: the main gradient, and of the auxiliary ones those that point the same way.

Du et al., "Adapting Auxiliary Losses Using Gradient Similarity", 2018, https://arxiv.org/abs/1812.02224
"""

from collections.abc import Hashable

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.names import check_task, index_of
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def cosine_gate(
    main: int | str = 0, *, weighted: bool = False, axis_name: Hashable | None = None
) -> base.Aggregator[SeenState]:
    r"""Adds an auxiliary gradient to the main one only where their cosine is positive.

    .. math:: g = g_\mathrm{main} + \sum_{i \ne \mathrm{main}} w_i g_i, \qquad
              w_i = [\cos(g_i, g_\mathrm{main}) > 0]

    or, with ``weighted``, :math:`w_i = \max(0, \cos(g_i, g_\mathrm{main}))`. Every auxiliary gradient is judged by
    itself. A step of gradient descent that is short enough lowers the main loss wherever its gradient does not vanish.
    Where the main gradient is absent or zero no cosine is known, and the others have weight 0.

    Note:
      At a cosine of 0 both forms leave the auxiliary gradient out, as the code of AuxiLearn does; there is no official
      code.

    Args:
      main: the name of the task that counts, or its index where losses have no names.
      weighted: whether the cosine is the weight.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``main`` is no task, or an index where the losses have names.
      TypeError: if ``main`` is neither an int nor a name.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.cosine_gate()
      >>> rows = jnp.array([[1.0, 0.0], [3.0, 4.0], [-1.0, 5.0]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(gradient)
      [4. 4.]

    References:
      Du et al., `Adapting Auxiliary Losses Using Gradient Similarity <https://arxiv.org/abs/1812.02224>`_, 2018.
    """
    check_task("main", main)

    def init(m, params, dtype):
        check_task("main", main, m)
        return init_seen(m, params, dtype)

    def weigh(state: SeenState, gramian, values, mask):
        del values
        at = index_of("main", main)
        _, _, cosines = numerics.cosines(gramian, mask)
        agreement = jnp.maximum(cosines[at], 0)
        weights = agreement if weighted else (agreement > 0).astype(agreement.dtype)
        return weights.at[at].set(1), count_seen(state, mask)

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name)
