"""GradDrop: gradient sign dropout, in every coordinate only the entries of one sign, drawn at random.

Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout", NeurIPS 2020,
https://arxiv.org/abs/2010.06808
"""

from collections.abc import Callable, Hashable

import chex
import jax
import jax.numpy as jnp

from mtlbalance import base
from mtlbalance.annotations import PerTask
from mtlbalance.hyperparameters import FRACTION, check_key, key_impl, per_task, reject
from mtlbalance.mapped_axes import split_over
from mtlbalance.meshes import explicit_mesh
from mtlbalance.states import RandomState, count_seen, init_random, split_key


@base.memoized
def graddrop(
    key: int | chex.PRNGKey = 0,
    leak: PerTask | float = 0.0,
    f: Callable[[jax.Array], jax.Array] | None = None,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[RandomState]:
    r"""In every coordinate, the sum of the positive gradients or that of the negative ones.

    .. math:: g = \sum_i \big( \ell_i + (1 - \ell_i) M_i \big) g_i, \quad
              M_i = [f(P) > U] [g_i > 0] + [f(P) < U] [g_i < 0], \quad
              P = \frac{1}{2} \Big( 1 + \frac{\sum_i g_i}{\sum_i |g_i|} \Big)

    in each coordinate alone, with :math:`U` uniform from 0 to 1. Where all gradients agree on the sign, :math:`f(P)` is
    1 or 0 by default, and the result is their sum. An outer derivative takes the masks :math:`M_i` for constants.

    There are no weights of the tasks: each coordinate keeps tasks of its own. The state carries the key, and each leaf
    draws with a part of it: the same state gives the same masks. To sweep seeds, build the method inside the function
    that is mapped: ``jax.vmap(lambda seed: train(aggregation.graddrop(seed)))(jnp.arange(8))``.

    Note:
      TorchJD draws from PyTorch's global generator: the same numbers in distribution only. The paper, and LibMTL, have
      GradDrop as a layer: they multiply gradients with respect to activations by the activations' signs and add them
      up over the batch to get :math:`P`. Here, as in TorchJD, the gradients are taken as they are.

    Args:
      key: a seed, or a :func:`jax.random.key`.
      leak: :math:`\ell`, numbers from 0 to 1: one for all tasks, or one for each, as an array or as a tree like the
        losses. May be traced.
      f: an increasing function of the purity :math:`P`, from [0, 1] to [0, 1], of arrays entry by entry. By default
        the identity.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split. Then each device draws for
        its part with a key of its own, and the draws are others than on one device.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`RandomState`.

    Raises:
      ValueError: at ``init``, if ``leak`` is out of bounds, or if it has not one number per task; at ``apply``, if
        ``f`` changes the shape.
      TypeError: if ``f`` is not a function.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.graddrop(key=0)
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print(gradient)
      [6. 2. 2.]

    References:
      Chen et al., `Just Pick a Sign <https://arxiv.org/abs/2010.06808>`_, NeurIPS 2020, algorithm 1, lines 10 to 15.
    """
    check_key(key)
    if f is not None and not callable(f):
        reject("f", "a function of the purity, or None", type(f).__name__, TypeError)

    def read_leak(m, dtype):
        return per_task("leak", leak, (m,), dtype, bound=FRACTION)

    def init(m, params, dtype):
        del params
        read_leak(m, dtype)
        return init_random(key)(m)

    def apply(state, jacobian, values, mask):
        del values
        draw_key, state = split_key(state, key_impl(key))

        def leaf(i, path, x):
            axes = split_over(x, axis_name, path)
            device_key = jax.random.fold_in(draw_key, jax.lax.axis_index(axes)) if axes else draw_key
            leaf_key = jax.random.fold_in(device_key, i)
            dtype = jnp.result_type(jnp.float32, x)
            # Row by row: of the whole leaf XLA's CPU backend would store every step.
            rows, leaks = [row.astype(dtype) for row in x], read_leak(len(x), dtype)
            positive = _keeps_positive(jax.lax.stop_gradient(rows), f, leaf_key)

            def kept(row, row_leak):
                return jnp.where(jnp.where(positive, row > 0, row < 0), row, row_leak * row)

            return sum(map(kept, rows, leaks)).astype(x.dtype)

        leaves, treedef = jax.tree.flatten_with_path(jacobian)
        drawn = [leaf(i, path, x) for i, (path, x) in enumerate(leaves)]
        return treedef.unflatten(drawn), count_seen(state, mask)

    return base.aggregator(init, apply=apply, per_task={"leak": leak})


def _keeps_positive(rows, f, key):
    """Where the positive entries are kept; elsewhere the negative ones are."""
    up, down = sum(jnp.maximum(row, 0) for row in rows), sum(jnp.maximum(-row, 0) for row in rows)
    # The purity is up / (up + down); in this form it is right where one of the sums overflows.
    purity = jnp.where(up > 0, 1 / (1 + down / jnp.where(up > 0, up, 1)), 0)
    chance = purity if f is None else f(purity)
    if jnp.shape(chance) != purity.shape:
        reject("f", f"a function that keeps the shape {purity.shape}", f"shape {jnp.shape(chance)}")
    # float32 in any case, so that a seed gives the same masks in either precision; lying as the parameters lie.
    sharding = jax.typeof(rows[0]).sharding if explicit_mesh(rows[0]) else None
    draws = jax.random.uniform(key, purity.shape, jnp.float32, out_sharding=sharding)
    return chance > draws
