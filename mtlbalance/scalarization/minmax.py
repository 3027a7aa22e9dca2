"""MinMax: loss weights on the simplex that climb while the model descends.

Liu and Wang, "A Dual-Dimer Method for Training Physics-Constrained Neural Networks with Minimax Architecture", Neural
Networks 136, 2021, https://arxiv.org/abs/2005.00615
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import PerTask
from mtlbalance.hyperparameters import per_task


class MinMaxState(NamedTuple):
    """State of :func:`minmax`.

    Attributes:
      logits: the logits of the weights, one per task. Learned, upwards.
    """

    logits: jax.Array


@base.memoized
def minmax(initial_logits: PerTask | float = 0.0) -> base.Scalarizer[MinMaxState]:
    r"""Weights that a gradient ascent moves towards the largest losses.

    .. math:: \min_\theta \max_a \sum_i w_i L_i(\theta), \quad w = m\,\mathrm{softmax}(a)

    The weights sum to m and are 1 at the start. Any real losses will do, and they should be of one scale.

    The gradient with respect to the logits :math:`a` has its sign reversed, so that whatever optimizer descends on it
    climbs: give it an optimizer of its own by ``mtlbalance.learn(minmax(), optax.adam(1e-3))``, or differentiate with
    respect to the state too and let one optimizer train both. A bare ``apply`` returns them as they were.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      ConFIG's version computes the ascent for these weights but then weighs the losses by the logits themselves. It
      starts them at 1 and makes no step on the first call.

    Args:
      initial_logits: start of :math:`a`: one real number, or one per task (an array or a tree of the same names). May
        be traced.

    Returns:
      A :class:`~mtlbalance.Scalarizer` with state :class:`MinMaxState` and ``learned=("logits",)``.

    Raises:
      ValueError: at ``init``, if ``initial_logits`` has another shape than the losses.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> from mtlbalance import scalarization
      >>> method = mtl.learn(scalarization.minmax(), optax.sgd(0.1))
      >>> scalar, state = method.apply(method.init(2), jnp.array([1.0, 5.0]))
      >>> print(scalar, state.inner.logits)
      6.0 [-0.2  0.2]

    References:
      Liu and Wang, `A Dual-Dimer Method <https://arxiv.org/abs/2005.00615>`_, 2021;
      https://github.com/tum-pbs/ConFIG.
    """

    def init(shape, dtype):
        start = per_task("initial_logits", initial_logits, shape, dtype)
        return MinMaxState(jax.lax.stop_gradient(start))  # or it would come back with its sign reversed

    def apply(state, values, mask):
        weights = jnp.sum(mask) * numerics.softmax(numerics.reverse_gradient(state.logits), mask)
        return jnp.sum(weights * values, where=mask), state

    return base.scalarizer(init, apply, learned=("logits",), per_task={"initial_logits": initial_logits})
