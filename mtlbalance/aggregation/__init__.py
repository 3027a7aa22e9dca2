"""Jacobian to gradient: one file per method."""

from mtlbalance.aggregation.aligned_mtl import aligned_mtl
from mtlbalance.aggregation.cagrad import cagrad
from mtlbalance.aggregation.config import config
from mtlbalance.aggregation.constant import constant
from mtlbalance.aggregation.cr_mogm import CRMOGMState, cr_mogm
from mtlbalance.aggregation.db_mtl import db_mtl
from mtlbalance.aggregation.dual_proj import dual_proj
from mtlbalance.aggregation.excess_mtl import ExcessMTLState, excess_mtl
from mtlbalance.aggregation.fairgrad import fairgrad
from mtlbalance.aggregation.gradvac import GradVacState, gradvac
from mtlbalance.aggregation.imtl_g import imtl_g
from mtlbalance.aggregation.krum import krum
from mtlbalance.aggregation.mean import mean
from mtlbalance.aggregation.mgda import mgda
from mtlbalance.aggregation.modo import MoDoState, modo
from mtlbalance.aggregation.nash_mtl import nash_mtl
from mtlbalance.aggregation.pcd import PCDState, pcd
from mtlbalance.aggregation.pcgrad import pcgrad
from mtlbalance.aggregation.random import random
from mtlbalance.aggregation.sdmgrad import SDMGradState, sdmgrad
from mtlbalance.aggregation.sum import sum
from mtlbalance.aggregation.upgrad import upgrad
from mtlbalance.baselines import RandomState, SeenState

__all__ = [
    "CRMOGMState",
    "ExcessMTLState",
    "GradVacState",
    "MoDoState",
    "PCDState",
    "RandomState",
    "SDMGradState",
    "SeenState",
    "aligned_mtl",
    "cagrad",
    "config",
    "constant",
    "cr_mogm",
    "db_mtl",
    "dual_proj",
    "excess_mtl",
    "fairgrad",
    "gradvac",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "modo",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "random",
    "sdmgrad",
    "sum",
    "upgrad",
]
