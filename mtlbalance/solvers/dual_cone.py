"""Projection on the dual cone of the gradients, in the tasks' coordinates (UPGrad, DualProj)."""

import chex
import jax.numpy as jnp

from mtlbalance import numerics
from mtlbalance.solvers.interior_point import nonnegative_qp


def dual_cone(gramian: chex.Array, lower: chex.Array, mask: chex.Array | None = None) -> chex.Array:
    r"""Minimizes :math:`v^\top G v` over :math:`v \ge u`.

    With :math:`G = J J^\top`, :math:`J^\top v` is the projection of :math:`J^\top u` on the cone of directions that
    conflict with no row of J. For several u, ``vmap`` over it: what depends on G alone is computed once.

    Note:
      It is solved in :math:`x_i = v_i \sqrt{G_{ii}}`, in which G becomes a matrix of cosines, so norms may differ by
      any ratio. Where the cone is so narrow that v must grow far beyond u, as between gradients that are opposite but
      for 1e-3, rounding G to float32 moves the least value by about :math:`10^{-6} \sum_i v_i^2 G_{ii}`, and the value
      may be that far from the least; otherwise it is within 1e-5 of :math:`\sum_i u_i^2 G_{ii}`. Where many v are
      optimal, as when G is singular, a short one is given.

    Args:
      gramian: G, symmetric, positive semidefinite up to rounding, shape ``[m, m]``.
      lower: u, shape ``[m]``, any sign.
      mask: booleans, shape ``[m]``: which entries are there; ``None`` means all.

    Returns:
      v, shape ``[m]``, in the Gramian's dtype, at least u: u where G's row is zero, 0 where absent, all 0 for u = 0,
      NaN if G or u is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.solvers import dual_cone
      >>> print(dual_cone(jnp.array([[4.0, -1.0], [-1.0, 1.0]]), jnp.array([1.0, 0.0])).round(3))
      [1. 1.]
    """
    lower = jnp.where(True if mask is None else mask, lower, 0).astype(gramian.dtype)
    nonzero, norms, cosines = numerics.cosines(gramian, mask)
    scaled = jnp.where(nonzero, norms * lower, 0)
    size = jnp.max(jnp.abs(scaled))
    offset = scaled / jnp.where(size == 0, 1, size)
    above = nonnegative_qp(cosines, jnp.zeros_like(norms), nonzero, offset=offset)
    return lower + size * above / norms
