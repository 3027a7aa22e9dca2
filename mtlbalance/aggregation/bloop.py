"""Bloop: the main gradient, and of the auxiliary ones what is at right angles to its running average.

Hsieh et al., "Careful with that Scalpel: Improving Gradient Surgery with an EMA", ICML 2024,
https://arxiv.org/abs/2402.02998
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.boundary import check_rows_like
from mtlbalance.gramian import squared_norm, total
from mtlbalance.hyperparameters import DECAY, NONNEGATIVE, check
from mtlbalance.losses import state_dtype
from mtlbalance.names import check_task, index_of
from mtlbalance.states import count_seen, zero_counts, zeros_params


class BloopState(NamedTuple):
    """State of :func:`bloop`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      average: the running average of the main gradient, shaped like the parameters.
    """

    seen: jax.Array
    average: Any


@base.memoized
def bloop(
    main: int | str = 0,
    lambda_: Number = 0.1,
    decay: Number = 0.9,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[BloopState]:
    r"""Descends the main loss as if it was alone, and the others where that costs it nothing to first order.

    .. math:: m \leftarrow \beta m + (1 - \beta) g_\mathrm{main}, \qquad
              g = g_\mathrm{main} + \lambda \Big( a - \frac{a \cdot m}{\lVert m \rVert^2} m \Big), \qquad
              a = \sum_{i \ne \mathrm{main}} g_i

    For a loss that matters and others that are wished for among its minima, all but equally good: smoothness, small
    weights. The average takes out the noise of the batch, for which a projection on the gradient itself would not do.
    It starts at zero, and is as large as the parameters, whatever the number of tasks. A step of
    :func:`mtlbalance.value_and_grad` keeps one gradient for each loss: add auxiliary losses up into one.

    Where the main task is absent its average is as it was; before it is first seen, the others are followed as they
    are. There are no weights: the gradient is not made of this call's gradients alone.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code's ``ema`` is :math:`1 - \beta`. It adds 1e-7 to :math:`\lVert m \rVert^2`, which is all of it
      for small gradients. Its average starts at zero, at random, or at what it is given, the first gradient, say:
      ``method.init(...)._replace(average=...)``. Its training scripts give it the parameters.

    Args:
      main: the name of the task that counts, or its index where losses have no names.
      lambda_: :math:`\lambda \ge 0`, how much the others do. May be traced.
      decay: :math:`\beta`, at least 0 and below 1. At 0 the projection is on the gradient itself. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`BloopState`.

    Raises:
      ValueError: if an argument is out of bounds; if ``main`` is no task, or an index where the losses have names.
      TypeError: if ``main`` is neither an int nor a name.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.bloop(lambda_=0.5)
      >>> rows = jnp.array([[2.0, 0.0], [-3.0, 4.0]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(gradient)
      [2. 2.]

    References:
      Hsieh et al., `Careful with that Scalpel <https://arxiv.org/abs/2402.02998>`_, ICML 2024;
      https://github.com/apple/ml-bloop.
    """
    check_task("main", main)
    check("lambda_", lambda_, NONNEGATIVE)
    check("decay", decay, DECAY)

    def init(m, params, dtype):
        check_task("main", main, m)
        return BloopState(zero_counts(m), zeros_params(params, dtype))

    def apply(state, jacobian, values, mask):
        del values
        rows_like = lambda x: jax.ShapeDtypeStruct((len(mask), *x.shape), x.dtype)
        check_rows_like("jacobian", jacobian, jax.tree.map(rows_like, state.average))
        at, dtype = index_of("main", main), state_dtype(state, jacobian)
        jacobian = jax.tree.map(lambda rows: jax.lax.stop_gradient(rows).astype(dtype), jacobian)
        follow = lambda old, rows: jnp.where(mask[at], decay * old + (1 - decay) * rows[at], old)
        average = jax.tree.map(follow, state.average, jacobian)

        def others(rows):  # one by one, no jnp.sum: so XLA adds them where they are used
            first, *more = [row for i, row in enumerate(rows) if i != at] or [jnp.zeros_like(rows[at])]
            return sum(more, first)

        auxiliary = jax.tree.map(others, jacobian)

        square = squared_norm(average, axis_name)
        product = jnp.asarray(total(jax.tree.map(jnp.multiply, auxiliary, average), axis_name))
        along = jnp.where(square == 0, 0, product / jnp.where(square == 0, 1, square))
        along = numerics.nan_unless(jnp.isfinite(square), along)  # or it would be 0
        bend = lambda rows, a, m: rows[at] + lambda_ * (a - along * m)
        gradient = jax.lax.stop_gradient(jax.tree.map(bend, jacobian, auxiliary, average))
        return gradient, count_seen(state._replace(average=average), mask)

    return base.aggregator(init, apply=apply, axis_name=axis_name)
