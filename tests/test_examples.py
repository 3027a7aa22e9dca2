"""The examples run to the end at tiny size, print their table, and make their picture if they have one."""

import argparse
import ast
import os
import pathlib
import subprocess
import sys

import distributed
import pytest
import show

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

# What makes it small, and what it must print.
TINY = {
    "minimal": ([], "On other images"),
    "own_method": (["--epochs", "1"], "On the test images"),
    "quickstart": (["--rounds", "1", "--seeds", "1"], "How far the solution is off"),
    "sweep": (["--steps", "10"], "On the test images"),
    "pareto_front": (["--steps", "10"], "lie between them"),
    "toy_pareto": (["--steps", "100", "--methods", "sum", "UW", "ConFIG"], "Arrived from all starts"),
    "train_loop": (["--epochs", "1", "--steps", "2"], "what changed in epochs 1 to 1"),
    "flax_nnx": (["--epochs", "1", "--steps", "2"], "what changed in epochs 1 to 1"),
    "equinox_mlp": (["--epochs", "1", "--steps", "2"], "what changed in epochs 1 to 1"),
    "instance_wise": (["--epochs", "1"], "Losses of single examples and tasks"),
    "grouping": (["--epochs", "1"], "On the test images"),
    "recurrent": (["--epochs", "1"], "On the test images, by rows read"),
    "two_stages": (["--steps", "5"], "How far the network is off"),
    "pinn": (["--steps", "5"], "Allen-Cahn until t = 0.5"),
    "compare": (["--quick", "--shorter", "250", "--methods", "uw", "krum"], "needs 3 tasks"),
    "constrained": (["--epochs", "1"], "What the sum's error costs the digits"),
    "energy_forces": (["--steps", "2", "--seeds", "1"], "On the test clusters"),
    "codec": (["--steps", "2", "--seeds", "1"], "On the test digits"),
    "language_model": (["--steps", "2", "--parts", "1", "--seeds", "2"], "What the auxiliary losses cost and bring"),
    "reinforcement_learning": (["--updates", "2", "--seeds", "2"], "The entropy bonus outside and inside"),
    "label_noise": (["--steps", "2", "--seeds", "2", "--widths", "4"], "where equal weights read"),
    "mixed_precision": (["--epochs", "1"], "On the test images, and in the gradients"),
    "distributed": (["--steps", "10"], "Relative distance at most"),  # and fails if it is more than rounding
}
WITHOUT_PICTURE = ("minimal", "mixed_precision", "distributed")
MODULES = (  # of what the others share
    "compare_jobs",
    "compare_methods",
    "compare_tables",
    "digits",
    "noisy_digits",
    "pinn_problems",
    "show",
)


def test_every_example_is_run():
    assert {*TINY, *MODULES} == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.by_default("own_method")
@pytest.mark.parametrize("name", TINY)
def test_example_runs(name, tmp_path):
    arguments, expected = TINY[name]
    picture = tmp_path / "picture.png"
    arguments = arguments if name in WITHOUT_PICTURE else [*arguments, "--output", picture]
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments]
    quickly = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quickly)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert name in WITHOUT_PICTURE or picture.stat().st_size > 10_000


@pytest.mark.slow
def test_a_picture_goes_where_git_ignores_it():
    """So that the first command of the README changes no tracked file."""
    command = ["git", "check-ignore", show.arguments("Help", "quickstart.py").parse_args([]).output]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_loop", "flax_nnx", "equinox_mlp"])
def test_help_is_its_own(name):
    """The first line of the example's docstring, also where the loop is another one's."""
    script = EXAMPLES / f"{name}.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    about = ast.get_docstring(ast.parse(script.read_text())).splitlines()[0]
    assert about in " ".join(done.stdout.split())


@pytest.mark.parametrize(("fails", "error"), [(True, "a process failed"), (False, "not done after 1 seconds")])
def test_of_two_processes_none_is_left_behind(fails, error, tmp_path, monkeypatch):
    """If the other one failed, or the time is up."""
    ends = "sys.exit(3) if sys.argv[-1] == '1' else time.sleep(60)" if fails else "time.sleep(60)"
    script = tmp_path / "process.py"
    write = f"pathlib.Path(r'{tmp_path}', sys.argv[-1]).write_text(str(os.getpid()))"
    script.write_text(f"import os, pathlib, sys, time\n{write}\n{ends}")
    monkeypatch.setattr(distributed, "__file__", str(script))
    with pytest.raises(SystemExit, match=error):
        distributed.run_processes(argparse.Namespace(steps=1, timeout=30 if fails else 1))
    for written in tmp_path.glob("[01]"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(written.read_text()), 0)
