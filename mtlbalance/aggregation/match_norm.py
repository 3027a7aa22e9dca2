"""Match norm: the other gradients brought to the length of one task's. MetaBalance, and VQGAN's adaptive weight.

He et al., "MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of Auxiliary Tasks", WWW
2022, https://arxiv.org/abs/2203.06801; Esser, Rombach and Ommer, "Taming Transformers for High-Resolution Image
Synthesis", CVPR 2021, https://arxiv.org/abs/2012.09841
"""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.hyperparameters import DECAY, FRACTION, NONNEGATIVE, POSITIVE_OR_INFINITE, check
from mtlbalance.names import check_task, index_of
from mtlbalance.states import count_seen, unbiased_average, zero_counts


class MatchNormState(NamedTuple):
    """State of :func:`match_norm`.

    Attributes:
      seen: int32, one per task: the calls in which it was present.
      norms: running averages of the gradients' lengths, one per task.
    """

    seen: jax.Array
    norms: jax.Array


@base.memoized
def match_norm(
    reference: int | str = 0,
    relax: Number = 0.7,
    decay: Number = 0.9,
    clip: Number = float("inf"),
    eps: Number = 0.0,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[MatchNormState]:
    r"""Brings every other gradient to the length of the reference's, or some of the way there.

    .. math:: w_i = r \min \Big( \frac{n_\mathrm{ref}}{n_i + \epsilon}, c \Big) + 1 - r \quad (i \ne \mathrm{ref}),
              \qquad w_\mathrm{ref} = 1, \qquad n_i \leftarrow \beta n_i + (1 - \beta) \lVert g_i \rVert

    where :math:`n_i` is without bias towards its start. The defaults are MetaBalance's. VQGAN's adaptive weight of the
    adversarial loss is ``match_norm("reconstruction", relax=1.0, decay=0.0, clip=1e4, eps=1e-4)`` decided on the last
    layer; from a start step on, by :func:`mtlbalance.prioritize` with a schedule. With ``clip=1`` gradients are
    shortened only. It needs lengths alone, and costs one backward pass through the trunk with ``at="features"`` of
    :func:`mtlbalance.value_and_grad`, where `MultiBalance <https://arxiv.org/abs/2411.11871>`_ balances gradients, too.

    The weights have no fixed total. Where the reference is absent its length is what it was; before it is first seen
    all weights are 1, and so is that of a task without any gradient so far.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      MetaBalance's code has lengths for each tensor of the parameters: an aggregator for each, by
      :func:`optax.partition`. Its averages start at 0, which cancels in the quotient as long as no task is absent.
      VQGAN's paper has :math:`\epsilon` = 1e-6, and no clip; its code is as above.

    Args:
      reference: the name of the task whose length counts, or its index where losses have no names.
      relax: :math:`r`, from 0 to 1: 0 is the sum, at 1 all are as long as the reference's. May be traced.
      decay: :math:`\beta`, at least 0 and below 1. May be traced.
      clip: :math:`c > 0`, the largest quotient; infinite by default. May be traced.
      eps: :math:`\epsilon \ge 0`. May be traced.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`MatchNormState`, ``weighting``, ``gramian_weighting`` and
      ``rowwise``.

    Raises:
      ValueError: if an argument is out of bounds; if ``reference`` is no task, or an index where the losses have names.
      TypeError: if ``reference`` is neither an int nor a name.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.match_norm(relax=0.5)
      >>> rows = jnp.array([[3.0, 0.0], [0.0, 12.0]])
      >>> gradient, state = method.apply(method.init(rows.shape), rows)
      >>> print(gradient)  # half of the way from 12 to 3
      [3.  7.5]

    References:
      He et al., `MetaBalance <https://arxiv.org/abs/2203.06801>`_, WWW 2022;
      https://github.com/facebookresearch/MetaBalance. Esser, Rombach and Ommer, `Taming Transformers for
      High-Resolution Image Synthesis <https://arxiv.org/abs/2012.09841>`_, CVPR 2021;
      https://github.com/CompVis/taming-transformers.
    """
    check_task("reference", reference)
    check("relax", relax, FRACTION)
    check("decay", decay, DECAY)
    check("clip", clip, POSITIVE_OR_INFINITE)
    check("eps", eps, NONNEGATIVE)

    def init(m, params, dtype):
        del params
        check_task("reference", reference, m)
        return MatchNormState(zero_counts(m), jnp.zeros(m, dtype))

    def weigh(state, squares, values, mask):
        del values
        at = index_of("reference", reference)
        norms = jnp.where(mask, unbiased_average(state.norms, jnp.sqrt(squares), decay, state.seen), state.norms)
        state = count_seen(state._replace(norms=norms), mask)
        quotients = jnp.minimum(numerics.ratio(norms[at], norms + eps), clip)
        quotients = jnp.where((state.seen[at] == 0) | (norms == 0), 1, quotients)
        return (relax * quotients + (1 - relax)).at[at].set(1), state

    return base.norms_aggregator(init, weigh, axis_name=axis_name)
