"""Small convex problems over the tasks, solved on the device."""

from mtlbalance.solvers.dual_cone import dual_cone
from mtlbalance.solvers.simplex_qp import simplex_qp

__all__ = [
    "dual_cone",
    "simplex_qp",
]
