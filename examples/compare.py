"""Every method of the library on two real jobs, tuned alike, and against fixed weights that are tuned too.

The jobs (``compare_jobs.py``): two overlaid digits and their sum, three losses of which one is in units of its own; and
Helmholtz's equation by a network, from its residual and its boundary. The protocol, the same for every row:

* the learning rate and one hyperparameter (``compare_methods.py``) are tuned on validation data, with three seeds;
* where the best value is the first or the last one tried, the grid is widened on that side, at most twice;
* twenty other seeds are trained with what was best, and measured on test data. Seeds are paired: the same start and
  the same batches for all methods;
* the baselines are equal weights, ``sum``, and the best of a sweep of at least five fixed weights, ``constant``, whose
  weight is tuned as any other hyperparameter is;
* a method's difference to those fixed weights has an interval of 95%, a paired t-test, and Holm's correction over all
  methods of a job;
* no row is left out: a training that diverged counts as a model that has learnt nothing, a method that cannot be
  called for two tasks says so.

A method is an index into ``mtl.switch``, and its learning rate, hyperparameter and seed are arguments of a compiled
training: six programs for each job train all of them. Trainings run on all cores, one on each.

What came out is in ``docs/evidence.md``, where ``--markdown`` writes its tables.

Run it with ``python examples/compare.py``, which takes up to half an hour on two CPU cores, or ``--quick``, two minutes
of the same with next to no training. What is done is kept beside the picture, and a run that was stopped goes on. It
needs ``mtlbalance[examples]``.
"""

import hashlib
import itertools
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import compare_tables
import jax
import numpy as np
import show
from compare_jobs import JOBS, training
from compare_methods import Entry, alone, entries_for
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import scalarization

RATE_LIMITS = (1e-5, 1.0)
# One training on one core, and that in order: small programs are slower in parallel.
ONE_CORE = {"xla_cpu_multi_thread_eigen": False, "xla_cpu_enable_concurrency_optimized_scheduler": False}


class Plan(NamedTuple):
    """How much is tried.

    Attributes:
      rates: the first learning rates.
      every: of a method's first values every how many-th is tried.
      tuning_seeds, test_seeds: how many.
      widenings: how often a grid may grow.
      shortened: by which factor trainings are.
    """

    rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)
    every: int = 1
    tuning_seeds: int = 3
    test_seeds: int = 20
    widenings: int = 2
    shortened: int = 1


QUICK = Plan(rates=(3e-2,), every=2, tuning_seeds=1, test_seeds=3, widenings=0, shortened=20)


# The programs.


class Trainer:
    """Trains and measures the models of a job, by any of the methods that it has compiled."""

    def __init__(self, job, n_steps):
        self.job, self.n_steps, self.measure, self.programs = job, n_steps, None, {}

    def compile_measure(self):
        params = jax.eval_shape(self.job.init_params, jax.random.key(0))
        self.measure = jax.jit(self.job.measure).lower(params).compile(compiler_options=ONE_CORE)

    def compile(self, entries):
        """One program for methods of one kind."""
        given = np.int32(0), np.float32(0), np.float32(0), np.int32(0)
        program = jax.jit(training(self.job, entries, self.n_steps)).lower(*given).compile(compiler_options=ONE_CORE)
        self.programs |= {entry.name: (program, i) for i, entry in enumerate(entries)}

    def train(self, name, rate, value, seed):
        program, index = self.programs[name]
        return jax.block_until_ready(program(np.int32(index), np.float32(rate), np.float32(value), np.int32(seed)))

    def measured(self, *training):
        """On the data for validation and for the test, ``[2, n_metrics]``; not finite where it diverged."""
        return np.asarray(self.measure(self.train(*training)), np.float64)

    def seconds(self, *training):
        start = time.perf_counter()
        self.train(*training)
        return time.perf_counter() - start


PLAIN = Entry("plain sum", lambda value, key: scalarization.sum())  # whose steps the others' time is compared with


def compile_all(trainers, tables, workers):
    """Compiles all kinds of methods of all jobs."""
    tasks = []
    for name, trainer in trainers.items():
        kinds = {}
        for entry in tables[name]:
            kinds.setdefault(entry.kind, []).append(entry)
        singles = [alone(trainer.job, task) for task in trainer.job.single]
        kinds["scalarizer"] = kinds.get("scalarizer", []) + singles
        tasks += [(trainer.compile, entries) for entries in [[PLAIN], *kinds.values()] if entries]
        tasks += [(trainer.compile_measure,)]
    longest_first = sorted(tasks, key=lambda task: -len(task[-1]) if len(task) > 1 else 0)
    with tqdm(total=len(tasks), desc="compiling", unit="program") as progress:
        in_threads(workers, longest_first, progress)


