"""The page on numerics says what methods do with a zero, a negative number, NaN and an absent task, as was found."""

import pytest

from tests.bad_values import PAGE, TABLES, cases_of, table, trials, with_table

pytestmark = pytest.mark.unoptimized


@pytest.mark.slow
@pytest.mark.parametrize("family", TABLES)
def test_the_tables_are_what_the_methods_do(family):
    found = trials(family)
    assert table(family, found) in PAGE.read_text()
    assert {name for name, trial in found.items() if not trial.shows_nan()} <= {"trimmed_mean"}
    assert all(trial.leaves_out_the_absent() for trial in found.values())


@pytest.mark.parametrize("family", TABLES)
def test_a_table_is_written_where_it_stands(family):
    text = PAGE.read_text()
    written = with_table(text, family, "the new one")
    before, after = written.split("the new one")
    assert text.startswith(before) and text.endswith(after)
    old = text[len(before) : len(text) - len(after)].splitlines()
    assert all(line.startswith("|") for line in old) and len(old) == 2 + len(cases_of(family))
    assert before.endswith("\n\n") and after.startswith("\n\n")


@pytest.mark.parametrize("family", TABLES)
def test_the_tables_name_every_method(family):
    rows = PAGE.read_text().partition(f"| `{family}` |")[2].partition("\n\n")[0]
    assert [line.split("`")[1] for line in rows.splitlines()[2:]] == list(cases_of(family))
