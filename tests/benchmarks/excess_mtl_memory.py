"""What ExcessMTL's weights lose where less than all squared gradients are kept: error against memory.

Run by hand: ``python tests/benchmarks/excess_mtl_memory.py``, some minutes. Each form sees the gradients of one
training, that with the full accumulator, so that what differs is the form's doing. Errors are of the weights after the
last step, of the task where it is largest, over the seeds: their mean, and the largest. The table in the docstring of
``aggregation.excess_mtl`` is made of these numbers.
"""

import argparse
import math
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtlbalance as mtl
from mtlbalance import aggregation
from mtlbalance.strides import keep, kept_shape

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import digits

STEP_SIZES = (0.01, 0.1, 1.0)
BATCH = 128


# The forms: what is kept of one task's squared gradients, and its excess.


def sampled(stride):
    """Ours: the excess of the library's own visits."""
    method = aggregation.excess_mtl(accumulate="full" if stride == 1 else stride)

    def visit(state, row):
        return method.rowwise.visit(state, 0, row)

    return lambda params: method.init((1, params)), visit, lambda state: state.squared_gradients


def of_leaves(init, visit):
    """A form that treats each parameter by itself: ``init(param)``, ``visit(memory, gradient) -> (memory, excess)``."""

    def visit_all(memory, row):
        memory, excess = zip(*map(visit, memory, jax.tree.leaves(row)), strict=True)
        return list(memory), sum(excess)

    return lambda params: list(map(init, jax.tree.leaves(params))), visit_all, lambda memory: memory


def excess_of(g, squares):
    return jnp.sum(g * g * jax.lax.rsqrt(squares + 1e-7))


def plainly_sampled(stride):
    """The same coordinates, and their excess for the excess of all."""

    def visit(squares, g):
        kept = keep(g, squares.shape)
        squares += kept * kept
        return squares, excess_of(kept, squares) * g.size / kept.size

    return of_leaves(lambda p: jnp.zeros(kept_shape(p.shape, stride)), visit)


def rounded(dtype):
    def visit(squares, g):
        new = squares.astype(jnp.float32) + g * g
        return new.astype(dtype), excess_of(g, new)

    return of_leaves(lambda p: jnp.zeros(p.shape, dtype), visit)


def factored():
    """Sums over the rows and over the columns, as Adafactor's; vectors whole."""

    def init(p):
        return (jnp.zeros(p.shape[:-1]), jnp.zeros(p.shape[-1])) if p.ndim > 1 else jnp.zeros(p.shape)

    def visit(squares, g):
        if g.ndim < 2:
            return squares + g * g, excess_of(g, squares + g * g)
        rows, columns = squares[0] + jnp.sum(g * g, axis=-1), squares[1] + jnp.sum(g * g, axis=tuple(range(g.ndim - 1)))
        estimate = rows[..., None] * columns / jnp.maximum(jnp.sum(columns), 1e-30)
        return (rows, columns), excess_of(g, estimate)

    return of_leaves(init, visit)


def per_tensor():
    def visit(squares, g):
        squares += jnp.sum(g * g)
        return squares, excess_of(g, squares / g.size)

    return of_leaves(lambda p: jnp.zeros(()), visit)


FORMS = {
    "full": sampled(1),
    "bfloat16": rounded(jnp.bfloat16),
    **{f"accumulate={stride}": sampled(stride) for stride in (16, 64, 256)},
    "64, plain sum": plainly_sampled(64),
    "rows and columns": factored(),
    "one per tensor": per_tensor(),
}


# The problems: parameters, losses of three tasks, and a batch for a key.


def of_digits(width):
    data, _ = digits.load_data()
    return partial(digits.init_params, width=width), digits.task_losses, lambda key: digits.draw_pairs(key, data, BATCH)


