"""Kills ``examples/train_loop.py`` at random times until it has died often enough, and compares what it resumes to.

Each time the same command is given again, which goes on from its last checkpoint. A run that comes to its end must
print the table of one that was never killed, and have saved the same parameters, states and history, bit by bit::

    python tests/benchmarks/kill_and_resume.py --kills 50

Every start is a process of its own, forked from one that has imported what it needs and has done nothing yet: else most
of them would die while importing. It needs ``mtlbalance[examples]``.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

EXAMPLES = str(Path(__file__).parents[2] / "examples")
GOING_ON = re.compile(r"going on after epoch (\d+)\n")


def loop(argv, printed, errors):
    import train_loop  # which the process has from its birth

    with (
        printed.open("w") as out,
        errors.open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        train_loop.main(argv)


class Starts:
    """Starts of the loop with one command, each in a process of its own."""

    def __init__(self, folder, args):
        self.folder = folder
        self.argv = [args.method, "--epochs", f"{args.epochs}", "--steps", f"{args.steps}"]
        self.argv += ["--output", f"{folder / 'picture.png'}"]
        # Compiling is most of what is left of a start: programs are kept.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{folder / 'programs'}"
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        sys.path.insert(0, EXAMPLES)
        os.environ["PYTHONPATH"] = os.pathsep.join([EXAMPLES, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["train_loop"])

    def run(self, checkpoints, seconds=None):
        """What the loop prints; ``None`` if it was killed before it came to its end."""
        printed, errors = self.folder / "printed", self.folder / "errors"
        argv = [*self.argv, "--checkpoints", f"{checkpoints}"]
        process = self.processes.Process(target=loop, args=(argv, printed, errors))
        process.start()
        process.join(seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            return None
        if process.exitcode:
            raise SystemExit(f"it does not go on from {os.listdir(checkpoints)}: {errors.read_text()}")
        return printed.read_text()


def saved(folder):
    """The last epoch, and what was saved then."""
    with ocp.CheckpointManager(folder) as checkpoints:
        last = checkpoints.latest_step()
        args = ocp.args.Composite(carry=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
        found = checkpoints.restore(last, args=args)
    return last, [np.asarray(x).tobytes() for x in jax.tree.leaves(found.carry)], found.run


def found_in(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


def check_same(name, found, expected):
    if found != expected:
        raise SystemExit(f"{name} of a run that was killed:\n{found}\nand of one that was not:\n{expected}")


def kill_often(folder, args):
    """How often a start was killed or came to its end, and after which epochs the latter went on."""
    rng, starts, counts, after = random.Random(args.seed), Starts(folder, args), collections.Counter(), []
    began = time.monotonic()
    table = starts.run(folder / "straight")
    seconds, expected = time.monotonic() - began, saved(folder / "straight")
    with tqdm(total=args.kills, unit="kill") as progress:
        printed = None
        while counts["killed"] < args.kills or printed is None:
            checkpoints = folder / f"run-{counts['ended']}"
            is_over, began = counts["killed"] == args.kills, time.monotonic()
            printed = starts.run(checkpoints, None if is_over else rng.uniform(0, seconds))
            if printed is None:
                counts["killed"] += 1
                counts["while saving"] += any("tmp" in name for name in found_in(checkpoints))
                counts["after an epoch"] += any(name.isdecimal() for name in found_in(checkpoints))
                progress.update()
                continue
            counts["ended"] += 1
            if not GOING_ON.search(printed):  # a whole run, which did not compile as the first one did
                seconds = min(seconds, time.monotonic() - began)
            after += map(int, GOING_ON.findall(printed))
            check_same("the table", GOING_ON.sub("", printed), table)
            check_same("what was saved", saved(checkpoints), expected)
            # A kill while an older one is deleted leaves a part of that, which nobody goes on from.
            steps = found_in(folder / "straight")
            check_same("the folder", [name for name in found_in(checkpoints) if name in steps], steps)
    return counts, after


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--method", default="m_config", help="one that remembers gradients by default")
    parser.add_argument("--epochs", type=int, default=60, help="of a run, each of which is saved")
    parser.add_argument("--steps", type=int, default=2, help="of an epoch")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        counts, after = kill_often(Path(folder), args)
    print(f"{counts['killed']} kills; {counts['ended']} runs came to their end, to the same table and numbers")
    print(f"{counts['while saving']} kills left part of a checkpoint; {counts['after an epoch']} came after an epoch")
    print(f"the last starts of these went on after the epochs {after} of {args.epochs}")


if __name__ == "__main__":
    main()
