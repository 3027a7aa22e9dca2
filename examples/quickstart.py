"""Five ways to balance three losses, on real data.

Two handwritten digits lie on top of each other, as in MultiMNIST. One small network reads them for three tasks:

* ``left``: which digit is the upper left one? (cross-entropy)
* ``right``: which digit is the lower right one? (cross-entropy)
* ``sum``: what do they add up to? (squared error, in raw units from 0 to 18)

The loss of the third task starts some forty times as large as the others, only because of its units. Each method
decides in its own way how much each task should count.

Run it with ``python examples/quickstart.py``: about half a minute on two CPU cores. It needs ``mtlbalance[examples]``.
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

TASKS = ("left", "right", "sum")  # sorted, the order in which JAX flattens a dict
BATCH_SIZE = 128
STEPS_PER_EPOCH = 100


# The data: pairs of digits on one canvas.


def load_images():
    """The 8x8 digits that come with scikit-learn, as (images, labels) for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8).astype(np.float32)
    # The single digits are split, not their pairs: no test pair shows an image that was seen in training.
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
    return (train_images, train_labels), (test_images, test_labels)


def draw_pairs(key, digits, n_pairs):
    """Lays random pairs on a 12x12 canvas, one digit upper left and one lower right: a 4x4 square is in both."""
    images, labels = digits
    left, right = jax.random.randint(key, (2, n_pairs), 0, len(images))
    upper_left = jnp.pad(images[left], ((0, 0), (0, 4), (0, 4)))
    lower_right = jnp.pad(images[right], ((0, 0), (4, 0), (4, 0)))
    return {
        "image": jnp.maximum(upper_left, lower_right),
        "left": labels[left],
        "right": labels[right],
        "sum": (labels[left] + labels[right]).astype(jnp.float32),
    }


def load_data():
    """The digits to train on, and pairs of others to test on."""
    train_digits, test_digits = load_images()
    return train_digits, draw_pairs(jax.random.key(0), test_digits, 4000)


# The model: two shared layers, and one linear head per task.


def init_layers(key, shapes, initializer):
    """A linear layer of each shape, by name."""
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"w": initializer(layer_key, shape), "b": jnp.zeros(shape[1])}
        for layer_key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def init_params(key, width=128):
    shapes = {"trunk_1": (144, width), "trunk_2": (width, width)}
    shapes |= {"left": (width, 10), "right": (width, 10), "sum": (width, 1)}
    return init_layers(key, shapes, jax.nn.initializers.he_normal())


def predict(params, images):
    def layer(name, x):
        return x @ params[name]["w"] + params[name]["b"]

    x = images.reshape(len(images), -1)
    x = jax.nn.relu(layer("trunk_1", x))
    x = jax.nn.relu(layer("trunk_2", x))
    return {"left": layer("left", x), "right": layer("right", x), "sum": layer("sum", x)[:, 0]}


