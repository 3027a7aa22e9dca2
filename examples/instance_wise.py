"""Every example of the batch is an objective: UPGrad over 16 examples times two tasks.

Two handwritten digits lie on top of each other, and one small network reads both, as in ``quickstart.py``. A batch of
16 pairs has 32 losses, one per example and task. Three trainings see the same batches:

* ``mean``: the gradient of the mean of all 32. It may raise some of them to lower the others.
* ``UPGrad 16``: each example's two losses are averaged, and UPGrad balances the 16 examples.
* ``UPGrad 16x2``: UPGrad balances all 32. The losses are an array ``[16, 2]``, and so are the weights.

UPGrad gives the largest weights to examples that are almost learned: the large gradients of hard examples would undo
them. It does not help here. On each of three seeds the test accuracy is the same up to half a point, and the worst
tenth of the test losses ends higher. A step takes many times as long. And only the gradient spares the other losses:
Adam's step, made of many gradients, raises almost as much of the batch's loss as with the mean.

Run it with ``python examples/instance_wise.py``: about half a minute on two CPU cores. It needs
``mtlbalance[examples]``.
"""

import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from quickstart import draw_pairs, init_params, load_data, predict, read_arguments
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

TASKS = ("left", "right")
BATCH_SIZE = 16
STEPS_PER_EPOCH = 100
LOSS_TICKS = (0.1, 0.2, 0.5, 1, 2)
SHOWN_EPOCH = 5  # of which the picture shows the weights: later most losses are almost 0


# The losses, and what is measured of them.


def all_losses(params, batch):
    """The cross-entropy of every example and task, an array ``[n_examples, n_tasks]``."""
    outputs = predict(params, batch["image"])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return jnp.stack([cross_entropy(outputs[task], batch[task]) for task in TASKS], axis=1)


def example_losses(params, batch):
    return jnp.mean(all_losses(params, batch), axis=1)


def worst_tenth(losses):
    """The mean of the largest tenth of all losses."""
    return np.mean(np.sort(np.ravel(losses))[-losses.size // 10 :])


def raised_part(params, batch, direction):
    """The part of the batch's loss that is in examples and tasks whose loss rises in this direction."""
    losses, slopes = jax.jvp(lambda params: all_losses(params, batch), (params,), (direction,))
    return jnp.sum(jnp.where(slopes > 0, losses, 0)) / jnp.sum(losses)


@jax.jit
def evaluate(params, pairs):
    """The losses, and the accuracy, as the mean over both digits."""
    outputs = predict(params, pairs["image"])
    hits = [jnp.mean(jnp.argmax(outputs[task], axis=1) == pairs[task]) for task in TASKS]
    return all_losses(params, pairs), jnp.mean(jnp.stack(hits))


# The training, the same for every method.


def train(losses_fn, method, state, params, data, epochs, key, progress):
    """Trains one model: its record of every step, its test losses after every epoch, and what the table shows."""
    digits, test_pairs = data
    grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True)
    # UPGrad's weights sum to 1 or more, the mean's to 1. Adam divides the scale of a gradient out, so that all share
    # a learning rate.
    optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, epochs * STEPS_PER_EPOCH))

    def step(carry, key):
        params, opt_state, state = carry
        batch = draw_pairs(key, digits, BATCH_SIZE)
        (_, state, weights), gradient = grad_fn(params, state, batch)
        updates, opt_state = optimizer.update(gradient, opt_state)
        downhill = jax.tree.map(jnp.negative, gradient)
        record = {
            "losses": all_losses(params, batch),
            "weights": weights,
            "by gradient": raised_part(params, batch, downhill),
            "by Adam": raised_part(params, batch, updates),
        }
        return (optax.apply_updates(params, updates), opt_state, state), record

    carry = params, optimizer.init(params), state
    keys = jax.random.split(key, (epochs, STEPS_PER_EPOCH))  # the same for every method, so the same batches
    # Compiled ahead of time, so that the table shows the time of the steps alone.
    run_epoch = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)).lower(carry, keys[0]).compile()
    records, tests, seconds = [], [evaluate(params, test_pairs)], 0.0
    for epoch_keys in keys:
        start = time.perf_counter()
        carry, record = jax.block_until_ready(run_epoch(carry, epoch_keys))
        seconds += time.perf_counter() - start
        records.append(jax.device_get(record))
        tests.append(evaluate(carry[0], test_pairs))
        progress.update()
    record = {name: np.stack([record[name] for record in records]) for name in records[0]}  # [epoch, step, ...]
    record["test mean"] = np.array([np.mean(losses) for losses, _ in tests])
    record["test worst"] = np.array([worst_tenth(losses) for losses, _ in tests])
    return record | {"accuracy": tests[-1][1], "ms": 1e3 * seconds / (epochs * STEPS_PER_EPOCH)}


