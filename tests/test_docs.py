"""The recipes' code blocks that import what they use run as they stand; parts of other programs are parsed."""

import importlib.util

import numpy as np
import pytest

from tests.pages import DOCS, blocks_of, dead_links, imported, not_ours

RECIPES = {path.stem: path.read_text() for path in sorted((DOCS / "recipes").glob("*.md"))}
# What no extra installs: a block that imports one of these is tried by hand, with the versions that its page names.
NOT_INSTALLED = ("metaworld_algorithms",)


BLOCKS = {name: block for page, text in RECIPES.items() for name, block in blocks_of(page, text)}


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
    assert not_ours(RECIPES[page]) == []


@pytest.mark.parametrize("page", RECIPES)
def test_links_lead_somewhere(page):
    assert dead_links(DOCS / "recipes" / f"{page}.md") == []


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
