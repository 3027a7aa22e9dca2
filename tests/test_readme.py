"""The README is short, its code runs as it stands, and what it names is there; so is what CONTRIBUTING.md has."""

import re
import subprocess
import sys

import pytest

import mtlbalance as mtl
from tests.pages import README, ROOT, blocks_of, dead_links, not_ours

BLOCKS = dict(blocks_of("README.md", README))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.usefixtures("users_broadcast")
def test_code_block_runs_on_its_own(name):
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "__main__"})


def test_there_is_a_step_and_a_method():
    assert [*BLOCKS] == ["README.md-A training step", "README.md-A method of your own"]
    assert all(len(block.splitlines()) <= 30 for block in BLOCKS.values())


def test_the_readme_fits_two_hundred_lines():
    assert len(README.splitlines()) <= 200


def test_names_of_ours_are_there():
    assert not_ours(README) == []


def test_links_and_pictures_lead_somewhere():
    assert dead_links(ROOT / "README.md") == []


def test_commands_that_are_named_are_there():
    scripts = re.findall(r"python ((?:examples|tests)/[\w/]+\.py)", README)
    assert len(scripts) >= 3
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_as_many_methods_as_it_says():
    assert int(re.search(r"(\d+) of them, by `python -c", README)[1]) == len(mtl.methods())


def test_every_picture_of_an_example_is_shown():
    shown = set(re.findall(r"examples/(\w+)\.png", README))
    assert shown == {path.stem for path in (ROOT / "examples").glob("*.png")}


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
