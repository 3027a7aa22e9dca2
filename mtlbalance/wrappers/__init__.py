"""Functions that take a method and return a method: one file each, what they share in ``plumbing``."""

from mtlbalance.wrappers.amortize import AmortizeState, amortize
from mtlbalance.wrappers.chain import ChainState, chain
from mtlbalance.wrappers.cr_mogm import CRMOGMState, cr_mogm
from mtlbalance.wrappers.learn import LearnState, learn
from mtlbalance.wrappers.skip_nonfinite import SkipNonfiniteState, skip_nonfinite
from mtlbalance.wrappers.skip_zero import SkipZeroState, skip_zero

__all__ = [
    "AmortizeState",
    "CRMOGMState",
    "ChainState",
    "LearnState",
    "SkipNonfiniteState",
    "SkipZeroState",
    "amortize",
    "chain",
    "cr_mogm",
    "learn",
    "skip_nonfinite",
    "skip_zero",
]
