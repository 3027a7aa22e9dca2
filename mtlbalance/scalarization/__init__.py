"""Losses to one scalar: one file per method."""

from mtlbalance.baselines import RandomState, SeenState
from mtlbalance.scalarization.constant import constant
from mtlbalance.scalarization.dwa import DWAState, dwa
from mtlbalance.scalarization.imtl_l import IMTLLState, imtl_l
from mtlbalance.scalarization.mean import mean
from mtlbalance.scalarization.random import random
from mtlbalance.scalarization.sum import sum
from mtlbalance.scalarization.uw import UWState, uw

__all__ = [
    "DWAState",
    "IMTLLState",
    "RandomState",
    "SeenState",
    "UWState",
    "constant",
    "dwa",
    "imtl_l",
    "mean",
    "random",
    "sum",
    "uw",
]
