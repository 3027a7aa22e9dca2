"""Sixty-four trainings in one compiled program: DWA's temperature times the seed, by ``jax.vmap``.

The tasks are those of ``digits.py``. A whole training is one ``jax.lax.scan``, and the method is built inside
the function that is mapped, so its temperature is a number like any other. The same sweep as a Python loop, over
one compiled training, shows what the single program gains and that both give the same numbers.

Run it with ``python examples/sweep.py``: about half a minute on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import time

import jax
import numpy as np
import optax
import show
from digits import draw_pairs, evaluate, init_params, load_images, task_losses
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import scalarization

TEMPERATURES = np.geomspace(0.02, 20, 8)
SEEDS = np.arange(8)
STEPS_PER_EPOCH = 50
EARLY_STEPS = 4 * STEPS_PER_EPOCH


def train(temperature, seed, digits, test_pairs, n_steps):
    """One training from start to end: its test metrics, and its losses at every step."""
    # With `steps_per_epoch`, DWA closes its epochs itself: no Python loop has to stop and do it.
    method = scalarization.dwa(temperature=temperature, steps_per_epoch=STEPS_PER_EPOCH)
    grad_fn = mtl.value_and_grad(task_losses, method)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, n_steps))
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init_params(init_key, width=32)

    def step(carry, key):
        params, opt_state, state = carry
        (losses, state), gradient = grad_fn(params, state, draw_pairs(key, digits, n_pairs=64))
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


# The two ways, with compiling and training timed apart: the programs are compiled ahead of time.


def run_together(train_one):
    """All trainings in one program: the results, and the seconds of compiling and of running."""
    # Every combination: the inner map runs over the seeds, the outer one over the temperatures.
    train_all = jax.vmap(jax.vmap(train_one, in_axes=(None, 0)), in_axes=(0, None))
    print("Training all models at once ...")
    program, compile_time = timed(jax.jit(train_all).lower(TEMPERATURES, SEEDS).compile)
    results, run_time = timed(program, TEMPERATURES, SEEDS)
    return jax.device_get(results), (compile_time, run_time)


def run_in_loop(train_one):
    """The same, one training after the other by one compiled program."""
    program, compile_time = timed(jax.jit(train_one).lower(TEMPERATURES[0], SEEDS[0]).compile)
    results, run_time = [], 0.0
    for temperature, seed in tqdm([(t, s) for t in TEMPERATURES for s in SEEDS], desc="One by one"):
        result, duration = timed(program, temperature, seed)
        results.append(result)
        run_time += duration
    grid = len(TEMPERATURES), len(SEEDS)
    stacked = jax.tree.map(lambda *leaves: np.reshape(leaves, (*grid, *leaves[0].shape)), *results)
    return stacked, (compile_time, run_time)


def compare(together, in_loop):
    """The largest differences between the two: of the early losses, relative, and of each metric at the end."""
    # The two programs round differently, and training magnifies that in the long run. So the strict comparison is
    # early: four epochs of DWA, of which its weights are equal in the first two and differ in the others.
    (metrics, losses), (loop_metrics, loop_losses) = together, in_loop
    early = max(np.max(np.abs(losses[task] / loop_losses[task] - 1)[..., :EARLY_STEPS]) for task in losses)
    assert early < 1e-2, "the two programs do not train the same models"
    return early, {name: np.max(np.abs(metrics[name] - loop_metrics[name])) for name in metrics}


# The results.


def print_times(seconds):
    rows = [(name, f"{compile_time:.1f} s", f"{run_time:.1f} s") for name, (compile_time, run_time) in seconds.items()]
    _, (together, in_loop) = zip(*seconds.values(), strict=True)
    caption = f"The loop runs {in_loop / together:.1f} times as long as the one program."
    show.print_table(f"{len(TEMPERATURES) * len(SEEDS)} trainings", ("", "compile", "run"), rows, caption)


def print_metrics(metrics):
    columns, about = ("temperature", "digits ↑", "sum ↓"), "digits: accuracy. sum: mean absolute error."
    rows = [
        (f"{temperature:.2g}", f"{x.mean():.1%} ± {x.std():.1%}", f"{y.mean():.2f} ± {y.std():.2f}")
        for temperature, x, y in zip(TEMPERATURES, metrics["digits"], metrics["sum"], strict=True)
    ]
    show.print_table("On the test images", columns, rows, f"Mean and standard deviation over the seeds. {about}")


def draw_metrics(metrics, output):
    """Each metric against the temperature."""
    titles = {"digits": "accuracy of the digits", "sum": "mean absolute error of the sum"}
    axis = {"xlabel": "temperature of DWA (large: equal weights)", "xscale": "log"}
    with show.picture(output, "The metrics against the temperature", 1, 2, figsize=(9.2, 3.4)) as (_, axes):
        for ax, (name, title) in zip(axes, titles.items(), strict=True):
            show.draw_seeds(ax, TEMPERATURES, metrics[name], title=title, **axis)
        axes[0].legend(loc="lower right")


def main(argv=None):
    args = show.arguments(__doc__, __file__, steps=2000).parse_args(argv)

    train_digits, test_digits = load_images()
    test_pairs = draw_pairs(jax.random.key(0), test_digits, 2000)

    def train_one(temperature, seed):
        return train(temperature, seed, train_digits, test_pairs, args.steps)

    seconds = {}
    together, seconds["one program"] = run_together(train_one)
    in_loop, seconds["Python loop"] = run_in_loop(train_one)
    early, late = compare(together, in_loop)

    print_times(seconds)
    print(f"Largest difference between them: {early:.0e} (relative) in the losses of the first {EARLY_STEPS} steps;")
    print(f"at the end, in the metrics below: digits {late['digits']:.1%}, sum {late['sum']:.3f}.")
    print_metrics(together[0])
    draw_metrics(together[0], args.output)


if __name__ == "__main__":
    main()
