"""Linear program over the probability simplex, by the dual simplex method, on device: EPO's corner."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from mtlbalance.mapped_axes import varying_as
from mtlbalance.numerics import nan_unless


class _Tableau(NamedTuple):
    r"""The dictionary :math:`x_B = b - T x_N` in one matrix; the last row is the objective's, the last column b.

    Variables go by number: the m weights, then a slack for each row, then the one of the equation, which is 0.
    """

    matrix: chex.Array
    basic: chex.Array
    nonbasic: chex.Array


@jax.jit  # a bare call would compile the loop each time
def simplex_lp(
    objective: chex.Array, matrix: chex.Array, lower: chex.Array, mask: chex.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    r"""Maximizes :math:`c^\top w` over :math:`w \ge 0`, :math:`\sum_i w_i = 1`, :math:`A w \ge b`.

    The largest entry of c is the best corner without the rows of A; the dual simplex method goes from there through
    corners that are best for more and more of them. No first phase looks for a point that satisfies all.

    Note:
      Rows and columns are scaled, so that gradients' norms may differ by 1e6. Rows that are missed by less than their
      rounding count as satisfied, and of several optimal corners it gives any. Where rows leave w as much room as
      rounding does, as between eight or more gradients that are opposite but for 1e-5, it may stop short: then w misses
      some, of forty gradients by up to .9 of the longest weighted one, and no w that is feasible may be found.

    Args:
      objective: c, shape ``[m]``.
      matrix: A, shape ``[k, m]``.
      lower: b, shape ``[k]``: -inf where a row asks for nothing.
      mask: booleans, shape ``[m]``: which entries of w are there; ``None`` means all.

    Returns:
      w, shape ``[m]``, in the matrix's dtype: 0 where absent, all 0 if nothing is there, NaN if what was given is not
      finite. And whether it satisfies all rows: if not, no w does, but for what the note says.

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
    sizes = jnp.max(jnp.abs(matrix), axis=1, initial=0)
    sizes = jnp.where(sizes > 0, sizes, 1)
    scaled = objective * total
    scaled = scaled / jnp.where(jnp.any(scaled != 0), jnp.max(jnp.abs(scaled)), 1)

    program = _Program(matrix / sizes[:, None], lower / sizes, total, present)
    tableau = program.start(scaled)
    carry = varying_as((jnp.zeros((), jnp.int32), jnp.array(True), jnp.array(True), tableau), tableau.matrix)
    proceeds = lambda carry: (carry[0] < 4 * (m + k)) & carry[1]
    _, unfinished, feasible, tableau = jax.lax.while_loop(proceeds, program.step, carry)
    y = jnp.maximum(program.weights_at(tableau), 0)
    weights = jnp.where(present, y * total, 0)
    # Rounding may leave nothing above zero.
    weights = jnp.where(jnp.sum(weights) > 0, weights, present.astype(weights.dtype))
    weights = weights / jnp.where(jnp.any(present), jnp.sum(weights), 1)
    return nan_unless(sound | ~present, weights), feasible & ~unfinished


class _Program(NamedTuple):
    """What was given, scaled: rows, their lower bounds, the equation's coefficients, which entries are there."""

    rows: chex.Array
    lower: chex.Array
    total: chex.Array
    present: chex.Array

    def start(self, objective):
        """The dictionary at the best corner of the simplex, where all slacks are basic."""
        k, m = self.rows.shape
        top = jnp.concatenate([-self.rows, -self.lower[:, None]], axis=1)
        equation = jnp.append(self.total, jnp.ones_like(objective[:1]))
        bottom = jnp.append(-objective, jnp.zeros_like(objective[:1]))
        matrix = jnp.concatenate([top, equation[None, :], bottom[None, :]])
        best = jnp.argmax(jnp.where(self.present, objective / self.total, -jnp.inf))
        return _pivot(_Tableau(matrix, jnp.append(m + jnp.arange(k), m + k), jnp.arange(m)), k, best)

    def weights_at(self, tableau):
        """The weights, scaled, of a corner."""
        k, m = self.rows.shape
        values = tableau.matrix[:-1, -1]
        return jnp.zeros(m + k + 1, values.dtype).at[tableau.basic].set(values)[:m]

    def step(self, carry):
        """One change of the basis: the variable that is most below zero leaves it."""
        count, _, feasible, tableau = carry
        k, m = self.rows.shape
        eps = jnp.finfo(self.rows.dtype).eps
        # What the exchanges have rounded is taken back: by the numbers given nonbasic variables are not quite zero.
        y = self.weights_at(tableau)
        off = jnp.concatenate([y, _dot(self.rows, y) - self.lower, 1 - _dot(self.total[None, :], y)])
        values = tableau.matrix[:-1, -1]
        exact = values + _dot(tableau.matrix[:-1, :-1], off[tableau.nonbasic])
        values = jnp.where(jnp.all(jnp.isfinite(exact)), exact, values)
        matrix = tableau.matrix.at[:-1, -1].set(values)
        tableau = tableau._replace(matrix=matrix)
        # The magnitudes that values are differences of.
        of_slacks = _dot(jnp.abs(self.rows), jnp.abs(y)) + jnp.abs(self.lower)
        sizes = jnp.concatenate([jnp.full(m, jnp.max(jnp.abs(y))), of_slacks, jnp.ones_like(y[:1])])[tableau.basic]

        relative = values / jnp.where(sizes > 0, sizes, 1)
        leaving = jnp.argmin(relative)
        is_below = jnp.min(relative) < -10 * eps
        row = _entry(matrix, leaving)[:-1]
        is_dead = (tableau.nonbasic == m + k) | ~jnp.append(self.present, jnp.ones(k + 1, bool))[tableau.nonbasic]
        enters = (row < -10 * eps * jnp.max(jnp.abs(row))) & ~is_dead
        price = jnp.maximum(matrix[-1, :-1], 0)
        entering = jnp.argmin(jnp.where(enters, price / jnp.where(enters, -row, 1), jnp.inf))
        new = _pivot(tableau, leaving, entering)
        moves = is_below & jnp.any(enters) & jnp.all(jnp.isfinite(new.matrix))
        tableau = jax.tree.map(lambda new, old: jnp.where(moves, new, old), new, tableau)
        return count + 1, moves, feasible & (~is_below | moves), tableau


def _pivot(tableau, leaving, entering):
    """Exchanges a basic variable and a nonbasic one."""
    matrix, basic, nonbasic = tableau
    row, column = _entry(matrix, leaving), _entry(matrix.T, entering)
    pivot = _entry(row, entering)
    pivot = jnp.where(pivot == 0, 1, pivot)  # then nothing enters, and what this gives is left out
    # The column of the variable that becomes nonbasic: 1 / pivot in its own row, -column / pivot in the others.
    row = _replaced(row, entering, 1) / pivot
    others = _replaced(matrix.T, entering, 0).T - column[:, None] * row[None, :]
    return _Tableau(
        _replaced(others, leaving, row[None, :]),
        _replaced(basic, leaving, _entry(nonbasic, entering)),
        _replaced(nonbasic, entering, _entry(basic, leaving)),
    )


def _dot(x, y):
    return jnp.matmul(x, y, precision="highest")


# By comparing with all indices, which XLA fuses; it makes loops of gathers and scatters.


def _entry(x, i):
    return jnp.sum(jnp.where(_is(x, i), x, 0), axis=0)


def _replaced(x, i, new):
    return jnp.where(_is(x, i), new, x)


def _is(x, i):
    return jnp.reshape(jnp.arange(len(x)) == i, (len(x),) + (1,) * (x.ndim - 1))
