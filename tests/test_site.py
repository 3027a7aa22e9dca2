"""The site's pages: their code runs, their links lead somewhere, and every method and public name is in them."""

import ast
import re
import sys

import numpy as np
import pytest
from compare_tables import NAMES, called

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.bad_values import TABLES, cases_of
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.pages import DOCS, README, ROOT, blocks_of, dead_links, imported, not_ours

sys.path.append(str(DOCS / "_ext"))

import method_pages
import shown
import toy

MADE = [*map(method_pages.file_of, method_pages.rows())]  # when the site is built
FOLDERS = ["", "start", "guides", "coming_from", "api"]
PAGES = {path.relative_to(DOCS).as_posix(): path for folder in FOLDERS for path in sorted((DOCS / folder).glob("*.md"))}
PAGES |= {f"{folder}/index.md": DOCS / folder / "index.md" for folder in ("methods", "examples")}
TEXTS = {page: path.read_text() for page, path in PAGES.items()}
BLOCKS = {name: block for page, text in TEXTS.items() for name, block in blocks_of(page, text)}
# A block that imports what it uses runs as it stands, others are parts of programs. What the README has runs there.
WHOLE = [name for name, block in BLOCKS.items() if [*imported(block)] and f"```python\n{block}```" not in README]


# The first training step runs with many methods, in `test_first_step.py`.
@pytest.mark.by_default(
    "guides/parts_of_a_model.md-A trunk with heads",
    "guides/training_steps.md-A training step with a scalarizer",
    "guides/training_steps.md-A training step with an aggregator",
    "guides/composing.md-Rows*",
)
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.usefixtures("users_broadcast")
def test_code_block_runs_on_its_own(name):
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", BLOCKS)
def test_code_block_is_python(name):
    ast.parse(BLOCKS[name])


@pytest.mark.parametrize("page", TEXTS)
def test_every_code_block_is_found(page):
    assert len([*blocks_of(page, TEXTS[page])]) == TEXTS[page].count("```python\n")


@pytest.mark.parametrize("page", TEXTS)
def test_names_of_ours_are_there(page):
    assert not_ours(TEXTS[page]) == []


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    assert dead_links(PAGES[page], MADE) == []


def test_every_page_is_in_the_tree():
    trees = {page: re.findall(r"```{toctree}\n(.*?)```", text, re.DOTALL) for page, text in TEXTS.items()}
    lines = [(PAGES[page].parent, line) for page in trees for line in "\n".join(trees[page]).splitlines()]
    named = lambda line: re.sub(r".*<(.*)>", r"\1", line)
    entries = {(folder / named(line)).resolve() for folder, line in lines if line and not line.startswith(":")}
    pages = {path.with_suffix("") for path in [*PAGES.values(), *(DOCS / "recipes").glob("*.md")]}
    assert pages - entries == {DOCS / "index"}


def test_every_public_name_has_a_page():
    assert shown.without_page() == []


def test_a_public_name_without_a_page_is_found(monkeypatch):
    monkeypatch.setattr(mtl, "nowhere", lambda: None, raising=False)
    monkeypatch.setattr(mtl, "__all__", [*mtl.__all__, "nowhere"])
    assert shown.without_page() == ["mtlbalance.nowhere"]


@pytest.mark.parametrize("family", [scalarization, aggregation], ids=["scalarization", "aggregation"])
def test_every_method_has_its_rows(family):
    name = family.__name__.rpartition(".")[-1]
    methods = {f"{name}.{public}" for public in family.__all__ if public.islower()}
    assert methods == {row for row in method_pages.rows() if row.startswith(f"{name}.")}
    assert all(len(form) == 7 for method in methods for form in method_pages.rows()[method])
    columns = TABLES[name]
    for case in cases_of(name):
        found = method_pages.bad_values(f"{name}.{case}")
        assert found and {value for value, _ in found} <= set(columns), case


def test_how_to_choose_names_every_method():
    begin = TEXTS["start/choose.md"].partition("## Where to begin\n")[2].partition("\n## ")[0]
    methods = {info.name for info in mtl.methods()}
    assert methods - set(re.findall(r"`(\w+)[`(]", begin)) == set()