def losses_of(outputs, batch):
    """The losses by name: in mtlbalance a dict works wherever an array of losses does."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {
        "left": jnp.mean(cross_entropy(outputs["left"], batch["left"])),
        "right": jnp.mean(cross_entropy(outputs["right"], batch["right"])),
        "sum": jnp.mean((outputs["sum"] - batch["sum"]) ** 2),
    }


def task_losses(params, batch):
    return losses_of(predict(params, batch["image"]), batch)


def evaluate(params, pairs):
    """Accuracy of the two digits; mean absolute error of the sum."""
    outputs = predict(params, pairs["image"])
    return {
        "left": jnp.mean(jnp.argmax(outputs["left"], axis=1) == pairs["left"]),
        "right": jnp.mean(jnp.argmax(outputs["right"], axis=1) == pairs["right"]),
        "sum": jnp.mean(jnp.abs(outputs["sum"] - pairs["sum"])),
    }


# The two families of methods. Both functions return the gradient, the method's new state, and the weights.


def scalarized_gradient(method, params, state, batch):
    """Losses to one scalar, then one backward pass."""

    def loss_fn(params):
        losses = task_losses(params, batch)
        scalar, new_state = method.apply(state, losses)
        return scalar, (new_state, losses)

    gradient, (new_state, losses) = jax.grad(loss_fn, has_aux=True)(params)
    # Only for the picture: the weights are the gradient of the scalar with respect to the losses.
    weights, _ = jax.grad(method.apply, argnums=1, has_aux=True)(state, losses)
    return gradient, new_state, jnp.stack(jax.tree.leaves(weights))


def aggregated_gradient(method, params, state, batch):
    """One gradient per task, then one gradient."""

    def loss_vector(params):
        return jnp.stack(jax.tree.leaves(task_losses(params, batch)))

    jacobian = jax.jacrev(loss_vector)(params)  # a tree like params, each leaf with one row per task
    gradient, new_state = method.apply(state, jacobian)
    return gradient, new_state, jnp.exp(new_state.log_weights)  # ExcessMTL keeps its weights in its state


# The training, the same for every method.


def train(method, params, digits, epochs, key, progress):
    """Trains one model; returns its parameters, and the weights of every step."""
    if isinstance(method, mtl.Scalarizer):
        gradient_fn, state = scalarized_gradient, method.init(len(TASKS))
    else:
        gradient_fn, state = aggregated_gradient, method.init((len(TASKS), params))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * STEPS_PER_EPOCH))

    # An epoch is one compiled program. What goes in as carry is donated: the new carry takes its memory.
    @partial(jax.jit, donate_argnames="carry")
    def run_epoch(carry, digits, key):
        def step(carry, key):
            params, opt_state, state = carry
            batch = draw_pairs(key, digits, BATCH_SIZE)
            gradient, state, weights = gradient_fn(method, params, state, batch)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state, state), weights

        return jax.lax.scan(step, carry, jax.random.split(key, STEPS_PER_EPOCH))

    params = jax.tree.map(jnp.copy, params)  # donated below, and the next method starts from the same ones
    carry, history = (params, optimizer.init(params), state), []
    for epoch in range(epochs):
        # The same keys for every method, so the same batches.
        carry, weights = run_epoch(carry, digits, jax.random.fold_in(key, epoch))
        params, opt_state, state = carry
        carry = params, opt_state, method.end_epoch(state)  # for DWA; the others return the state as it is
        history.append(weights)
        progress.update()
    return params, np.concatenate(history)


# The results.


def print_table(metrics):
    table = Table(
        title="On the test images",
        caption="left, right: accuracy. sum: mean absolute error, in raw units. Δm: relative change against equal "
        "weights, averaged over the three columns; worse is positive. One seed: another can move it by three points.",
        caption_justify="left",
    )
    table.add_column("method")
    for column in "left ↑", "right ↑", "sum ↓", "Δm ↓":
        table.add_column(column, justify="right")
    equal = metrics["equal weights"]
    for name, found in metrics.items():
        change = {task: found[task] / equal[task] - 1 for task in TASKS}
        delta_m = (-change["left"] - change["right"] + change["sum"]) / 3
        table.add_row(name, f"{found['left']:.1%}", f"{found['right']:.1%}", f"{found['sum']:.2f}", f"{delta_m:+.1%}")
    Console().print(table)


def draw_weights(history, output):
    """One panel per method: each task's share of the weights, step by step."""
    fig, axes = plt.subplots(1, len(history), figsize=(9.6, 3.1), sharex=True, sharey=True, layout="constrained")
    for ax, (name, weights) in zip(axes, history.items(), strict=True):
        shares = weights / weights.sum(axis=1, keepdims=True)
        epochs = np.arange(len(shares)) / STEPS_PER_EPOCH
        # Thick below thin, so that all curves show where they coincide.
        for task, share, linewidth in zip(TASKS, shares.T, [4.5, 2.8, 1.2], strict=True):
            ax.plot(epochs, share, linewidth=linewidth, label=task)
        ax.set(title=name, xlabel="epoch", yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share of the weights")
    axes[0].legend(title="task")
    fig.savefig(output, dpi=100)
    plt.close(fig)


def read_arguments(argv, doc, script, epochs):
    """The options that most examples have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(script).with_suffix(".png"), help="the picture")
    return parser.parse_args(argv)


def main(argv=None):
    args = read_arguments(argv, __doc__, __file__, epochs=40)

    train_digits, test_pairs = load_data()
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    start = init_params(init_key)
    losses = task_losses(start, test_pairs)
    print("losses before training:", ", ".join(f"{name} {loss:.1f}" for name, loss in losses.items()))

    # Some methods give weights that sum to 1, some to 3, some to anything. Under Adam, which divides the scale
    # of a gradient out, only each task's share matters; with another optimizer, retune the learning rate.
    methods = {
        "equal weights": scalarization.mean(),
        "UW": mtl.learn(scalarization.uw(), optax.adam(1e-2)),
        "IMTL-L": mtl.learn(scalarization.imtl_l(), optax.adam(1e-2)),
        "DWA": scalarization.dwa(temperature=2.0),
        "ExcessMTL": aggregation.excess_mtl(robust_step_size=0.01),  # as in its authors' code
    }
    metrics, history = {}, {}
    with tqdm(total=len(methods) * args.epochs, unit="epoch") as progress:
        for name, method in methods.items():
            progress.set_description(f"{name:13}")
            params, history[name] = train(method, start, train_digits, args.epochs, data_key, progress)
            metrics[name] = evaluate(params, test_pairs)

    print_table(metrics)
    draw_weights(history, args.output)
    print(f"The weights over training: {args.output}")


if __name__ == "__main__":
    main()
