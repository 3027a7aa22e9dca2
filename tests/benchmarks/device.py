"""One accelerator, or a CPU, in under eight minutes: numbers, memory, steps, solvers and a sweep, as a page of tables.

Run by hand, in a clone, with a GPU: ``python tests/benchmarks/device.py --output device.md``. The page goes into the
docs as it is. Needs the ``test`` extra; with the ``parity`` extra, and a torch that sees the device, TorchJD is timed
too. ``--size small`` is for a CPU, and ends in about a minute. What does not fit into the memory, or the time left,
says so in its row, and what fails has its error there.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
from tqdm import tqdm

sys.path.append(str(Path(__file__).parents[2]))
import device_numbers
import device_times


class Size(NamedTuple):
    """How much is done.

    Attributes:
      most: recorded cases of each kind that are checked.
      shapes: tasks and coordinates of the Jacobians that are moved.
      tasks: how many the solvers get.
      layers: of the network whose step is timed; the last is the number of tasks.
      batch: its examples.
      models: in the sweep.
      n_steps: of a training, in one measurement.
      rounds: of interleaved measurements.
      methods: how many of every list, from its start.
    """

    most: int
    shapes: tuple[tuple[int, int], ...]
    tasks: tuple[int, ...]
    layers: tuple[int, ...]
    batch: int
    models: int
    n_steps: int
    rounds: int
    methods: int | None = None

    def some(self, names):
        return list(names)[: self.methods]


LARGE = ((3, 10**6), (8, 10**6), (40, 10**6), (3, 10**7), (40, 10**7), (3, 10**8), (8, 10**8), (40, 10**8))
SIZES = {
    "full": Size(12, LARGE, (2, 8, 32, 128, 256), (512, 2048, 2048, 8), 256, 1024, 100, 15),
    "small": Size(3, ((3, 10**5), (8, 10**5)), (2, 16), (16, 64, 64, 3), 64, 1024, 20, 5),
    "tiny": Size(1, ((3, 1000),), (2,), (4, 8, 3), 8, 4, 2, 1, 1),
}


PARTS = {
    "Numbers": device_numbers.correctness,
    "Memory": device_times.roofline,
    "Whole steps": device_times.steps,
    "Solvers": device_times.solver_times,
    "A sweep": device_times.sweep,
}


def table(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def done(label, job, n_columns, ends):
    """A row; whatever goes wrong is written into it, so that the others are not lost."""
    if time.monotonic() > ends:
        cells = ["no time left"]
    else:
        try:
            cells = job()
        except Exception as error:
            cells = [f"failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}".replace("|", "/")]
    return [label, *cells, *[""] * (n_columns - 1 - len(cells))]


def page(size, seconds):
    device, ends = jax.devices()[0], time.monotonic() + seconds
    parts = {title: part(size) for title, part in PARTS.items()}
    yield f"`{device.device_kind}`, {device.client.platform_version.split()[0]}, jax {jax.__version__}, float32"
    with tqdm(total=sum(len(jobs) for _, jobs in parts.values())) as bar:
        for title, (columns, jobs) in parts.items():
            rows = []
            for label, job in jobs:
                bar.set_description(f"{title}: {label}"[:50])
                rows.append(done(label, job, len(columns), ends))
                bar.update()
            yield f"### {title}\n\n{table(columns, rows)}"


def main(arguments):
    found = "\n\n".join(page(SIZES[arguments.size], arguments.seconds))
    print(found)
    if arguments.output:
        arguments.output.write_text(found + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="full", help="small: about a minute on a CPU")
    parser.add_argument("--seconds", type=float, default=420, help="after which no measurement is begun")
    parser.add_argument("--output", type=Path, help="file for the page, which is printed too")
    main(parser.parse_args())
