"""Parameters as a model holds them: what no optimizer could train is refused, and the framework's way out is named."""

import sys

import chex
import jax

from mtlbalance.hyperparameters import is_number, reject

# What to give in place of a whole module.
OF_MODULE = "eqx.filter(model, eqx.is_inexact_array) or eqx.partition; nnx.split(model, nnx.Param, ...)"


def check_trainable(name: str, params: chex.ArrayTree) -> None:
    """Raises if there is anything among the parameters that is no number, or state that a model changes by itself.

    Args:
      name: the argument's, for the error.
      params: arrays, or what stands for them: their shapes and dtypes, or no leaf at all.
    """
    _check_nnx(name, params)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not is_number(leaf):
            found = f"{leaf!r}" if isinstance(leaf, str) else type(leaf).__name__
            expected = f"floating point numbers (of a module its parameters alone: {OF_MODULE})"
            reject(f"{name}{jax.tree_util.keystr(path)}", expected, found, TypeError)


def _check_nnx(name, params):
    """Statistics and random state would get gradients of zero, and what the model makes of them would be lost."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return
    is_module, is_variable = (lambda x, kind=kind: isinstance(x, kind) for kind in (nnx.Module, nnx.Variable))
    # A state is what its user has chosen, with variables of his own kinds if he likes; but not with Flax's own state.
    has_module = any(map(is_module, jax.tree.leaves(params, is_leaf=is_module)))
    for path, x in jax.tree.leaves_with_path(params, is_leaf=is_variable):
        is_state = is_variable(x) and not isinstance(x, nnx.Param)
        if is_state and (has_module or type(x).__module__.startswith("flax.")):
            recipe = "definition, params, others = nnx.split(model, nnx.Param, ...), and nnx.merge inside losses_fn"
            expected = f"parameters alone, nnx.Param ({recipe}: README, In Flax and Equinox)"
            found = f"{type(x).__name__}, which would silently keep its value"
            reject(f"{name}{jax.tree_util.keystr(path)}", expected, found, TypeError)
