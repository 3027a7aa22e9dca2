"""The README says what each method does with a zero, a negative number, NaN and an absent task, as it was found."""

import pathlib

import pytest

from tests.bad_values import TABLES, cases_of, table, trials

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
pytestmark = pytest.mark.unoptimized


@pytest.mark.slow
@pytest.mark.parametrize("family", TABLES)
def test_the_tables_are_what_the_methods_do(family):
    found = trials(family)
    assert table(family, found) in README
    assert {name for name, trial in found.items() if not trial.shows_nan()} <= {"trimmed_mean"}
    assert all(trial.leaves_out_the_absent() for trial in found.values())


@pytest.mark.parametrize("family", TABLES)
def test_the_tables_name_every_method(family):
    rows = README.partition(f"| `{family}` |")[2].partition("\n\n")[0]
    assert [line.split("`")[1] for line in rows.splitlines()[2:]] == list(cases_of(family))
