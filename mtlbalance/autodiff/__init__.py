"""Losses with their Jacobian, with its Gramian, and one training step for every method."""

from mtlbalance.autodiff.auto_lambda import AutoLambdaState, auto_lambda
from mtlbalance.autodiff.jacobian import value_and_gramian, value_and_jac
from mtlbalance.autodiff.ntk import diag_ntk, ntk_weights
from mtlbalance.autodiff.step import value_and_grad
from mtlbalance.autodiff.subsets import subset

__all__ = [
    "AutoLambdaState",
    "auto_lambda",
    "diag_ntk",
    "ntk_weights",
    "subset",
    "value_and_grad",
    "value_and_gramian",
    "value_and_jac",
]
