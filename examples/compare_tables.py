"""The statistics of ``compare.py``, its tables and its picture. No script: it imports them."""

import csv
import re
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import show
from compare_jobs import Job
from matplotlib.ticker import LogLocator
from scipy import stats

EQUAL, FIXED = "scalarization.sum", "scalarization.constant"
NAMES = {EQUAL: "equal weights (sum)", FIXED: "fixed weights, tuned (constant)"}
LEVEL = 0.05
AT_EDGE, AGGREGATOR = "†", "∇ "


# The statistics.


class Paired(NamedTuple):
    """A mean difference over seeds.

    Attributes:
      mean: the difference.
      low, high: the ends of its interval of 95%.
      p: of the two-sided t-test that it is 0.
    """

    mean: float
    low: float
    high: float
    p: float


def paired(difference):
    """The paired t-test of ``scipy.stats.ttest_rel``, also where all differences are the same."""
    n, mean = len(difference), float(np.mean(difference))
    error = standard_error(difference)
    if error == 0:
        return Paired(mean, mean, mean, float(mean == 0))
    half = stats.t.ppf(1 - LEVEL / 2, n - 1) * error
    return Paired(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, n - 1)))


def standard_error(x, axis=0):
    return np.std(x, axis=axis, ddof=1) / np.sqrt(np.shape(x)[axis])


def holm(p_values):
    """Holm's correction: the smallest level at which each hypothesis is rejected while all are tested."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1)
    return corrected


# What was found.


class Distance(NamedTuple):
    """The difference of a method's scores to a baseline's.

    Attributes:
      paired: of the seeds.
      p: with Holm's correction over all methods.
      verdict: whether the method is better or worse at the corrected 5% level, or neither.
    """

    paired: Paired
    p: float
    verdict: str


class Row(NamedTuple):
    """A method on a job; metrics and scores are of seeds, and the less a score, the better."""

    name: str
    kept: dict[str, Any]
    knob: str
    metrics: np.ndarray
    scores: np.ndarray
    to_fixed: Distance
    to_equal: Distance


class Found(NamedTuple):
    """All that was found on a job.

    Attributes:
      job: which.
      rows: the methods, the best first.
      unable: names of methods that cannot be called, and the number of tasks that they need.
      single: the metric of each task trained alone.
    """

    job: Job
    rows: list[Row]
    unable: dict[str, int]
    single: np.ndarray


def find(job, entries, kept):
    """The rows of one job, with what is tested over all of them."""
    single = np.array(kept["single"][1])
    able = [entry for entry in entries if entry.name in kept]
    metrics = {entry.name: np.array(kept[entry.name]["metrics"]) for entry in able}
    scores = {name: job.score(x, single) for name, x in metrics.items()}
    to_fixed, to_equal = (distances(scores, baseline, job.smallest) for baseline in (FIXED, EQUAL))
    rows = [
        Row(e.name, kept[e.name], e.knob, metrics[e.name], scores[e.name], to_fixed[e.name], to_equal[e.name])
        for e in able
    ]
    unable = {entry.name: entry.fewest_tasks for entry in entries if entry.name not in kept}
    return Found(job, sorted(rows, key=lambda row: np.mean(row.scores)), unable, single)


def distances(scores, baseline, smallest):
    """Of all methods to one of them, which are as many hypotheses as there are others."""
    found = {name: paired(x - scores[baseline]) for name, x in scores.items()}
    others = [name for name in found if name != baseline]
    corrected = dict(zip(others, holm([found[name].p for name in others]), strict=True)) | {baseline: 1.0}

    def verdict(name):
        # Two methods that are one but for rounding may differ surely, and by nothing that a table shows.
        is_found = corrected[name] <= LEVEL and abs(found[name].mean) >= smallest
        return ("better" if found[name].mean < 0 else "worse") if is_found else ""

    return {name: Distance(found[name], float(corrected[name]), verdict(name)) for name in scores}


# As text.


def called(name):
    """A method's name without its family; which of two families the mark says."""
    return NAMES.get(name) or name.replace("scalarization.", "").replace("aggregation.", AGGREGATOR)


def with_error(x, digits):
    return f"{np.mean(x):.{digits}f} ± {standard_error(x):.{digits}f}"


