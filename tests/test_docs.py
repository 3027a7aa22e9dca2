"""The recipes' code blocks that import what they use run as they stand; parts of other programs are parsed."""

import ast
import importlib.util
import pathlib
import re

import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

ROOT = pathlib.Path(__file__).parent.parent
RECIPES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "recipes").glob("*.md"))}
OURS = {"mtl": mtl, "aggregation": aggregation, "scalarization": scalarization}
# What no extra installs: a block that imports one of these is tried by hand, with the versions that its page names.
NOT_INSTALLED = ("metaworld_algorithms",)


def blocks_of(page, text):
    """By page and heading."""
    for section in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
        heading = section.partition("\n")[0]
        for i, block in enumerate(re.findall(r"```python\n(.*?)```", section, re.DOTALL)):
            yield f"{page}-{heading}" + (f" {i}" if i else ""), block


BLOCKS = {name: block for page, text in RECIPES.items() for name, block in blocks_of(page, text)}


def imported(block):
    for node in ast.walk(ast.parse(block)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from (name.partition(".")[0] for name in names)


WHOLE = [name for name, block in BLOCKS.items() if [*imported(block)]]


@pytest.mark.by_default("language_models-GDPO")
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.usefixtures("users_broadcast")
def test_code_block_runs_on_its_own(name):
    for package in {*imported(BLOCKS[name])} & {*NOT_INSTALLED}:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    exec(compile(BLOCKS[name], name, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", RECIPES)
def test_names_of_ours_are_there(page):
    """Also in the blocks that are not run, and in diffs."""
    named = re.findall(rf"\b({'|'.join(OURS)})\.(\w+)", RECIPES[page])
    assert [f"{module}.{name}" for module, name in named if not hasattr(OURS[module], name)] == []


@pytest.mark.parametrize("page", RECIPES)
def test_links_lead_somewhere(page):
    files = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", RECIPES[page])}
    folder = ROOT / "docs" / "recipes"
    assert [file for file in files if file and not file.startswith("http") and not (folder / file).exists()] == []


# By their own lines, in float32: NVlabs/GDPO b080e63, `trl/trainer/grpo_trainer.py`; and "normalize_then_sum" of trl
# 1.16.0, which agrees with it where no reward is missing. (The former takes such a one for 0.)
REWARDS = np.array([[[1, 0.2], [0, 0.9], [1, 0.4]], [[0, 0.3], [1, 0.1], [0, 0.8]]], np.float32)
SOME_MISSING = np.where([[[0, 0], [1, 0], [0, 0]], [[0, 0], [0, 0], [1, 1]]], np.nan, REWARDS)
GDPO = {
    "official": (REWARDS, [[0.2819314, -1.0483788, 0.7664475], [-1.2509633, 1.2906369, -0.03967342]]),
    "trl, some missing": (SOME_MISSING, [[-0.96032274, 1.2804302, -0.32010755], [-0.81668955, 0.81668967, 0.0]]),
}


@pytest.mark.parametrize(("rewards", "expected"), GDPO.values(), ids=GDPO)
@pytest.mark.unoptimized
@pytest.mark.usefixtures("users_broadcast")
def test_gdpo_is_that_of_its_sources(rewards, expected):
    variables = {}
    exec(BLOCKS["language_models-GDPO"], variables)
    np.testing.assert_allclose(variables["gdpo_advantages"](rewards, np.array([1, 0.5])), expected, atol=2e-6)
