"""A bound in place of a weight: the sum's error is to be at most 1.0, and the digits as good as they get then.

The tasks are those of ``digits.py``, on a smaller network; the sum's loss is its mean absolute error, in raw units.
Three models are trained with a weight by hand, which says nothing of the error that will come out: it takes a search.
In the others the sum is a constraint with a bound, and its weight a multiplier that climbs while the error is above it
and falls while it is below. The digits are the objectives.

A bound holds where it is measured, on the batches of the training: on images that the network has not seen the error
is larger. And a multiplier falls slowly where the bound is met by little: the error ends a little below it.

Run it with ``python examples/constrained.py``: about a minute on two CPU cores. It needs ``mtlbalance[examples]``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from digits import TASKS, draw_pairs, evaluate, init_params, load_data, losses_of, predict
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import scalarization

BATCH_SIZE = 128
STEPS_PER_EPOCH = 100
WIDTH = 48
BOUND = 1.0
BOUNDS = {"sum": BOUND}  # all that is not named is an objective


def weighted(weight):
    return scalarization.constant(dict.fromkeys(TASKS, 1.0) | {"sum": weight})


METHODS = {
    "weight 0.1": weighted(0.1),
    "weight 1": weighted(1.0),
    "weight 10": weighted(10.0),
    "multiplier": scalarization.lagrangian(BOUNDS, lr=5e-3),
    "damped": scalarization.lagrangian(BOUNDS, lr=5e-3, damping=0.5),
    "proportional": scalarization.lagrangian(BOUNDS, lr=5e-3, kappa_p=30.0, nu=0.9),
    "GECO": scalarization.geco(BOUNDS, lr=2e-3, alpha=0.9),
    # Here the error may be on both sides of its bound: no waiting for the descent to rest.
    "CAPU": scalarization.capu(BOUNDS, eta=5e-3, omega=0.0, initial_multipliers=0.0, initial_penalties=5e-3),
}
BY_HAND = [name for name in METHODS if name.startswith("weight")]


def task_losses(params, batch):
    outputs = predict(params, batch["image"])
    return losses_of(outputs, batch) | {"sum": jnp.mean(jnp.abs(outputs["sum"] - batch["sum"]))}


def train(method, params, digits, epochs, key, progress):
    """Trains one model; returns its parameters, and the mean losses and weights of every epoch."""
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * STEPS_PER_EPOCH))
    grad_fn = mtl.value_and_grad(task_losses, method, return_weights=True)

    @partial(jax.jit, donate_argnames="carry")
    def run_epoch(carry, digits, key):
        def step(carry, key):
            params, opt_state, state = carry
            (losses, state, weights), gradient = grad_fn(params, state, draw_pairs(key, digits, BATCH_SIZE))
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state, state), mtl.report(losses, weights)

        carry, log = jax.lax.scan(step, carry, jax.random.split(key, STEPS_PER_EPOCH))
        return carry, jax.tree.map(jnp.mean, log)

    state = grad_fn.init(params, draw_pairs(key, digits, BATCH_SIZE))
    params = jax.tree.map(jnp.copy, params)  # donated below, and the next method starts from the same ones
    carry, logs = (params, optimizer.init(params), state), []
    for epoch in range(epochs):
        carry, log = run_epoch(carry, digits, jax.random.fold_in(key, epoch))
        logs.append(jax.device_get(log))
        progress.update()
    return carry[0], jax.tree.map(lambda *epochs: np.stack(epochs), *logs)


def print_table(found):
    rows = []
    for name, (metrics, log) in found.items():
        last = {key: values[-1] for key, values in log.items()}
        digits = (last["loss/left"] + last["loss/right"]) / 2
        in_training = f"{last['weight/sum']:.2f}", f"{last['loss/sum']:.2f}", f"{digits:.3f}"
        rows.append((name, *in_training, *show.format_scores(metrics)))
    columns = "sum by", "its weight", "its error", "digits' loss", *show.SCORES
    about = "its weight, its error, digits' loss: means of the last epoch, in training. On the test images: "
    about += f"{show.ABOUT_SCORES} All but the weights by hand have the bound {BOUND}."
    show.print_table("What the sum's error costs the digits", columns, rows, about)


def draw(found, output):
    """The constrained loss and its bound; the objectives; the weight: the multiplier and what is added to it."""
    size = {"figsize": (9.6, 3.8), "sharex": True}
    with show.picture(output, "Losses, bound and multipliers", 1, 3, **size) as (fig, axes):
        curves = {name: log for name, (_, log) in found.items()}
        epochs = np.arange(1, 1 + len(next(iter(curves.values()))["loss/sum"]))
        panels = {
            "error of the sum": lambda log: log["loss/sum"],
            "mean loss of the digits": lambda log: (log["loss/left"] + log["loss/right"]) / 2,
            "weight of the sum": lambda log: log["weight/sum"],
        }
        for ax, (title, values) in zip(axes, panels.items(), strict=True):
            for i, (name, log) in enumerate(curves.items()):
                style = {"color": f"C{i - len(BY_HAND)}", "linewidth": 1.6}
                if name in BY_HAND:
                    style = {"color": "0.45", "linewidth": 1, "linestyle": ["--", ":", "-."][i]}
                ax.plot(epochs, values(log), label=name, **style)
            ax.set(title=title, xlabel="epoch", yscale="log")
        axes[0].axhline(BOUND, color="black", linewidth=1, label="bound")
        axes[0].set_ylim(0.7, 3)
        axes[0].set_yticks([0.7, 1, 2, 3], ["0.7", "1", "2", "3"])
        axes[0].minorticks_off()
        axes[2].set_ylim(0.05, 20)
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, epochs=30).parse_args(argv)
    train_digits, test_pairs = load_data()
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    start = init_params(init_key, WIDTH)

    found = {}
    with tqdm(total=len(METHODS) * args.epochs, unit="epoch") as progress:
        for name, method in METHODS.items():
            progress.set_description(f"{name:12}")
            params, log = train(method, start, train_digits, args.epochs, data_key, progress)
            found[name] = evaluate(params, test_pairs), log

    print_table(found)
    draw(found, args.output)


if __name__ == "__main__":
    main()
