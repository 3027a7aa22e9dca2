"""Runs every check on every case of the catalogue: a check takes ``built``, ``scalarizer`` or ``aggregator``.

By default a check runs on one case of each kind, and one with the mark ``every_method`` on every public method; on all
others it is slow, unless the methods are a user's. Two marks say more. ``cases`` has a predicate: of the others the
check says nothing. ``one_of_a_kind("engine")`` is for what tests the engine, ``one_of_a_kind("boundary")`` the
boundary, which know no method by name and treat those that offer the same paths alike; one of the engine does without
other settings of a method.
"""

import importlib.util
from pathlib import Path

import pytest

from tests import catalogue
from tests.conformance.helpers import Built

FAMILIES = {"scalarizer": "scalarization", "aggregator": "aggregation"}
ARGUMENTS = {"built", *FAMILIES}
LISTS = {"SCALARIZERS": "scalarization", "AGGREGATORS": "aggregation"}


def pytest_configure(config):
    path = config.getoption("catalogue")
    config.built = build(vars(load(path) if path else catalogue), path)


def build(rows, path=None):
    """The cases in a catalogue, whose lists may be one only."""
    cases = [(case, family) for name, family in LISTS.items() for case in rows.get(name, ())]
    return [build_one(path, *case) for case in cases] or reject(path, "neither, or empty ones")


def build_one(path, case, family):
    try:
        return Built(case, family)
    except Exception as error:
        raise pytest.UsageError(f"--catalogue {path}: {case.name} cannot be built: {error}") from error


def load(path):
    if not Path(path).is_file():
        reject(path, "no such file")
    spec = importlib.util.spec_from_file_location("users_catalogue", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise pytest.UsageError(f"--catalogue {path}: {type(error).__name__}: {error}") from error
    return module


def reject(path, found):
    expected = "a Python file that defines SCALARIZERS or AGGREGATORS, lists of tests.catalogue.Case"
    raise pytest.UsageError(f"--catalogue {path}: expected {expected}, found {found}")


def pytest_generate_tests(metafunc):
    """``built`` stands for every case, ``scalarizer`` and ``aggregator`` for those of one family."""
    for argument in ARGUMENTS & set(metafunc.fixturenames):
        only = [mark.args[0] for mark in metafunc.definition.iter_markers("cases")]
        chosen = [
            built
            for built in metafunc.config.built
            if built.family == FAMILIES.get(argument, built.family) and all(holds(built) for holds in only)
        ]
        metafunc.parametrize(argument, chosen, ids=[f"{b.family}-{b.case.name}" for b in chosen])


def pytest_collection_modifyitems(config, items):
    """All checks of a method next to each other and in one process: what one compiles serves the next.

    After all other tests: there are many of these groups and each is small, so that two workers end together. What is
    compiled with all optimizations stands in the middle: where that changes all programs are forgotten.
    """
    found = [(method_of(item), item) for item in items]
    # A check for which a user's catalogue has no case would be reported as skipped.
    found = [(built, item) for built, item in found if built or not ARGUMENTS & set(getattr(item, "fixturenames", ()))]
    if not config.getoption("catalogue"):
        left_out = mark_slow([(built, item) for built, item in found if built is not None])
        found = [(built, item) for built, item in found if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    order = {None: -1} | {built: i for i, built in enumerate(config.built)}
    is_optimized = lambda item: item.get_closest_marker("unoptimized") is None
    place = lambda built, item: (built is not None, is_optimized(item) == (built is None), order[built])
    items[:] = [item for _, item in sorted(found, key=lambda pair: place(*pair))]


def mark_slow(found):
    """By default every check runs on one case of each kind, and what is said to on every public method.

    Returns the checks of the engine that run nowhere: on what is neither, and where the first case is slow already.
    """
    representatives, left_out = {}, set()
    for built, item in found:
        mark = item.get_closest_marker("one_of_a_kind")
        kind = built.paths if mark else built.kind
        first = representatives.setdefault((item.nodeid.split("[")[0], kind), built)
        is_another_setting = "-" in built.case.name
        if built is first or (item.get_closest_marker("every_method") and not is_another_setting):
            continue
        of_engine = mark is not None and mark.args == ("engine",)
        if of_engine and (is_another_setting or item.get_closest_marker("slow")):
            left_out.add(item)
        item.add_marker(pytest.mark.slow)
    return left_out


def method_of(item):
    """The case that a check runs on; ``None`` for other tests."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return next((value for value in params if isinstance(value, Built)), None)
