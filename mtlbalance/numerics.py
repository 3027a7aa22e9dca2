"""Small formulas that several methods share: shares and norms that stay finite, cosines, semidefinite matrices."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import optax

from mtlbalance.decompositions import eigh


def weighted_sum(weights: chex.Array, values: chex.Array, mask: chex.Array) -> jax.Array:
    """The losses present, added up with weights that are constants of differentiation."""
    return jnp.sum(jax.lax.stop_gradient(weights) * values, where=mask)


def ratio(new: chex.Array, old: chex.Array) -> jax.Array:
    """``new / old``; 1 where ``old`` is zero, and the largest number where the quotient is beyond it."""
    return jnp.where(old == 0, 1, finite(new / jnp.where(old == 0, 1, old)))


def mean(x: chex.Array, mask: chex.Array) -> jax.Array:
    """The mean over the tasks in ``mask``; 0 over none."""
    return jnp.sum(x, where=mask) / jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)


def or_all(mask: chex.Array) -> jax.Array:
    """The tasks in ``mask``, or all where it has none: what is computed of those is left out after, and no 0 / 0."""
    return mask | ~jnp.any(mask)


def softmax(logits: chex.Array, mask: chex.Array) -> jax.Array:
    """Softmax over the tasks in ``mask``, zeros over none. Infinite logits count as the largest number: no NaN."""
    logits = jnp.where(mask, finite(logits), 0)
    return jnp.where(mask, jax.nn.softmax(logits, axis=None, where=or_all(mask)), 0)


def normalize(weights: chex.Array, mask: chex.Array, total: chex.Numeric = 1) -> jax.Array:
    """Weights of the tasks in ``mask`` scaled to a total; equal ones where they add up to zero."""
    weights = jnp.where(mask, weights, 0)
    weights = weights / scale(weights)  # so that adding up does not overflow
    equal = mask.astype(weights.dtype) / jnp.maximum(jnp.sum(mask), 1)
    added = jnp.sum(weights)
    return total * jnp.where(added == 0, equal, weights / jnp.where(added == 0, 1, added))


def shares(scores: chex.Array, ready: chex.Array, mask: chex.Array) -> jax.Array:
    """Weights of total 1: a task that is not ``ready`` has an equal share, the others divide the rest by score."""
    n_present, dividing = jnp.maximum(jnp.sum(mask), 1), mask & ready
    return jnp.where(dividing, normalize(scores, dividing, jnp.sum(dividing)), mask) / n_present


def exponentiated_step(log_weights: chex.Array, step: chex.Array, moving: chex.Array) -> jax.Array:
    """Multiplies the weights of the tasks in ``moving`` by ``exp(step)`` and rescales them to the total they had."""
    step, counted = jnp.where(moving, finite(step), 0), or_all(moving)
    step = step - jnp.max(step, where=counted, initial=-jnp.inf)  # scaled out again: large steps keep their digits
    moved = log_weights + step
    total_before = jax.nn.logsumexp(log_weights, where=counted)
    total_after = jax.nn.logsumexp(moved, where=counted)
    return jnp.where(moving, finite(moved + total_before - total_after), log_weights)


def unit(vector: chex.Array) -> jax.Array:
    """``vector`` over its Euclidean norm, at any scale; zero stays zero."""
    vector = vector / scale(vector)
    # Now the norm is at least 1 unless it is zero.
    return vector / optax.safe_norm(vector, 0.5)


def project_simplex(vector: chex.Array, mask: chex.Array) -> jax.Array:
    """The nearest weights of total 1, at least 0, for the tasks in ``mask``; the others get 0.

    NaN for all of them where one of theirs is not finite.
    """
    largest = jnp.max(vector, where=mask, initial=-jnp.inf)
    # Only differences count: large numbers are brought near 0, others keep their digits. Whatever lies more than 1
    # below the largest is projected to 0.
    shift = jnp.where(jnp.abs(largest) > 1, largest, 0)
    least = jnp.where(shift == 0, largest, 0) - 2
    # Not further below, or adding them up might overflow.
    below = jnp.where(mask, jnp.maximum(vector - shift, least), least)
    projected = optax.projections.projection_simplex(below).astype(vector.dtype)
    return nan_unless(jnp.all(jnp.isfinite(vector) | ~mask), projected)


def simplex_step(weights: chex.Array, step: chex.Array, mask: chex.Array) -> jax.Array:
    """:func:`project_simplex` of ``weights - step``, with the weights' digits however long the step is."""
    # A part that all tasks have in common moves nothing.
    return project_simplex(weights - (step - jnp.min(step, where=mask, initial=jnp.inf)), mask)


