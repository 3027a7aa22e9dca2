"""The loop of ``train_loop.py`` for a network written with Equinox.

An Equinox model is a tree of parameters and of anything else, such as activation functions. ``eqx.partition`` takes the
parameters out for the method and the optimizer, and the losses put the model together again.

    python examples/equinox_mlp.py famo

Twenty epochs take about ten seconds on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from quickstart import compare
from tqdm import tqdm
from train_loop import (
    balanced_gradient,
    draw_batches,
    evaluate,
    find_method,
    init_state,
    keys_of_epoch,
    load_data,
    make_parser,
    observe,
    print_table,
    record,
)


class Reader(eqx.Module):
    """Two shared layers, and one linear head per task. It reads one image."""

    trunk: eqx.nn.MLP
    heads: dict[str, eqx.nn.Linear]

    def __init__(self, width=128, *, key):
        keys = jax.random.split(key, 4)
        relu = jax.nn.relu
        self.trunk = eqx.nn.MLP(144, width, width, depth=1, activation=relu, final_activation=relu, key=keys[0])
        sizes = {"left": 10, "right": 10, "sum": "scalar"}
        self.heads = {
            task: eqx.nn.Linear(width, size, key=key) for key, (task, size) in zip(keys[1:], sizes.items(), strict=True)
        }

    def __call__(self, image):
        features = self.trunk(jnp.ravel(image))
        return {task: head(features) for task, head in self.heads.items()}


def make_step(name, method, optimizer):
    @eqx.filter_jit
    def step(model, opt_state, state, digits, key):
        *_, batch = batches = draw_batches(name, key, digits)
        params, others = eqx.partition(model, eqx.is_inexact_array)

        def losses_fn(params, batch):
            return compare(jax.vmap(eqx.combine(params, others))(batch["image"]), batch)

        (losses, state, *weights), gradient = balanced_gradient(losses_fn, name, method)(params, state, *batches)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        model = eqx.apply_updates(model, updates)
        outputs = jax.vmap(model)(batch["image"])
        state = observe(name, method, state, outputs, batch)
        return model, opt_state, state, record(losses, compare(outputs, batch), weights)

    return step


def train(name, method, model, digits, args):
    """The trained model, and the mean record of every epoch."""
    optimizer = optax.adam(args.learning_rate)
    params = eqx.filter(model, eqx.is_inexact_array)
    opt_state, state = optimizer.init(params), init_state(method, params)
    step, history = make_step(name, method, optimizer), []
    for i in tqdm(range(args.epochs), unit="epoch"):
        records = []
        for key in keys_of_epoch(args.seed, i, args.steps):
            model, opt_state, state, found = step(model, opt_state, state, digits, key)
            records.append(found)
        state = method.end_epoch(state)
        history.append(jax.tree.map(lambda *steps: float(np.mean(steps)), *records))
    return model, history


def main(argv=None):
    args = make_parser(__doc__.splitlines()[0]).parse_args(argv)
    name, method = find_method(args.method, args.set)
    digits, test_pairs = load_data()
    start = Reader(key=jax.random.key(args.seed))
    model, history = train(name, method, start, digits, args)
    before, after = (evaluate(jax.vmap(model)(test_pairs["image"]), test_pairs) for model in (start, model))
    print_table(args.method, before, after, history)


if __name__ == "__main__":
    main()
