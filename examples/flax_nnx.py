"""The loop of ``train_loop.py`` for a network written with Flax NNX.

A model's parameters are a tree, so any method takes them: the step splits the model, and puts it together again inside
the losses. ``nnx.Optimizer`` takes the balanced gradient as any other. For a model that changes when it is called, by
batch statistics or dropout, see "In Flax and Equinox" in the README.

    python examples/flax_nnx.py famo

Twenty epochs take about ten seconds on two CPU cores. It needs ``mtlbalance[examples]``.
"""

from functools import partial

import jax
import numpy as np
import optax
from flax import nnx
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


class Reader(nnx.Module):
    """Two shared layers, and one linear head per task."""

    def __init__(self, width=128, *, rngs):
        linear = partial(nnx.Linear, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
        self.trunk_1, self.trunk_2 = linear(144, width), linear(width, width)
        self.left, self.right, self.sum = linear(width, 10), linear(width, 10), linear(width, 1)

    def __call__(self, images):
        x = images.reshape(len(images), -1)
        x = nnx.relu(self.trunk_1(x))
        x = nnx.relu(self.trunk_2(x))
        return {"left": self.left(x), "right": self.right(x), "sum": self.sum(x)[:, 0]}


def make_step(name, method):
    """One step: it changes the model and the optimizer in place, and returns the method's state and a record."""

    @nnx.jit
    def step(model, optimizer, state, digits, key):
        *_, batch = batches = draw_batches(name, key, digits)
        definition, params = nnx.split(model)

        def losses_fn(params, batch):
            return compare(nnx.merge(definition, params)(batch["image"]), batch)

        (losses, state, *weights), gradient = balanced_gradient(losses_fn, name, method)(params, state, *batches)
        optimizer.update(model, gradient)
        outputs = model(batch["image"])
        state = observe(name, method, state, outputs, batch)
        return state, record(losses, compare(outputs, batch), weights)

    return step


def train(name, method, model, digits, args):
    """Trains the model in place; returns the mean record of every epoch."""
    optimizer = nnx.Optimizer(model, optax.adam(args.learning_rate), wrt=nnx.Param)
    step, state, history = make_step(name, method), init_state(method, nnx.state(model)), []
    for i in tqdm(range(args.epochs), unit="epoch"):
        records = []
        for key in keys_of_epoch(args.seed, i, args.steps):
            state, found = step(model, optimizer, state, digits, key)
            records.append(found)
        state = method.end_epoch(state)
        history.append(jax.tree.map(lambda *steps: float(np.mean(steps)), *records))
    return history


def main(argv=None):
    args = make_parser(__doc__.splitlines()[0]).parse_args(argv)
    name, method = find_method(args.method, args.set)
    digits, test_pairs = load_data()
    model = Reader(rngs=nnx.Rngs(args.seed))
    before = evaluate(model(test_pairs["image"]), test_pairs)
    history = train(name, method, model, digits, args)
    print_table(args.method, before, evaluate(model(test_pairs["image"]), test_pairs), history)


if __name__ == "__main__":
    main()
