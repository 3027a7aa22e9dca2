"""Quadratic program over the probability simplex: the least norm in the hull of the gradients (MGDA) and its kin."""

import chex
import jax.numpy as jnp

from mtlbalance.solvers.interior_point import nonnegative_qp


def simplex_qp(matrix: chex.Array, linear: chex.Array | None = None, mask: chex.Array | None = None) -> chex.Array:
    r"""Minimizes :math:`\frac12 w^\top Q w + c^\top w` over :math:`w \ge 0`, :math:`\sum_i w_i = 1`.

    Only the smallest of the squared norms on Q's diagonal bounds the optimum, so only they give the scale: the value is
    within 1e-6 of their harmonic mean, plus the range of c, of the least one, whatever the ratio of the norms.
    The weights are less certain than the value: between near-duplicates any split is optimal.

    Note:
      It is solved in :math:`x_i = w_i \sqrt{Q_{ii}}`, in which Q becomes a matrix of cosines. A zero row needs no
      special case: it takes the smallest of the other scales, and, with c = 0, all the weight.

    Args:
      matrix: Q, a Gramian: symmetric, positive semidefinite up to rounding, shape ``[m, m]``.
      linear: c, shape ``[m]``, any sign; 0 if ``None``.
      mask: booleans, shape ``[m]``: which entries are there; ``None`` means all.

    Returns:
      w, shape ``[m]``, in the matrix's dtype: 0 where absent; all 0 if nothing is there, NaN if Q or c is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.solvers import simplex_qp
      >>> print(simplex_qp(jnp.array([[4.0, 0.0], [0.0, 1.0]])).round(3))
      [0.2 0.8]
    """
    present = jnp.ones(len(matrix), bool) if mask is None else mask
    linear = jnp.zeros(len(matrix), matrix.dtype) if linear is None else linear.astype(matrix.dtype)
    linear = linear - jnp.min(linear, where=present, initial=jnp.inf)  # a constant on the simplex
    linear = jnp.where(present, linear, 0)
    norms = jnp.sqrt(jnp.diag(matrix))
    smallest = jnp.min(norms, where=present & (norms > 0), initial=jnp.inf)
    # No finer than c: what c decides needs no curvature.
    scale = jnp.maximum(jnp.where(jnp.isinf(smallest), 0, smallest), jnp.sqrt(jnp.max(linear)))
    scale = jnp.where(scale == 0, 1, scale)
    norms = jnp.maximum(norms, scale)
    row = scale / norms
    cosines, linear = matrix / norms[:, None] / norms[None, :], linear * row / scale / scale
    weights = jnp.where(present, row, 0) * nonnegative_qp(cosines, linear, present, row)
    return weights / jnp.where(jnp.any(present), jnp.sum(weights), 1)
