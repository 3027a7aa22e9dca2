"""No public method escapes the conformance checks."""

import pytest

from mtlbalance import aggregation, scalarization
from tests.catalogue import AGGREGATORS, SCALARIZERS


@pytest.mark.parametrize(("family", "cases"), [(scalarization, SCALARIZERS), (aggregation, AGGREGATORS)])
def test_every_public_method_is_in_the_catalogue(family, cases):
    methods = {name for name in family.__all__ if name.islower()}
    assert methods <= {case.name for case in cases}
