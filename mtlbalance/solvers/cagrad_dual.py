"""The dual problem of conflict-averse descent (Liu et al. 2021, https://arxiv.org/abs/2110.14048), on device."""

import chex
import jax
import jax.numpy as jnp

from mtlbalance.mapped_axes import varying_as
from mtlbalance.solvers.interior_point import nonnegative_qp

# The value is flat in the length at its best: one that agrees with itself to 1e-5 leaves it exact to rounding.
_CLOSE = 1e-5
# Five to ten are usual. All are needed where the length falls to its bound, as between gradients that cancel.
_MOST_TRIALS = 18


@jax.jit  # a bare call would compile the loops each time
def cagrad_dual(gramian: chex.Array, c: chex.Numeric, mask: chex.Array | None = None) -> jax.Array:
    r"""Minimizes :math:`g_w^\top g_0 + c \|g_0\| \|g_w\|` over :math:`g_w = \sum_i w_i g_i`, :math:`w` on the simplex.

    :math:`g_0` is the mean gradient. As :math:`\|g_w\|` is the least :math:`\|g_w\|^2 / 2t + t / 2` over t > 0, it is a
    quadratic program for each t inside a convex problem in t alone: :math:`\|g_w\| > t` for t below its solution, which
    a bracketed secant finds. Unlike Newton's method on the norm itself it does not mind a solution with
    :math:`g_w = 0`.

    The value is within 1e-5 of the least one, in units of its terms or of :math:`\|g_0\|` times the smallest norm; with
    c near 0.1, dozens of tasks and norms that differ by 1e6 within 5e-5. Where gradients cancel, the rounding of
    ``gramian`` leaves lengths uncertain by its square root: if :math:`g_w` vanishes, as it may from c = 1 on, the value
    is within 1e-3, and if :math:`g_0` itself is shorter than 1e-4 of the norms, there is no telling.

    Args:
      gramian: inner products of the tasks' gradients, shape ``[m, m]``, of any scale.
      c: radius of the ball around the mean gradient over its norm, at least 0, may be traced.
      mask: tasks present, shape ``[m]``. A zero gradient is not an absent one: it counts in the mean.

    Returns:
      Weights of total 1, shape ``[m]``; 0 where absent. Between near-duplicates any split is optimal.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.solvers import cagrad_dual
      >>> print(cagrad_dual(jnp.array([[4.0, 0.0], [0.0, 1.0]]), 0.5).round(2))
      [0. 1.]
    """
    dtype = gramian.dtype
    present = jnp.ones(len(gramian), bool) if mask is None else mask
    c = jnp.asarray(c, dtype)
    norms = jnp.sqrt(jnp.where(present, jnp.diag(gramian), 0))
    largest = jnp.max(norms)
    largest = jnp.where(largest == 0, 1, largest)
    norms, gramian = norms / largest, jnp.where(present[:, None] & present[None, :], gramian / largest / largest, 0)
    sums = jnp.sum(gramian, axis=1)
    length = jnp.sqrt(jnp.maximum(jnp.sum(sums), 0))
    along = jnp.clip(sums / jnp.where(length == 0, 1, length), -norms, norms)  # g_i's part along the mean
    # The value's magnitude is that of the smallest norm, or of the largest descent where there is any.
    unit = jnp.min(norms, where=norms > 0, initial=1)
    unit = jnp.maximum(unit, jnp.max(-along - c * norms))
    scales = jnp.maximum(norms, unit)
    row = unit / scales
    matrix = gramian / scales[:, None] / scales[None, :]

    def weigh(log_t):
        curvature = c * jnp.exp2(-log_t)
        # Divided by its curvature the problem keeps its digits however small that is, but for c = 0.
        size = jnp.maximum(curvature, 1e-6)
        x = nonnegative_qp(matrix * (curvature / size), along / scales / size, present, row)
        # The least mean square is that of its vector: rounding must not make it negative.
        square = jnp.dot(x, jnp.matmul(matrix, x, precision="highest"), precision="highest")
        return x, jnp.log2(jnp.maximum(square, jnp.finfo(dtype).tiny)) / 2 - log_t  # how much longer than t

    # A combination shorter than 1e-5 of the unit counts as vanishing.
    x = varying_as(jnp.zeros_like(row), matrix)
    x = _search(weigh, jnp.asarray(jnp.log2(1e-5), dtype), -jnp.log2(jnp.min(row)), x)
    weights = jnp.where(present, row * x, 0)
    return weights / jnp.where(jnp.any(present), jnp.sum(weights), 1)


def _search(weigh, low, high, x):
    """The weights at the root of the excess that ``weigh`` gives with them, which decreases: by the Illinois rule.

    That is a secant between bounds of the root, where the excess at a bound that has stayed before counts half.
    """

    def step(carry):
        (low, high), (at_low, at_high), was_above, _, _, count = carry
        middle = (high * at_low - low * at_high) / (at_low - at_high)
        x, excess = weigh(middle)
        above = excess > 0
        stayed = jnp.where(above == was_above, 0.5, 1)
        bounds = jnp.where(above, middle, low), jnp.where(above, high, middle)
        excesses = jnp.where(above, excess, at_low * stayed), jnp.where(above, at_high * stayed, excess)
        return bounds, excesses, above, x, excess, count + 1

    def unfinished(carry):
        *_, excess, count = carry
        return (jnp.abs(excess) > _CLOSE) & (count < _MOST_TRIALS)

    # The excess at the bounds is not known: with these the first trial is their middle.
    one = jnp.ones_like(low)
    start = varying_as(((low, high), (one, -one), jnp.array(True), x, one), x)
    return jax.lax.while_loop(unfinished, step, (*start, 0))[3]
