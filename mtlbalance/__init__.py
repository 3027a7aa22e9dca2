"""Balance several losses while training one model, in JAX."""

from mtlbalance import aggregation, diagnostics, gramian, scalarization
from mtlbalance.autodiff import subset, value_and_grad, value_and_gramian, value_and_jac
from mtlbalance.base import Aggregator, Rowwise, Scalarizer, Weighting
from mtlbalance.inputs import Counted
from mtlbalance.transforms import aggregate
from mtlbalance.wrappers import (
    AmortizeState,
    ChainState,
    LearnState,
    SkipNonfiniteState,
    amortize,
    chain,
    learn,
    skip_nonfinite,
)

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "AmortizeState",
    "ChainState",
    "Counted",
    "LearnState",
    "Rowwise",
    "Scalarizer",
    "SkipNonfiniteState",
    "Weighting",
    "aggregate",
    "aggregation",
    "amortize",
    "chain",
    "diagnostics",
    "gramian",
    "learn",
    "scalarization",
    "skip_nonfinite",
    "subset",
    "value_and_grad",
    "value_and_gramian",
    "value_and_jac",
]
