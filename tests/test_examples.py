"""The examples run to the end at tiny size, print their table, and make their picture if they have one."""

import argparse
import ast
import functools
import importlib
import os
import pathlib
import runpy
import subprocess
import sys

import distributed
import numpy as np
import pinn
import pytest
import show

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"

# What makes it small, and what it must print.
TINY = {
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
# What makes it smaller yet and is no argument: names in the example, and their values.
TWO_STEPS = {"STEPS_PER_EPOCH": 2}
SMALLER = {
    "own_method": TWO_STEPS,
    "constrained": TWO_STEPS,
    "instance_wise": TWO_STEPS,
    "mixed_precision": TWO_STEPS,
    "grouping": TWO_STEPS | {"WATCHED_BATCHES": 2},
    "recurrent": TWO_STEPS | {"N_SEEDS": 2},
    "pinn": {"Plan": functools.partial(pinn.Plan, seeds=2, weights=(1, 10))},
    "sweep": {"TEMPERATURES": np.array([0.02, 20]), "SEEDS": np.arange(2)},
    "two_stages": {"SEEDS": 2},
    "energy_forces": {"N_TRAIN": 8, "N_VALID": 8, "N_TEST": 8},
    "language_model": {"BATCH_SIZE": 4, "MICROBATCHES": 2},
    "reinforcement_learning": {"EPISODES": 2, "HORIZON": 4},
}
WITHOUT_PICTURE = ("mixed_precision", "distributed")
# In processes of their own: what the README begins with, and what starts threads or processes. The others share what is
# imported and compiled, which is most of their time.
IN_A_PROCESS = ("quickstart", "compare", "distributed")
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
    assert {"minimal", *TINY, *MODULES} == {path.stem for path in EXAMPLES.glob("*.py")}


def run_in_a_process(name, arguments):
    quickly = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quickly)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(name, arguments, monkeypatch, capsys):
    """As ``python examples/NAME.py`` does, but for the import."""
    example = importlib.import_module(name)
    for constant, value in SMALLER.get(name, {}).items():
        monkeypatch.setattr(example, constant, value)
    example.main(arguments)
    return capsys.readouterr().out


@pytest.mark.unoptimized
@pytest.mark.usefixtures("users_broadcast")
@pytest.mark.by_default("own_method")
@pytest.mark.parametrize("name", TINY)
def test_example_runs(name, tmp_path, monkeypatch, capsys):
    arguments, expected = TINY[name]
    picture = tmp_path / "picture.png"
    arguments = arguments if name in WITHOUT_PICTURE else [*arguments, "--output", str(picture)]
    if name in IN_A_PROCESS:
        printed = run_in_a_process(name, arguments)
    else:
        printed = run_here(name, arguments, monkeypatch, capsys)
    assert expected in printed
    assert name in WITHOUT_PICTURE or picture.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.unoptimized
@pytest.mark.usefixtures("users_broadcast")
def test_the_minimal_example_runs(monkeypatch, capsys):
    """It has no arguments: of its steps the first ten."""
    monkeypatch.setattr("tqdm.tqdm", lambda keys: keys[:10])
    runpy.run_path(str(EXAMPLES / "minimal.py"), run_name="__main__")
    assert "On other images" in capsys.readouterr().out


def test_every_example_is_a_script():
    """And calls ``main`` without arguments, as nothing here does."""
    for name in TINY:
        script = (EXAMPLES / f"{name}.py").read_text()
        assert script.endswith('if __name__ == "__main__":\n    main()\n'), name
        (main,) = (x for x in ast.parse(script).body if isinstance(x, ast.FunctionDef) and x.name == "main")
        assert len(main.args.args) == len(main.args.defaults), name


@pytest.mark.slow
def test_a_picture_goes_where_git_ignores_it():
    """So that the first command of the README changes no tracked file."""
    command = ["git", "check-ignore", show.arguments("Help", "quickstart.py").parse_args([]).output]
    done = subprocess.run(command, cwd=EXAMPLES, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_loop", "flax_nnx", "equinox_mlp"])
def test_help_is_its_own(name, capsys):
    """The first line of the example's docstring, also where the loop is another one's."""
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(name).main(["--help"])
    assert stopped.value.code == 0
    about = ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())).splitlines()[0]
    assert about in " ".join(capsys.readouterr().out.split())


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
