"""Linear program over the probability simplex, by the dual simplex method, on device: EPO's corner."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtlbalance.mapped_axes import varying_as


class _Tableau(NamedTuple):
    r"""The dictionary :math:`x_B = b - T x_N` in one matrix; the last row is the objective's, the last column b.

    Variables go by number: the m weights, then a slack for each row, then the one of the equation, which is 0.
    ``sizes`` are the magnitudes that went into b, and so what its rounding is relative to.
    """

    matrix: chex.Array
    sizes: chex.Array
    basic: chex.Array
    free: chex.Array


@jax.jit  # a bare call would compile the loop each time
def simplex_lp(
    objective: chex.Array, matrix: chex.Array, lower: chex.Array, mask: chex.Array | None = None
) -> tuple[chex.Array, chex.Array]:
    r"""Maximizes :math:`c^\top w` over :math:`w \ge 0`, :math:`\sum_i w_i = 1`, :math:`A w \ge b`.

    The largest entry of c is the best corner without the rows of A; the dual simplex method goes from there through
    corners that are best for more and more of them. No first phase looks for a point that satisfies all.

    Note:
      Rows and columns are scaled, so that gradients' norms may differ by any ratio. Rows that are missed by less than
      their rounding count as satisfied. Of several optimal corners it gives any.

    Args:
      objective: c, shape ``[m]``.
      matrix: A, shape ``[k, m]``.
      lower: b, shape ``[k]``: -inf where a row asks for nothing.
      mask: booleans, shape ``[m]``: which entries of w are there; ``None`` means all.

    Returns:
      w, shape ``[m]``, in the matrix's dtype: 0 where absent, all 0 if nothing is there, NaN if what was given is not
      finite. And whether it satisfies all rows: if not, no w does, and this one misses as few as were found.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.solvers import simplex_lp
      >>> gramian = jnp.array([[4.0, -1.0], [-1.0, 1.0]])
      >>> weights, feasible = simplex_lp(jnp.array([3.0, 0.0]), gramian, jnp.zeros(2))
      >>> print(weights, feasible)
      [0.5 0.5] True
    """
    k, m = matrix.shape
    present = jnp.ones(m, bool) if mask is None else mask
    asks = lower > -jnp.inf
    objective = jnp.where(present, objective, 0).astype(matrix.dtype)
    matrix = jnp.where(asks[:, None] & present[None, :], matrix, 0)
    lower = jnp.where(asks, lower, 0).astype(matrix.dtype)
    sound = jnp.all(jnp.isfinite(matrix)) & jnp.all(jnp.isfinite(lower)) & jnp.all(jnp.isfinite(objective))

    # In y_i = w_i times the largest entry of its column over the least of these; every row over its largest entry.
    columns = jnp.max(jnp.abs(matrix), axis=0, initial=0)
    least = jnp.min(columns, where=columns > 0, initial=jnp.inf)
    total = jnp.where(columns > 0, least / jnp.where(columns > 0, columns, 1), 1)  # the equation's coefficients
    matrix = matrix * total[None, :]
    rows = jnp.max(jnp.abs(matrix), axis=1, initial=0)
    rows = jnp.where(rows > 0, rows, 1)
    scaled = objective * total
    scaled = scaled / jnp.where(jnp.any(scaled != 0), jnp.max(jnp.abs(scaled)), 1)

    tableau = _start(scaled, matrix / rows[:, None], lower / rows, total, present)
    carry = varying_as((jnp.zeros((), jnp.int32), jnp.array(True), jnp.array(True), tableau), tableau.matrix)
    dead = lambda free: (free == m + k) | ~present[jnp.minimum(free, m - 1)] & (free < m)
    most = 4 * (m + k)
    proceeds = lambda carry: (carry[0] < most) & carry[1]
    _, unfinished, feasible, tableau = jax.lax.while_loop(proceeds, lambda carry: _step(carry, dead), carry)

    y = jnp.zeros(m + k + 1, matrix.dtype).at[tableau.basic].set(jnp.maximum(tableau.matrix[:-1, -1], 0))[:m]
    weights = jnp.where(present, y * total, 0)
    weights = weights / jnp.where(jnp.any(present), jnp.sum(weights), 1)
    return jnp.where(present & ~sound, jnp.nan, weights), feasible & ~unfinished


def _start(objective, matrix, lower, total, present):
    """The dictionary at the best corner of the simplex, where all slacks are basic."""
    k, m = matrix.shape
    top = jnp.concatenate([-matrix, -lower[:, None]], axis=1)
    equation = jnp.append(total, 1)[None, :]
    bottom = jnp.append(-objective, 0)[None, :]
    tableau = _Tableau(
        jnp.concatenate([top, equation, bottom]),
        jnp.append(jnp.abs(lower), 1),
        jnp.append(m + jnp.arange(k), m + k),
        jnp.arange(m),
    )
    best = jnp.argmax(jnp.where(present, objective / total, -jnp.inf))
    return _pivot(tableau, k, best)


def _step(carry, dead):
    """One change of the basis: the variable that is most below zero leaves it."""
    count, _, feasible, tableau = carry
    matrix = tableau.matrix
    rounding = 10 * jnp.finfo(matrix.dtype).eps
    values = matrix[:-1, -1] / jnp.where(tableau.sizes > 0, tableau.sizes, 1)
    leaving = jnp.argmin(values)
    is_below = values[leaving] < -rounding
    row = matrix[leaving, :-1]
    enters = (row < -rounding * jnp.max(jnp.abs(row))) & ~dead(tableau.free)
    price = jnp.maximum(matrix[-1, :-1], 0)
    entering = jnp.argmin(jnp.where(enters, price / jnp.where(enters, -row, 1), jnp.inf))
    moves = is_below & jnp.any(enters)
    new = _pivot(tableau, leaving, entering)
    tableau = jax.tree.map(lambda new, old: jnp.where(moves, new, old), new, tableau)
    return count + 1, moves, feasible & (~is_below | moves), tableau


def _pivot(tableau, leaving, entering):
    """Exchanges a basic variable and a free one."""
    matrix, sizes, basic, free = tableau
    row, column = matrix[leaving], matrix[:, entering]
    pivot = row[entering]
    # The column of the variable that becomes free: 1 / pivot in its own row, -column / pivot in the others.
    row = row.at[entering].set(1) / pivot
    size = sizes[leaving] / jnp.abs(pivot)
    others = matrix.at[:, entering].set(0) - column[:, None] * row[None, :]
    return _Tableau(
        others.at[leaving].set(row),
        jnp.maximum(sizes, jnp.abs(column[:-1]) * size).at[leaving].set(size),
        basic.at[leaving].set(free[entering]),
        free.at[entering].set(basic[leaving]),
    )
