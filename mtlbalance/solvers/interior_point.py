"""The predictor-corrector interior point of Mehrotra (1992), which the quadratic programs of this folder share."""

from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.scipy.linalg import cho_factor, cho_solve

from mtlbalance.mapped_axes import varying_as
from mtlbalance.numerics import nan_unless

# Generic problems take 4 to 12, those with gradients that depend on each other up to all.
_MOST_ITERATIONS = 30


@jax.jit  # a bare call would compile the loop each time
def nonnegative_qp(
    matrix: chex.Array,
    linear: chex.Array,
    mask: chex.Array,
    coefficients: chex.Array | None = None,
    offset: chex.Array | None = None,
) -> jax.Array:
    r"""Minimizes :math:`\frac12 (b + x)^\top R (b + x) + q^\top x` over :math:`x \ge 0` and :math:`d^\top x = 1`.

    A ridge of a few rounding errors is added to R: about as far below zero as rounding moves the eigenvalues of a
    Gramian. It also bounds the set of minimizers, into whose middle an interior point would go, however far.

    Args:
      matrix: R, shape ``[m, m]``: positive semidefinite with a diagonal of at most about 1.
      linear: q, shape ``[m]``, of a magnitude for which 1 is not small.
      mask: booleans, shape ``[m]``: which entries are there.
      coefficients: d, shape ``[m]``: at least 0, the largest of those there 1. Without it there is no such equation.
      offset: b, shape ``[m]``, 0 by default. R b could be a part of q, but here what cancels in b + x does so exactly.

    Returns:
      x, shape ``[m]``, 0 where absent; NaN where there if what was given is not finite. A constant of differentiation.
    """
    m, dtype = len(linear), matrix.dtype
    eps = float(jnp.finfo(dtype).eps)
    ridge, identity = (4 + m**0.5) * eps, jnp.eye(m, dtype=dtype)
    # An absent entry rests at x = 1 with no gradient and no multiplier, which leaves every sum below to the others.
    matrix = jnp.where(mask[:, None] & mask[None, :], matrix + ridge * identity, identity)
    linear = jnp.where(mask, linear, -1).astype(dtype)
    offset = jnp.zeros(m, dtype) if offset is None else jnp.where(mask, offset, 0).astype(dtype)
    constrained = coefficients is not None
    coefficients = jnp.where(mask, coefficients, 0).astype(dtype) if constrained else jnp.zeros(m, dtype)
    # Solutions without the equation have many zeros: starting there at 1 takes two iterations more.
    x = jnp.where(mask, 1 / jnp.maximum(jnp.sum(coefficients), 1) if constrained else 0.2, 1)
    gradient = _dot(matrix, offset + x) + linear
    price = jnp.sum(jnp.where(mask, x * gradient, 0)) if constrained else jnp.zeros((), dtype)
    surplus = jnp.where(mask, gradient - price * coefficients, 0)
    z = jnp.where(mask, jnp.maximum(surplus, 0) + jnp.max(jnp.abs(surplus)) / 10, 0)
    settling, iterate = varying_as(((jnp.array(True), jnp.ones((), dtype)), (x, z, price)), surplus)
    problem = _Problem(matrix, linear, mask, coefficients if constrained else None, offset)
    # A constant of differentiation, as all weights are: `custom_vmap` has no rule for a loop that is differentiated.
    given = jax.lax.stop_gradient((problem, (jnp.zeros((), jnp.int32), *settling, iterate)))
    *_, (x, _, _) = _iterate(*given)
    x = jnp.where(x > eps, x, 0)
    return jnp.where(mask, nan_unless(jnp.all(jnp.isfinite(surplus)), x), 0)


class _Problem(NamedTuple):
    """What a step depends on, for the entries there: ``None`` for the coefficients where there is no equation."""

    matrix: chex.Array
    linear: chex.Array
    mask: chex.Array
    coefficients: chex.Array | None
    offset: chex.Array


def _unfinished(carry):
    return (carry[0] < _MOST_ITERATIONS) & carry[1]


@custom_vmap
def _iterate(problem, carry):
    return jax.lax.while_loop(_unfinished, partial(_step, problem), carry)