def cells_of_distance(found, distance, with_interval):
    """How far it is from a baseline, and how sure that is."""
    mean, low, high, _ = distance.paired
    text = (lambda x: f"{x:+.1f}") if found.job.single else (lambda x: f"{10**x:.2f}")
    interval = f" [{text(low)}, {text(high)}]" if with_interval else ""
    return [f"{text(mean)}{interval}", f"{distance.verdict} {distance.p:.2g}".strip()]


def cells_of(found, i, row):
    kept, edges = row.kept, row.kept["edges"]
    scores = [with_error(row.metrics[:, 0], 3)]
    if found.job.single:
        scores = [with_error(row.scores, 1), *(f"{x:.3g}" for x in np.mean(row.metrics, axis=0))]
    fixed = ["", ""] if row.name == FIXED else cells_of_distance(found, row.to_fixed, with_interval=True)
    equal = ["", ""] if row.name == EQUAL else cells_of_distance(found, row.to_equal, with_interval=False)
    rate = f"{kept['rate']:.2g}{AT_EDGE * ('learning rate' in edges)}"
    knob = f"{row.knob} {kept['value']:.3g}{AT_EDGE * (row.knob in edges)}" if row.knob else ""
    diverged = f" ({kept['diverged']} diverged)" if kept["diverged"] else ""
    return [f"{i:2} {called(row.name)}{diverged}", *scores, *fixed, *equal, rate, knob, f"{kept['times_plain']:.1f}"]


def columns_of(found):
    scores = ["Δm, %", *found.job.metrics] if found.job.single else ["error"]
    unit = "to" if found.job.single else "times"
    return ["   method", *scores, f"{unit} fixed", "p", f"{unit} equal", "p", "rate", "tuned", "time"]


def table_of(found):
    """The cells of all rows, the methods that cannot be called last."""
    columns = columns_of(found)
    rows = [cells_of(found, i + 1, row) for i, row in enumerate(found.rows)]
    unable = [[f"   {called(name)}: needs {n} tasks", *[""] * (len(columns) - 1)] for name, n in found.unable.items()]
    return columns, rows + unable


def about(found):
    """What the numbers of a table are."""
    job, n_seeds = found.job, len(found.rows[0].scores)
    n_tested = len(found.rows) - 1
    if job.single:
        alone = ", ".join(f"{name} {x:.3g}" for name, x in zip(job.metrics, found.single, strict=True))
        scores = (
            "Δm: relative change against tasks that are trained alone, averaged over the tasks; worse is positive. "
            "left, right: accuracy. sum: mean absolute error. To fixed, to equal: the difference of Δm to that of "
            "fixed weights that are tuned, and of equal ones. "
            f"Trained alone: {alone}."
        )
    else:
        scores = (
            "Error: of the solution, relative. Times fixed, times equal: the geometric mean over seeds of a method's "
            "error over that of fixed weights that are tuned, or equal ones, as errors range over decades. No Δm: "
            "alone, the boundary is met by u = 0."
        )
    rest = (
        f"{n_seeds} seeds, mean and standard error; in brackets the interval of 95%. p: paired t-test, by Holm's "
        f"correction for {n_tested} methods; better and worse are at the corrected 5% level, by what a table can show. "
        f"{AT_EDGE}: the best was the last one tried on one side. Time: of a step, over that of the plain sum. "
        f"{AGGREGATOR.strip()}: an aggregator."
    )
    return f"{scores} {rest}"


def bears(found):
    """What a table bears at the corrected level, in words."""
    lines = []
    for baseline, name in (("tuned fixed weights", "to_fixed"), ("equal weights", "to_equal")):
        for verdict in ("better", "worse"):
            rows = [called(row.name) for row in found.rows if getattr(row, name).verdict == verdict]
            lines.append(f"* {verdict} than {baseline}: {', '.join(rows) or 'none'}")
    return "\n".join(lines)


