"""A method of your own: each loss is divided by its running average, so that units do not count.

``base.scalarizer`` makes a method of two plain functions of one array. It sees to names, masks, counted losses, dtypes
and compiling, and what it returns goes wherever a method of the library goes.

Run it with ``python examples/own_method.py``: some fifteen seconds on two CPU cores. It needs ``mtlbalance[examples]``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import show
from digits import TASKS, draw_pairs, evaluate, init_params, load_data, task_losses
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import base, numerics, states

STEPS_PER_EPOCH = 100


class RunningScaleState(NamedTuple):
    """The first field has one entry per task; all of them are arrays, as what a ``lax.scan`` carries must be."""

    seen: jax.Array
    average: jax.Array


def running_scale(decay=0.99):
    """The sum of the losses, each over the average of its own, with weights that are constants of differentiation."""

    def init(shape, dtype):
        return RunningScaleState(states.zero_counts(shape), jnp.zeros(shape, dtype))

    def apply(state, values, mask):  # mask: which tasks are there; the others keep what is remembered of them
        moved = states.running_average(state.average, values, decay, state.seen)
        weights = numerics.ratio(1.0, moved)  # finite for a loss of zero, too
        state = state._replace(average=jnp.where(mask, moved, state.average))
        return numerics.weighted_sum(weights, values, mask), states.count_seen(state, mask)

    return base.scalarizer(init, apply)


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, epochs=20).parse_args(argv)
    digits, test_pairs = load_data()
    init_key, data_key = jax.random.split(jax.random.key(args.seed))
    method, optimizer = running_scale(), optax.adam(1e-3)
    grad_fn = mtl.value_and_grad(task_losses, method, return_weights=True)

    def step(carry, key):
        params, opt_state, state = carry
        (_, state, weights), gradient = grad_fn(params, state, draw_pairs(key, digits, 128))
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), weights

    run_epoch = jax.jit(lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, STEPS_PER_EPOCH)))
    params = init_params(init_key)
    carry, history = (params, optimizer.init(params), method.init(len(TASKS))), []
    for epoch_key in tqdm(jax.random.split(data_key, args.epochs), unit="epoch"):
        carry, weights = run_epoch(carry, epoch_key)
        history.append(jax.tree.map(jnp.mean, weights))

    scores = show.format_scores(evaluate(carry[0], test_pairs))
    show.print_table("On the test images", ("method", *show.SCORES), [("yours", *scores)], show.ABOUT_SCORES)
    with show.picture(args.output, "The weights over training", figsize=(4.8, 3.2)) as (_, ax):
        curves = jax.tree.map(lambda *means: jnp.stack(means), *history)
        show.draw_curves(ax, jnp.arange(1, args.epochs + 1), curves, ylabel="weight", yscale="log")
        ax.legend(title="task")


if __name__ == "__main__":
    main()
