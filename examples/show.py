"""What the examples share of arguments, progress, tables and pictures. No script: they import it."""

import argparse
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

OUTPUT = Path(__file__).parent / "output"  # git ignores it

# Of models that read the digits, as `digits.evaluate` finds them.
SCORES = ("left ↑", "right ↑", "sum ↓")
ABOUT_SCORES = "left, right: accuracy. sum: mean absolute error, in raw units."


def at_least_one(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def arguments(doc, script=None, seed=None, **counts):
    """A parser with an option for each count, whose value is the default; with ``--output`` for a script's picture."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    for name, default in counts.items():
        parser.add_argument(f"--{name}", type=at_least_one, default=default, help=f"{default} by default")
    if seed is not None:
        parser.add_argument("--seed", type=int, default=seed, help=f"{seed} by default")
    if script is not None:
        output = OUTPUT / f"{Path(script).stem}.png"
        parser.add_argument("--output", type=Path, default=output, help="the picture")
    return parser


def print_table(title, columns, rows, caption, width=None, **style):
    """The first column has names, the others numbers."""
    table = Table(title=title, caption=caption, caption_justify="left", **style)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def spread(x, digits=2, sign=""):
    """Mean and standard deviation (that of a sample), of numbers that have an entry for each seed."""
    return f"{np.mean(x):{sign}.{digits}f} ± {np.std(x, ddof=min(1, np.size(x) - 1)):.{digits}f}"


def format_scores(metrics):
    return [f"{metrics['left']:.1%}", f"{metrics['right']:.1%}", f"{metrics['sum']:.2f}"]


def in_parts(advance, carry, n_steps, progress, n_parts=20):
    """``advance(carry, steps)`` over all steps, in parts between which the bar moves.

    Returns:
      The last carry, and a list of what else each part returned.
    """
    outputs = []
    for steps in np.array_split(np.arange(n_steps), min(n_parts, n_steps)):
        carry, output = advance(carry, steps)
        outputs.append(output)
        progress.update(len(steps))
    return carry, outputs


@contextmanager
def picture(output, subject, n_rows=1, n_columns=1, layout="constrained", grid=True, **options):
    """Panels to draw in; afterwards they get a grid, the picture is saved, and its place printed."""
    fig, axes = plt.subplots(n_rows, n_columns, layout=layout, **options)
    yield fig, axes
    for ax in np.ravel(axes) if grid else ():
        ax.grid(alpha=0.3)
    output.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(output, dpi=100)
    plt.close(fig)
    print(f"{subject}: {output}")


def draw_curves(ax, x, curves, colors=None, **labels):
    """A curve for each name; thick below thin, so that all show where they coincide."""
    colors = [f"C{i}" for i in range(len(curves))] if colors is None else colors
    widths = np.linspace(3.5, 1.2, len(curves))
    for (name, y), color, width in zip(curves.items(), colors, widths, strict=True):
        ax.plot(x, y, color=color, linewidth=width, label=name)
    ax.set(**{"xlabel": "epoch"} | labels)
    ax.xaxis.get_major_locator().set_params(integer=True)


def draw_seeds(ax, x, found, **labels):
    """A point for each seed, and their mean; ``found`` is ``[x, seed]``."""
    points = ax.plot(x, found, "o", color="C0", alpha=0.35, markeredgewidth=0)
    points[0].set_label("one seed")
    ax.plot(x, np.mean(found, axis=1), color="C1", linewidth=2, label="mean of the seeds")
    ax.set(**labels)
