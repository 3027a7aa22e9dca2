"""Functions that take a method and return a method: one file each, what they share in ``plumbing``."""

from mtlbalance.wrappers.amortize import AmortizeState, amortize
from mtlbalance.wrappers.chain import ChainState, chain
from mtlbalance.wrappers.checked import checked
from mtlbalance.wrappers.cr_mogm import CRMOGMState, cr_mogm
from mtlbalance.wrappers.freeze import freeze
from mtlbalance.wrappers.learn import LearnState, learn
from mtlbalance.wrappers.nested import NestedState, nested
from mtlbalance.wrappers.prioritize import PrioritizeState, prioritize
from mtlbalance.wrappers.regularize import RegularizeState, regularize
from mtlbalance.wrappers.skip_nonfinite import SkipNonfiniteState, skip_nonfinite
from mtlbalance.wrappers.skip_zero import SkipZeroState, skip_zero
from mtlbalance.wrappers.switch import SwitchState, switch
from mtlbalance.wrappers.transform_rows import TransformRowsState, transform_rows
from mtlbalance.wrappers.transform_weights import TransformWeightsState, transform_weights

__all__ = [
    "AmortizeState",
    "CRMOGMState",
    "ChainState",
    "LearnState",
    "NestedState",
    "PrioritizeState",
    "RegularizeState",
    "SkipNonfiniteState",
    "SkipZeroState",
    "SwitchState",
    "TransformRowsState",
    "TransformWeightsState",
    "amortize",
    "chain",
    "checked",
    "cr_mogm",
    "freeze",
    "learn",
    "nested",
    "prioritize",
    "regularize",
    "skip_nonfinite",
    "skip_zero",
    "switch",
    "transform_rows",
    "transform_weights",
]
