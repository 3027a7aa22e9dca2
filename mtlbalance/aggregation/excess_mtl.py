"""ExcessMTL: weights by excess risk, from the squared gradients so far.

He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024, https://arxiv.org/abs/2402.02009
"""

from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number
from mtlbalance.complex_parts import entries, squared_modulus
from mtlbalance.gramian import total
from mtlbalance.hyperparameters import POSITIVE, check, check_count, check_int, reject
from mtlbalance.parameters import check_params_like
from mtlbalance.states import count_seen, zero_counts, zeros_jacobian
from mtlbalance.strides import keep, kept_params, kept_shape


class ExcessMTLState(NamedTuple):
    """State of :func:`excess_mtl`.

    Attributes:
      log_weights: logarithms of the weights, one per task; the weights sum to 1.
      baseline: the excess that later ones are measured against, one per task; 0 while unset, and during warm-up
        the part of the mean gathered so far.
      seen: int32, one per task: the calls in which it was present.
      squared_gradients: sum of the squared gradients, real leaves ``[m, *param.shape]``; of complex ones the squared
        moduli. With ``accumulate=64`` those of every 64th coordinate, ``[m, *kept]``, ``kept`` with the param's axes.
    """

    log_weights: jax.Array
    baseline: jax.Array
    seen: jax.Array
    squared_gradients: Any


