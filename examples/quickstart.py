"""Five ways to balance three losses, on real data.

Two handwritten digits lie on top of each other, and one small network reads them for three tasks: the left digit, the
right one, and their sum (``digits.py``). The loss of the sum starts some forty times as large as the others, only
because of its units. Each method decides in its own way how much each task should count.

Run it with ``python examples/quickstart.py``: about half a minute on two CPU cores. It needs ``mtlbalance[examples]``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from digits import TASKS, draw_pairs, evaluate, init_params, load_data, task_losses
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

BATCH_SIZE = 128
STEPS_PER_EPOCH = 100

# Some methods give weights that sum to 1, some to 3, some to anything. Under Adam, which divides the scale of a
# gradient out, only each task's share matters; with another optimizer, retune the learning rate.
METHODS = {
    "equal weights": scalarization.mean(),
    "UW": mtl.learn(scalarization.uw(), optax.adam(1e-2)),
    "IMTL-L": mtl.learn(scalarization.imtl_l(), optax.adam(1e-2)),
    "DWA": scalarization.dwa(temperature=2.0),
    "ExcessMTL": aggregation.excess_mtl(robust_step_size=0.01),  # as in its authors' code
}


# The training, the same for every method.


def train(method, params, digits, epochs, key, progress):
    """Trains one model; returns its parameters, and each task's weight at every step."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * STEPS_PER_EPOCH))
    grad_fn = mtl.value_and_grad(task_losses, method, return_weights=True, hooks=True)

    # An epoch is one compiled program. What goes in as carry is donated: the new carry takes its memory.
    @partial(jax.jit, donate_argnames="carry")
    def run_epoch(carry, digits, key):
        def step(carry, key):
            params, opt_state, state = carry
            batch = draw_pairs(key, digits, BATCH_SIZE)
            (_, state, weights), gradient = grad_fn(params, state, batch)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state, state), weights

        return jax.lax.scan(step, carry, jax.random.split(key, STEPS_PER_EPOCH))

    # A scalarizer's state is for the losses, an aggregator's for their number and the parameters: any batch serves.
    state = grad_fn.init(params, draw_pairs(key, digits, BATCH_SIZE))
    params = jax.tree.map(jnp.copy, params)  # donated below, and the next method starts from the same ones
    carry, history = (params, optimizer.init(params), state), []
    for epoch in range(epochs):
        # The same keys for every method, so the same batches.
        carry, weights = run_epoch(carry, digits, jax.random.fold_in(key, epoch))
        params, opt_state, state = carry
        carry = params, opt_state, method.end_epoch(state)  # for DWA; the others return the state as it is
        history.append(weights)
        progress.update()
    return params, jax.tree.map(lambda *epochs: np.concatenate(epochs), *history)


# The results.


def change(metrics, equal):
    """Δm, the relative change against equal weights, averaged over the three tasks."""
    relative = {task: metrics[task] / equal[task] - 1 for task in TASKS}
    return (-relative["left"] - relative["right"] + relative["sum"]) / 3


def print_table(metrics):
    equal = metrics["equal weights"]
    rows = [(name, *show.format_scores(found), f"{change(found, equal):+.1%}") for name, found in metrics.items()]
    caption = f"{show.ABOUT_SCORES} Δm: relative change against equal weights, averaged over the three columns; "
    caption += "worse is positive. One seed: another can move it by three points."
    show.print_table("On the test images", ("method", *show.SCORES, "Δm ↓"), rows, caption)


def draw_weights(history, output):
    """One panel per method: each task's share of the weights, step by step."""
    size = {"figsize": (9.6, 3.1), "sharex": True, "sharey": True}
    with show.picture(output, "The weights over training", 1, len(history), **size) as (_, axes):
        for ax, (name, weights) in zip(axes, history.items(), strict=True):
            total = sum(weights.values())
            shares = {task: weights[task] / total for task in TASKS}
            show.draw_curves(ax, np.arange(len(total)) / STEPS_PER_EPOCH, shares, title=name, yscale="log")
        axes[0].set_ylabel("share of the weights")
        axes[0].legend(title="task")


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, epochs=40).parse_args(argv)

    train_digits, test_pairs = load_data()
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    start = init_params(init_key)
    losses = task_losses(start, test_pairs)
    print("losses before training:", ", ".join(f"{name} {loss:.1f}" for name, loss in losses.items()))

    metrics, history = {}, {}
    with tqdm(total=len(METHODS) * args.epochs, unit="epoch") as progress:
        for name, method in METHODS.items():
            progress.set_description(f"{name:13}")
            params, history[name] = train(method, start, train_digits, args.epochs, data_key, progress)
            metrics[name] = evaluate(params, test_pairs)

    print_table(metrics)
    draw_weights(history, args.output)


if __name__ == "__main__":
    main()
