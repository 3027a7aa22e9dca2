"""Jacobian to gradient: one file per method."""

from mtlbalance.aggregation.constant import constant
from mtlbalance.aggregation.excess_mtl import ExcessMTLState, excess_mtl
from mtlbalance.aggregation.mean import mean
from mtlbalance.aggregation.random import random
from mtlbalance.aggregation.sum import sum
from mtlbalance.baselines import RandomState, SeenState

__all__ = [
    "ExcessMTLState",
    "RandomState",
    "SeenState",
    "constant",
    "excess_mtl",
    "mean",
    "random",
    "sum",
]
