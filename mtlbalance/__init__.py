"""Balance several losses while training one model, in JAX."""

from mtlbalance import (
    aggregation,
    base,
    complex_parts,
    diagnostics,
    gramian,
    hyperparameters,
    names,
    numerics,
    scalarization,
    solvers,
    states,
    weights,
)
from mtlbalance.autodiff import subset, value_and_grad, value_and_gramian, value_and_jac
from mtlbalance.changed_tasks import carry_over
from mtlbalance.contract import Aggregator, Rowwise, Scalarizer, Weighting
from mtlbalance.diagnostics import audit, report
from mtlbalance.losses import Counted
from mtlbalance.project_update import project_update
from mtlbalance.transforms import aggregate
from mtlbalance.wrappers import (
    AmortizeState,
    ChainState,
    LearnState,
    NestedState,
    PrioritizeState,
    RegularizeState,
    SkipNonfiniteState,
    SkipZeroState,
    TransformWeightsState,
    amortize,
    chain,
    freeze,
    learn,
    nested,
    prioritize,
    regularize,
    skip_nonfinite,
    skip_zero,
    transform_weights,
)

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "AmortizeState",
    "ChainState",
    "Counted",
    "LearnState",
    "NestedState",
    "PrioritizeState",
    "RegularizeState",
    "Rowwise",
    "Scalarizer",
    "SkipNonfiniteState",
    "SkipZeroState",
    "TransformWeightsState",
    "Weighting",
    "aggregate",
    "aggregation",
    "amortize",
    "audit",
    "base",
    "carry_over",
    "chain",
    "complex_parts",
    "diagnostics",
    "freeze",
    "gramian",
    "hyperparameters",
    "learn",
    "names",
    "nested",
    "numerics",
    "prioritize",
    "project_update",
    "regularize",
    "report",
    "scalarization",
    "skip_nonfinite",
    "skip_zero",
    "solvers",
    "states",
    "subset",
    "transform_weights",
    "value_and_grad",
    "value_and_gramian",
    "value_and_jac",
    "weights",
]
