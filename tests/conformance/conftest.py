"""Runs every check on every case of the catalogue: a check takes ``built``, ``scalarizer`` or ``aggregator``."""

from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.conformance.helpers import Built

BUILT = [Built(case, "scalarization") for case in SCALARIZERS] + [Built(case, "aggregation") for case in AGGREGATORS]


def pytest_generate_tests(metafunc):
    """``built`` stands for every case, ``scalarizer`` and ``aggregator`` for those of one family."""
    families = {"built": None, "scalarizer": "scalarization", "aggregator": "aggregation"}
    for argument in families.keys() & set(metafunc.fixturenames):
        chosen = [b for b in BUILT if families[argument] in (None, b.family)]
        metafunc.parametrize(argument, chosen, ids=[f"{b.family}-{b.case.name}" for b in chosen])
