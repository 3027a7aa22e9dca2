"""Sixty-four trainings in one compiled program: DWA's temperature times the seed, by ``jax.vmap``.

The tasks are those of ``quickstart.py``. A whole training is one ``jax.lax.scan``, and the method is built inside
the function that is mapped, so its temperature is a number like any other. The same sweep as a Python loop, over
one compiled training, shows what the single program gains and that both give the same numbers.

Run it with ``python examples/sweep.py``: about half a minute on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import argparse
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from quickstart import draw_pairs, evaluate, init_params, load_images, task_losses
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mtlbalance import scalarization

TEMPERATURES = np.geomspace(0.02, 20, 8)
SEEDS = np.arange(8)
STEPS_PER_EPOCH = 50


def train(temperature, seed, digits, test_pairs, n_steps):
    """One training from start to end: its test metrics, and its losses at every step."""
    # With `steps_per_epoch`, DWA closes its epochs itself: no Python loop has to stop and do it.
    method = scalarization.dwa(temperature=temperature, steps_per_epoch=STEPS_PER_EPOCH)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, n_steps))
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init_params(init_key, width=32)

    def step(carry, key):
        params, opt_state, state = carry
        batch = draw_pairs(key, digits, n_pairs=64)

        def loss_fn(params):
            losses = task_losses(params, batch)
            scalar, new_state = method.apply(state, losses)
            return scalar, (new_state, losses)

        gradient, (state, losses) = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), losses

    carry = params, optimizer.init(params), method.init(3)
    (params, _, _), losses = jax.lax.scan(step, carry, jax.random.split(data_key, n_steps))
    metrics = evaluate(params, test_pairs)
    return {"digits": (metrics["left"] + metrics["right"]) / 2, "sum": metrics["sum"]}, losses


def timed(function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


def print_comparison(seconds, together, in_loop):
    """What each way took, and how far apart their results are."""
    table = Table(title=f"{len(TEMPERATURES) * len(SEEDS)} trainings")
    for column in "", "compile", "run":
        table.add_column(column, justify="right")
    for name, (compile_time, run_time) in seconds.items():
        table.add_row(name, f"{compile_time:.1f} s", f"{run_time:.1f} s")
    Console().print(table)
    (_, run_together), (_, run_loop) = seconds.values()
    print(f"The loop runs {run_loop / run_together:.1f} times as long as the one program.")

    # The two programs round differently, and training magnifies that in the long run. So the strict comparison is
    # early: four epochs of DWA, of which its weights are equal in the first two and differ in the others.
    (metrics, losses), (loop_metrics, loop_losses) = together, in_loop
    early_steps = 4 * STEPS_PER_EPOCH
    early = max(np.max(np.abs(losses[task] / loop_losses[task] - 1)[..., :early_steps]) for task in losses)
    late = {name: np.max(np.abs(metrics[name] - loop_metrics[name])) for name in metrics}
    print(f"Largest difference between them: {early:.0e} (relative) in the losses of the first {early_steps} steps;")
    print(f"at the end, in the metrics below: digits {late['digits']:.1%}, sum {late['sum']:.3f}.")
    assert early < 1e-2, "the two programs do not train the same models"


def print_metrics(metrics):
    table = Table(
        title="On the test images",
        caption="Mean and standard deviation over the seeds. digits: accuracy. sum: mean absolute error.",
        caption_justify="left",
    )
    for column in "temperature", "digits ↑", "sum ↓":
        table.add_column(column, justify="right")
    for temperature, digits, total in zip(TEMPERATURES, metrics["digits"], metrics["sum"], strict=True):
        digits, total = f"{digits.mean():.1%} ± {digits.std():.1%}", f"{total.mean():.2f} ± {total.std():.2f}"
        table.add_row(f"{temperature:.2g}", digits, total)
    Console().print(table)


def draw_metrics(metrics, output):
    """Each metric against the temperature: a point per seed, and the mean."""
    labels = {"digits": "accuracy of the digits", "sum": "mean absolute error of the sum"}
    fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained")
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        points = ax.plot(TEMPERATURES, metrics[name], "o", color="C0", alpha=0.35, markeredgewidth=0)
        (mean,) = ax.plot(TEMPERATURES, metrics[name].mean(axis=1), color="C1", linewidth=2)
        ax.set(title=label, xlabel="temperature of DWA (large: equal weights)", xscale="log")
        ax.grid(alpha=0.3)
    axes[0].legend([points[0], mean], ["one seed", "mean"], loc="lower right")
    fig.savefig(output, dpi=100)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture")
    args = parser.parse_args(argv)

    train_digits, test_digits = load_images()
    test_pairs = draw_pairs(jax.random.key(0), test_digits, 2000)

    def train_one(temperature, seed):
        return train(temperature, seed, train_digits, test_pairs, args.steps)

    # Every combination: the inner map runs over the seeds, the outer one over the temperatures.
    train_all = jax.vmap(jax.vmap(train_one, in_axes=(None, 0)), in_axes=(0, None))

    # Compiled ahead of time, to time compilation and training apart.
    print("Training all models at once ...")
    program, compile_time = timed(jax.jit(train_all).lower(TEMPERATURES, SEEDS).compile)
    together, run_time = timed(program, TEMPERATURES, SEEDS)
    seconds = {"one program": (compile_time, run_time)}

    program, compile_time = timed(jax.jit(train_one).lower(TEMPERATURES[0], SEEDS[0]).compile)
    results, run_time = [], 0.0
    for temperature, seed in tqdm([(t, s) for t in TEMPERATURES for s in SEEDS], desc="One by one"):
        result, duration = timed(program, temperature, seed)
        results.append(result)
        run_time += duration
    seconds["Python loop"] = (compile_time, run_time)
    grid = len(TEMPERATURES), len(SEEDS)
    in_loop = jax.tree.map(lambda *leaves: np.reshape(leaves, (*grid, *leaves[0].shape)), *results)

    together = jax.device_get(together)
    print_comparison(seconds, together, in_loop)
    print_metrics(together[0])
    draw_metrics(together[0], args.output)
    print(f"The metrics against the temperature: {args.output}")


if __name__ == "__main__":
    main()
