"""Every measurement beside another library, by one command, and the table of it in README and docs.

Run by hand: ``python tests/benchmarks/all.py --clones FOLDER``, on two cores with nothing else to do (``taskset -c
0,1`` on a larger machine): about a quarter of an hour. It writes ``docs/benchmarks.md`` and README's "Speed", between
their markers. Needs the ``parity`` extra (torch, torchjd) and tqdm; for more peers

* ``pip install cooper-optim==1.0.1`` (Cooper);
* ``pip install cvxpy cvxopt`` (EPO's official program, which LibMOON runs too, and LibMTL's Nash-MTL);
* ``pip install scipy "qpsolvers[quadprog]"`` (LibMTL's CAGrad, FairGrad and UPGrad);
* in FOLDER, clones of dbmptr/EPOSearch, median-research-group/LibMTL and facebookresearch/encodec, each in a folder of
  its name.

A row whose peer is not there says so. Each part runs in a process of its own, by turns with its peer: see
``interleave.py``. ``--quick`` takes a few rounds of a few rows of each part, prints the table and writes nothing.
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import tables
from interleave import Row
from tqdm import tqdm


class Part(NamedTuple):
    title: str
    module: str  # has `measure(rounds, quick)`, which yields rows
    peer: str = "TorchJD"
    folder: str | None = None  # of the clones, what `measure` is given as `folder`; "." for all of them
    env: dict[str, str] = {}  # noqa: RUF012


PARTS = [
    Part("training steps", "train_step"),
    Part(
        "training steps, XLA's default scheduler",
        "train_step",
        env={"XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=true"},
    ),
    Part("steps with a Jacobian", "autodiff"),
    Part("Gramian methods", "gramian_methods"),
    Part("GradDrop and the trimmed mean", "coordinatewise"),
    Part("ExcessMTL", "excess_mtl"),
    Part("LibMTL's rules", "libmtl_rules", "LibMTL", "."),
    Part("steps with two constraints", "constraints", "Cooper"),
    Part("EPO's weights", "epo", "EPOSearch, LibMOON", "."),
    Part("a generator's gradient", "gradient_shares", "EnCodec", "encodec"),
]


def rows_of(part, arguments):
    """In a process of its own: XLA's flags, and torch's threads, are one for a whole process."""
    command = [sys.executable, __file__, "--part", str(PARTS.index(part)), *sys.argv[1:]]
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, env=os.environ | part.env, stdout=subprocess.PIPE, stderr=said, text=True)
        for line in child.stdout:
            yield Row(**json.loads(line))
        if child.wait():
            said.seek(0)
            last = (said.read().strip().splitlines() or ["no word"])[-1]
            yield Row(part.title, "", part.peer, note=f"failed: {last}")


def measured(part, arguments):
    """What the process of one part yields."""
    keywords = {}
    if part.folder is not None:
        if arguments.clones is None:
            yield Row(part.title, "", part.peer, note="not run: `--clones` not given")
            return
        keywords["folder"] = arguments.clones / part.folder
    try:
        module = importlib.import_module(part.module)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(arguments.threads)
        yield from module.measure(3 if arguments.quick else arguments.rounds, arguments.quick, **keywords)
    except (ImportError, FileNotFoundError) as error:
        yield Row(part.title, "", part.peer, note=f"not run: {error}")


def main(arguments):
    rows, progress = [], tqdm(PARTS)
    for part in progress:
        progress.set_description(part.title)
        for row in rows_of(part, arguments):
            rows.append(row)
            progress.set_postfix_str(row.what)
            progress.write(f"{row.group}: {row.what}: {row.note or tables.digits(row.median)}")
    if arguments.quick:
        print(tables.whole(rows), tables.short(rows), sep="\n\n")
    else:
        tables.write(rows, arguments.threads, arguments.rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    parser.add_argument("--clones", type=Path, help="the folder of clones, see the docstring")
    parser.add_argument("--quick", action="store_true", help="a few rows, written nowhere")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part is None:
        main(arguments)
    else:
        with contextlib.redirect_stdout(sys.stderr):  # the scripts' own prints
            for row in measured(PARTS[arguments.part], arguments):
                print(json.dumps(row._asdict()), file=sys.__stdout__, flush=True)
