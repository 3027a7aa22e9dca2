"""The tables that ``all.py`` writes into README and docs, between two markers: no number is copied by hand."""

import datetime
import math
import os
import platform
import statistics
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- begin: tests/benchmarks/all.py -->", "<!-- end: tests/benchmarks/all.py -->"
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "torch", "torchjd", "cooper-optim", "cvxpy", "cvxopt", "qpsolvers")


def between_markers(text, new):
    """The text with what stands between the markers replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"expected each of {BEGIN!r} and {END!r} once")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{new.strip()}\n\n{END}{after}"


def conditions(threads, rounds):
    """When, with what and on what the numbers were taken."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    versions = ", ".join([f"Python {platform.python_version()}", *versions])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{cpu()}, {cores} cores, {threads} threads of PyTorch, {platform.system()}"
    return f"{datetime.date.today()}; {versions}; {machine}; {rounds} rounds."


def cpu():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


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


def short(rows):
    """A line for each kind of work and peer: the geometric mean, and between what it lies."""
    groups = {}
    for row in rows:
        groups.setdefault((row.group, row.peer), []).append(row)
    cells = []
    for (group, peer), members in groups.items():
        found = [row for row in members if not row.note]
        if not found:
            cells.append([group, peer, members[0].note, ""])
            continue
        least, most = min(found, key=lambda row: row.median), max(found, key=lambda row: row.median)
        ends = f"{digits(least.median)} ({least.what}), {digits(most.median)} ({most.what})" if len(found) > 1 else ""
        cells.append([group, peer, digits(statistics.geometric_mean(row.median for row in found)), ends])
    return table(["work", "against", "times as fast", "lowest, highest"], cells)


def digits(x):
    """Two or three that mean something, never as a power of ten."""
    return f"{x:.0f}" if x >= 100 else f"{x:.{max(0, 1 - math.floor(math.log10(x)))}f}"


def write(rows, threads, rounds):
    about = conditions(threads, rounds)
    PAGE.write_text(between_markers(PAGE.read_text(), f"{about}\n\n{whole(rows)}"))
    README.write_text(between_markers(README.read_text(), short(rows)))
