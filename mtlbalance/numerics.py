"""Small formulas that several methods share: quotients, shares and norms that stay finite."""

import chex
import jax
import jax.numpy as jnp
import optax


def weighted_sum(weights: chex.Array, values: chex.Array, mask: chex.Array) -> chex.Array:
    """The losses present, added up with weights that are constants of differentiation."""
    return jnp.sum(jax.lax.stop_gradient(weights) * values, where=mask)


def ratio(new: chex.Array, old: chex.Array) -> chex.Array:
    """``new / old``; 1 where ``old`` is zero, and the largest number where the quotient is beyond it."""
    return jnp.where(old == 0, 1, finite(new / jnp.where(old == 0, 1, old)))


def softmax(logits: chex.Array, mask: chex.Array) -> chex.Array:
    """Softmax over the tasks in ``mask``. Infinite logits count as the largest number: they would give NaN."""
    return jax.nn.softmax(finite(logits), axis=None, where=mask)


def normalize(weights: chex.Array, mask: chex.Array, total: chex.Numeric = 1) -> chex.Array:
    """Weights of the tasks in ``mask`` scaled to a total; equal ones where they add up to zero."""
    weights = jnp.where(mask, weights, 0)
    weights = weights / scale(weights)  # so that adding up does not overflow
    equal = mask.astype(weights.dtype) / jnp.maximum(jnp.sum(mask), 1)
    added = jnp.sum(weights)
    return total * jnp.where(added == 0, equal, weights / jnp.where(added == 0, 1, added))


def shares(scores: chex.Array, ready: chex.Array, mask: chex.Array) -> chex.Array:
    """Weights of total 1: a task that is not ``ready`` has an equal share, the others divide the rest by score."""
    n_present, dividing = jnp.maximum(jnp.sum(mask), 1), mask & ready
    return jnp.where(dividing, normalize(scores, dividing, jnp.sum(dividing)), mask) / n_present


def exponentiated_step(log_weights: chex.Array, step: chex.Array, moving: chex.Array) -> chex.Array:
    """Multiplies the weights of the tasks in ``moving`` by ``exp(step)`` and rescales them to the total they had."""
    step = finite(step)
    step = step - jnp.max(step, where=moving, initial=-jnp.inf)  # scaled out again: large steps keep their digits
    moved = log_weights + step
    total_before = jax.nn.logsumexp(log_weights, where=moving)
    total_after = jax.nn.logsumexp(moved, where=moving)
    return jnp.where(moving, finite(moved + total_before - total_after), log_weights)


def unit(vector: chex.Array) -> chex.Array:
    """``vector`` over its Euclidean norm, at any scale; zero stays zero."""
    vector = vector / scale(vector)
    # Now the norm is at least 1 unless it is zero.
    return vector / optax.safe_norm(vector, 0.5)


def scale(x: chex.Array) -> chex.Array:
    """The largest magnitude, to divide by, a constant of differentiation; 1 for zeros.

    It stays below an eighth of the largest number: XLA divides by multiplying with the inverse, and flushes that of
    larger ones to zero.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    return jnp.where(largest == 0, 1, jnp.minimum(largest, jnp.finfo(x.dtype).max / 8))


def reverse_gradient(x: chex.Array) -> chex.Array:
    """``x``, whose gradient comes back with the opposite sign: who descends on it climbs."""
    return 2 * jax.lax.stop_gradient(x) - x


def finite(x: chex.Array) -> chex.Array:
    """``x`` with infinities replaced by the largest numbers.

    It also keeps XLA from fusing a product into the subtraction of the largest one, which would leave a rest where
    zero is due.
    """
    limit = jnp.finfo(x.dtype).max
    return jnp.clip(x, -limit, limit)
