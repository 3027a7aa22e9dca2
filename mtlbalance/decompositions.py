"""LAPACK's decompositions of small matrices, any number of them side by side in one program.

On a CPU jaxlib 0.10 splits a large batch among the threads of XLA's pool, and waits for them in one of these threads.
Where as many batches wait as there are cores, all of them wait for ever: a sweep of a step with two decisions hangs. So
under ``vmap`` a batch is taken in pieces that are too small to be split. That takes as long as the whole batch.
"""

import math
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

# Multiplications in a piece: LAPACK's batches of up to 200,000 are not split.
_PIECE = 100_000


def _in_pieces(multiplications: int) -> Callable[..., Any]:
    """Decorates a function of stacked matrices ``[..., m, m]``; for one it takes so many multiplications, times m^3."""

    def decorate(decompose):
        one_piece = custom_vmap(decompose)

        def pieces(matrices):
            *batch, m, _ = matrices.shape
            size = max(1, _PIECE // max(1, multiplications * m**3))
            # Of a batch whose size is not known, in an exported program, one at a time.
            known = all(isinstance(n, int) for n in batch)
            if known and math.prod(batch) <= size:
                return one_piece(matrices)
            outputs = jax.lax.map(one_piece, jnp.reshape(matrices, (-1, m, m)), batch_size=size if known else None)
            return jax.tree.map(lambda x: jnp.reshape(x, (*batch, *x.shape[1:])), outputs)

        @one_piece.def_vmap
        def of_batch(_size, _is_batched, matrices):
            outputs = jax.lax.platform_dependent(matrices, cpu=pieces, default=decompose)
            return outputs, jax.tree.map(lambda _: True, outputs)

        differentiable = jax.custom_jvp(one_piece)
        differentiable.defjvp(partial(jax.jvp, decompose))
        return wraps(decompose)(differentiable)

    return decorate


@_in_pieces(6)
def eigh(matrix: chex.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and eigenvectors of a symmetric matrix."""
    return tuple(jnp.linalg.eigh(matrix))


@_in_pieces(2)
def orthonormal(matrix: chex.Array) -> jax.Array:
    """An orthonormal basis of the columns of a square matrix, the Q of its QR."""
    return jnp.linalg.qr(matrix)[0]
