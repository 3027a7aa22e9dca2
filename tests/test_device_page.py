"""The page that a person with a GPU makes, at its tiniest size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "benchmarks" / "device.py"


@pytest.mark.slow
def test_the_page_of_a_device_has_all_its_tables(tmp_path):
    """Every cell is there, nothing has failed, and what is checked is as expected."""
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--output", str(tmp_path / "page.md")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | quick)
    page = (tmp_path / "page.md").read_text()
    assert "failed" not in page
    assert "no time left" not in page
    tables = dict(part.split("\n\n", 1) for part in page.split("### ")[1:])
    assert list(tables) == ["Numbers", "Memory", "Whole steps", "Solvers", "A sweep"]
    for table in tables.values():
        columns, _, *rows = (line.strip("| ").split(" | ") for line in table.strip().splitlines())
        assert rows
        assert all(len(row) == len(columns) and all(row) for row in rows)
    for line in tables["Numbers"].strip().splitlines()[2:]:
        _, found, expected = line.strip("| ").split(" | ")
        below = expected.removeprefix("below ")
        assert found == expected or float(found) <= float(below), line
