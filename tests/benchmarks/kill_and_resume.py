"""Kills ``examples/train_loop.py`` at random times until it has died often enough, and compares what it resumes to.

Each time the same command is given again, which goes on from its last checkpoint. A run that comes to its end must
print the table of one that was never killed, and have saved the same parameters, states and history, bit by bit::

    python tests/benchmarks/kill_and_resume.py --kills 50

It needs ``mtlbalance[examples]``.
"""

import argparse
import collections
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

LOOP = Path(__file__).parents[2] / "examples" / "train_loop.py"
GOING_ON = re.compile(r"going on after epoch (\d+)\n")


class Loop:
    """The command with its files in a folder."""

    def __init__(self, folder, args):
        self.folder = folder
        self.command = [sys.executable, LOOP, args.method, "--epochs", f"{args.epochs}", "--steps", f"{args.steps}"]
        # Compiling is most of a start: programs are kept, so that more of the time is training and saving.
        cache = {
            "JAX_COMPILATION_CACHE_DIR": f"{folder / 'programs'}",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.environment = os.environ | cache

    def start(self, checkpoints, seconds=None):
        """What it prints; ``None`` if it was killed before it came to its end."""
        given = ["--checkpoints", checkpoints, "--output", self.folder / "picture.png"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*self.command, *given], env=self.environment, **pipes)
        try:
            printed, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        if process.returncode:
            raise SystemExit(f"it does not go on from {os.listdir(checkpoints)}:\n{errors}")
        return printed


def saved(folder):
    """The last epoch, and what was saved then."""
    with ocp.CheckpointManager(folder) as checkpoints:
        last = checkpoints.latest_step()
        args = ocp.args.Composite(carry=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
        found = checkpoints.restore(last, args=args)
    return last, [np.asarray(x).tobytes() for x in jax.tree.leaves(found.carry)], found.run


def check_same(name, found, expected):
    if found != expected:
        raise SystemExit(f"{name} of a run that was killed:\n{found}\nand of one that was not:\n{expected}")


def kill_often(folder, args):
    """How often a start was killed, came to its end, and went on after which epoch."""
    rng, loop, counts, after = random.Random(args.seed), Loop(folder, args), collections.Counter(), []
    began = time.monotonic()
    table = loop.start(folder / "straight")
    seconds, expected = time.monotonic() - began, saved(folder / "straight")
    with tqdm(total=args.kills, unit="kill") as progress:
        printed = None
        while counts["killed"] < args.kills or printed is None:
            checkpoints = folder / f"run-{counts['came to its end']}"
            is_over = counts["killed"] == args.kills
            printed = loop.start(checkpoints, None if is_over else rng.uniform(0, seconds))
            if printed is None:
                counts["killed"] += 1
                progress.update()
                continue
            counts["came to its end"] += 1
            after += map(int, GOING_ON.findall(printed))
            check_same("the table", GOING_ON.sub("", printed), table)
            check_same("what was saved", saved(checkpoints), expected)
            check_same("the folder", sorted(os.listdir(checkpoints)), sorted(os.listdir(folder / "straight")))
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
    ends = counts["came to its end"]
    print(f"{counts['killed']} kills; {ends} runs came to their end, to the same table and numbers")
    print(f"the last starts of these went on after the epochs {after} of {args.epochs}")


if __name__ == "__main__":
    main()
