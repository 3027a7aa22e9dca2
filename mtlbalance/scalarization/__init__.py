"""Losses to one scalar: one file per method."""

from mtlbalance.baselines import RandomState, SeenState
from mtlbalance.scalarization.constant import constant
from mtlbalance.scalarization.cosmos import cosmos
from mtlbalance.scalarization.dwa import DWAState, dwa
from mtlbalance.scalarization.famo import FAMOState, famo
from mtlbalance.scalarization.geometric_mean import geometric_mean
from mtlbalance.scalarization.imtl_l import IMTLLState, imtl_l
from mtlbalance.scalarization.mean import mean
from mtlbalance.scalarization.pbi import pbi
from mtlbalance.scalarization.random import random
from mtlbalance.scalarization.scale_invariant import scale_invariant
from mtlbalance.scalarization.stch import STCHState, stch
from mtlbalance.scalarization.sum import sum
from mtlbalance.scalarization.uw import UWState, uw

__all__ = [
    "DWAState",
    "FAMOState",
    "IMTLLState",
    "RandomState",
    "STCHState",
    "SeenState",
    "UWState",
    "constant",
    "cosmos",
    "dwa",
    "famo",
    "geometric_mean",
    "imtl_l",
    "mean",
    "pbi",
    "random",
    "scale_invariant",
    "stch",
    "sum",
    "uw",
]
