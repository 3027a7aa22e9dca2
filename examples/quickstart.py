"""Five ways to balance three losses, on real data.

Two handwritten digits lie on top of each other, as in MultiMNIST. One small network reads them for three tasks:

* ``left``: which digit is the upper left one? (cross-entropy)
* ``right``: which digit is the lower right one? (cross-entropy)
* ``sum``: what do they add up to? (squared error, in raw units from 0 to 18)

The third loss starts some forty times as large as the others, only because of its units. Each method
decides in its own way what that should mean for the layers that all tasks share.

Run it with ``python quickstart.py``: about half a minute on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

TASKS = ("left", "right", "sum")  # sorted, as jax.tree sorts the names of a dict
BATCH_SIZE = 128


# The data: pairs of digits on one canvas.


def overlay(images, digits, n_pairs, rng):
    """Draws pairs of 8x8 digits and lays them on a 12x12 canvas, where a 4x4 square is covered by both."""
    first, second = rng.integers(len(images), size=(2, n_pairs))
    canvas = np.zeros((2, n_pairs, 12, 12), np.float32)
    canvas[0, :, :8, :8] = images[first]
    canvas[1, :, 4:, 4:] = images[second]
    left, right = digits[first], digits[second]
    pairs = {"image": canvas.max(axis=0), "left": left, "right": right, "sum": (left + right).astype(np.float32)}
    return jax.tree.map(jnp.asarray, pairs)


def load_pairs(n_train=10_000, n_test=4_000):
    """Training and test pairs. The digits are split first: no test pair shows an image seen in training."""
    images, digits = load_digits().images / 16, load_digits().target
    train_images, test_images, train_digits, test_digits = train_test_split(
        images, digits, test_size=0.25, stratify=digits, random_state=0
    )
    rng = np.random.default_rng(0)
    return overlay(train_images, train_digits, n_train, rng), overlay(test_images, test_digits, n_test, rng)


# The model: two shared layers, and one linear head for each task.


def init_params(key, n_hidden=128):
    sizes = {"trunk_1": (144, n_hidden), "trunk_2": (n_hidden, n_hidden)}
    sizes |= {"left": (n_hidden, 10), "right": (n_hidden, 10), "sum": (n_hidden, 1)}
    he_normal = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes))
    return {
        name: {"w": he_normal(key, shape), "b": jnp.zeros(shape[1])}
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


def predict(params, images):
    def layer(name, x):
        return x @ params[name]["w"] + params[name]["b"]

    x = images.reshape(len(images), -1)
    x = jax.nn.relu(layer("trunk_1", x))
    x = jax.nn.relu(layer("trunk_2", x))
    return {"left": layer("left", x), "right": layer("right", x), "sum": layer("sum", x)[:, 0]}


def task_losses(params, batch):
    """The losses by name. A dict works everywhere in mtlbalance that an array of losses does."""
    outputs = predict(params, batch["image"])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {
        "left": cross_entropy(outputs["left"], batch["left"]).mean(),
        "right": cross_entropy(outputs["right"], batch["right"]).mean(),
        "sum": jnp.mean((outputs["sum"] - batch["sum"]) ** 2),
    }


def test_metrics(params, pairs):
    """Accuracy of the digits, and the mean absolute error of the sum in raw units."""
    outputs = predict(params, pairs["image"])
    return {
        "left": jnp.mean(outputs["left"].argmax(axis=1) == pairs["left"]),
        "right": jnp.mean(outputs["right"].argmax(axis=1) == pairs["right"]),
        "sum": jnp.mean(jnp.abs(outputs["sum"] - pairs["sum"])),
    }


# The two families: losses to one scalar, or one gradient per task to one gradient.


def scalarized_gradient(method, params, state, batch):
    def loss_fn(params):
        losses = task_losses(params, batch)
        scalar, new_state = method.apply(state, losses)
        return scalar, (losses, new_state)

    gradient, (losses, new_state) = jax.grad(loss_fn, has_aux=True)(params)
    # For the picture only: the weights are the gradient of the scalar with respect to the losses.
    weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(state, losses)
    return gradient, new_state, jnp.stack(jax.tree.leaves(weights))


def aggregated_gradient(method, params, state, batch):
    def loss_vector(params):
        return jnp.stack(jax.tree.leaves(task_losses(params, batch)))

    jacobian = jax.jacrev(loss_vector)(params)  # shaped like params, with one row per task in front
    gradient, new_state = method.apply(state, jacobian)
    return gradient, new_state, jnp.exp(new_state.log_weights)


def train(method, pairs, epochs, seed, progress):
    """Trains one model with any method; returns its parameters and the weights at each step."""
    params = init_params(jax.random.key(seed))
    if isinstance(method, mtl.Scalarizer):
        gradient_fn, state = scalarized_gradient, method.init(len(TASKS))
    else:
        gradient_fn, state = aggregated_gradient, method.init((len(TASKS), params))
    n_steps = len(pairs["image"]) // BATCH_SIZE
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * n_steps))

    # An epoch is one compiled program; what it carries from step to step is donated, so nothing is copied.
    @partial(jax.jit, donate_argnums=0)
    def run_epoch(carry, pairs, key):
        def step(carry, rows):
            params, opt_state, state = carry
            batch = jax.tree.map(lambda x: x[rows], pairs)
            gradient, state, weights = gradient_fn(method, params, state, batch)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state, state), weights

        order = jax.random.permutation(key, len(pairs["image"]))[: n_steps * BATCH_SIZE]
        return jax.lax.scan(step, carry, order.reshape(n_steps, BATCH_SIZE))

    carry, history = (params, optimizer.init(params), state), []
    for epoch in range(epochs):
        # The key depends on the seed and the epoch alone: every method sees the same batches.
        carry, weights = run_epoch(carry, pairs, jax.random.fold_in(jax.random.key(seed), epoch))
        params, opt_state, state = carry
        carry = params, opt_state, method.end_epoch(state)  # for DWA; the other methods ignore it
        history.append(weights)
        progress.update()
    return params, np.concatenate(history)


# The results.


def print_table(metrics):
    baseline = metrics["equal weights"]
    table = Table(
        title="Test set",
        caption="sum: mean absolute error, digits from 0 to 18. Δm: change of the three columns relative to equal "
        "weights, averaged, where worse is positive.",
    )
    table.add_column("method")
    for column in "left ↑", "right ↑", "sum ↓", "Δm ↓":
        table.add_column(column, justify="right")
    for name, found in metrics.items():
        change = {task: found[task] / baseline[task] - 1 for task in TASKS}
        delta = np.mean([-change["left"], -change["right"], change["sum"]])
        table.add_row(name, f"{found['left']:.1%}", f"{found['right']:.1%}", f"{found['sum']:.3f}", f"{delta:+.1%}")
    Console().print(table)


def draw_weights(history, n_steps, output):
    """One panel per method: each task's share of the weights, over the epochs."""
    fig, axes = plt.subplots(2, 3, figsize=(9, 5), sharex=True, sharey=True, layout="constrained")
    for ax, (name, weights) in zip(axes.flat, history.items(), strict=False):
        share = weights / weights.sum(axis=1, keepdims=True)
        for task, curve in zip(TASKS, share.T, strict=True):
            ax.plot(np.arange(len(curve)) / n_steps, curve, label=task)
        ax.set(title=name, yscale="log")
    fig.savefig(output, dpi=100)
    plt.close(fig)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".png"))
    args = parser.parse_args(argv)

    train_pairs, test_pairs = load_pairs()
    losses = task_losses(init_params(jax.random.key(args.seed)), train_pairs)
    print("losses at the start:", ", ".join(f"{name} {loss:.1f}" for name, loss in losses.items()))

    # Adam does not mind the scale of a gradient, so it does not matter that the weights sum to 1 in some
    # methods and to 3 in others: what matters is each task's share.
    methods = {
        "equal weights": scalarization.mean(),
        "UW": mtl.learn(scalarization.uw(), optax.adam(1e-2)),
        "IMTL-L": mtl.learn(scalarization.imtl_l(), optax.adam(1e-2)),
        "DWA": scalarization.dwa(temperature=2.0),
        "ExcessMTL": aggregation.excess_mtl(),
    }
    metrics, history = {}, {}
    with tqdm(total=len(methods) * args.epochs, unit="epoch") as progress:
        for name, method in methods.items():
            progress.set_description(f"{name:13}")
            params, history[name] = train(method, train_pairs, args.epochs, args.seed, progress)
            metrics[name] = test_metrics(params, test_pairs)

    print_table(metrics)
    draw_weights(history, len(train_pairs["image"]) // BATCH_SIZE, args.output)
    print("weights drawn in", args.output)


if __name__ == "__main__":
    main()
