"""The command that measures beside other libraries: the tables that it writes, and that what it runs is there."""

import ast
import importlib.util
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ROOT / "tests" / "benchmarks"
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/benchmarks.md")}


@pytest.fixture
def script(monkeypatch):
    """Scripts import each other by their folder, and under names that no test may keep."""
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)

    def load(name):
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        del sys.modules[name]


def rows_of(row):
    return [
        row("a step | b", "first", "TorchJD", 1e-3, 2e-3, 2.0, 2.1),
        row("a step", "second", "TorchJD", 1e-5, 8e-5, 8.0, 7.9),
        row("a step", "third", "TorchJD", note="does not run: no such rule"),
        row("Gramian methods, 3 tasks", "UPGrad", "TorchJD", 1e-3, 3e-3, 3.0, 3.0),
        row("c", "", "Cooper", note="not run: No module named 'cooper'"),
    ]


def cells(table):
    """Of each line, which must have as many as the header."""
    lines = [re.fullmatch(r"\| (.*) \|", line)[1].split(" | ") for line in table.splitlines()]
    assert set(lines[1]) == {"---"}
    assert {len(line) for line in lines} == {len(lines[0])}
    return lines[2:]


def test_every_row_is_in_the_table_and_every_kind_in_the_short_one(script):
    tables, rows = script("tables"), rows_of(script("interleave").Row)
    whole = cells(tables.whole(rows))
    assert [line[1] for line in whole] == ["first", "second", "third", "UPGrad", ""]
    assert whole[1][3:] == ["0.010", "0.080", "8.0", "7.9"]
    assert whole[4][3] == "not run: No module named 'cooper'"
    assert cells(tables.short(rows)) == [
        ["a step of a tiny MLP", "TorchJD", "4.0", "2.0 (a step / b: first), 8.0 (a step: second)"],
        ["one call of a method", "TorchJD", "3.0", ""],
        ["c", "Cooper", "not run: No module named 'cooper'", ""],
    ]


def test_work_that_was_measured_in_two_ways_counts_as_users_get_it(script):
    tables, row = script("tables"), script("interleave").Row
    rows = [row(f"a step{way}", "x", "TorchJD", median=m, minima=m) for way, m in (("", 8.0), (tables.DEFAULT, 2.0))]
    assert cells(tables.short(iter(rows))) == [["a step of a tiny MLP", "TorchJD", "2.0", ""]]


def test_ratios_are_of_what_there_over_what_here(script):
    """Of two libraries with one and ten pieces of work in a call."""
    row = script("interleave").compared("a", "b", "TorchJD", [2.0, 1.0, 4.0], [10.0, 20.0, 30.0], theirs_count=10)
    assert row[3:7] == (1.0, 1.0, 0.75, 1.0)


def test_the_table_is_written_between_the_markers_and_nowhere_else(script, monkeypatch, tmp_path):
    tables, rows = script("tables"), rows_of(script("interleave").Row)
    for name, text in PAGES.items():
        page = tmp_path / pathlib.Path(name).name
        page.write_text(text)
        monkeypatch.setattr(tables, "README" if name == "README.md" else "PAGE", page)
    for _ in range(2):  # what was written is written over
        tables.write(rows, threads=2, rounds=15)
    for name, text in PAGES.items():
        found = (tmp_path / pathlib.Path(name).name).read_text()
        assert text.partition(tables.BEGIN)[0] == found.partition(tables.BEGIN)[0]
        assert text.partition(tables.END)[2] == found.partition(tables.END)[2]
        assert found.count("not run: No module named 'cooper'") == 1
    for page in "no markers", f"{tables.END} {tables.BEGIN}":
        with pytest.raises(ValueError, match="once, and then"):
            tables.between_markers(page, "a table")


def test_the_readmes_table_is_that_of_the_page(script):
    """It can be made of it, and has six lines at most."""
    tables, rows = script("tables"), rows_of(script("interleave").Row)
    page = tables.between_markers(PAGES["docs/benchmarks.md"], f"When and where.\n\n{tables.whole(rows)}")
    assert tables.short(tables.rows_in(page)) == tables.short(rows)
    peers = [part.peer for part in script("all").PARTS]
    assert len({"training steps", "one call of a method"} | {*peers} - {"TorchJD"}) <= 6


def test_what_stands_between_the_markers_is_a_table(script):
    tables = script("tables")
    for text in PAGES.values():
        written = text.partition(tables.BEGIN)[2].partition(tables.END)[0].strip()
        assert cells("\n".join(line for line in written.splitlines() if line.startswith("|")))
        assert "not measured" not in written


def test_the_conditions_name_versions_and_machine(script):
    said = script("tables").conditions(threads=2, rounds=15)
    assert re.match(r"\d{4}-\d\d-\d\d; Python 3\.\d+", said)
    assert "2 threads of PyTorch" in said
    assert "jax 0" in said


def test_every_part_can_be_measured(script):
    """Without importing it: the peers are not installed where tests run."""
    for part in script("all").PARTS:
        tree = ast.parse((SCRIPTS / f"{part.module}.py").read_text())
        (measure,) = [node for node in tree.body if getattr(node, "name", "") == "measure"]
        names = [arg.arg for arg in measure.args.args]
        assert names[:2] == ["rounds", "quick"], part.module
        assert ("folder" in [arg.arg for arg in measure.args.kwonlyargs]) == (part.folder is not None), part.module
        assert any(isinstance(node, ast.Yield | ast.YieldFrom) for node in ast.walk(measure)), part.module


def test_links_of_the_page_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", PAGES["docs/benchmarks.md"])
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_without_a_peer_the_row_says_so(script, monkeypatch):
    every, argued = script("all"), type("Arguments", (), {"clones": None, "quick": True, "threads": 1})
    (row,) = every.measured(every.PARTS[-1], argued)
    assert row.note == "not run: `--clones` not given"
    monkeypatch.setitem(sys.modules, "cooper", None)
    (row,) = every.measured(every.Part("steps", "constraints", "Cooper"), argued)
    assert "cooper" in row.note