def root_mean(x: chex.Array, y: chex.Array, part: chex.Numeric) -> jax.Array:
    """The root of ``(1 - part) * x**2 + part * y**2``, without overflow.

    Neither number is divided by itself: the roots of numbers just beside 1 are rounded down more often than up, which
    adds up over a million calls.
    """
    largest = jnp.finfo(x.dtype).max / 8
    size = jnp.minimum(x / 2 + y / 2, largest)
    size = jnp.where(size == 0, 1, size)
    return finite(size * jnp.sqrt((1 - part) * jnp.square(x / size) + part * jnp.square(y / size)))


def bias_correction(decay: chex.Numeric, count: chex.Array) -> jax.Array:
    """``1 - decay**count``, by which a running average from zero is too small, with all its digits."""
    return -jnp.expm1(count * jnp.log1p(decay - 1))


def regularized(gramian: chex.Array, reg_eps: chex.Numeric, norm_eps: chex.Numeric) -> jax.Array:
    """The Gramian over its trace, zero where that is below ``norm_eps``, plus ``reg_eps`` on the diagonal."""
    size = scale(gramian)
    gramian = gramian / size
    trace = jnp.trace(gramian)
    vanishes = (trace == 0) | (trace * size < norm_eps)
    normalized = jnp.where(vanishes, 0, gramian / jnp.where(vanishes, 1, trace))
    return normalized + reg_eps * jnp.eye(len(gramian), dtype=gramian.dtype)


def cosines(gramian: chex.Array, mask: chex.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``(nonzero, norms, cosines)``: which gradients are present and not zero; 1 and 0 stand elsewhere."""
    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    nonzero = (norms != 0) if mask is None else (norms != 0) & mask
    norms = jnp.where(nonzero, norms, 1)
    return nonzero, norms, jnp.where(nonzero[:, None] & nonzero[None, :], gramian / norms[:, None] / norms[None, :], 0)


def conflict_free(gramian: chex.Array, preferred: chex.Array) -> jax.Array:
    """ConFIG's weights: the direction whose cosines are as preferred, as long as the gradients' projections on it."""
    preferred = preferred / scale(preferred)
    nonzero, norms, angles = cosines(gramian)
    v = solve_psd(eigh_psd(angles), preferred)
    projections = jnp.dot(angles, v, precision="highest")  # of the gradients' directions on the one that is sought
    rounding = 10 * len(v) * jnp.finfo(v.dtype).eps
    square = jnp.where(jnp.max(jnp.abs(projections)) > rounding, jnp.sum(v * projections), 0)
    length = jnp.sum(norms * projections, where=nonzero) / jnp.where(square > 0, square, 1)
    return nan_unless(jnp.all(jnp.isfinite(gramian)), jnp.where(nonzero & (square > 0), length * (v / norms), 0))


def squared_length(gramian: chex.Array, weights: chex.Array) -> jax.Array:
    """The squared norm of the gradients' weighted sum; 0 where that is the rounding of what cancels in it."""
    square = jnp.dot(weights, jnp.dot(gramian, weights, precision="highest"), precision="highest")
    added = jnp.sum(jnp.abs(weights) * jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0)))
    return jnp.where(square > 10 * jnp.finfo(gramian.dtype).eps * added**2, square, 0)


