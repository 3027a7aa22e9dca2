"""Steps with multipliers of this library and of Cooper, side by side.

Run by hand, with torch and cooper-optim installed beside this library: ``python tests/benchmarks/constraints.py``. The
same work in both: an MLP 16-64-64-3 with one mean squared error per output, of which two have an upper bound; batches
of 64, Adam at 1e-3 and ascent at 1e-2, dual first, two threads, the same initial weights and data.
"""

import argparse
import collections
import os

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import cooper
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from cooper.multipliers import DenseMultiplier
from interleave import compared, interleave, median_of_ratios
from torch_model import torch_model

import mtlbalance as mtl
from mtlbalance import scalarization

SIZES, BATCH, LEARNING_RATE, RATE = [16, 64, 64, 3], 64, 1e-3, 1e-2
BOUNDS = (np.inf, 0.5, 0.2)


def make_batches(n_steps):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_steps, BATCH, SIZES[0]))
    y = np.tanh(x @ rng.normal(size=(SIZES[0], SIZES[-1]))) * [0.3, 1.0, 3.0]
    return x.astype(np.float32), y.astype(np.float32)


def init_params(key):
    shapes = zip(jax.random.split(key, len(SIZES) - 1), SIZES[:-1], SIZES[1:], strict=True)
    return [{"w": jax.random.normal(k, (n, m)) / np.sqrt(n), "b": jnp.zeros(m)} for k, n, m in shapes]


def task_losses(params, batch):
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2, axis=0)


def ours(method, params, batches):
    """A function that dispatches a step for every batch, and one that runs them in one program."""
    grad_fn, optimizer = mtl.value_and_grad(task_losses, method), optax.adam(LEARNING_RATE)

    def step(carry, batch):
        params, opt_state, state = carry
        (losses, state), gradient = grad_fn(params, state, batch)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), losses

    start = lambda: jax.tree.map(jnp.copy, (params, optimizer.init(params), method.init(SIZES[-1])))
    one = jax.jit(step, donate_argnums=0)
    run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)

    def dispatched():
        carry = start()
        for batch in zip(*batches, strict=True):
            carry, losses = one(carry, batch)
        jax.block_until_ready((carry, losses))
        return carry[2]

    def scanned():
        return jax.block_until_ready(run(start(), batches))[0][2]

    return dispatched, scanned


class Problem(cooper.ConstrainedMinimizationProblem):
    def __init__(self, model):
        super().__init__()
        self.model, self.bounds = model, torch.tensor(BOUNDS[1:])
        multiplier = DenseMultiplier(num_constraints=2)
        self.upper = cooper.Constraint(cooper.ConstraintType.INEQUALITY, multiplier=multiplier)

    def compute_cmp_state(self, x, y):
        losses = ((self.model(x) - y) ** 2).mean(dim=0)
        violation = cooper.ConstraintState(violation=losses[1:] - self.bounds)
        return cooper.CMPState(loss=losses[0], observed_constraints={self.upper: violation})


def theirs(params, batches):
    batches = [torch.from_numpy(np.array(x)) for x in batches]

    def run():
        problem = Problem(torch_model(params))
        primal = torch.optim.Adam(problem.model.parameters(), lr=LEARNING_RATE)
        dual = torch.optim.SGD(problem.dual_parameters(), lr=RATE, maximize=True)
        both = cooper.optim.AlternatingDualPrimalOptimizer(problem, primal_optimizers=primal, dual_optimizers=dual)
        for x, y in zip(*batches, strict=True):
            both.roll(compute_cmp_state_kwargs={"x": x, "y": y})
        return problem.upper.multiplier.weight.detach().numpy()

    return run


def plain(params, batches):
    return ours(scalarization.sum(), params, batches)[1]


def measure(rounds, quick=False, n_steps=200):
    params, batches = init_params(jax.random.key(0)), make_batches(20 if quick else n_steps)
    n_steps = len(batches[0])
    dispatched, scanned = ours(scalarization.lagrangian(BOUNDS, lr=RATE), params, batches)
    functions = {"dispatched": dispatched, "scan": scanned, "Cooper": theirs(params, batches)}
    functions["sum in scan"] = plain(params, batches)
    np.testing.assert_allclose(dispatched().multipliers[1:], functions["Cooper"](), rtol=1e-3)
    times = interleave(functions, rounds)
    for name, seconds in times.items():
        row = compared(
            "a training step with two constraints", name, "Cooper", seconds, times["Cooper"], n_steps, n_steps
        )
        ratios = f"{row.median:.2f} (median), {row.minima:.2f}"
        print(f"{name:12} {1e6 * row.ours:8.1f} us a step; Cooper's over it: {ratios}")
        if name in ("dispatched", "scan"):
            yield row
    print(f"lagrangian over sum, in scan: {median_of_ratios(times['scan'], times['sum in scan']):.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2, help="of torch; 1 on a machine with other things to do")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    collections.deque(measure(args.rounds, n_steps=args.steps), maxlen=0)


if __name__ == "__main__":
    main()
