"""ExcessMTL: weights by excess risk, from the squared gradients so far.

He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024, https://arxiv.org/abs/2402.02009
"""

from collections.abc import Hashable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.complex_parts import entries, squared_modulus
from mtlbalance.gramian import total
from mtlbalance.hyperparameters import POSITIVE, check, check_int
from mtlbalance.states import count_seen, zero_counts, zeros_jacobian


class ExcessMTLState(NamedTuple):
    """State of :func:`excess_mtl`.

    Attributes:
      log_weights: logarithms of the weights, one per task; the weights sum to 1.
      baseline: the excess that later ones are measured against, one per task; 0 while unset, and during warm-up
        the part of the mean gathered so far.
      seen: int32, one per task: the calls in which it was present.
      squared_gradients: sum of the squared gradients, real leaves ``[m, *param.shape]``; of complex ones the squared
        moduli.
    """

    log_weights: chex.Array
    baseline: chex.Array
    seen: chex.Array
    squared_gradients: chex.ArrayTree


@base.memoized
def excess_mtl(
    robust_step_size: chex.Numeric = 1.0,
    n_warmup_steps: int = 0,
    normalize_first_step: bool = True,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator:
    r"""Weights each task by how far it is from its best, estimated from its gradients.

    With :math:`g_i` the gradient of task i (row i of the Jacobian), at every call

    .. math::
        S_i \leftarrow S_i + g_i^2, \qquad
        E_i = \sum_k \frac{g_{ik}^2}{\sqrt{S_{ik} + 10^{-7}}}, \qquad
        w_i \leftarrow \frac{w_i \exp(\eta\, E_i / (E_i^0 + 10^{-7}))}{\sum_j \ldots}, \qquad
        g = \sum_i w_i g_i

    The baseline :math:`E_i^0` is the task's first positive excess, or its mean over the warm-up. A task keeps its
    weight until it has one, so the first call (and the warm-up) leaves the weights uniform, and a task that
    is absent or without gradient at first starts on equal terms later. The weights sum to 1 and start at 1/m.

    The squared gradients are as large as the Jacobian. Gradients beyond 1e19 overflow their float32 squares,
    and then the weights are NaN: wrap the method in :func:`mtlbalance.skip_nonfinite` where that can happen.

    A task's ratio falls at best like one over the root of the call, so after t calls two log-weights may differ by
    up to about :math:`2 \eta \sqrt{t}`: with the default step a run of thousands can end with nearly all weight on one
    or two tasks. The official code's default is 0.01.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code and LibMTL start at weight 1 and keep the total m: their gradient is m times this one's.
      They have no warm-up and no :math:`10^{-7}` in the ratio. TorchJD up to 0.18 moves the weights on the first
      call already, by the excess itself instead of a ratio; ``normalize_first_step=False`` does the same.

    Args:
      robust_step_size: :math:`\eta > 0`. May be traced.
      n_warmup_steps: calls that only gather the baseline, at least 0. They are counted for each task.
      normalize_first_step: ``False`` uses the raw excess as the exponent on a call that sets a baseline itself, which
        without a warm-up is the first.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`ExcessMTLState`, ``weighting`` and ``rowwise``.

    Raises:
      ValueError: if ``robust_step_size`` or ``n_warmup_steps`` is out of bounds.
      TypeError: if ``n_warmup_steps`` is not an int.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.excess_mtl()
      >>> state = method.init((2, 2))
      >>> gradient, state = method.apply(state, jnp.array([[2.0, 0.0], [1.0, 0.0]]))
      >>> gradient, state = method.apply(state, jnp.array([[1.0, 0.0], [2.0, 0.0]]))
      >>> print([f"{weight:.4f}" for weight in jnp.exp(state.log_weights)])
      ['0.1729', '0.8271']

    References:
      He et al., `Robust Multi-Task Learning with Excess Risks <https://arxiv.org/abs/2402.02009>`_, ICML 2024,
      eqs. 6, 7 and 9, and "scale processing" in section 3.2; warm-up: appendix C.1;
      https://github.com/yifei-he/ExcessMTL.
    """
    check("robust_step_size", robust_step_size, POSITIVE)
    check_int("n_warmup_steps", n_warmup_steps, 0)

    def init(m, params, dtype):
        return ExcessMTLState(
            log_weights=jnp.full(m, -jnp.log(m), dtype),
            baseline=jnp.zeros(m, dtype),
            seen=zero_counts(m),
            squared_gradients=zeros_jacobian(m, entries(params), dtype),
        )

    def visit(squared_gradients, gradient, task):
        del task  # an absent task's gradient is zero, and so is its square
        # Eq. 7: the accumulator includes the gradient at hand.
        squares = jax.tree.map(lambda s, g: s + squared_modulus(g), squared_gradients, gradient)

        def excess(s, g):  # of both parts of a complex number
            # The last factor is 1, or NaN where the squares overflowed and the others would hide it.
            inverse = jax.lax.rsqrt(s + 1e-7)
            return jax.tree.map(lambda part: part * (part * inverse) * jnp.where(jnp.isinf(s), jnp.nan, 1), g)

        return squares, total(jax.tree.map(excess, squares, gradient), axis_name)

    def weigh(state, excess, values, mask):
        del values
        warming_up = state.seen < n_warmup_steps
        unset = ~warming_up & (state.baseline == 0)
        gathered = state.baseline + excess / max(n_warmup_steps, 1)
        baseline = jnp.where(warming_up, gathered, jnp.where(unset, excess, state.baseline))
        ratio = excess / (baseline + 1e-7)
        moving = mask & ~warming_up & ~unset
        if not normalize_first_step:
            ratio, moving = jnp.where(unset, excess, ratio), mask & ~warming_up
        log_weights = numerics.exponentiated_step(state.log_weights, robust_step_size * ratio, moving)  # eq. 9
        state = state._replace(log_weights=log_weights, baseline=jnp.where(mask, baseline, state.baseline))
        return jax.nn.softmax(log_weights, where=mask), count_seen(state, mask)

    return base.rowwise_aggregator(init, visit, weigh, memory="squared_gradients", of_moduli=True)
