"""How everything here is timed: several ways to do some work by turns in one process, and the ratios of each round.

On a shared machine the time of a piece of work ranges over a factor of ten, and so does the ratio of two times taken
minutes apart. The median of ratios of times taken next to each other is steady.
"""

import statistics
import time
from typing import NamedTuple

HEADER = f"{'':32} {'ours':>10} {'TorchJD':>10} {'median of ratios':>17} {'of minima':>10} {'required':>9}"


# Seconds before a call of microseconds to some ms, in which the threads of the one before stop spinning: of two
# libraries in one process, the one that is not timed takes a core for about that long.
REST = 0.005


class Row(NamedTuple):
    """One comparison, as the table of ``all.py`` shows it: what is one piece of work here and there."""

    group: str
    what: str
    peer: str
    ours: float | None = None  # the shortest time, seconds
    theirs: float | None = None
    median: float | None = None  # how many times as fast ours is: of the rounds' ratios, and of the shortest times
    minima: float | None = None
    note: str = ""  # why there are no numbers


def compared(group, what, peer, ours, theirs, ours_count=1, theirs_count=1):
    """A :class:`Row` of the seconds of every round, of so many units of work each."""
    ours, theirs = [seconds / ours_count for seconds in ours], [seconds / theirs_count for seconds in theirs]
    ratio = median_of_ratios(theirs, ours)
    return Row(group, what, peer, min(ours), min(theirs), ratio, min(theirs) / min(ours))


def interleave(functions, rounds, rest=None):
    """The seconds that each function took in every round, by name.

    Args:
      functions: name to function of no arguments, which returns when its work is done.
      rounds: how often each is called, after one call to warm up. The one to go first changes from round to round.
      rest: seconds to wait before every turn, which then starts with one call more, as in a training.
    """
    names = list(functions)
    times = {name: [] for name in names}
    for name in names:
        functions[name]()
    for start in range(rounds):
        for turn in range(len(names)):
            name = names[(start + turn) % len(names)]
            if rest is not None:
                time.sleep(rest)
                functions[name]()
            before = time.perf_counter()
            functions[name]()
            times[name].append(time.perf_counter() - before)
    return times


def median_of_ratios(numerator, denominator):
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def row(name, ours, theirs, required, ours_count=1, theirs_count=1):
    """One line under :data:`HEADER`: the shortest times per unit of work, and how many times faster ours is.

    Args:
      name: what was timed.
      ours: our seconds of every round.
      theirs: TorchJD's.
      required: the ratio to reach.
      ours_count: how many units of work one of our times is.
      theirs_count: how many one of TorchJD's is.
    """
    found = compared("", name, "TorchJD", ours, theirs, ours_count, theirs_count)
    times = f"{1e3 * found.ours:7.4f} ms {1e3 * found.theirs:7.4f} ms"
    return f"{name:32} {times} {found.median:16.2f}x {found.minima:9.2f}x {required!s:>8}"