@_iterate.def_vmap
def _iterate_each(size, batched, problem, carry):
    """What ``vmap`` makes of the loop, with one condition for all problems: the one that ``checkify`` can take."""
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, batched[0])
    carry = jax.tree.map(lambda x, b: x if b else jnp.broadcast_to(x, (size, *jnp.shape(x))), carry, batched[1])
    keep = lambda new, old, unfinished: jnp.where(jnp.expand_dims(unfinished, range(1, new.ndim)), new, old)

    def step(carry):
        new = jax.vmap(_step, in_axes=(axes, 0))(problem, carry)
        return jax.tree.map(partial(keep, unfinished=_unfinished(carry)), new, carry)

    # The same for the type's sake, as which axes it varies over: the carry of a loop must not change it.
    carry = varying_as(carry, problem, carry)
    carry = jax.lax.while_loop(lambda carry: jnp.any(_unfinished(carry)), step, carry)
    return carry, jax.tree.map(lambda _: True, carry)


def _step(problem, carry):
    """One of Newton's steps and its correction: how many, whether to go on, the infeasible part, x, z and the price."""
    matrix, linear, mask, coefficients, offset = problem
    constrained, dtype = coefficients is not None, matrix.dtype
    if not constrained:
        coefficients = jnp.zeros_like(linear)
    eps = float(jnp.finfo(dtype).eps)
    n_present = jnp.maximum(jnp.sum(mask), 1).astype(dtype)
    count, _, infeasible, (x, z, price) = carry
    gap = _dot(x, z) / n_present
    dual = _dot(matrix, offset + x) + linear - price * coefficients - z
    # Cholesky's error does not depend on the scale of rows and columns: entries of z / x may range from 0 to 1e10.
    factor = cho_factor(matrix + jnp.diag(z / x), lower=True)
    # Both at once: two batches side by side might wait for each other, see `mtlbalance.decompositions`.
    sides = jnp.stack([-z - dual, coefficients] if constrained else [-z - dual], axis=1)
    free, along = cho_solve(factor, sides).T if constrained else (cho_solve(factor, sides)[:, 0], coefficients)
    slope = jnp.where(jnp.any(mask), _dot(coefficients, along), 1)

    def direction(target, free):  # Newton's, towards x * z = target
        dprice = (1 - _dot(coefficients, x + free)) / slope if constrained else price
        dx = free + dprice * along
        return dx, (target - z * dx) / x, dprice

    dx, dz, _ = direction(-x * z, free)
    length = _longest(x, z, dx, dz)
    after = _dot(x + length * dx, z + length * dz) / n_present
    centre = gap * jnp.clip(after / jnp.maximum(gap, jnp.finfo(dtype).tiny), 0, 1) ** 3
    # Where the way is short the second-order term is far too large, and iterates might go round in circles.
    second_order = jnp.minimum(1, 4 * length) * dx * dz
    target = jnp.where(mask, centre - second_order, 0) - x * z
    dx, dz, dprice = direction(target, cho_solve(factor, target / x - dual))
    # Near the solution almost to the boundary: with a fixed part of the way the gap would shrink by a fixed factor.
    length = jnp.minimum(1, jnp.clip(1 - gap, 0.99, 0.999) * _longest(x, z, dx, dz))
    new = x + length * dx, z + length * dz, price + length * dprice
    # Where x and z are far below rounding the factorization may break down.
    sound = jnp.all(jnp.isfinite(new[0]) & (new[0] > 0) & jnp.isfinite(new[1]))
    iterate = jax.tree.map(lambda new, old: jnp.where(sound, new, old), new, (x, z, price))
    # The value has settled at eps, the small entries, which are large ones for a task with a small norm, at eps^2.
    infeasible = infeasible * (1 - length)
    unsettled = (_dot(*iterate[:2]) > eps**2 * n_present) | (infeasible > eps)
    return count + 1, sound & unsettled, infeasible, iterate


def _dot(x, y):
    return jnp.matmul(x, y, precision="highest")


def _longest(x, z, dx, dz):
    """The longest step, up to 1, that leaves x and z at least 0."""
    values, changes = jnp.concatenate([x, z]), jnp.concatenate([dx, dz])
    falling = changes < 0
    return jnp.min(-values / jnp.where(falling, changes, 1), where=falling, initial=1)
