"""The examples run to the end at tiny size, and make their pictures."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
TINY = {"quickstart": ["--epochs", "1"], "sweep": ["--steps", "10"]}


def test_every_example_is_run():
    assert TINY.keys() == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_example_runs(name, tmp_path):
    picture = tmp_path / "picture.png"
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *TINY[name], "--output", picture]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "On the test images" in done.stdout
    assert picture.stat().st_size > 10_000
