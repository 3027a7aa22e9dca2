"""How everything here is timed: several ways to do some work by turns in one process, and the ratios of each round.

On a shared machine the time of a piece of work ranges over a factor of ten, and so does the ratio of two times taken
minutes apart. The median of ratios of times taken next to each other is steady.
"""

import statistics
import time

HEADER = f"{'':32} {'ours':>10} {'TorchJD':>10} {'median of ratios':>17} {'of minima':>10} {'required':>9}"


def interleave(functions, rounds):
    """The seconds that each function took in every round, by name.

    Args:
      functions: name to function of no arguments, which returns when its work is done.
      rounds: how often each is called, after one call to warm up. The one to go first changes from round to round.
    """
    names = list(functions)
    times = {name: [] for name in names}
    for name in names:
        functions[name]()
    for start in range(rounds):
        for turn in range(len(names)):
            name = names[(start + turn) % len(names)]
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
    ours = [seconds / ours_count for seconds in ours]
    theirs = [seconds / theirs_count for seconds in theirs]
    return (
        f"{name:32} {1e3 * min(ours):7.4f} ms {1e3 * min(theirs):7.4f} ms {median_of_ratios(theirs, ours):16.2f}x"
        f" {min(theirs) / min(ours):9.2f}x {required!s:>8}"
    )
