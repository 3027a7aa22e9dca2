"""Jacobian to gradient: one file per method."""

from mtlbalance.aggregation.aligned_mtl import aligned_mtl
from mtlbalance.aggregation.bloop import BloopState, bloop
from mtlbalance.aggregation.cagrad import cagrad
from mtlbalance.aggregation.config import config
from mtlbalance.aggregation.constant import constant
from mtlbalance.aggregation.cosine_gate import cosine_gate
from mtlbalance.aggregation.db_mtl import DBMTLState, db_mtl
from mtlbalance.aggregation.dual_proj import dual_proj
from mtlbalance.aggregation.epo import epo
from mtlbalance.aggregation.excess_mtl import ExcessMTLState, excess_mtl
from mtlbalance.aggregation.fairgrad import fairgrad
from mtlbalance.aggregation.grad_norm_weights import GradNormWeightsState, grad_norm_weights
from mtlbalance.aggregation.graddrop import graddrop
from mtlbalance.aggregation.gradient_shares import GradientSharesState, gradient_shares
from mtlbalance.aggregation.gradnorm import GradNormState, gradnorm
from mtlbalance.aggregation.gradvac import GradVacState, gradvac
from mtlbalance.aggregation.imtl_g import imtl_g
from mtlbalance.aggregation.inverse_dirichlet import InverseDirichletState, inverse_dirichlet
from mtlbalance.aggregation.krum import krum
from mtlbalance.aggregation.lr_annealing import LRAnnealingState, lr_annealing
from mtlbalance.aggregation.m_config import MConFIGState, m_config
from mtlbalance.aggregation.match_norm import MatchNormState, match_norm
from mtlbalance.aggregation.mean import mean
from mtlbalance.aggregation.mgda import mgda
from mtlbalance.aggregation.moco import MoCoState, moco
from mtlbalance.aggregation.modo import MoDoState, modo
from mtlbalance.aggregation.nash_mtl import nash_mtl
from mtlbalance.aggregation.pcd import PCDState, pcd
from mtlbalance.aggregation.pcgrad import pcgrad
from mtlbalance.aggregation.random import random
from mtlbalance.aggregation.sdmgrad import SDMGradState, sdmgrad
from mtlbalance.aggregation.sum import sum
from mtlbalance.aggregation.trimmed_mean import trimmed_mean
from mtlbalance.aggregation.upgrad import upgrad
from mtlbalance.states import RandomState, SeenState
from mtlbalance.wrappers.cr_mogm import CRMOGMState, cr_mogm

__all__ = [
    "BloopState",
    "CRMOGMState",
    "DBMTLState",
    "ExcessMTLState",
    "GradNormState",
    "GradNormWeightsState",
    "GradVacState",
    "GradientSharesState",
    "InverseDirichletState",
    "LRAnnealingState",
    "MConFIGState",
    "MatchNormState",
    "MoCoState",
    "MoDoState",
    "PCDState",
    "RandomState",
    "SDMGradState",
    "SeenState",
    "aligned_mtl",
    "bloop",
    "cagrad",
    "config",
    "constant",
    "cosine_gate",
    "cr_mogm",
    "db_mtl",
    "dual_proj",
    "epo",
    "excess_mtl",
    "fairgrad",
    "grad_norm_weights",
    "graddrop",
    "gradient_shares",
    "gradnorm",
    "gradvac",
    "imtl_g",
    "inverse_dirichlet",
    "krum",
    "lr_annealing",
    "m_config",
    "match_norm",
    "mean",
    "mgda",
    "moco",
    "modo",
    "nash_mtl",
    "pcd",
    "pcgrad",
    "random",
    "sdmgrad",
    "sum",
    "trimmed_mean",
    "upgrad",
]
