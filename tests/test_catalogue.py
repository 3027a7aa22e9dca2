"""No public method escapes the conformance checks, nor does a hyperparameter that may be traced."""

import inspect
import typing

import jax
import pytest

import mtlbalance as mtl
from mtlbalance.annotations import Number
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.conformance import conftest

CASES = {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}
# Each method with one of these compares it with a count of its calls.
COUNTED = "steps_per_epoch", "n_warmup_steps", "n_warmup_epochs"
METHODS = [pytest.param(info, id=info.full_name) for info in mtl.methods()]


@pytest.mark.parametrize("info", METHODS)
def test_every_public_method_is_in_the_catalogue_with_what_it_requires(info):
    (case,) = [case for case in CASES[info.family] if case.name == info.name]
    assert case.required.keys() == set(info.required)
    parameters = inspect.signature(info.factory, eval_str=True).parameters.values()
    assert case.names_task == next((each.name for each in parameters if each.annotation == int | str), None)


def takes_float(parameter):
    """Whether one number will do, also where there may be one for each task."""
    kinds = {parameter.annotation, *typing.get_args(parameter.annotation)}
    return isinstance(parameter.default, float) or bool({float, Number} & kinds)


def takes_count(parameter):
    """Whether it is an integer that may be traced; a key is swept as a seed."""
    kinds = set(typing.get_args(parameter.annotation))
    return {int, jax.Array} <= kinds and float not in kinds and parameter.name != "key"


@pytest.mark.parametrize("info", METHODS)
def test_every_hyperparameter_that_may_be_traced_is_swept(info):
    """In the row of the method, or in one whose name goes on after a hyphen."""
    parameters = inspect.signature(info.factory, eval_str=True).parameters.values()
    assert not any(x.name in COUNTED and not takes_count(x) for x in parameters)
    rows = [case for case in CASES[info.family] if case.name.split("-")[0] == info.name]
    swept = {hyperparameter for case in rows for hyperparameter in case.hyperparameters}
    assert {x.name for x in parameters if takes_float(x) or takes_count(x)} <= swept


@pytest.mark.parametrize("case", [*SCALARIZERS, *AGGREGATORS], ids=lambda case: case.name)
def test_every_sweep_compares(case):
    """A single value, or the same twice, would compare nothing."""
    assert all(len(set(values)) == len(values) > 1 for values in case.hyperparameters.values())


def test_a_catalogue_of_ones_own(tmp_path):
    """What ``pytest tests/conformance --catalogue FILE`` reads, and what it says of a file that is none."""
    file = tmp_path / "methods.py"
    file.write_text("from tests.catalogue import Case, following\nSCALARIZERS = [Case('mine', following)]\n")
    (built,) = conftest.build(vars(conftest.load(file)), file)
    assert (built.family, built.case.name) == ("scalarization", "mine")
    file.write_text("")
    with pytest.raises(pytest.UsageError, match=r"SCALARIZERS or AGGREGATORS.*found neither"):
        conftest.build(vars(conftest.load(file)), file)
    with pytest.raises(pytest.UsageError, match="found no such file"):
        conftest.load(tmp_path / "nothing.py")
