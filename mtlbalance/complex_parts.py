"""Complex numbers as pairs of reals, which is all that a method's plain functions see of them.

Where a gradient or a parameter is complex they get :class:`ComplexParts`, two leaves in the place of one. So inner
products are real parts of complex ones, and what works entry by entry sees two coordinates, without a word in the
method's file. The sign of the imaginary part is :func:`jax.grad`'s: that of the conjugate of the steepest ascent.
"""

import operator
from functools import reduce
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp


class ComplexParts(NamedTuple):
    """A complex array in two real ones.

    Attributes:
      real: its real part.
      imag: its imaginary part.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import complex_parts
      >>> gradient = complex_parts.split({"fourier": jnp.array([3.0 + 4.0j]), "bias": jnp.array([2.0])})
      >>> print(gradient["fourier"].imag, complex_parts.squared_modulus(gradient["fourier"]))
      [4.] [25.]
      >>> print(complex_parts.moduli(gradient))
      {'bias': Array([2.], dtype=float32), 'fourier': Array([5.], dtype=float32)}
    """

    real: chex.Array
    imag: chex.Array


def split(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree with every complex array in its parts; real ones are as they were."""
    return jax.tree.map(lambda x: ComplexParts(jnp.real(x), jnp.imag(x)) if is_complex(x) else x, tree)


def split_params(params: chex.ArrayTree) -> chex.ArrayTree:
    """Parameters as :func:`split` has them, of which shapes, dtypes and shardings matter alone."""

    def leaf(x):
        if not is_complex(x) or isinstance(x, jax.core.Tracer):
            return split(x)
        dtype = jnp.finfo(jnp.result_type(x)).dtype
        part = jax.ShapeDtypeStruct(jnp.shape(x), dtype, sharding=getattr(x, "sharding", None))
        return ComplexParts(part, part)

    return jax.tree.map(leaf, params)


def join(tree: chex.ArrayTree) -> chex.ArrayTree:
    """What :func:`split` undoes."""
    return jax.tree.map(lambda x: jax.lax.complex(*x) if is_parts(x) else x, tree, is_leaf=is_parts)


def join_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """The tree with complex arrays where ``like`` has them: in a wrapper it may have parts itself."""
    return jax.tree.map(lambda x, found: jax.lax.complex(*found) if is_complex(x) else found, like, tree)


def entries(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree with one real leaf for every complex number: for what is a number for each, as its modulus."""
    return jax.tree.map(lambda x: x.real if is_parts(x) else x, tree, is_leaf=is_parts)


def moduli(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The absolute values, one real leaf for every complex number."""
    return jax.tree.map(jnp.abs, join(tree))


def squared_modulus(x: chex.Array | ComplexParts) -> jax.Array:
    """The squares of the absolute values, as in :func:`optax.scale_by_rms`."""
    return reduce(operator.add, [part * part for part in jax.tree.leaves(x)])


def is_complex(x: Any) -> bool:
    """Whether ``x`` is a complex array or number."""
    return jnp.issubdtype(x.dtype if hasattr(x, "dtype") else jnp.result_type(x), jnp.complexfloating)


def is_parts(x: Any) -> bool:
    """Whether ``x`` stands for a complex array."""
    return isinstance(x, ComplexParts)
