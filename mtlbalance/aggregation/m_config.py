"""M-ConFIG: ConFIG of running averages, of which a step renews one only, with Adam's scaling.

Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025,
https://arxiv.org/abs/2408.11104
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.complex_parts import entries, squared_modulus
from mtlbalance.gramian import combine, gramian_of_tasks
from mtlbalance.hyperparameters import DECAY, check
from mtlbalance.losses import state_dtype
from mtlbalance.states import among, count_seen, increment, select, zero_counts, zeros_jacobian, zeros_params


class MConFIGState(NamedTuple):
    """State of :func:`m_config`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      turns: int32, one per task: those that renewed its average.
      last_turn: int32, one per task: the number of the last of these, 0 before the first; at the largest int32 they
        are numbered anew, in their order.
      momentum: running averages of the gradients, leaves ``[m, *param.shape]``.
      count: int32 scalar: the calls that gave a gradient.
      direction: the last gradient before scaling, as if it were an average that has not been corrected for its start;
        shaped like the parameters.
      squares: running average of the squares that Adam divides by, real and shaped like the parameters; of complex ones
        the squared moduli.
    """

    seen: jax.Array
    turns: jax.Array
    last_turn: jax.Array
    momentum: Any
    count: jax.Array
    direction: Any
    squares: Any


_LAST = jnp.iinfo(jnp.int32).max - 1  # an absent task's number is the one above it


@base.memoized
def m_config(
    beta_1: Number = 0.9, beta_2: Number = 0.999, *, axis_name: Hashable | None = None
) -> base.Aggregator[MConFIGState]:
    r"""ConFIG's direction of the gradients' running averages; each call renews the one that waited longest.

    .. math:: m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i, \qquad
              d = \mathrm{ConFIG}\Big( \frac{m_1}{1 - \beta_1^{t_1}}, \ldots, \frac{m_m}{1 - \beta_1^{t_m}} \Big),
              \qquad g = \frac{d}{\sqrt{\hat s} + 10^{-8}}

    where i is the task whose turn it is, :math:`t_j` counts task j's turns, and :math:`\hat s` is Adam's second moment
    of the gradients whose first moment :math:`d` would be, at the t-th call that gives a gradient:

    .. math:: d' = (1 - \beta_1^t) d, \qquad
              s \leftarrow \beta_2 s + (1 - \beta_2) \Big( \frac{d' - \beta_1 d'_{t-1}}{1 - \beta_1} \Big)^2, \qquad
              \hat s = \frac{s}{1 - \beta_2^t}

    The gradient is zero until every task present had a turn. It is scaled as Adam's update is: follow it by
    ``optax.sgd``. Of all gradients a call needs one, and :func:`mtlbalance.value_and_grad` computes no other: a step
    takes one backward pass and the Gramian of the averages.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      In the official code the caller says whose turn it is.

    Args:
      beta_1: :math:`\beta_1`, at least 0 and below 1. May be traced.
      beta_2: :math:`\beta_2`, at least 0 and below 1. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`MConFIGState` and ``rowwise``. It has no weighting: what it
      combines are not the gradients of the call.

    Raises:
      ValueError: if ``beta_1`` or ``beta_2`` is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.m_config()
      >>> rows = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> gradient, state = method.apply(method.init((2, 3)), rows)
      >>> gradient, state = method.apply(state, rows)
      >>> print([f"{x:.4f}" for x in gradient], state.last_turn)
      ['1.0000', '1.0000', '1.0000'] [1 2]

    References:
      Liu et al., `ConFIG <https://arxiv.org/abs/2408.11104>`_, ICLR 2025, algorithm 1;
      https://github.com/tum-pbs/ConFIG.
    """
    for name, beta in {"beta_1": beta_1, "beta_2": beta_2}.items():
        check(name, beta, DECAY)

    def init(m, params, dtype):
        return MConFIGState(
            seen=zero_counts(m),
            turns=zero_counts(m),
            last_turn=zero_counts(m),
            momentum=zeros_jacobian(m, params, dtype),
            count=jnp.zeros((), jnp.int32),
            direction=zeros_params(params, dtype),
            squares=zeros_params(entries(params), dtype),
        )

    def visits(state, mask):
        last_turn = jnp.where(mask, jnp.minimum(state.last_turn, _LAST), jnp.iinfo(jnp.int32).max)
        return jnp.argmin(last_turn)[None]

    def visit(momentum, gradient, task):
        follow = lambda m, g: jnp.where(task.present, beta_1 * m + (1 - beta_1) * g, m)
        return jax.tree.map(follow, momentum, gradient), ()

    def finish(state, statistics, values, mask):
        del statistics, values
        # In the state's dtype, so that they are the same number whether traced or not.
        decay_1, decay_2 = (jnp.asarray(beta, state_dtype(state, ())) for beta in (beta_1, beta_2))
        turn = among(visits(state, mask), mask)
        last_turn, turns = _with_room(state.last_turn), increment(state.turns, turn)
        state = state._replace(turns=turns, last_turn=jnp.where(turn, jnp.max(last_turn) + 1, last_turn))
        ready = jnp.all((turns > 0) | ~mask)

        corrections = jnp.where(mask & ready, 1 / numerics.bias_correction(decay_1, jnp.maximum(turns, 1)), 0)
        gramian = gramian_of_tasks(state.momentum, len(mask), axis_name)
        weights = numerics.conflict_free(
            corrections[:, None] * gramian * corrections[None, :], jnp.ones_like(corrections)
        )
        gradient = combine(corrections * weights, state.momentum)

        old = {"count": state.count, "direction": state.direction, "squares": state.squares}
        new = second_moment(gradient, decay_1, decay_2, **old)
        state = state._replace(**select(ready, new, old))
        correction = numerics.bias_correction(decay_2, jnp.maximum(state.count, 1))

        finite = jnp.all(jnp.isfinite(gramian) | ~(mask[:, None] & mask[None, :]))

        def divide(s, g):  # both parts of a complex number
            scaled = lambda part: jnp.where(ready, part / (jnp.sqrt(s / correction) + 1e-8), 0)
            return jax.tree.map(lambda part: numerics.nan_unless(finite & jnp.isfinite(s), scaled(part)), g)

        return jax.tree.map(divide, state.squares, gradient), count_seen(state, mask)

    def second_moment(gradient, decay_1, decay_2, count, direction, squares):
        count = optax.safe_increment(count)
        new_direction = jax.tree.map(lambda d: numerics.bias_correction(decay_1, count) * d, gradient)
        implied = jax.tree.map(lambda new, old: (new - decay_1 * old) / (1 - decay_1), new_direction, direction)
        squares = jax.tree.map(lambda s, x: decay_2 * s + (1 - decay_2) * squared_modulus(x), squares, implied)
        return {"count": count, "direction": new_direction, "squares": squares}

    return base.rowwise_aggregator(init, visit, finish=finish, visits=visits, memory="momentum")


def _with_room(numbers):
    """The numbers of the last turns; where there is none above them, those of their order."""
    order = jnp.sum(numbers[None, :] < numbers[:, None], axis=1, dtype=jnp.int32)
    return jnp.where(jnp.max(numbers) >= _LAST, order, numbers)
