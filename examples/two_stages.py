"""Two stages, as physics-informed networks are trained: Adam while a method balances, then L-BFGS with weights frozen.

A small network learns the solution of ``u'' = f`` on an interval from two losses: the residual of the equation inside,
and that of ``u = 0`` at the two ends. Adam trains it, with equal weights or with those of learning-rate annealing. From
there it goes on in two ways: by Adam as before, or by L-BFGS. The line search of L-BFGS compares values, so that it
must see one and the same function: ``mtl.freeze`` keeps the last weights as constants. All seeds are trained in one
program.

What came out, in median of five seeds: after the first stage the network is off by 6.4e-2 with equal weights and by
5.5e-4 with those of the method; where L-BFGS goes on, in the end by 4.9e-4 and 7.7e-5.

The method is that of Wang et al., "Understanding and mitigating gradient pathologies in physics-informed neural
networks", 2021, https://arxiv.org/abs/2001.04536.

Run it with ``python examples/two_stages.py``: a minute on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

INSIDE = np.linspace(0, 1, 66)[1:-1]
WIDTHS = 1, 32, 32, 1
SEEDS = 5
# `amortize` keeps the weights of a call in the state, where `freeze` finds them.
METHODS = {
    "equal weights": mtl.amortize(scalarization.sum()),
    "learning-rate annealing": mtl.amortize(aggregation.lr_annealing(reference="equation")),
}


# The problem.


def solution(x):
    return jnp.sin(2 * jnp.pi * x) + 0.2 * jnp.sin(8 * jnp.pi * x)


def init_params(key):
    draw, keys = jax.nn.initializers.glorot_normal(), jax.random.split(key, len(WIDTHS) - 1)
    return [
        (draw(key, shape), jnp.zeros(shape[1])) for key, shape in zip(keys, itertools.pairwise(WIDTHS), strict=True)
    ]


def predict(params, x):
    *hidden, (last, offset) = params
    y = 2 * x[None] - 1
    for weight, bias in hidden:
        y = jnp.tanh(y @ weight + bias)
    return (y @ last + offset)[0]


def task_losses(params):
    u = partial(predict, params)
    second_derivative = lambda f: jax.vmap(jax.grad(jax.grad(f)))(INSIDE)
    residual = second_derivative(u) - second_derivative(solution)
    ends = jax.vmap(u)(np.array([0.0, 1.0]))
    return {"equation": jnp.mean(residual**2), "ends": jnp.sum(ends**2)}


def error(params):
    """The norm of what the network is off by, relative to that of the solution."""
    expected = solution(INSIDE)
    return jnp.linalg.norm(jax.vmap(partial(predict, params))(INSIDE) - expected) / jnp.linalg.norm(expected)


# The training.


def by_adam(grad_fn, optimizer, carry, _):
    params, opt_state, state = carry
    (_, state), gradient = grad_fn(params, state)
    updates, opt_state = optimizer.update(gradient, opt_state)
    params = optax.apply_updates(params, updates)
    return (params, opt_state, state), error(params)


def by_lbfgs(value_fn, optimizer, carry, _):
    params, opt_state = carry
    value, gradient = optax.value_and_grad_from_state(value_fn)(params, state=opt_state)
    updates, opt_state = optimizer.update(gradient, opt_state, params, value=value, grad=gradient, value_fn=value_fn)
    params = optax.apply_updates(params, updates)
    return (params, opt_state), error(params)


def train(method, n_steps, key):
    """The errors of both stages, ``[2 * n_steps]`` each: with Adam to the end, and with L-BFGS in the second stage."""
    grad_fn, adam = mtl.value_and_grad(task_losses, method), optax.adam(optax.cosine_decay_schedule(3e-3, 2 * n_steps))
    params = init_params(key)
    step = partial(by_adam, grad_fn, adam)
    carry, first = jax.lax.scan(step, (params, adam.init(params), grad_fn.init(params)), length=n_steps)
    _, more_adam = jax.lax.scan(step, carry, length=n_steps)

    params, _, state = carry
    frozen, lbfgs = mtl.freeze(method, state), optax.lbfgs(memory_size=50)
    frozen_state = frozen.init(len(task_losses(params)))
    value_fn = lambda params: frozen.apply(frozen_state, task_losses(params))[0]
    _, more_lbfgs = jax.lax.scan(partial(by_lbfgs, value_fn, lbfgs), (params, lbfgs.init(params)), length=n_steps)
    return {"Adam": jnp.append(first, more_adam), "then L-BFGS": jnp.append(first, more_lbfgs)}


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, steps=1000).parse_args(argv)
    found = {}
    for name, method in tqdm(METHODS.items(), unit="method"):
        # In float64: towards the end the values that a line search compares differ in their last digits.
        with jax.enable_x64(True):
            keys = jax.random.split(jax.random.key(args.seed), SEEDS)
            found[name] = jax.tree.map(np.asarray, jax.jit(jax.vmap(partial(train, method, args.steps)))(keys))

    ends = lambda curves: (curves["Adam"][:, args.steps - 1], *(errors[:, -1] for errors in curves.values()))
    rows = [(name, *(f"{np.median(errors):.1e}" for errors in ends(curves))) for name, curves in found.items()]
    columns = "weights", "after one stage", "Adam goes on", "then L-BFGS"
    about = f"Relative error of the solution, median of {SEEDS} seeds; {args.steps} steps a stage."
    show.print_table("How far the network is off", columns, rows, about)
    with show.picture(args.output, "The errors", figsize=(6.4, 4)) as (fig, ax):
        draw(ax, found, args.steps)
        fig.legend(loc="outside lower center", ncols=2, frameon=False)


def draw(ax, found, n_steps):
    """The median of the seeds, and each of them; the stages share the first half."""
    for color, (name, curves) in zip(("C0", "C1"), found.items(), strict=True):
        for style, (stage, errors) in zip(("--", "-"), curves.items(), strict=True):
            steps = np.arange(1, errors.shape[1] + 1)
            ax.plot(steps, errors.T, color + style, linewidth=0.6, alpha=0.25)
            ax.plot(steps, np.median(errors, axis=0), color + style, label=f"{name}: {stage}")
    ax.axvline(n_steps, color="0.5", linewidth=1)
    ax.set(xlabel="step", ylabel="relative error (thick: median)", yscale="log")


if __name__ == "__main__":
    main()
