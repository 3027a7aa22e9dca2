"""The examples run to the end at tiny size, print their table, and make their picture if they have one."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

# What makes it small, and what it must print.
TINY = {
    "quickstart": (["--epochs", "1"], "On the test images"),
    "sweep": (["--steps", "10"], "On the test images"),
    "pareto_front": (["--steps", "10"], "lie between them"),
    "toy_pareto": (["--steps", "100", "--methods", "sum", "UW", "ConFIG"], "Arrived from all starts"),
    "train_loop": (["--epochs", "1", "--steps", "2"], "what changed in epochs 1 to 1"),
    "flax_nnx": (["--epochs", "1", "--steps", "2"], "what changed in epochs 1 to 1"),
    "equinox_mlp": (["--epochs", "1", "--steps", "2"], "what changed in epochs 1 to 1"),
    "instance_wise": (["--epochs", "1"], "Losses of single examples and tasks"),
    "grouping": (["--epochs", "1"], "On the test images"),
    "recurrent": (["--epochs", "1"], "On the test images, by rows read"),
    "mixed_precision": (["--epochs", "1"], "On the test images, and in the gradients"),
}
WITHOUT_PICTURE = ("mixed_precision",)


def test_every_example_is_run():
    assert TINY.keys() == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.by_default("toy_pareto")
@pytest.mark.parametrize("name", TINY)
def test_example_runs(name, tmp_path):
    arguments, expected = TINY[name]
    picture = tmp_path / "picture.png"
    arguments = arguments if name in WITHOUT_PICTURE else [*arguments, "--output", picture]
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert name in WITHOUT_PICTURE or picture.stat().st_size > 10_000
