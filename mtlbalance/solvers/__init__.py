"""Small convex problems over the tasks, solved on the device."""

from mtlbalance.solvers.simplex_qp import simplex_qp

__all__ = [
    "simplex_qp",
]
