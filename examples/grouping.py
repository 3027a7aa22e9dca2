"""How finely to balance: the whole model, each part, each layer or each tensor on its own.

Two tasks may agree on the whole and conflict in one layer. So the network of ``digits.py`` is trained by UPGrad
with one decision for all its parameters, and with one for each group of them: ``optax.partition``, where every group
has an ``mtl.aggregate`` and a state of its own. A last model decides on one layer and applies its weights to all
parameters, in some two thirds of their time per step: ``decide_on=``.

Layers and tensors do see more conflicts: in the second layer the sum is more often against a digit than in the whole
model. But it does not help here: no grouping beats equal weights in any column on all three seeds.

Run it with ``python examples/grouping.py``: about 40 seconds on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
import show
from digits import TASKS, draw_pairs, evaluate, init_params, load_data, task_losses
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, diagnostics, scalarization
from mtlbalance.gramian import gramian

BATCH_SIZE = 128
STEPS_PER_EPOCH = 100
TRUNK = ("trunk_1", "trunk_2")
LAST = TRUNK[-1]
PAIRS = np.triu_indices(len(TASKS), 1)
WATCHED_BATCHES = 40

# The group of a tensor, by its names in the parameters.
GROUPINGS = {
    "whole model": lambda layer, tensor: "all",
    "each part": lambda layer, tensor: "trunk" if layer in TRUNK else "heads",
    "each layer": lambda layer, tensor: layer if layer in TRUNK else "heads",
    "each tensor": lambda layer, tensor: f"{layer}/{tensor}" if layer in TRUNK else "heads",
}


def label_leaves(params, group_of):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: group_of(*(key.key for key in path)), params)


def balanced_groups(labels):
    return sorted(set(jax.tree.leaves(labels)) - {"heads"})


# The models: each has two functions, `init(params)` and `step((params, state), batch)`, and the groups to watch.


class Model(NamedTuple):
    init: Callable
    step: Callable
    grouping: str
    groups: list[str]


def balance_groups(labels, adam):
    """The Jacobian goes in, and each group makes its own gradient of its part; Adam is common to all."""
    groups = {name: mtl.aggregate(aggregation.upgrad(), n_tasks=len(TASKS)) for name in balanced_groups(labels)}
    # A head has a gradient for its own task only, so in a group of heads no two tasks conflict: UPGrad would return the
    # mean of the rows. Heads get the plain gradient of the sum instead; for Adam that is the same but for the scale.
    groups["heads"] = optax.stateless(lambda rows, params: jax.tree.map(lambda leaf: leaf.sum(0), rows))
    optimizer = optax.chain(optax.partition(groups, labels), adam)

    def step(carry, batch):
        params, state = carry
        _, jacobian = mtl.value_and_jac(task_losses)(params, batch)
        updates, state = optimizer.update(jacobian, state, params)
        return optax.apply_updates(params, updates), state

    return optimizer.init, step


def decide_once(method, seen, adam, decide_on=None):
    """One decision for all parameters; the Jacobian, if any, is only that of the parameters that decide."""
    grad_fn = mtl.value_and_grad(task_losses, method, decide_on=decide_on)

    def step(carry, batch):
        params, (state, opt_state) = carry
        (_, state), gradient = grad_fn(params, state, batch)
        updates, opt_state = adam.update(gradient, opt_state)
        return optax.apply_updates(params, updates), (state, opt_state)

    return lambda params: (method.init(seen), adam.init(params)), step


def make_models(params, n_steps):
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, n_steps))
    models = {"equal weights": Model(*decide_once(scalarization.mean(), len(TASKS), adam), "whole model", ["all"])}
    for name, group_of in GROUPINGS.items():
        labels = label_leaves(params, group_of)
        models[name] = Model(*balance_groups(labels, adam), name, balanced_groups(labels))
    mask = {layer: layer == LAST for layer in params}
    seen = len(TASKS), mtl.subset(params, mask)
    decided = decide_once(aggregation.upgrad(), seen, adam, decide_on=mask)
    return models | {f"decided on {LAST}": Model(*decided, "each layer", [LAST])}


# The training, and the conflicts that it meets.


def compile_epoch(step, *args):
    def run_epoch(carry, digits, key):
        def draw_and_step(carry, key):
            return step(carry, draw_pairs(key, digits, BATCH_SIZE)), None

        return jax.lax.scan(draw_and_step, carry, jax.random.split(key, STEPS_PER_EPOCH))[0]

    return jax.jit(run_epoch).lower(*args).compile()


@jax.jit
def find_conflicts(params, digits, key):
    """Which pairs of tasks conflict, ``[batches, pairs]``, for each grouping and each of its groups."""

    def in_group(jacobian, labels, name):
        part = mtl.subset(jacobian, jax.tree.map(lambda label: label == name, labels))
        return diagnostics.conflicts(gramian(part))[PAIRS]

    def on_batch(key):
        _, jacobian = mtl.value_and_jac(task_losses)(params, draw_pairs(key, digits, BATCH_SIZE))
        labels = {name: label_leaves(params, group_of) for name, group_of in GROUPINGS.items()}
        return {
            grouping: {name: in_group(jacobian, tree, name) for name in balanced_groups(tree)}
            for grouping, tree in labels.items()
        }

    return jax.lax.map(on_batch, jax.random.split(key, WATCHED_BATCHES))


def train(models, start, digits, epochs, key):
    """Trains all models; returns for each its parameters, milliseconds per step, and conflicts after every epoch."""
    carries = {name: (start, model.init(start)) for name, model in models.items()}
    programs, seconds, conflicts = {}, {name: [] for name in models}, {name: [] for name in models}
    with tqdm(total=len(models) * (1 + epochs), desc="compiling") as progress:
        for name, model in models.items():
            programs[name] = compile_epoch(model.step, carries[name], digits, key)
            progress.update()
        progress.set_description("training")
        # An epoch of each in turn, so that whatever else the machine does slows all of them alike.
        for epoch_key in jax.random.split(key, epochs):
            for name, program in programs.items():
                begin = time.perf_counter()
                carries[name] = jax.block_until_ready(program(carries[name], digits, epoch_key))
                seconds[name].append(time.perf_counter() - begin)
                conflicts[name].append(jax.device_get(find_conflicts(carries[name][0], digits, epoch_key)))
                progress.update()
    milliseconds = {name: 1000 * np.median(seconds[name]) / STEPS_PER_EPOCH for name in models}
    conflicts = {name: jax.tree.map(lambda *epochs: np.stack(epochs), *conflicts[name]) for name in models}
    return {name: params for name, (params, _) in carries.items()}, milliseconds, conflicts


# The results.


def print_table(models, metrics, milliseconds, conflicts):
    rows = []
    for name, found in metrics.items():
        _, _, grouping, groups = models[name]
        share = f"{np.mean([conflicts[name][grouping][group] for group in groups]):.0%}"
        rows.append((name, *show.format_scores(found), f"{len(groups)}", share, f"{milliseconds[name]:.2f}"))
    caption = f"{show.ABOUT_SCORES} groups: parameters with a decision of their own. conflicts: how often two tasks' "
    caption += (
        "gradients conflict in these groups (equal weights: in the whole model) of this training, over all pairs "
    )
    caption += f"of tasks and {WATCHED_BATCHES} batches after every epoch."
    columns = ("balanced", *show.SCORES, "groups", "conflicts", "ms/step")
    show.print_table("On the test images", columns, rows, caption)


def draw_conflicts(conflicts, output):
    """One panel per pair of tasks: how often they conflict in each layer, and in the whole model."""
    curves = {"whole model": conflicts["whole model"]["all"], **conflicts["each layer"]}
    size = {"figsize": (9.6, 3.5), "sharex": True, "sharey": True}
    subject = "Where and when the tasks conflict, with equal weights"
    with show.picture(output, subject, 1, len(TASKS), **size) as (fig, axes):
        for pair, (ax, i, j) in enumerate(zip(axes, *PAIRS, strict=True)):
            shares = {name: found[..., pair].mean(axis=1) for name, found in curves.items()}
            epochs, title = 1 + np.arange(len(shares[LAST])), f"{TASKS[i]} and {TASKS[j]}"
            show.draw_curves(ax, epochs, shares, ["0.7", "C0", "C1"], title=title, ylim=(-0.03, 1))
            ax.yaxis.set_major_formatter("{x:.0%}")
        axes[0].set_ylabel("batches with a conflict")
        axes[-1].legend()
        fig.suptitle("How often two tasks conflict, in a training with equal weights")


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, epochs=20).parse_args(argv)

    train_digits, test_pairs = load_data()
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    start = init_params(init_key)
    models = make_models(start, args.epochs * STEPS_PER_EPOCH)
    trained, milliseconds, conflicts = train(models, start, train_digits, args.epochs, data_key)

    metrics = {name: evaluate(params, test_pairs) for name, params in trained.items()}
    print_table(models, metrics, milliseconds, conflicts)
    draw_conflicts(conflicts["equal weights"], args.output)


if __name__ == "__main__":
    main()