def write_csv(path, found):
    of_distance = ["difference", "low", "high", "p", "p_holm"]
    fields = ["method", "score", "standard_error"]
    fields += [f"{name}_to_{baseline}" for baseline in ("fixed", "equal") for name in of_distance]
    fields += [
        "learning_rate",
        "knob",
        "value",
        "tried",
        "edges",
        "diverged",
        "microseconds",
        "times_plain",
        *found.job.metrics,
        "scores",
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields)
        for row in found.rows:
            kept, metrics = row.kept, np.mean(row.metrics, axis=0)
            numbers = [np.mean(row.scores), standard_error(row.scores)]
            numbers += [*row.to_fixed.paired, row.to_fixed.p, *row.to_equal.paired, row.to_equal.p]
            tuned = [
                kept["rate"],
                row.knob,
                kept["value"],
                kept["tried"],
                " and ".join(kept["edges"]),
                kept["diverged"],
            ]
            times = [kept["microseconds"], kept["times_plain"]]
            scores = " ".join(f"{x:.6g}" for x in row.scores)
            numbers, times, metrics = ([f"{x:.6g}" for x in part] for part in (numbers, times, metrics))
            writer.writerow([row.name, *numbers, *tuned, *times, *metrics, scores])
        writer.writerows([name, f"needs {n} tasks"] for name, n in found.unable.items())
    print(f"{found.job.title}: {path}")


def write_markdown(path, all_found):
    """Puts each job's table between the page's marks of its name, and leaves the rest of the page as it is."""
    page = path.read_text()
    for name, found in all_found.items():
        columns, rows = table_of(found)
        lines = [columns, ["---"] * len(columns), *rows]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        begin, end = f"<!-- {name}: made by compare.py -->", f"<!-- {name}: end -->"
        new = f"{begin}\n\n{bears(found)}\n\n{about(found)}\n\n{table}\n\n{end}"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{path}: expected the marks {begin} and {end}, found none")
        page = pattern.sub(new.replace("\\", r"\\"), page)
    path.write_text(page)
    print(f"The tables: {path}")


# The picture.


def draw(axes, all_found):
    """Each method's distance to fixed weights with its interval, the same method on the same line for all jobs."""
    ranks = {}
    for found in all_found.values():
        for i, row in enumerate(found.rows):
            ranks.setdefault(row.name, []).append(i)
    names = sorted(ranks, key=lambda name: np.mean(ranks[name]))
    places = {name: len(names) - i for i, name in enumerate(names)}
    colors = {"better": "#009E73", "worse": "#D55E00", "": "0.6"}
    for ax, found in zip(axes, all_found.values(), strict=True):
        for row in found.rows:
            distance = np.array(row.to_fixed.paired[:3])
            x, low, high = distance if found.job.single else 10.0**distance
            color = "black" if row.name == FIXED else colors[row.to_fixed.verdict]
            ax.plot([low, high], [places[row.name]] * 2, color=color, linewidth=2)
            ax.plot(x, places[row.name], "o", color=color, markersize=5)
        ax.axvline(0 if found.job.single else 1, color="black", linewidth=1)
        ax.set_title(found.job.title, fontsize=12)
        if found.job.single:
            ax.set_xscale("symlog", linthresh=10)
            ax.set_xlabel("Δm less that of\ntuned fixed weights, points")
        else:
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            ax.xaxis.set_minor_formatter("")
            ax.set_xlabel("error over that of\ntuned fixed weights")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_ylim(0, len(names) + 1)
    axes[0].set_yticks([places[name] for name in names], map(called, names), fontsize=10)
    return colors


def show_all(all_found, output, markdown):
    for found in all_found.values():
        columns, rows = table_of(found)
        show.print_table(found.job.title, columns, rows, about(found), width=190)
        output.parent.mkdir(parents=True, exist_ok=True)
    for name, found in all_found.items():
        write_csv(output.with_name(f"{output.stem}_{name}.csv"), found)
    height = 2 + 0.2 * max(len(found.rows) for found in all_found.values())
    size = {"figsize": (8.6, height), "sharey": True, "squeeze": False}
    with show.picture(output, "The distances to fixed weights", 1, len(all_found), **size) as (fig, axes):
        colors = draw(axes[0], all_found)
        texts = {"better": "better at the corrected 5% level", "worse": "worse", "": "neither"}
        handles = [plt.Line2D([], [], color=colors[key], marker="o", label=text) for key, text in texts.items()]
        fig.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
        fig.supxlabel(
            f"left is better. {AGGREGATOR.strip()}: an aggregator. Bars: intervals of 95%, each for itself", fontsize=10
        )
    if markdown:
        write_markdown(markdown, all_found)
