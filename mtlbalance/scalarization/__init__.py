"""Losses to one scalar: one file per method."""

from mtlbalance.scalarization.capu import CAPUState, capu
from mtlbalance.scalarization.causal import CausalState, causal
from mtlbalance.scalarization.coba import CoBaState, coba
from mtlbalance.scalarization.constant import constant
from mtlbalance.scalarization.cosmos import cosmos
from mtlbalance.scalarization.cov_weighting import CoVWeightingState, cov_weighting
from mtlbalance.scalarization.dtp import DTPState, dtp
from mtlbalance.scalarization.dwa import DWAState, dwa
from mtlbalance.scalarization.famo import FAMOState, famo
from mtlbalance.scalarization.first_loss import FirstLossState, first_loss
from mtlbalance.scalarization.geco import GECOState, geco
from mtlbalance.scalarization.geometric_mean import geometric_mean
from mtlbalance.scalarization.group_dro import GroupDROState, group_dro
from mtlbalance.scalarization.imtl_l import IMTLLState, imtl_l
from mtlbalance.scalarization.lagrangian import LagrangianState, lagrangian
from mtlbalance.scalarization.lbtw import LBTWState, lbtw
from mtlbalance.scalarization.mean import mean
from mtlbalance.scalarization.minmax import MinMaxState, minmax
from mtlbalance.scalarization.pbi import pbi
from mtlbalance.scalarization.random import random
from mtlbalance.scalarization.relobralo import ReLoBRaLoState, relobralo
from mtlbalance.scalarization.revised_uw import RevisedUWState, revised_uw
from mtlbalance.scalarization.scale_invariant import scale_invariant
from mtlbalance.scalarization.self_adaptive import SelfAdaptiveState, self_adaptive
from mtlbalance.scalarization.slaw import SLAWState, slaw
from mtlbalance.scalarization.softadapt import SoftAdaptState, softadapt
from mtlbalance.scalarization.stch import STCHState, stch
from mtlbalance.scalarization.sum import sum
from mtlbalance.scalarization.uw import UWState, uw
from mtlbalance.scalarization.uw_o import uw_o
from mtlbalance.scalarization.uw_so import uw_so
from mtlbalance.states import RandomState, SeenState

__all__ = [
    "CAPUState",
    "CausalState",
    "CoBaState",
    "CoVWeightingState",
    "DTPState",
    "DWAState",
    "FAMOState",
    "FirstLossState",
    "GECOState",
    "GroupDROState",
    "IMTLLState",
    "LBTWState",
    "LagrangianState",
    "MinMaxState",
    "RandomState",
    "ReLoBRaLoState",
    "RevisedUWState",
    "SLAWState",
    "STCHState",
    "SeenState",
    "SelfAdaptiveState",
    "SoftAdaptState",
    "UWState",
    "capu",
    "causal",
    "coba",
    "constant",
    "cosmos",
    "cov_weighting",
    "dtp",
    "dwa",
    "famo",
    "first_loss",
    "geco",
    "geometric_mean",
    "group_dro",
    "imtl_l",
    "lagrangian",
    "lbtw",
    "mean",
    "minmax",
    "pbi",
    "random",
    "relobralo",
    "revised_uw",
    "scale_invariant",
    "self_adaptive",
    "slaw",
    "softadapt",
    "stch",
    "sum",
    "uw",
    "uw_o",
    "uw_so",
]
