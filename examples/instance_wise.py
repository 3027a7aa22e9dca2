"""Every example of the batch is an objective: UPGrad over 16 examples times two tasks.

Two handwritten digits lie on top of each other, and one small network reads both, that of ``digits.py``. A batch of
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
import numpy as np
import optax
import show
from digits import draw_pairs, init_params, load_data, predict
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

TASKS = ("left", "right")
BATCH_SIZE = 16
STEPS_PER_EPOCH = 100
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
    rows = []
    for name, record in records.items():
        losses = record["test mean"][-1], record["test worst"][-1], record["losses"][-1].mean()
        raised = record["by gradient"].mean(), record["by Adam"].mean()
        cells = f"{record['accuracy']:.1%}", *(f"{x:.3f}" for x in losses), *(f"{x:.1%}" for x in raised)
        rows.append((name, *cells, f"{record['ms']:.1f}"))
    columns = "method", "test\naccuracy ↑", "test\nloss ↓", "worst\ntest ↓", "train\nloss ↓"
    columns += "raised\n↓", "raised\nAdam ↓", "ms per\nstep ↓"
    caption = "worst test: mean of the largest tenth of the test losses. train: in the last epoch. raised: the part of "
    caption += "a batch's loss that is in examples and tasks whose loss rises along the negative gradient, or along "
    caption += "Adam's step; mean of all steps. One seed: the docstring says what held on three."
    show.print_table("Losses of single examples and tasks", columns, rows, caption)


def draw_weights(ax, losses, weights, epoch):
    """Every weight of one epoch against its loss, and their mean for equally many losses each."""
    # Times their number: with the mean, each weight is then 1.
    losses, weights = np.ravel(losses[epoch]), np.ravel(weights[epoch]) * BATCH_SIZE * len(TASKS)
    ax.plot(losses, weights, ".", color="C2", markersize=3, alpha=0.25, markeredgewidth=0)
    groups = np.array_split(np.argsort(losses), 25)
    average = np.transpose([(np.median(losses[i]), weights[i].mean()) for i in groups])
    ax.plot(*average, color="black", label="on average")
    ax.axhline(1, color="C0", label="mean: all 1")
    ax.set(xlabel="loss", ylabel="weight", xscale="log", yscale="log", xlim=(1e-5, 20))
    ax.set_title(f"UPGrad 16x2: weights in epoch {epoch + 1}", fontsize=10)
    ax.legend(fontsize=8, loc="upper left")


def draw(records, output):
    """The test losses, how much of the training loss goes against the gradient, and the weights."""
    raised = {name: 100 * record["by gradient"].mean(axis=1) for name, record in records.items()}
    balanced, epochs = records["UPGrad 16x2"], np.arange(len(raised["mean"]) + 1)
    with show.picture(output, "The losses and the weights", 1, 4, figsize=(12, 3.3)) as (_, axes):
        titles = {"test mean": "test loss", "test worst": "worst tenth of the test losses"}
        for ax, (key, title), ticks in zip(axes, titles.items(), ((0.1, 0.2, 0.5, 1, 2), (1, 2, 3)), strict=False):
            show.draw_curves(ax, epochs, {name: record[key] for name, record in records.items()}, yscale="log")
            ax.set_yticks(ticks, ticks)
            ax.minorticks_off()
            ax.set_title(title, fontsize=10)
        show.draw_curves(axes[2], epochs[1:], raised, ylim=(0, None))
        axes[2].set_title("% of the batch's loss that a step along\nthe negative gradient raises", fontsize=10)
        axes[0].legend(fontsize=8)
        draw_weights(axes[3], balanced["losses"], balanced["weights"], min(SHOWN_EPOCH, len(raised["mean"])) - 1)


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, epochs=20).parse_args(argv)

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


if __name__ == "__main__":
    main()
