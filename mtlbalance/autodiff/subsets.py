"""Which parameters a method sees: trees of booleans, what they select, and how it is put together again."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtlbalance.annotations import ArrayTree
from mtlbalance.hyperparameters import reject

Subset = ArrayTree | Callable[[ArrayTree], ArrayTree]


def subset(params: ArrayTree, mask: Subset) -> ArrayTree:
    """The parameters that a mask selects, with :class:`optax.MaskedNode` in the place of the others.

    For the state of a method that sees some of the parameters: ``method.init((m, mtl.subset(params, shared)))``.

    Args:
      params: any tree.
      mask: a tree of booleans in the structure of ``params`` or a prefix of it, or a function from ``params`` to one.

    Returns:
      A tree with the selected leaves of ``params``.

    Raises:
      ValueError: if the mask has another structure.
      TypeError: if it has anything but booleans that are known while tracing.

    Example:
      >>> import mtlbalance as mtl
      >>> print(mtl.subset({"trunk": 1.0, "heads": {"a": 2.0, "b": 3.0}}, {"trunk": True, "heads": False}))
      {'heads': {'a': MaskedNode(), 'b': MaskedNode()}, 'trunk': 1.0}
    """
    return select_subset(params, read_subset("mask", mask, params))


def read_subset(name: str, subset: Subset, params: ArrayTree) -> ArrayTree:
    """A boolean for every leaf of the params."""
    is_function = callable(subset) and jax.tree_util.all_leaves([subset])  # a module of booleans may be callable too
    subset = subset(params) if is_function else subset
    try:
        full = jax.tree.broadcast(subset, params)
    except ValueError as error:
        expected = f"booleans in the params' structure, or in a prefix of it: {jax.tree.structure(params)}"
        raise ValueError(f"{name}: expected {expected}, found {jax.tree.structure(subset)}") from error
    for leaf in jax.tree.leaves(full):
        if not isinstance(leaf, bool | np.bool_):
            reject(name, "booleans, known while tracing", type(leaf).__name__, TypeError)
    return full


def read_option(name: str, subset: Subset | None, params: ArrayTree) -> ArrayTree | None:
    """The subset that an option asks for, which must not be empty: a predicate that met no name is a slip."""
    full = None if subset is None else read_subset(name, subset, params)
    leaves = jax.tree.leaves(full)
    if leaves and not any(leaves):
        purpose = {"shared": "balance", "decide_on": "decide on"}[name]
        reject(name, f"at least one parameter to {purpose}", "False for all")
    return full


def select_subset(tree: ArrayTree, subset: ArrayTree) -> ArrayTree:
    """The leaves that are in the subset."""
    return jax.tree.map(lambda selected, x: x if selected else optax.MaskedNode(), subset, tree)


def join_subsets(subset: ArrayTree, selected: ArrayTree, others: ArrayTree) -> ArrayTree:
    """``selected`` where a leaf is in the subset, which may have nothing elsewhere; else ``others``."""
    return jax.tree.map(lambda first, x, y: x if first else y, subset, selected, others)


def with_float0(gradient: ArrayTree, params: ArrayTree, lead: tuple[int, ...] = ()) -> ArrayTree:
    """Zeros of dtype ``float0`` in the place of integers' gradients, as JAX has them."""

    def leaf(g, p):
        if jnp.issubdtype(jnp.result_type(p), jnp.inexact):
            return g
        return np.zeros((*lead, *jnp.shape(p)), jax.dtypes.float0)

    return jax.tree.map(leaf, gradient, params)


def whole(gradient: ArrayTree) -> ArrayTree:
    """All of a gradient counts."""
    return gradient
