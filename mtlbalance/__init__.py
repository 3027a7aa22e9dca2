"""Balance several losses while training one model, in JAX."""

from mtlbalance import aggregation, gramian, scalarization
from mtlbalance.base import Aggregator, Rowwise, Scalarizer, Weighting
from mtlbalance.inputs import Counted
from mtlbalance.transforms import aggregate
from mtlbalance.wrappers import LearnState, SkipNonfiniteState, learn, skip_nonfinite

__version__ = "0.1.0"

__all__ = [
    "Aggregator",
    "Counted",
    "LearnState",
    "Rowwise",
    "Scalarizer",
    "SkipNonfiniteState",
    "Weighting",
    "aggregate",
    "aggregation",
    "gramian",
    "learn",
    "scalarization",
    "skip_nonfinite",
]