# The results.


def print_table(records):
    table = Table(
        title="Losses of single examples and tasks",
        caption="worst test: mean of the largest tenth of the test losses. train: in the last epoch. raised: the part "
        "of a batch's loss that is in examples and tasks whose loss rises along the negative gradient, or along "
        "Adam's step; mean of all steps. One seed: the docstring says what held on three.",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    columns = "test\naccuracy ↑", "test\nloss ↓", "worst\ntest ↓", "train\nloss ↓", "raised\n↓", "raised\nAdam ↓"
    for column in *columns, "ms per\nstep ↓":
        table.add_column(column, justify="right")
    for name, record in records.items():
        losses = record["test mean"][-1], record["test worst"][-1], record["losses"][-1].mean()
        raised = record["by gradient"].mean(), record["by Adam"].mean()
        row = [f"{record['accuracy']:.1%}", *(f"{x:.3f}" for x in losses), *(f"{x:.1%}" for x in raised)]
        table.add_row(name, *row, f"{record['ms']:.1f}")
    Console().print(table)


def draw_curves(axes, records):
    """The test losses, and how much of the training loss goes against the gradient."""
    # Thick below thin, so that all curves show where they coincide.
    for i, (name, record) in enumerate(records.items()):
        style = {"color": f"C{i}", "linewidth": 3.6 - 1.1 * i}
        epochs = np.arange(len(record["test mean"]))
        axes[0].plot(epochs, record["test mean"], **style, label=name)
        axes[0].plot(epochs, record["test worst"], **style, linestyle=(0, (2, 1)))
        axes[1].plot(epochs[1:], 100 * record["by gradient"].mean(axis=1), **style)
    axes[0].plot([], [], color="gray", linestyle=(0, (2, 1)), label="worst tenth")
    axes[0].set(title="test loss", xlabel="epoch", yscale="log", yticks=LOSS_TICKS, yticklabels=LOSS_TICKS)
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8)
    axes[1].set(
        title="% of the batch's loss that a step along\nthe negative gradient raises", xlabel="epoch", ylim=(0, None)
    )


def draw_weights(ax, losses, weights, epoch):
    """Every weight of one epoch against its loss, and their mean for equally many losses each."""
    losses, weights = np.ravel(losses), np.ravel(weights)
    ax.plot(losses, weights, ".", color="C2", markersize=3, alpha=0.25, markeredgewidth=0)
    groups = np.array_split(np.argsort(losses), 25)
    ax.plot(
        [np.median(losses[i]) for i in groups], [weights[i].mean() for i in groups], color="black", label="on average"
    )
    ax.axhline(1, color="C0", label="mean: all 1")
    ax.set_xlim(1e-5, 20)
    ax.set(
        title=f"UPGrad 16x2: weights in epoch {epoch + 1}", xlabel="loss", ylabel="weight", xscale="log", yscale="log"
    )
    ax.legend(fontsize=8, loc="upper left")


def draw(records, output):
    fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.3), layout="constrained")
    balanced, epoch = records["UPGrad 16x2"], min(SHOWN_EPOCH, len(records["mean"]["losses"])) - 1
    draw_curves(axes[:2], records)
    # Times their number: with the mean, each weight is then 1.
    draw_weights(axes[2], balanced["losses"][epoch], balanced["weights"][epoch] * BATCH_SIZE * len(TASKS), epoch)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.title.set_fontsize(10)
    fig.savefig(output, dpi=100)
    plt.close(fig)


def main(argv=None):
    args = read_arguments(argv, __doc__, __file__, epochs=20)

    train_digits, test_pairs = load_data()
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    start = init_params(init_key, width=64)

    mean, upgrad = scalarization.mean(), aggregation.upgrad()
    # What a method's state is made for: a scalarizer's for the shape of the losses, an aggregator's for their number.
    methods = {
        "mean": (all_losses, mean, mean.init((BATCH_SIZE, len(TASKS)))),
        "UPGrad 16": (example_losses, upgrad, upgrad.init((BATCH_SIZE, start))),
        "UPGrad 16x2": (all_losses, upgrad, upgrad.init((BATCH_SIZE * len(TASKS), start))),
    }
    records = {}
    with tqdm(total=len(methods) * args.epochs, unit="epoch") as progress:
        for name, method in methods.items():
            progress.set_description(f"{name:11}")
            records[name] = train(*method, start, (train_digits, test_pairs), args.epochs, data_key, progress)

    print_table(records)
    draw(records, args.output)
    print(f"The losses and the weights: {args.output}")


if __name__ == "__main__":
    main()