@base.memoized
def excess_mtl(
    robust_step_size: Number = 1.0,
    n_warmup_steps: int | jax.Array = 0,
    normalize_first_step: bool = True,
    *,
    accumulate: Literal["full"] | int = "full",
    axis_name: Hashable | None = None,
) -> base.Aggregator[ExcessMTLState]:
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

    The squared gradients are as large as the Jacobian. ``accumulate=64`` keeps those of every 64th coordinate K alone,
    the same ones at every call, chosen by the parameter's shape, and estimates the excess by what is known of all:

    .. math::
        E_i \approx \sum_k \frac{g_{ik}^2}{\sqrt{g_{ik}^2 + 10^{-7}}} \;
        \frac{\sum_{k \in K} n_k\, g_{ik}^2 / \sqrt{S_{ik} + 10^{-7}}}
        {\sum_{k \in K} n_k\, g_{ik}^2 / \sqrt{g_{ik}^2 + 10^{-7}}}

    with :math:`n_k` the number of coordinates in k's parameter over that of those kept. A first call is exact, and so
    is the baseline. At least 8 are kept along an axis that is as long, so small parameters are kept whole. What is kept
    is split over devices as the parameter is; where its part of a device is no multiple of the stride along an axis (12
    kept of 768, on 8 devices) it is whole on each, and a call moves that parameter's numbers between devices.

    The error of the weights after 200 steps, of the task where it is largest, averaged over two seeds, for step sizes
    of .01, .1 and 1: each form saw the same gradients (memory over m x P;
    ``tests/benchmarks/excess_mtl_memory.py --steps 200 --seeds 2``):

    ========================  ======  ====================  ======  ====================
    kept                      digits: 38k parameters        language model: 314k
    ------------------------  ----------------------------  ----------------------------
    \                         memory  error                 memory  error
    ========================  ======  ====================  ======  ====================
    every 16th                .063    .0002  .002  .019     .063    .006  .023  .119
    every 64th                .020    .0008  .009  .046     .016    .012  .023  .023
    64th, their sum alone     .020    .0024  .027  .235     .016    .272  .753  .967
    rows' and columns' sums   .032    .0065  .027  .129     .023    .013  .030  .081
    one number a parameter    .0003   .0060  .020  .065     .0000   .126  .495  .500
    all, in bfloat16          .5      .0001  .0003 .0007    .5      .0003 .0008 .0016
    ========================  ======  ====================  ======  ====================

    Sums of rows and columns, as Adafactor's, take more memory and are further off; bfloat16 stops adding after some
    hundred calls. With a step size of 1 the weights run away, and any error with them.

    Gradients beyond 1e19 overflow their float32 squares, and then the weights are NaN: wrap the method in
    :func:`mtlbalance.skip_nonfinite` where that can happen.

    A task's ratio falls at best like one over the root of the call, so after t calls two log-weights may differ by
    up to about :math:`2 \eta \sqrt{t}`: with the default step a run of thousands can end with nearly all weight on one
    or two tasks. The official code's default is 0.01.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The official code and LibMTL start at weight 1 and keep the total m: their gradient is m times this one's.
      They have no warm-up and no :math:`10^{-7}` in the ratio. TorchJD up to 0.18 moves the weights on the first
      call already, by the excess itself instead of a ratio; ``normalize_first_step=False`` does the same.

    Note:
      The paper's claim, that a task with noisy labels loses weight, holds under a condition. A task's excesses add up
      to about :math:`2 \sum_k \sqrt{S_{ik}}`, so :math:`\log w_i` is about :math:`2 \eta \sum_k \sqrt{S_{ik}} / E_i^0`
      and a constant: weight goes to the task whose gradients, from batches, have stayed larger in proportion to its
      first ones, far from its best or noisy. Where a network learns the clean task by heart that is the noisy one. On
      digits, with 80% of one task's labels drawn at random and a step size of .01, it got .60 ± .03 of the weight,
      after a warm-up of three epochs .91; a network too narrow to fit the noise gave it .43 ± .01 and .33 ± .05. With a
      step size of 1 one of the two often ended without weight there, also where neither had noise. A fixed weight of .1
      for the noisy task did as well for the clean one, or better, in both, and the narrow network then hardly learned
      the noisy one:
      ``python examples/label_noise.py``, and ``--search`` for 25 trainings.

    Args:
      robust_step_size: :math:`\eta > 0`. May be traced.
      n_warmup_steps: calls that only gather the baseline, at least 0. They are counted for each task. May be
        traced.
      normalize_first_step: ``False`` uses the raw excess as the exponent on a call that sets a baseline itself, which
        without a warm-up is the first.
      accumulate: ``"full"``, or a power of two: one in how many squared gradients is kept.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once. With
        ``accumulate`` each device takes coordinates of its own part: those of one device if it keeps a multiple of 8
        along every axis.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`ExcessMTLState`, ``weighting`` and ``rowwise``.

    Raises:
      ValueError: if ``robust_step_size``, ``n_warmup_steps`` or ``accumulate`` is out of bounds.
      TypeError: if ``n_warmup_steps`` or ``accumulate`` is no integer.

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
    check_count("n_warmup_steps", n_warmup_steps, 0)
    stride = _read_stride(accumulate)

    def init(m, params, dtype):
        kept = entries(params) if stride == 1 else kept_params(entries(params), stride)
        return ExcessMTLState(
            log_weights=jnp.full(m, -jnp.log(m), dtype),
            baseline=jnp.zeros(m, dtype),
            seen=zero_counts(m),
            squared_gradients=zeros_jacobian(m, kept, dtype),
        )

    def inverse_root(squares):
        # The difference is 0, and NaN where the squares overflowed: one over their root would hide it.
        return jax.lax.rsqrt(squares + (1e-7 + (squares - squares)))

    def visit(squared_gradients, gradient, task):
        del task  # an absent task's gradient is zero, and so is its square
        if stride > 1:
            return visit_kept(squared_gradients, gradient)
        # Eq. 7: the accumulator includes the gradient at hand.
        squares = jax.tree.map(lambda s, g: s + squared_modulus(g), squared_gradients, gradient)

        def excess(s, g):  # of both parts of a complex number
            inverse = inverse_root(s)
            return jax.tree.map(lambda part: part * (part * inverse), g)

        return squares, total(jax.tree.map(excess, squares, gradient), axis_name)

    def visit_kept(squared_gradients, gradient):
        moduli = lambda tree: jax.tree.map(lambda _, g: squared_modulus(g), squared_gradients, tree)
        kept = moduli(_kept(squared_gradients, gradient, stride, is_part=axis_name is not None))
        squares = jax.tree.map(jnp.add, squared_gradients, kept)
        # What this gradient's excess would be on a first call is known of all coordinates; of those that are kept, the
        # part of it that the calls before have left, which differs less from one to another.
        first = jax.tree.map(lambda g: g * jax.lax.rsqrt(g + 1e-7), moduli(gradient))
        n_each = jax.tree.map(lambda all, some: all.size / max(some.size, 1), first, kept)

        def of_kept(squares):
            term = lambda s, g, n: n * g * inverse_root(s)
            return total(jax.tree.map(term, squares, kept, n_each), axis_name)

        return squares, total(first, axis_name) * numerics.ratio(of_kept(squares), of_kept(kept))

    def weigh(state, excess, values, mask):
        del values
        warming_up = state.seen < n_warmup_steps
        unset = ~warming_up & (state.baseline == 0)
        gathered = state.baseline + excess / jnp.maximum(n_warmup_steps, 1)
        baseline = jnp.where(warming_up, gathered, jnp.where(unset, excess, state.baseline))
        ratio = excess / (baseline + 1e-7)
        moving = mask & ~warming_up & ~unset
        if not normalize_first_step:
            ratio, moving = jnp.where(unset, excess, ratio), mask & ~warming_up
        log_weights = numerics.exponentiated_step(state.log_weights, robust_step_size * ratio, moving)  # eq. 9
        state = state._replace(log_weights=log_weights, baseline=jnp.where(mask, baseline, state.baseline))
        return numerics.softmax(log_weights, mask), count_seen(state, mask)

    memory = "squared_gradients" if stride == 1 else "squared_gradients.*"
    return base.rowwise_aggregator(init, visit, weigh, memory=memory, of_moduli=True)


def _read_stride(accumulate):
    """One in how many coordinates is kept."""
    if isinstance(accumulate, str):
        if accumulate != "full":
            reject("accumulate", "'full' or a power of two", f"{accumulate!r}")
        return 1
    check_int("accumulate", accumulate, 1)
    if accumulate & (accumulate - 1):
        reject("accumulate", "'full' or a power of two", f"{accumulate}")
    return accumulate


def _kept(squared_gradients, gradient, stride, *, is_part):
    """The coordinates of a gradient of which the squares are summed."""
    if not is_part:  # of a parameter that is split over devices: the shapes are those of parts
        like = lambda g: jax.ShapeDtypeStruct(kept_shape(g.shape, stride), g.dtype)
        where = f"jacobian (what accumulate={stride} keeps of a row)"
        check_params_like(where, jax.tree.map(like, entries(gradient)), squared_gradients)
    keep_leaf = lambda s, g: jax.tree.map(lambda part: keep(part, s.shape), g)
    return jax.tree.map(keep_leaf, squared_gradients, gradient)
