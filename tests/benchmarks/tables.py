"""The tables that ``all.py`` writes into README and docs, between two markers: no number is copied by hand.

``python tests/benchmarks/tables.py`` makes the README's once more, of the one in ``docs/benchmarks.md``.
"""

import datetime
import math
import os
import platform
import re
import statistics
import subprocess
from importlib import metadata
from pathlib import Path

from interleave import Row

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- begin: tests/benchmarks/all.py -->", "<!-- end: tests/benchmarks/all.py -->"
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "torch", "torchjd", "cooper-optim", "cvxpy", "cvxopt", "qpsolvers")


def between_markers(text, new):
    """The text with what stands between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ValueError(f"expected {BEGIN!r} once, and then {END!r} once")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{new.strip()}\n\n{END}{after}"


def commits(clones):
    """Of the libraries that are cloned and not installed."""
    found = []
    for folder in sorted(path.parent for path in clones.glob("*/.git")) if clones else ():
        command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        found.append(f"{folder.name} {subprocess.run(command, capture_output=True, text=True).stdout.strip()}")
    return found


def conditions(threads, rounds, clones=None):
    """When, with what and on what the numbers were taken."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    versions = ", ".join([f"Python {platform.python_version()}", *versions, *commits(clones)])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{cpu()}, {cores} cores, {threads} threads of PyTorch, {platform.system()}"
    return f"{datetime.date.today()}; {versions}; {machine}; {rounds} rounds."


def cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    in_a_cell = lambda text: " ".join(text.split()).replace("|", "/")
    return "\n".join(f"| {' | '.join(map(in_a_cell, line))} |" for line in lines)


def whole(rows):
    """Every row, in the order in which they were measured."""
    cells = [
        [row.group, row.what, row.peer, row.note, "", "", ""]
        if row.note
        else [row.group, row.what, row.peer, *map(digits, (1e3 * row.ours, 1e3 * row.theirs, row.median, row.minima))]
        for row in rows
    ]
    times = "here, ms", "there, ms", "times as fast: median of ratios", "of minima"
    return table(["work", "which", "against", *times], cells)


# Of work that was measured with another setting of XLA too, what users get counts.
DEFAULT = ", XLA's default scheduler"
# What a step or a call is made of, which nobody runs alone.
PIECES = re.compile("^a step on the sum|^a bare call|^the Gramian and the weighted sum|without the Gramian")


def short(rows):
    """A line for each kind of work and peer: the geometric mean, and between what it lies."""
    rows = list(rows)
    kinds, groups = {}, {row.group for row in rows}
    for row in rows:
        if not PIECES.search(row.group) and row.group + DEFAULT not in groups:
            kinds.setdefault((kind(row), row.peer), []).append(row)
    cells = []
    for (work, peer), members in kinds.items():
        found = [row for row in members if not row.note]
        if not found:
            cells.append([work, peer, members[0].note, ""])
            continue
        least, most = min(found, key=lambda row: row.median), max(found, key=lambda row: row.median)
        ends = f"{end(least)}, {end(most)}" if len(found) > 1 else ""
        cells.append([work, peer, digits(statistics.geometric_mean(row.median for row in found)), ends])
    return table(["work", "against", "times as fast", "lowest, highest"], cells)


def kind(row):
    """The README's word for what a row's group is one of: beside TorchJD whole steps, or calls of a method."""
    if row.peer != "TorchJD":
        return row.group.partition(",")[0]
    if row.group.startswith("a step balanced by UPGrad"):
        return "a step of a wide MLP, by UPGrad"
    return "a step of a tiny MLP" if re.match("a |training|steps", row.group) else "one call of a method"


def end(row):
    """The ratio of a row, and what it is of its kind."""
    group = row.group.removeprefix(kind(row)).removesuffix(DEFAULT).strip(", ")
    which = ": ".join(filter(None, (group, row.what)))
    return f"{digits(row.median)} ({which})"


def digits(x):
    """Two or three that mean something, never as a power of ten."""
    return f"{x:.0f}" if x >= 100 else f"{x:.{max(0, 1 - math.floor(math.log10(x)))}f}"


def write(rows, threads, rounds, clones=None):
    about = conditions(threads, rounds, clones)
    PAGE.write_text(between_markers(PAGE.read_text(), f"{about}\n\n{whole(rows)}"))
    write_short()


def write_short():
    """The README's table from the page's."""
    README.write_text(between_markers(README.read_text(), short(rows_in(PAGE.read_text()))))


def rows_in(text):
    """The rows of the whole table that the page has, without their times."""
    lines = text.partition(BEGIN)[2].partition(END)[0].splitlines()
    _, _, *cells = [line[2:-2].split(" | ") for line in lines if line.startswith("|")]
    for group, what, peer, here, _, median, minima in cells:
        if median.strip():
            yield Row(group, what, peer, median=float(median), minima=float(minima))
        else:
            yield Row(group, what, peer, note=here)


if __name__ == "__main__":
    write_short()
