"""Sixty-four trainings in one compiled program: DWA's temperature times the seed, by ``jax.vmap``.

The task is that of ``quickstart.py``. A method is built inside the function that is mapped, so its hyperparameter
may be a traced number like any other; a whole training is one ``jax.lax.scan``. The same sweep as a Python loop
over one compiled training shows what the vectorised program gains, and that both find the same.

Run it with ``python sweep.py``: about a minute on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from quickstart import draw_pairs, init_params, load_images, task_losses, test_metrics
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from mtlbalance import scalarization

TEMPERATURES = jnp.geomspace(0.1, 20, 8)
SEEDS = jnp.arange(8)


def train(temperature, seed, digits, test_pairs, steps):
    """One training from start to end, and its test metrics: a pure function of two traced numbers."""
    # With `steps_per_epoch` the method closes its epochs itself, so that no Python loop is needed.
    method = scalarization.dwa(temperature=temperature, steps_per_epoch=50)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    init_key, data_key = jax.random.split(jax.random.key(seed))
    params = init_params(init_key, width=32)

    def step(carry, key):
        params, opt_state, state = carry
        batch = draw_pairs(key, digits, n_pairs=64)

        def loss_fn(params):
            return method.apply(state, task_losses(params, batch))

        gradient, state = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), None

    carry = params, optimizer.init(params), method.init(3)
    (params, _, _), _ = jax.lax.scan(step, carry, jax.random.split(data_key, steps))
    return test_metrics(params, test_pairs)


def timed(function, *args):
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return result, time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture")
    args = parser.parse_args(argv)

    train_digits, test_digits = load_images()
    test_pairs = draw_pairs(jax.random.key(0), test_digits, 2000)

    def train_one(temperature, seed):
        return train(temperature, seed, train_digits, test_pairs, args.steps)

    def train_all(temperatures, seeds):
        over_seeds = jax.vmap(train_one, in_axes=(None, 0))
        return jax.vmap(over_seeds, in_axes=(0, None))(temperatures, seeds)

    compiled, compile_s = timed(jax.jit(train_all).lower(TEMPERATURES, SEEDS).compile)
    print(f"compile {compile_s:.1f}")
    found, run_s = timed(compiled, TEMPERATURES, SEEDS)
    print(f"run {run_s:.1f}")

    one, compile_one_s = timed(jax.jit(train_one).lower(TEMPERATURES[0], SEEDS[0]).compile)
    start = time.perf_counter()
    rows = [[one(t, s) for s in SEEDS] for t in tqdm(TEMPERATURES)]
    loop = jax.tree.map(lambda *x: np.array(x).reshape(8, 8), *[r for row in rows for r in row])
    print("loop", compile_one_s, time.perf_counter() - start)
    print({k: (np.abs(loop[k] - found[k]).max(), np.std(found[k], axis=1).mean(), np.mean(found[k], 1)) for k in loop})


if __name__ == "__main__":
    main()