@pytest.mark.parametrize(("family", "cases"), [("scalarization", SCALARIZERS), ("aggregation", AGGREGATORS)])
def test_the_table_of_methods_has_the_totals_that_are_tested(family, cases):
    table = TEXTS["methods/index.md"]
    rows = re.findall(rf"^\| `{family}\.(\w+)\(.*?\| (?:.*?) \| (?:.*?) \| (.*?) \|", table, re.MULTILINE)
    assert len(rows) > 20
    totals = {case.name: case.total for case in cases}
    for name, total in rows:
        assert totals[name] == (total if total in ("1", "m") else None), name


def test_every_example_is_in_the_list():
    named = re.findall(r"\]\(\.\./\.\./examples/(\w+\.py)\)", TEXTS["examples/index.md"])
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {*named}


TORCHJD_PAGES = [
    "Basic usage",
    "IWRM",
    "IWMTL",
    "Partial Jacobian",
    "Multi-task",
    "Recurrent",
    "Monitoring",
    "Lightning",
    "mixed precision",
    "Grouping",
]


@pytest.mark.parametrize("page", TORCHJD_PAGES)
def test_every_example_page_of_torchjd_has_its_counterpart(page):
    table = TEXTS["coming_from/torchjd.md"].partition("| TorchJD's page | here |")[2].partition("\n\n")[0]
    (row,) = [line for line in table.splitlines() if page in line]
    assert re.search(r"\]\(\.\./(guides|\.\./examples)/", row.split("|")[2])


def test_a_page_has_what_is_known_of_a_method(monkeypatch):
    monkeypatch.setattr(toy, "draw", lambda paths, output: None)
    text = method_pages.page("aggregation.excess_mtl")
    for part in (
        ".. autofunction:: mtlbalance.aggregation.excess_mtl\n",
        ".. autoclass:: mtlbalance.aggregation.ExcessMTLState\n",
        "| makes | one gradient per task → one gradient |",
        "| keeps | log-weights",
        "| source | [He et al. 2024]",
        "| gradient 0 | shorter |",
        "../toy/aggregation.excess_mtl-",
        "(../../guides/devices.md)",
    ):
        assert part in text, part


def test_measurements_of_a_method_are_on_its_page(monkeypatch, tmp_path):
    table = "| method | a |\n|---|---|\n| `uw_o` | 1 |\n| `scalarization.uw()` | 2 |\n| sum | 3 |\n"
    (tmp_path / "evidence.md").write_text(f"# Evidence\n\n{table}\nAnd so on.\n")
    monkeypatch.setattr(method_pages, "DOCS", tmp_path)
    found = method_pages.measured("scalarization.uw")
    assert "| method | a |\n|---|---|\n| `scalarization.uw()` | 2 |\n\nFrom [evidence]" in found
    assert method_pages.measured("aggregation.upgrad") == ""


def test_rows_that_compare_writes_are_of_a_method():
    """By the names that it gives them, which have no code around them."""
    lines = [f"| {i + 1:2} {called(name)} | 0.1 |" for i, name in enumerate(method_pages.CASES)]
    lines.append(f"|    {called('aggregation.krum')}: needs 3 tasks | |")
    for name in "scalarization.sum", "aggregation.sum", "scalarization.famo", "aggregation.upgrad", "aggregation.krum":
        own = [line for line in lines if method_pages.is_of(line, name)]
        assert len(own) == (2 if name.endswith("krum") else name not in NAMES)
        linked = method_pages.with_links("evidence", "\n".join(own))
        assert linked.count(f"](/methods/{name.replace('.', '/')}.md)") == len(own)


def test_the_paths_are_those_of_the_example():
    recorded = {*np.load(toy.RECORDED)}
    runs = {run for found in toy.runs().values() for run in found}
    assert runs == {*toy.example().METHODS}
    assert recorded == runs | {run + toy.ARRIVED for run in runs}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["constant (10, 1)", "FAMO", "Nash-MTL"])
def test_the_paths_are_what_the_methods_do(run):
    """To half precision, for the starts below the ravines, in which rounding decides where a path goes."""
    example, recorded = toy.example(), np.load(toy.RECORDED)
    paths = example.trace_paths(example.METHODS[run], toy.N_STEPS)[:, :: toy.EVERY]
    below = [list(example.STARTS).index(start) for start in "DE"]
    np.testing.assert_allclose(recorded[run][below], paths[below], atol=0.02)