def language_model(n_tokens=2048, width=64):
    """Three texts of frequent and rare tokens, each half by its own rule; the next token from the last two."""
    frequency = 1 / jnp.arange(1, n_tokens + 1)
    mix = jnp.array([0.2, 0.5, 0.8])  # how much of each text is drawn, and not by the rule

    def init(key):
        shapes = {"embed": (n_tokens, width), "up": (2 * width, 4 * width), "down": (4 * width, width)}
        params = digits.init_layers(key, shapes | {"out": (width, n_tokens)}, jax.nn.initializers.lecun_normal())
        return params | {"embed": params["embed"]["w"]}

    def losses(params, batch):
        tokens, targets = batch
        x = params["embed"][tokens].reshape(*targets.shape, -1)
        x = jax.nn.relu(x @ params["up"]["w"] + params["up"]["b"]) @ params["down"]["w"] + params["down"]["b"]
        logits = x @ params["out"]["w"] + params["out"]["b"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets), axis=1)

    def draw(key):
        keys = jax.random.split(key, 2)
        drawn = jax.random.choice(keys[0], n_tokens, (3, BATCH, 3), p=frequency / jnp.sum(frequency))
        # Each text has its own frequent tokens, some of them far down the vocabulary.
        drawn = (drawn * jnp.array([1, 3, 5]).reshape(3, 1, 1) + jnp.array([0, 7, 1000]).reshape(3, 1, 1)) % n_tokens
        ruled = (drawn[..., 0] * 5 + drawn[..., 1] * 3) % n_tokens
        return drawn[..., :2], jnp.where(jax.random.uniform(keys[1], (3, BATCH)) < mix[:, None], drawn[..., 2], ruled)

    return init, losses, draw


PROBLEMS = {
    "digits, width 32": of_digits(32),
    "digits, width 128": of_digits(128),
    "digits, width 512": of_digits(512),
    "language model, width 64": language_model(),
    "language model, width 256": language_model(n_tokens=4096, width=256),
}


def excess_by_form(problem, n_steps, seed):
    """Of each form and task the excess at every step, ``{form: [steps, m]}``, and the numbers kept over m x P."""
    init, losses_fn, draw = problem
    method, optimizer = aggregation.excess_mtl(STEP_SIZES[0]), optax.adam(3e-3)
    grad_fn = mtl.value_and_jac(losses_fn)
    params = init(jax.random.key(seed))
    tasks = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * 3), tree)

    @jax.jit
    def run(params, keys):
        def step(carry, key):
            params, opt_state, state, memories = carry
            _, jacobian = grad_fn(params, draw(key))
            gradient, state = method.apply(state, jacobian)
            found = {name: jax.vmap(FORMS[name][1])(memories[name], jacobian) for name in FORMS}
            updates, opt_state = optimizer.update(gradient, opt_state)
            memories = {name: memory for name, (memory, _) in found.items()}
            excess = {name: excess for name, (_, excess) in found.items()}
            return (optax.apply_updates(params, updates), opt_state, state, memories), excess

        memories = {name: tasks(form[0](params)) for name, form in FORMS.items()}
        carry = params, optimizer.init(params), method.init((3, params)), memories
        return jax.lax.scan(step, carry, keys)[1]

    n_bytes = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    memory = {name: n_bytes(jax.eval_shape(lambda form=form: form[2](form[0](params)))) for name, form in FORMS.items()}
    excess = run(params, jax.random.split(jax.random.key(seed + 100), n_steps))
    return excess, {name: found / n_bytes(params) for name, found in memory.items()}


@jax.jit
def last_weights(excess, step_size):
    """The weights after all steps, from the excess at each."""
    method = aggregation.excess_mtl(step_size)
    state = method.init((3, ()))
    return jax.lax.scan(lambda state, e: method.rowwise.weigh(state, e)[::-1], state, excess)[1][-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    arguments = parser.parse_args()
    print("error of the last weights by step size, mean (largest) over the seeds; memory over that of all squares")
    for name in arguments.problems:
        began = time.perf_counter()
        runs = [excess_by_form(PROBLEMS[name], arguments.steps, seed) for seed in range(arguments.seeds)]
        full = [[np.asarray(last_weights(run["full"], step)) for run, _ in runs] for step in STEP_SIZES]
        shown = ["  ".join(f"{w:.3f}" for w in weights[0]) for weights in full]
        print(f"\n{name}: weights of the first seed {' | '.join(shown)}  ({time.perf_counter() - began:.0f} s)")
        for form in FORMS:
            row = []
            for step, expected in zip(STEP_SIZES, full, strict=True):
                found = [np.asarray(last_weights(run[form], step)) for run, _ in runs]
                errors = [np.max(np.abs(w - e)) for w, e in zip(found, expected, strict=True)]
                row.append(f"{np.mean(errors):.4f} ({np.max(errors):.4f})")
            print(f"{form:20} {runs[0][1][form]:8.4f}   " + "   ".join(row), flush=True)


if __name__ == "__main__":
    main()
