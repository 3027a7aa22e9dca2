"""EPO: exact Pareto optimal search, descent to the point of the front at which preference times loss is equal for all.

Mahapatra and Rajan, "Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in Pareto
Optimization", ICML 2020, https://proceedings.mlr.press/v119/mahapatra20a.html
"""

from collections.abc import Hashable

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import Number, PerTask
from mtlbalance.hyperparameters import NONNEGATIVE, Bound, check, per_task
from mtlbalance.solvers import simplex_lp
from mtlbalance.states import SeenState, count_seen, init_seen_after

_PREFERENCE = Bound("a finite number above 0", lambda r: (r > 0) & (r < float("inf")))


@base.memoized
def epo(
    preference: PerTask, eps: Number = 1e-4, relax: bool = False, *, axis_name: Hashable | None = None
) -> base.Aggregator[SeenState]:
    r"""Descends to the Pareto-optimal point with :math:`r_1 L_1 = \dots = r_m L_m`, on fronts of any shape.

    .. math:: \hat l_i = \frac{r_i L_i}{\sum_j r_j L_j}, \quad \mu = \sum_i \hat l_i \log(m \hat l_i), \quad
              a_i = r_i (\log(m \hat l_i) - \mu), \qquad g = \sum_i w_i g_i, \quad w \in \Delta

    Where the losses are not yet as preferred, :math:`\mu > \epsilon`, the weights balance: they maximize
    :math:`w^\top G a`, the rate at which :math:`\mu` falls, such that the tasks with :math:`(G a)_j \le 0` rise no
    faster than along :math:`a` itself, :math:`(G w)_j \ge (G a)_j`, and the loss with the largest :math:`r_j L_j` does
    not rise; if these are all tasks, none rises. Elsewhere they descend: they maximize the fall of all losses together,
    :math:`\sum_j (G w)_j`, such that no loss rises, and with ``relax=False`` neither does :math:`\mu`, as far as that
    goes together. A linear program of m weights in either case, solved on the device.

    Losses must be positive; a negative one makes the weights NaN. The weights sum to 1, and stop at a Pareto-optimal
    point only if it is the preferred one: to get there some losses may have to rise. Near the preference both kinds of
    steps alternate; let the learning rate fall. The method reads the losses: give them as ``values=``.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      This is the official code's program; where that has no solution, and the code raises, the constraint on
      :math:`\mu` is dropped, as by ``relax=True``. Of :math:`\hat l_i = 0` the logarithm is that of the least normal
      number; LibMOON bounds it at 1e-3, and takes negative losses for zero. The preference is the paper's r, large for
      a loss that is to be small. LibMOON's, the ray on which the losses are to lie, is 1/r. Only its ratios say where
      the point is, but a larger one lets losses rise faster on the way. The official experiments multiply the gradient
      by :math:`10 \max(\mu, 0.1)` (toy problems), or by m.

    Args:
      preference: :math:`r`, one number above 0 per task: an array, or a tree of the losses' names. May be traced:
        ``vmap`` over it traces a Pareto front.
      eps: :math:`\epsilon \ge 0`, the :math:`\mu` up to which the losses count as preferred. May be traced.
      relax: whether :math:`\mu` may rise while descending.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``eps`` is out of bounds; at ``init``, if ``preference`` is, or is not one number per task.
      TypeError: if a call has no ``values``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.epo(jnp.array([1.0, 2.0]))
      >>> rows, losses = jnp.array([[2.0, 0.0], [-1.0, 1.0]]), jnp.array([4.0, 2.0])
      >>> gradient, state = method.apply(method.init(rows.shape), rows, values=losses)  # as preferred: none rises
      >>> print(gradient)
      [0.5 0.5]
      >>> gradient, state = method.apply(method.init(rows.shape), rows, values=losses / jnp.array([1.0, 4.0]))
      >>> print(gradient)  # the second is smaller than preferred, and may rise
      [2. 0.]

    References:
      Mahapatra and Rajan, `Multi-Task Learning with User Preferences
      <https://proceedings.mlr.press/v119/mahapatra20a.html>`_, ICML 2020, algorithm 1;
      https://github.com/dbmptr/EPOSearch.
    """
    check("eps", eps, NONNEGATIVE)

    def read_preference(mask, dtype):
        return per_task("preference", preference, mask.shape, dtype, scalar=False, bound=_PREFERENCE)

    def weigh(state, gramian, values, mask):
        r = read_preference(mask, gramian.dtype)
        losses = numerics.nonnegative(values.astype(r.dtype))
        # Each at a scale of 1, so that their product neither overflows nor vanishes.
        relative = numerics.normalize((r / numerics.scale(r)) * (losses / numerics.scale(losses)), mask)
        n_present = jnp.sum(mask).astype(r.dtype)
        logs = jnp.log(jnp.maximum(relative * n_present, jnp.finfo(r.dtype).tiny))
        mu = jnp.sum(relative * logs, where=mask)
        a = jnp.where(mask, r * (logs - mu), 0)
        gramian = gramian / numerics.scale(gramian)
        along = jnp.dot(gramian, a, precision="highest")  # how fast each loss falls along a

        falls = mask & (along > 0)
        is_largest = mask & (relative == jnp.max(relative, where=mask, initial=0))
        bounds = jnp.where(is_largest, 0, jnp.where(falls, -jnp.inf, along))
        balances = mu > eps
        bounds = jnp.where(mask, jnp.where(balances & jnp.any(falls), bounds, 0), -jnp.inf)
        # mu falls at the rate along @ w; where no gradient lets it fall, it rises no faster than it must.
        fastest = jnp.minimum(jnp.max(along, where=mask, initial=-jnp.inf), 0)
        bound_of_mu = jnp.where(balances | relax, -jnp.inf, fastest)
        objective = jnp.where(balances, along, jnp.sum(gramian, axis=0))

        rows = jnp.concatenate([gramian, along[None, :]])
        weights, feasible = simplex_lp(objective, rows, jnp.append(bounds, bound_of_mu), mask)
        if not relax:
            # Under vmap this one always runs; without bounds it ends at once.
            again, _ = simplex_lp(objective, gramian, jnp.where(feasible, -jnp.inf, bounds), mask)
            weights = jnp.where(feasible, weights, again)
        return numerics.nan_unless(jnp.isfinite(mu), weights), count_seen(state, mask)

    return base.aggregator(
        init_seen_after(read_preference),
        gramian_weighting=weigh,
        reads_losses=True,
        axis_name=axis_name,
        per_task={"preference": preference},
    )