def in_threads(workers, tasks, progress=None):
    """What each of ``(function, *arguments)`` returns. A compiled program lets other threads run beside it."""
    pool = ThreadPoolExecutor(workers)
    try:
        futures = [pool.submit(*task) for task in tasks]
        for future in futures if progress else ():
            future.add_done_callback(lambda _: progress.update())
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)  # where one failed, or a user stops it, the others are not begun


# The protocol.


def known(metrics, job):
    """The metrics, and in the place of those of a diverged training those of a model that has learnt nothing."""
    finite = np.all(np.isfinite(metrics), axis=-1, keepdims=True)
    return np.where(finite, metrics, job.ignorant)


def wider(values, best, limits):
    """The values and one more where the best of them is at an end that is not the limit."""
    if len(values) == 1:
        return values
    low, high = (float(f"{x:.3g}") for x in (values[0] ** 2 / values[1], values[-1] ** 2 / values[-2]))
    low, high = max(low, limits[0]), min(high, limits[1])
    before = [low] if best == values[0] and low < values[0] else []
    after = [high] if best == values[-1] and high > values[-1] else []
    return [*before, *values, *after]


def first_values(entry, plan):
    return list(entry.values[plan.every // 2 :: plan.every] or entry.values)


def n_trainings(entry, plan):
    """Of a method, unless its grid grows."""
    return len(plan.rates) * len(first_values(entry, plan)) * plan.tuning_seeds + plan.test_seeds


def tune(trainer, entry, plan, score, progress):
    """The best learning rate and value on the data for validation; how many were tried; which is at an edge still."""
    rates, values, scores = list(plan.rates), first_values(entry, plan), {}
    for left in reversed(range(plan.widenings + 1)):
        untried = [tried for tried in itertools.product(rates, values) if tried not in scores]
        progress.total += len(untried) * plan.tuning_seeds if scores else 0  # the first ones are counted already
        for tried in untried:
            found = np.array([trainer.measured(entry.name, *tried, i)[0] for i in range(plan.tuning_seeds)])
            # Of settings with a diverged training none is the best, as long as there is another.
            scores[tried] = float(np.mean(score(found))) if np.all(np.isfinite(found)) else np.inf
            progress.update(plan.tuning_seeds)
        rate, value = best = min(scores, key=scores.get)
        more = wider(rates, rate, RATE_LIMITS), wider(values, value, entry.limits)
        if more == (rates, values) or not left:
            break
        rates, values = more
    edges = {"learning rate": more[0] != rates, entry.knob: more[1] != values}
    return *best, len(scores), [name for name, is_at_edge in edges.items() if is_at_edge]


def compare(trainer, entry, plan, score, progress):
    """A row: what was tuned, the metrics of each test seed, and the time of a step."""
    rate, value, n_tried, edges = tune(trainer, entry, plan, score, progress)
    test_seeds = 1000 + np.arange(plan.test_seeds)
    metrics = np.array([trainer.measured(entry.name, rate, value, seed)[1] for seed in test_seeds])
    progress.update(plan.test_seeds)
    times = [(trainer.seconds(entry.name, rate, value, 0), trainer.seconds(PLAIN.name, rate, 0, 0)) for _ in range(3)]
    own, plain = np.min(times, axis=0)
    return {
        "rate": rate,
        "value": value,
        "tried": n_tried,
        "edges": edges,
        "diverged": int(np.sum(~np.all(np.isfinite(metrics), axis=-1))),
        "metrics": known(metrics, trainer.job).tolist(),
        "microseconds": own / trainer.n_steps * 1e6,
        "times_plain": own / plain,
    }


def single_tasks(trainer, plan, workers, progress):
    """The metric of each task trained alone, tuned alike: on the data for validation, and on those for the test."""

    def one(i, task):
        job = trainer.job
        score = lambda metrics: -job.metrics[task] * metrics[..., i]
        row = compare(trainer, alone(job, task), plan, score, progress)
        seeds = range(plan.tuning_seeds)
        return np.mean([trainer.measured(f"{task} alone", row["rate"], 0, s)[0, i] for s in seeds]), row["metrics"]

    found = in_threads(workers, [(one, i, task) for i, task in enumerate(trainer.job.single)])
    validation = np.array([value for value, _ in found])
    return validation, np.array([np.mean(metrics, axis=0)[i] for i, (_, metrics) in enumerate(found)])


# What is done, and what is left.


class Kept:
    """The rows of a job in a file, which is that of the same settings."""

    def __init__(self, folder, name, settings):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self.path, self.lock = folder / f"{name}-{digest}.json", threading.Lock()
        self.rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else {}
        self.settings = settings

    def add(self, name, row):
        with self.lock:
            self.rows[name] = row
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps({"settings": self.settings, "rows": self.rows}, indent=1))
            new.replace(self.path)


def compare_all(trainers, tables, kept, plan, workers):
    """Trains what no file has."""
    singles = [PLAIN for trainer in trainers.values() for _ in trainer.job.single]
    total = sum(n_trainings(entry, plan) for entry in itertools.chain(singles, *tables.values()))
    with tqdm(total=total, unit="training") as progress:
        for name, trainer in trainers.items():
            if "single" not in kept[name].rows:
                found = single_tasks(trainer, plan, workers, progress)
                kept[name].add("single", [x.tolist() for x in found])

        def work(name, entry):
            trainer, single = trainers[name], np.array(kept[name].rows["single"][0])
            score = lambda metrics: trainer.job.score(metrics, single)
            kept[name].add(entry.name, compare(trainer, entry, plan, score, progress))

        todo = [(work, name, entry) for name in tables for entry in tables[name]]
        in_threads(workers, todo[::-1])  # aggregators take longer, and go first: no core is idle at the end


def chosen(name, wanted):
    """Whether a row is asked for: the baselines always."""
    return (
        not wanted
        or name in (compare_tables.EQUAL, compare_tables.FIXED)
        or name.partition(".")[2] in wanted
        or name in wanted
    )


def settings_of(plan, trainer, table):
    """What decides the numbers: rows of other settings are not mixed with these."""
    grids = {name: [entry.knob, entry.values, entry.limits] for name, entry in table.items()}
    files = [Path(__file__).with_name(f"compare_{part}.py").read_bytes() for part in ("jobs", "methods")]
    versions = {
        "mtlbalance": mtl.__version__,
        "jax": jax.__version__,
        "jobs": hashlib.sha256(b"".join(files)).hexdigest(),
    }
    return plan._asdict() | {"n_steps": trainer.n_steps, "grids": grids, "versions": versions}


def read_arguments(argv):
    parser = show.arguments(__doc__, __file__, workers=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="every method, in two minutes, with next to no training")
    parser.add_argument("--shorter", type=int, help="trainings shorter by this factor than they would be")
    parser.add_argument("--methods", nargs="+", default=(), help="some methods, by name, beside the baselines")
    parser.add_argument("--jobs", nargs="+", default=[*JOBS], choices=[*JOBS], help="both by default")
    parser.add_argument("--markdown", type=Path, help="a page to write the tables into")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_arguments(argv)
    plan = QUICK if args.quick else Plan()
    jax.config.update("jax_disable_most_optimizations", args.quick)  # it compiles for longer than it trains
    plan = plan._replace(shortened=args.shorter or plan.shortened)
    jobs = {name: JOBS[name]() for name in args.jobs}
    trainers = {name: Trainer(job, max(1, job.n_steps // plan.shortened)) for name, job in jobs.items()}
    tables = {name: entries_for(job) for name, job in jobs.items()}
    kept = {
        name: Kept(args.output.parent / "compare", name, settings_of(plan, trainers[name], tables[name]))
        for name in jobs
    }
    entries = {
        name: [entry for entry in table.values() if chosen(entry.name, args.methods)] for name, table in tables.items()
    }
    possible = {name: [e for e in found if e.fewest_tasks <= len(jobs[name].tasks)] for name, found in entries.items()}
    left = {name: [entry for entry in found if entry.name not in kept[name].rows] for name, found in possible.items()}
    if any(left.values()):
        compile_all(trainers, left, args.workers)
        compare_all(trainers, left, kept, plan, args.workers)

    found = {name: compare_tables.find(job, entries[name], kept[name].rows) for name, job in jobs.items()}
    compare_tables.show_all(found, args.output, args.markdown)


if __name__ == "__main__":
    main()
