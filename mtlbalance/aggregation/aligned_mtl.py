"""Aligned-MTL: gradients made orthogonal and equally long, as near to the old ones as can be.

Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
https://arxiv.org/abs/2305.19000
"""

from collections.abc import Hashable
from functools import partial

import jax.numpy as jnp

from mtlbalance import base, numerics
from mtlbalance.annotations import PerTask
from mtlbalance.hyperparameters import preference, reject
from mtlbalance.states import SeenState, count_seen, init_seen_after

_SCALE_MODES = ("min", "median", "rmse")


@base.memoized
def aligned_mtl(
    pref_vector: PerTask | None = None, scale_mode: str = "min", *, axis_name: Hashable | None = None
) -> base.Aggregator[SeenState]:
    r"""The preferred combination of the gradients after their principal components were made equally long.

    .. math:: g = \sum_i w_i g_i, \quad w = \sqrt{\sigma} \, V \Lambda^{-1/2} V^\top p

    with the eigenvalues :math:`\Lambda` and eigenvectors :math:`V` of the Gramian, without the eigenvalues that are
    zero up to rounding, and :math:`\sigma` the smallest, the (lower) median or the mean of the others. The weights
    have no fixed total. Where all gradients are zero they are the preference.

    The gradient to its hyperparameters is zero: they act through constants of differentiation.

    Note:
      The smallest eigenvalue is the paper's choice and TorchJD's default; the official code's is the mean,
      ``"rmse"``. LibMTL adds up where the preference averages: its weights are m times as large.
      In float32 a component shorter than about :math:`3 \cdot 10^{-4} \sqrt{m}` of the longest is rounding error, and a
      task whose gradient is that short loses its weight; so it does in TorchJD's float32.

    Args:
      pref_vector: preference :math:`p`, one real number per task: an array or a tree of names; 1/m each by default.
        May be traced.
      scale_mode: ``"min"``, ``"median"`` or ``"rmse"``.
      axis_name: under :func:`jax.shard_map`, the axis over which parameters are split; what is whole counts once.

    Returns:
      An :class:`~mtlbalance.Aggregator` with state :class:`SeenState`, ``weighting`` and ``gramian_weighting``.

    Raises:
      ValueError: if ``scale_mode`` is unknown; at ``init``, if there is not one preference per task.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtlbalance import aggregation
      >>> method = aggregation.aligned_mtl()
      >>> gradient, state = method.apply(method.init((2, 3)), jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
      >>> print([f"{x:.4f}" for x in gradient])
      ['0.2133', '0.9673', '0.9673']

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning <https://arxiv.org/abs/2305.19000>`_,
      CVPR 2023, algorithm 1; https://github.com/SamsungLabs/MTL.
    """
    if scale_mode not in _SCALE_MODES:
        reject("scale_mode", f"one of {_SCALE_MODES}", f"{scale_mode!r}")

    preferences = partial(preference, pref_vector)

    def weigh(state, gramian, values, mask):
        del values
        m = mask.shape[0]
        preferred = preferences(mask, gramian.dtype)
        eigenvalues, vectors, kept = numerics.eigh_psd(gramian / numerics.scale(gramian))
        n_kept = jnp.sum(kept)
        if scale_mode == "min":
            sigma = jnp.min(eigenvalues, where=kept, initial=jnp.inf)
        elif scale_mode == "median":
            sigma = eigenvalues[m - n_kept + (n_kept - 1) // 2]  # ascending: the kept ones come last
        else:
            sigma = jnp.mean(eigenvalues, where=kept)
        stretch = jnp.where(kept, jnp.sqrt(sigma / jnp.where(kept, eigenvalues, 1)), 0)
        components = jnp.dot(vectors.T, preferred, precision="highest")
        aligned = jnp.dot(vectors, stretch * components, precision="highest")
        return jnp.where(n_kept > 0, aligned, preferred), count_seen(state, mask)

    return base.aggregator(
        init_seen_after(preferences),
        gramian_weighting=weigh,
        axis_name=axis_name,
        per_task={"pref_vector": pref_vector},
    )
