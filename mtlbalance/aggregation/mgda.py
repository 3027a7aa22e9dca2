"""MGDA: the shortest gradient between those of the tasks.

Désidéri, "Multiple-gradient Descent Algorithm (MGDA) for Multiobjective Optimization", Comptes Rendus Mathematique
350, 2012, https://doi.org/10.1016/j.crma.2012.03.014; Sener and Koltun, "Multi-Task Learning as Multi-Objective
Optimization", NeurIPS 2018, https://arxiv.org/abs/1810.04650
"""

from collections.abc import Hashable
from typing import Literal

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.hyperparameters import reject
from mtlbalance.solvers import simplex_qp
from mtlbalance.states import SeenState, count_seen, init_seen


@base.memoized
def mgda(
    normalize: Literal["l2", "loss", "loss+"] | None = None,
    combine_normalized: bool = False,
    *,
    axis_name: Hashable | None = None,
) -> base.Aggregator[SeenState]:
    r"""The combination of the gradients with the least norm.

    .. math:: g = \sum_i w_i g_i, \quad w = \arg\min_{w \in \Delta} \Big\lVert \sum_i w_i g_i \Big\rVert^2

    It conflicts with no gradient, and is zero where the tasks are Pareto-stationary. The weights sum to 1.
    Most of the weight goes to the short gradients. It stops at a gradient of zero; :func:`mtlbalance.skip_zero` goes
    on without that task.

    With ``normalize`` the weights are those of the gradients divided by numbers :math:`n_i`, so that the short ones do
    not get nearly all of the weight:

    .. math:: g = \sum_i w_i g_i \ \text{or} \ \sum_i w_i \frac{g_i}{n_i}, \qquad
              w = \arg\min_{w \in \Delta} \Big\lVert \sum_i w_i \frac{g_i}{n_i} \Big\rVert^2, \qquad
              n_i = \lVert g_i \rVert, \ L_i \ \text{or} \ L_i \lVert g_i \rVert

    The second sum (``combine_normalized=True``) is the one that conflicts with no gradient; its weights have no fixed
    total. With ``"loss"`` and ``"loss+"`` the method reads the losses, which must be positive: give them as
    ``values=``. A loss of zero counts as 1, a negative one makes all weights NaN.

    Note:
      The problem is solved to rounding. TorchJD's and LibMTL's iterations stop sooner, with about three correct digits.

      ``normalize`` is not in the paper but in its code, which gives the weights to the losses themselves, as TorchJD
      means to (pull request 530). LibMTL's ``mgda_gn`` combines the gradients that it has divided
      (``combine_normalized=True``), unless it decides on a representation's gradients.

    Args:
      normalize: what gradients are divided by before the weights are sought: ``"l2"`` their norms, ``"loss"`` the
        losses, ``"loss+"`` both; by default nothing.
      combine_normalized: whether the gradients that are combined are divided too.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``normalize`` is unknown, or missing where ``combine_normalized`` is given.
      TypeError: with ``"loss"`` and ``"loss+"``, if a call has no ``values``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.mgda()
      >>> weighting = method.gramian_weighting
      >>> weights, state = weighting.apply(weighting.init(2), jnp.array([[4.0, 0.0], [0.0, 1.0]]))
      >>> print([f"{weight:.4f}" for weight in weights])
      ['0.2000', '0.8000']

    References:
      Désidéri, `Multiple-gradient Descent Algorithm (MGDA) for Multiobjective Optimization
      <https://doi.org/10.1016/j.crma.2012.03.014>`_, Comptes Rendus Mathematique 350, 2012.

      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_,
      NeurIPS 2018, eq. 3; https://github.com/isl-org/MultiObjectiveOptimization.
    """
    if normalize not in (None, "l2", "loss", "loss+"):
        reject("normalize", "'l2', 'loss', 'loss+' or None", f"{normalize!r}")
    if combine_normalized and normalize is None:
        reject("normalize", "'l2', 'loss' or 'loss+', where combine_normalized is given", "None")
    by_norm, by_loss = normalize in ("l2", "loss+"), normalize in ("loss", "loss+")

    def weigh(state, gramian, values, mask):
        state = count_seen(state, mask)
        if normalize is None:
            return simplex_qp(gramian, mask=mask), state
        _, norms, cosines = numerics.cosines(gramian, mask)
        normalized = cosines if by_norm else gramian
        losses = jnp.where(values == 0, 1, numerics.nonnegative(values)) if by_loss else jnp.ones_like(norms)
        # The weights are the same whatever all are multiplied by: here no gradient gets longer than it was.
        inverse = jnp.min(losses, where=mask, initial=jnp.inf) / losses
        weights = simplex_qp(inverse[:, None] * normalized * inverse[None, :], mask=mask)
        if combine_normalized:
            weights = numerics.finite(numerics.finite(weights / (norms if by_norm else 1)) / losses)
        return numerics.nan_unless(jnp.all(jnp.isfinite(losses) | ~mask), weights), state

    return base.aggregator(init_seen, gramian_weighting=weigh, reads_losses=by_loss, axis_name=axis_name)
