"""The comparisons of ``test_golden.py`` against TorchJD itself, on new inputs. Skipped where it is not installed."""

import pytest

from tests.golden import comparisons

pytest.importorskip("torch", reason="needs the parity extra")
pytest.importorskip("torchjd", reason="needs the parity extra")

from tests.golden import record


@pytest.fixture(scope="module")
def fresh():
    return record.record(seed=1)


def test_baselines(fresh):
    for case in fresh["scalarizers"]:
        comparisons.check_baseline_scalarizer(case)
    for case in fresh["aggregators"]:
        comparisons.check_baseline_aggregator(case)


def test_uw(fresh):
    for case in fresh["uw"]:
        comparisons.check_uw(case)


def test_imtl_l(fresh):
    for case in fresh["imtl_l"]:
        comparisons.check_imtl_l(case)


def test_dwa(fresh):
    for case in fresh["dwa"]:
        comparisons.check_dwa(case)


def test_excess_mtl(fresh):
    for case in fresh["excess_mtl"]:
        for run in case["runs"]:
            comparisons.check_excess_mtl(case["jacobians"], run)


def test_stateless(fresh):
    for case in fresh["stateless"]:
        comparisons.check_stateless(case)


def test_famo(fresh):
    for case in fresh["famo"]:
        comparisons.check_famo(case)


def test_random(fresh):
    for case in fresh["random"]:
        comparisons.check_random(case)