def eigh_psd(matrix: chex.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of a positive semidefinite matrix; and which are more than rounding."""
    eigenvalues, vectors = eigh(matrix)
    return eigenvalues, vectors, eigenvalues > len(matrix) * jnp.finfo(matrix.dtype).eps * eigenvalues[-1]


def solve_psd(decomposition: tuple[chex.Array, chex.Array, chex.Array], vector: chex.Array) -> jax.Array:
    """The shortest least-squares solution ``x`` of ``matrix @ x = vector``, from :func:`eigh_psd` of the matrix."""
    eigenvalues, vectors, kept = decomposition
    components = jnp.dot(vectors.T, vector, precision="highest")
    return jnp.dot(vectors, jnp.where(kept, components / jnp.where(kept, eigenvalues, 1), 0), precision="highest")


def wide(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The same numbers in float32 or wider: where narrow ones would overflow, or be rounded on their way."""
    return jax.tree.map(lambda x: x.astype(jnp.result_type(jnp.float32, x)), tree)


def scale(x: chex.Array, axis: int | None = None) -> jax.Array:
    """The largest magnitude, to divide by, a constant of differentiation; 1 for zeros. Of all, or along an axis.

    It stays below an eighth of the largest number: XLA divides by multiplying with the inverse, and flushes that of
    larger ones to zero.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=axis is not None))
    return jnp.where(largest == 0, 1, jnp.minimum(largest, jnp.finfo(x.dtype).max / 8))


def nonnegative(x: chex.Array) -> jax.Array:
    """``x``; NaN where it is negative, and its gradient too: nobody descends on what means nothing there."""
    return x * nan_where(x < 0)


def weighted_mean(weights: chex.Array, values: chex.Array, mask: chex.Array) -> jax.Array:
    """Of losses present, which must not be negative, with weights that are constants of differentiation."""
    return weighted_sum(weights / jnp.maximum(jnp.sum(mask), 1), nonnegative(values), mask)


def relative_roots(values: chex.Array, mask: chex.Array) -> jax.Array:
    """The roots of the values over the largest one present: from 0 to 1, zeros of zeros. Constants."""
    roots = jnp.where(mask, jnp.sqrt(jnp.maximum(jax.lax.stop_gradient(values), 0)), 0)
    return roots / scale(roots)


def held(x: chex.Array, bound: Callable[[chex.Array], chex.Array], returns: chex.Array) -> tuple[jax.Array, jax.Array]:
    """A learned number ``x``, for its regularizer, and ``x`` within its ``bound``, to make a weight of.

    Beyond the bound the second one is the bound, and its gradient goes to ``x`` all the same: a descent that would
    leave the bound inwards finds back. Where it would not, ``returns`` is false: neither has a gradient then, and ``x``
    stays where it is.
    """
    # Of a constant: the gradient of a minimum is a product with 0, NaN where that to the bounded number overflows.
    bounded = bound(jax.lax.stop_gradient(x))
    beyond = x != bounded
    x = jnp.where(beyond & ~returns, jax.lax.stop_gradient(x), x)
    return x, jnp.where(beyond, bounded + (x - jax.lax.stop_gradient(x)), x)


def magnitude(x: chex.Array) -> jax.Array:
    """``abs(x)``, whose gradient at zero is 1."""
    return jnp.where(x < 0, -x, x)


def reverse_gradient(x: chex.Array) -> jax.Array:
    """``x``, whose gradient comes back with the opposite sign: who descends on it climbs."""
    return 2 * jax.lax.stop_gradient(x) - x


def nan_unless(ok: chex.Array, x: chex.Array) -> jax.Array:
    """``x``, or NaN where ``ok`` is false: what was made of numbers that are not finite must not look as if it was."""
    return jnp.where(ok, x, nan_where(~ok))


def nan_where(bad: chex.Array) -> jax.Array:
    """NaN where ``bad``, else 1: a root, as a constant NaN is reported by ``jax_debug_nans`` where nobody gets it."""
    return jnp.sqrt(jnp.where(bad, -1.0, 1.0))


def all_finite(tree: chex.ArrayTree) -> jax.Array:
    """Whether every number in a tree is finite; true for a tree without leaves."""
    return jnp.all(jnp.array([True, *(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree))]))


def finite(x: chex.Array) -> jax.Array:
    """``x`` with infinities replaced by the largest numbers.

    It also keeps XLA from fusing a product into the subtraction of the largest one, which would leave a rest where
    zero is due.
    """
    limit = jnp.finfo(x.dtype).max
    return jnp.clip(x, -limit, limit)
