"""No public method escapes the conformance checks, nor does a float hyperparameter."""

import inspect
import typing

import pytest

from mtlbalance import aggregation, scalarization
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.conformance import conftest

FAMILIES = [(scalarization, SCALARIZERS), (aggregation, AGGREGATORS)]


def methods(family):
    return [name for name in family.__all__ if name.islower()]


@pytest.mark.parametrize(("family", "cases"), FAMILIES)
def test_every_public_method_is_in_the_catalogue(family, cases):
    assert set(methods(family)) <= {case.name for case in cases}


def takes_float(parameter):
    """Whether one number will do, also where there may be one for each task."""
    return isinstance(parameter.default, float) or float in typing.get_args(parameter.annotation)


@pytest.mark.parametrize(("family", "cases"), FAMILIES)
def test_every_float_hyperparameter_is_swept(family, cases):
    """In the row of the method, or in one whose name goes on after a hyphen."""
    for name in methods(family):
        parameters = inspect.signature(getattr(family, name), eval_str=True).parameters.values()
        rows = [case for case in cases if case.name.split("-")[0] == name]
        swept = {hyperparameter for case in rows for hyperparameter in case.hyperparameters}
        assert {x.name for x in parameters if takes_float(x)} <= swept, f"catalogue: {name} sweeps only {swept}"


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
