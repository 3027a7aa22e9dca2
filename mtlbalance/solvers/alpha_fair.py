"""The equations of alpha-fairness (Ban and Ji 2024, https://arxiv.org/abs/2402.15638), on device."""

import chex
import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve

from mtlbalance import numerics

# Ten suffice for generic gradients, 15 for every hard case at alpha = 1; the rest is for norms that differ by 1e6
# with alpha at 1/2 or 2, and by 1e3 at 1/5 or 5.
_ITERATIONS = 40
# In units of the rounding error: keeps the factorization of a singular Gramian positive.
_RIDGE = 4


def alpha_fair(gramian: chex.Array, alpha: chex.Numeric, mask: chex.Array | None = None) -> jax.Array:
    r"""Weights that share progress alpha-fairly: the positive solution of :math:`G w = w^{-1/\alpha}`.

    It is the stationary point of the convex :math:`w^\top G w / 2 + \sum_i w_i^{1 - 1/\alpha} / (1/\alpha - 1)`, with
    :math:`-\sum_i \log w_i` for the second term if :math:`\alpha = 1`. It exists unless a positive combination of
    gradients vanishes; then the ridge bounds the weights, as it does where the rounding of ``gramian`` hides whether
    one vanishes. The relative residual of equation i is of the order of the rounding error times
    :math:`\sum_j |G_{ij}| w_j / w_i^{-1/\alpha}`, the condition of its sum.

    Args:
      gramian: inner products of the tasks' gradients, shape ``[m, m]``, of any scale.
      alpha: positive, may be traced. 1 is the bargaining solution; as it grows the least progress counts most.
        Far from 1 the weights spread beyond float32: they solve the equations for alpha in [1/2, 2] with norms
        that differ by 1e6, in [1/5, 5] with norms that differ by 1e3 and gradients that do not all but depend on
        each other.
      mask: tasks present, shape ``[m]``.

    Returns:
      Weights, shape ``[m]``; 0 for absent tasks and for zero gradients, whose equation has no solution.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance.solvers import alpha_fair
      >>> print(alpha_fair(jnp.array([[4.0, 0.0], [0.0, 1.0]]), 2.0).round(3))
      [0.397 1.   ]
    """
    power = 1 / jnp.asarray(alpha, gramian.dtype)
    nonzero, norms, cosines = numerics.cosines(gramian, mask)
    unit = jnp.exp(jnp.sum(jnp.log(norms)) / jnp.maximum(jnp.sum(nonzero, dtype=norms.dtype), 1))
    ridge = _RIDGE * jnp.finfo(gramian.dtype).eps
    cosines = jnp.where(jnp.eye(len(norms), dtype=bool), 1 + ridge, cosines)
    # The equations in u = n w, the gradients' contributions to the sum: C u = u^(-1/alpha) n^(1/alpha - 1).
    log_targets = jnp.where(nonzero, (power - 1) * jnp.log(norms / unit), 0)
    contributions = _solve(cosines, log_targets, power)
    contributions = numerics.nan_unless(jnp.all(jnp.isfinite(cosines)), contributions)
    return jnp.where(nonzero, contributions / norms * unit ** ((power - 1) / (power + 1)), 0)


@jax.jit  # a bare call would compile the loop each time
def _solve(matrix, log_targets, power):
    """Newton on C u = y and power log u + log y = log_targets, each kept positive, neither solved before the end.

    With y free the steps are long where u must change by orders of magnitude: eliminating y takes three times as many.
    """

    def step(point, _):
        u, y = point
        rest = log_targets - power * jnp.log(u) - jnp.log(y)
        factor = cho_factor(matrix + jnp.diag(power * y / u))
        outside = y - jnp.matmul(matrix, u, precision="highest")
        du = cho_solve(factor, y * rest + outside) / u
        dy = rest - power * du
        length = 0.9 / jnp.maximum(jnp.max(-jnp.append(du, dy)), 0.9)
        new = u * (1 + length * du), y * (1 + length * dy)
        sound = jnp.all(jnp.isfinite(jnp.append(*new)) & (jnp.append(*new) > 0))
        return jax.tree.map(lambda after, before: jnp.where(sound, after, before), new, point), None

    alone = jnp.exp(log_targets / (power + 1))  # the solution for orthogonal gradients
    return jax.lax.scan(step, (alone, alone), length=_ITERATIONS)[0][0]
