"""Type checkers understand a user's script: no error in a right one, and one in each line of another that is wrong."""

import importlib.util
import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import pytest

import mtlbalance

SCRIPTS = pathlib.Path(__file__).parent / "typing"
ROOT = str(pathlib.Path(mtlbalance.__file__).parents[1])
FILES = "user_script.py wrong_script.py"

# As for an installed package, whose own code is not checked; optax has no types for mypy.
INTERPRETER = sys.executable
CHECKERS = {
    "pyrefly": f"check --preset=default --output-format=min-text --search-path={ROOT} "
    f"--python-interpreter-path={INTERPRETER} {FILES}",
    "mypy": "--follow-imports=silent --check-untyped-defs --disable-error-code=import-untyped "
    f"--python-executable={INTERPRETER} {FILES}",
    "pyright": f"--pythonpath={INTERPRETER} -p .",
    "basedpyright": f"--pythonpath={INTERPRETER} -p .",
}


@pytest.mark.by_default("*pyrefly*")
@pytest.mark.parametrize("checker", CHECKERS)
def test_errors_stand_where_they_should(checker, tmp_path):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    for script in FILES.split():
        shutil.copy(SCRIPTS / script, tmp_path)
    settings = {"typeCheckingMode": "basic", "extraPaths": [ROOT]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", checker, *CHECKERS[checker].split()]
    environment = {"MYPYPATH": ROOT, "HOME": str(tmp_path)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    errors = [line for line in ran.stdout.splitlines() if re.search(r"\.py:\d+.* error: |ERROR |:\d+ - error", line)]
    found = {tuple(re.search(r"(\w+\.py):(\d+)", line).groups()) for line in errors}
    lines = (SCRIPTS / "wrong_script.py").read_text().splitlines()
    expected = {("wrong_script.py", str(n)) for n, line in enumerate(lines, 1) if "  # error: " in line}
    assert len(expected) >= 20 and found == expected, ran.stdout + ran.stderr


def test_the_right_script_runs(capsys):
    runpy.run_path(str(SCRIPTS / "user_script.py"))
    assert "scalarization.constant([1.0, 2.0])" in capsys.readouterr().out
