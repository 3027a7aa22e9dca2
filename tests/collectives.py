"""What a compiled program sends between devices, read from its text."""

import collections
import math
import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast|ragged-all-to-all"
COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({KINDS})(?:-start)?\(")
SHAPE = re.compile(r"\w+\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One operation: its kind, the shapes that come out, on each device, and how often it runs."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    times: int


def collectives_of(text: str) -> list[Collective]:
    """Those of a compiled program, by ``compiled.as_text()``; one in a loop runs as often as the loop."""
    found, calls, entry, name = collections.defaultdict(list), collections.defaultdict(list), None, None
    for line in text.splitlines():
        if start := COMPUTATION.match(line):
            name = start[1]
            entry = name if line.startswith("ENTRY") else entry
        elif collective := COLLECTIVE.search(line):
            shapes = tuple(tuple(map(int, filter(None, dims.split(",")))) for dims in SHAPE.findall(collective[1]))
            found[name].append((collective[2], shapes))
        else:
            trips = int(TRIPS.search(line)[1]) if TRIPS.search(line) else 1
            branches = [part.strip().lstrip("%") for part in ",".join(BRANCHES.findall(line)).split(",") if part]
            calls[name] += [(called, trips) for called in CALLED.findall(line) + branches]

    def run(name, times):
        own = [Collective(kind, shapes, times) for kind, shapes in found[name]]
        return own + [one for called, trips in calls[name] for one in run(called, times * trips)]

    return run(entry, 1)


def of_tasks(shape: tuple[int, ...], m: int) -> bool:
    """Whether that is m x m numbers, m or one: a Gramian, losses, weights, and no parameter with a longer axis."""
    return len(shape) <= 2 and max(shape, default=1) <= m


def of_parameters(text: str, m: int) -> list[Collective]:
    """The collectives of a program without what is of m tasks."""
    large = [one._replace(shapes=tuple(x for x in one.shapes if not of_tasks(x, m))) for one in collectives_of(text)]
    return [one for one in large if one.shapes]


def n_operations(collectives: list[Collective]) -> int:
    """How many run."""
    return sum(one.times for one in collectives)


def n_moved(collectives: list[Collective]) -> int:
    """How many numbers come out of all of them, on each device."""
    return sum(one.times * math.prod(shape) for one in collectives for shape in one.shapes)
