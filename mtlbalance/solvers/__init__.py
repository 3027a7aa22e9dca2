"""Small convex problems over the tasks, solved on the device, for matrices of float32 or float64.

What solves a quadratic program is a constant of differentiation, as the weights made of it are.
"""

from mtlbalance.solvers.alpha_fair import alpha_fair
from mtlbalance.solvers.cagrad_dual import cagrad_dual
from mtlbalance.solvers.dual_cone import dual_cone
from mtlbalance.solvers.nash_bargaining import nash_bargaining
from mtlbalance.solvers.priority_constrained import priority_constrained
from mtlbalance.solvers.simplex_lp import simplex_lp
from mtlbalance.solvers.simplex_qp import simplex_qp

__all__ = [
    "alpha_fair",
    "cagrad_dual",
    "dual_cone",
    "nash_bargaining",
    "priority_constrained",
    "simplex_lp",
    "simplex_qp",
]
