"""What to log: how the tasks' gradients relate to each other and to an update, and the weights losses really have.

Pure functions of what a training step has at hand, for inside its ``jit`` or after it. Given ``losses``, they answer in
the losses' structure: per task a tree like it, per pair of tasks a tree of such trees, as :func:`jax.hessian` does. An
absent task (``mask``, or a :class:`~mtlbalance.Counted` loss of count 0) has zeros, and counts in no mean; its row of
the Jacobian or the Gramian may be anything. :func:`~mtlbalance.report` makes one flat dict of all that, and
:func:`~mtlbalance.audit`, outside of ``jit``, says before the training whether the losses need balancing.
"""

from mtlbalance.diagnostics.audit import Audit, Estimate, audit
from mtlbalance.diagnostics.between_tasks import alignment, conflicts, cosine_similarities, magnitude_ratios
from mtlbalance.diagnostics.reading import by_task
from mtlbalance.diagnostics.report import report
from mtlbalance.diagnostics.updates import directional_derivatives, update_cosines
from mtlbalance.diagnostics.weights import effective_weights

__all__ = [
    "Audit",
    "Estimate",
    "alignment",
    "audit",
    "by_task",
    "conflicts",
    "cosine_similarities",
    "directional_derivatives",
    "effective_weights",
    "magnitude_ratios",
    "report",
    "update_cosines",
]
