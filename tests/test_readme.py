"""Every code block of the README runs as it stands, and its tables name every method."""

import pathlib
import re
import subprocess
import sys

import pytest

import mtlbalance as mtl
from tests.catalogue import AGGREGATORS, SCALARIZERS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
HEADINGS = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block_below(heading):
    """The first one."""
    return re.search(r"```python\n(.*?)```", README.partition(f"# {heading}\n")[2], re.DOTALL)[1]


@pytest.mark.by_default("block-[0-4]")
@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{i}" for i in range(len(BLOCKS))])
@pytest.mark.usefixtures("users_broadcast")
def test_code_block_runs_on_its_own(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.slow
def test_the_template_of_a_method_passes_the_checks(tmp_path):
    """Of every method, with the row that stands below it."""
    blocks = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    template = tmp_path / "my_methods.py"
    template.write_text("\n".join(blocks))
    command = [sys.executable, "-m", "pytest", "tests/conformance", "--catalogue", template, "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50


def test_how_to_contribute_fits_a_hundred_lines():
    assert len(CONTRIBUTING.splitlines()) <= 100


def test_there_are_code_blocks():
    assert len(BLOCKS) >= 4


def test_links_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in HEADINGS}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert {link[1:] for link in links if link.startswith("#")} <= headings
    files = {link for link in links if not link.startswith(("#", "http"))}
    assert {f"docs/recipes/{page.name}" for page in (ROOT / "docs" / "recipes").glob("*.md")} <= files
    assert {f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py")} <= files
    assert all((ROOT / file).exists() for file in files)


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
    table = README.partition("| TorchJD's page | here |")[2].partition("\n\n")[0]
    (row,) = [line for line in table.splitlines() if page in line]
    assert re.search(r"\]\((#|examples/)", row.split("|")[2])


def test_method_table_names_every_method():
    named = re.findall(r"^\| `((?:scalarization|aggregation)\.\w+)\(", README, re.MULTILINE)
    assert set(named) == {info.full_name for info in mtl.methods()}


def test_where_to_begin_names_every_method():
    begin = README.partition("### Where to begin\n")[2].partition("\n### ")[0]
    methods = {info.name for info in mtl.methods()}
    assert methods - set(re.findall(r"`(\w+)[`(]", begin)) == set()


@pytest.mark.parametrize(("family", "cases"), [("scalarization", SCALARIZERS), ("aggregation", AGGREGATORS)])
def test_method_table_has_the_totals_that_are_tested(family, cases):
    rows = re.findall(rf"^\| `{family}\.(\w+)\(.*?\| (?:.*?) \| (?:.*?) \| (.*?) \|", README, re.MULTILINE)
    assert len(rows) > 20
    totals = {case.name: case.total for case in cases}
    for name, total in rows:
        assert totals[name] == (total if total in ("1", "m") else None), name
