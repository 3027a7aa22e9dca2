"""Parameters as a model holds them: what no optimizer could train is refused, and what is not shaped like them."""

import sys
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp

from mtlbalance.hyperparameters import is_number, kind_of, reject

# What to give in place of a whole module.
OF_MODULE = "eqx.filter(model, eqx.is_inexact_array) or eqx.partition; nnx.split(model, nnx.Param, ...)"


def check_trainable(name: str, params: chex.ArrayTree) -> None:
    """Raises if there is anything among the parameters that is no number, or state that a model changes by itself.

    Args:
      name: the argument's, for the error.
      params: arrays, or what stands for them: their shapes and dtypes, or no leaf at all.
    """
    _check_nnx(name, params)
    if isinstance(params, Mapping) and {"params", "batch_stats"} <= set(params):
        expected = "the collection 'params' alone (the others come in as an argument, and out with has_aux=True)"
        found = f"the collections {sorted(params)}, of which statistics would keep their values"
        reject(name, expected, found, TypeError)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not is_number(leaf):
            expected = f"floating point numbers (of a module its parameters alone: {OF_MODULE})"
            reject(f"{name}{jax.tree_util.keystr(path)}", expected, kind_of(leaf), TypeError)


def is_network(shapes: list[tuple[int, ...]]) -> bool:
    """Whether arrays are a network's, and no losses: the last axis of a matrix is what another of them takes in.

    Layers are followed by their bias or by the next layer. Losses may be of any shape too: of one point each, or one
    with several axes.
    """
    matrices = [shape for shape in shapes if sum(n > 1 for n in shape) > 1]
    takes_in = lambda shape: shape[-2] if len(shape) > 1 else shape[-1] if shape else 1
    return any(a != b and a[-1] == takes_in(b) > 1 for a in matrices for b in shapes)


def _check_nnx(name, params):
    """Statistics and random state would get gradients of zero, and what the model makes of them would be lost."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    is_module, is_variable = lambda x: isinstance(x, nnx.Module), lambda x: isinstance(x, nnx.Variable)
    # What is no module its user has chosen, variables of kinds of their own included; but Flax's own state is none.
    has_module = any(map(is_module, jax.tree.leaves(params, is_leaf=is_module)))
    for path, x in jax.tree.leaves_with_path(params, is_leaf=is_variable):
        is_state = is_variable(x) and not isinstance(x, nnx.Param)
        if is_state and (has_module or type(x).__module__.startswith("flax.")):
            recipe = "definition, params, others = nnx.split(model, nnx.Param, ...), and nnx.merge inside losses_fn"
            expected = f"parameters alone, nnx.Param ({recipe}: docs/guides/frameworks.md)"
            found = f"{type(x).__name__}, which would silently keep its value"
            reject(f"{name}{jax.tree_util.keystr(path)}", expected, found, TypeError)


def check_params_like(name: str, tree: chex.ArrayTree, params: chex.ArrayTree, skip: int = 0) -> None:
    """Raises unless two trees have one structure, and one shape a leaf (after ``skip`` axes of ``params``)."""
    found, expected = jax.tree.structure(tree), jax.tree.structure(params)
    if found != expected:
        hint = " (of a part of them: was init given mtl.subset(params, mask)?)" if "MaskedNode" in f"{found}" else ""
        reject(name, f"the params' tree {expected}", f"{found}{hint}")
    for (path, leaf), param in zip(jax.tree.leaves_with_path(tree), jax.tree.leaves(params), strict=True):
        if jnp.shape(leaf) != jnp.shape(param)[skip:]:
            where = f"{name}{jax.tree_util.keystr(path)}"
            reject(where, f"shape {jnp.shape(param)[skip:]}", f"shape {jnp.shape(leaf)}")
