"""GradNorm: weights learned until all gradients have the length that their task's rate of training calls for.

Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks", ICML 2018,
https://arxiv.org/abs/1711.02257
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONNEGATIVE, check, per_task
from mtlbalance.states import count_seen, optimizer_step, read_optimizer, zero_counts


class GradNormState(NamedTuple):
    """State of :func:`gradnorm`.

    Attributes:
      raw_weights: one per task: the weights up to a factor, or with ``softmax`` their logarithms up to a summand.
      initial_losses: the losses that the others are measured against, one per task.
      seen: int32, one per task: the calls in which it was present.
      opt_state: the state of the optimizer.
    """

    raw_weights: jax.Array
    initial_losses: jax.Array
    seen: jax.Array
    opt_state: Any


@base.memoized
def gradnorm(
    alpha: Number = 1.5,
    optimizer: optax.GradientTransformation | None = None,
    initial_losses: PerTask | None = None,
    softmax: bool = False,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[GradNormState]:
    r"""Learns weights that give slower tasks longer gradients.

    .. math:: \min_w \sum_i \Big| w_i \lVert g_i \rVert - \Big( \tfrac{1}{m} \sum_j w_j \lVert g_j \rVert \Big)
              r_i^\alpha \Big|, \qquad r_i = \frac{\tilde L_i}{\frac{1}{m} \sum_j \tilde L_j}, \quad
              \tilde L_i = \frac{L_i}{L_i(0)}, \qquad g = \sum_i w_i g_i

    by one step of an optimizer at every call, after the call's gradient; what :math:`w_i \lVert g_i \rVert` is
    compared with is a constant there. After the step negative weights become zero, and all are scaled to the total m.
    Losses must be of one sign each: one of the other sign counts as zero. The method reads them: give them as
    ``values=``.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The paper has the norms of the last shared layer only, ``decide_on=`` of :func:`mtlbalance.value_and_grad`. It
      does not say what becomes of negative weights. LibMTL learns the logits of a softmax over the tasks, times m
      (``softmax=True``), by the model's own optimizer, takes the mean loss of the first epoch as :math:`L_i(0)`, and
      equal weights during it.

    Args:
      alpha: :math:`\alpha \ge 0`, how strongly rates are pulled together. May be traced.
      optimizer: of the weights, any of optax; ``optax.adam(0.025)`` by default.
      initial_losses: :math:`L_i(0)`, one number for all or one per task (an array or a tree of the same names); by
        default the first loss of each. The paper advises the logarithm of the number of classes for a classification.
      softmax: whether the weights are m times a softmax.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`GradNormState`, ``weighting``, ``gramian_weighting`` and
      ``rowwise``.

    Raises:
      ValueError: if ``alpha`` is out of bounds; at ``init``, if there is not one initial loss per task.
      TypeError: if a call has no ``values``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from mtlbalance import aggregation
      >>> method = aggregation.gradnorm(optimizer=optax.sgd(0.1))
      >>> rows, losses = jnp.array([[3.0, 0.0], [0.0, 1.0]]), jnp.array([2.0, 5.0])
      >>> gradient, state = method.apply(method.init(rows.shape), rows, values=losses)
      >>> print(gradient, [f"{x:.4f}" for x in state.raw_weights])  # the longer gradient loses weight
      [3. 1.] ['0.7778', '1.2222']

    References:
      Chen et al., `GradNorm <https://arxiv.org/abs/1711.02257>`_, ICML 2018, eqs. 1 and 2, algorithm 1.
    """
    check("alpha", alpha, NONNEGATIVE)
    optimizer = read_optimizer(optax.adam(0.025) if optimizer is None else optimizer)

    def init(m, params, dtype):
        del params
        raw, start = jnp.ones(m, dtype), 1.0 if initial_losses is None else initial_losses
        start = per_task("initial_losses", start, (m,), dtype)
        return GradNormState(raw, start, zero_counts(m), optimizer.init({"raw_weights": raw}))

    def imbalance(weights, norms, values, state, mask):
        n_present = jnp.maximum(jnp.sum(mask), 1).astype(weights.dtype)
        losses = jnp.maximum(numerics.ratio(values, state.initial_losses), 0)
        rates = numerics.ratio(losses, jnp.sum(losses / n_present, where=mask))
        lengths = weights * norms
        targets = jax.lax.stop_gradient(jnp.sum(lengths / n_present, where=mask) * rates**alpha)  # eq. 1
        return jnp.sum(jnp.abs(lengths - targets), where=mask)  # eq. 2

    def weigh(state, squares, values, mask):
        first = (state.seen == 0) & mask & (initial_losses is None)
        state = state._replace(initial_losses=jnp.where(first, values, state.initial_losses))
        # The tasks present have the total that they would have alone: their number.
        n_present = jnp.sum(mask)
        if softmax:
            raw, to_weights = state.raw_weights, lambda raw: n_present * numerics.softmax(raw, mask)
        else:
            raw, to_weights = numerics.normalize(state.raw_weights, mask, n_present), lambda raw: raw

        def value_fn(fields):
            return imbalance(to_weights(fields["raw_weights"]), jnp.sqrt(squares), values, state, mask)

        fields, opt_state = optimizer_step(optimizer, value_fn, state.opt_state, {"raw_weights": raw}, mask)
        new = fields["raw_weights"]
        if not softmax:
            before = jnp.sum(state.raw_weights, where=mask)
            new = numerics.normalize(jnp.maximum(new, 0), mask, before)
        state = state._replace(raw_weights=jnp.where(mask, new, state.raw_weights), opt_state=opt_state)
        # They are of the calls before: a loss that is not finite must show all the same.
        return numerics.nan_unless(jnp.all(jnp.isfinite(values) | ~mask), to_weights(raw)), count_seen(state, mask)

    return base.norms_aggregator(
        init, weigh, axis_name=axis_name, reads_losses=True, per_task={"initial_losses": initial_losses}
    )
