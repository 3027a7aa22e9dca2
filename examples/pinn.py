"""Physics-informed networks: weights of tasks and of points, Adam and then L-BFGS, eight seeds in one program.

A network learns the solution of an equation from two losses: the residual of the equation inside, and what is known on
the rim, the boundary for Helmholtz or the start for Allen-Cahn. The two are weighed by hand, in a sweep that equal
weights are a part of, or by the norms of their gradients: anew at the first step of a round (``refresh=``), as papers
do every 1000 steps. Allen-Cahn's residuals have besides causal weights, new at every step: those of late times wait
until the early ones are small. The losses are the squared residuals of all points, and ``mtl.nested`` puts the causal
weights inside of those of the two tasks. Then L-BFGS goes on, with all weights frozen. The arms of a kind, all seeds
and both stages are one compiled program.

What came out: for Helmholtz the gradients' norms (error 0.047) find weights as good as the best of the sweep (0.065,
1 : 1000), where equal weights fail (1.3). For Allen-Cahn, here until half of its time, they do not: 0.015 with causal
weights against 0.010 for the best of the sweep (1 : 10) and 0.021 for equal ones. Without causal weights equal ones
(0.20) and the norms (0.043) are worse, but the best of the sweep is not (0.012). One learning rate serves all arms: on
Helmholtz 0.01 is better than 0.003 for equal weights and for the norms, and as good for 1 : 100.

Run it with ``python examples/pinn.py``: two and a half minutes on two CPU cores. It needs ``mtlbalance[examples]``.
With ``--full``, which takes half an hour, rounds have 1000 steps and Allen-Cahn goes to its end, with four seeds of
fewer arms. For Helmholtz the norms (0.0042) are then better than the sweep (0.0078) and equal weights (0.10); for
Allen-Cahn they are no better than equal weights (0.0079, 0.0084), and 1 : 100 is (0.0018).

The causal weights are those of Wang et al., "Respecting causality is all you need for training physics-informed neural
networks", 2022, https://arxiv.org/abs/2203.07404, the norms those of jaxpi, https://arxiv.org/abs/2308.08468.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from jax.flatten_util import ravel_pytree
from pinn_problems import allen_cahn, helmholtz
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization


class Arm(NamedTuple):
    """A way to weigh: the condition by a number, or by the gradients' norms (``None``); the points, if tol is not 0."""

    weight: float | None
    tol: float

    def name(self, plan):
        points = ", not causal" if self.tol != max(plan.tols) else ""
        return {None: "gradient norms", 1: "equal weights"}.get(self.weight, f"1 : {self.weight}") + points


class Plan(NamedTuple):
    """How to train: so many rounds of Adam, each of which begins with new weights, and of L-BFGS.

    The sweep has these weights of the condition, where that of the equation is 1.
    """

    lr: float
    n_points: int
    steps: int  # of a round
    adam: int
    lbfgs: int
    memory: int = 50  # of L-BFGS
    seeds: int = 8
    weights: tuple[int, ...] = (1, 10, 100, 1000)
    tols: tuple[float, ...] = (0.0,)

    @property
    def arms(self):
        """Those with weights by hand, and those without."""
        return [[Arm(weight, tol) for tol in self.tols for weight in ws] for ws in (self.weights, (None,))]

    @property
    def n_rounds(self):
        """Of all arms: one of Adam is of all seeds."""
        return sum(map(len, self.arms)) * (self.adam + self.lbfgs * self.seeds)


def make_plans(steps, full):
    """For each problem. Until half of its time Allen-Cahn's solution is smooth."""
    if not full:
        plan = Plan(lr=1e-2, n_points=128, steps=steps, adam=10, lbfgs=2)
        return [(helmholtz(), plan), (allen_cahn(0.5), plan._replace(tols=(10.0, 0.0)))]
    plan = Plan(lr=1e-2, n_points=128, steps=1000, adam=10, lbfgs=2)
    longer = Plan(
        lr=5e-3, n_points=1024, steps=1000, adam=6, lbfgs=8, memory=200, seeds=4, weights=(1, 100), tols=(10.0,)
    )
    return [(helmholtz(), plan), (allen_cahn(1.0), longer)]


# The training.


def task_losses(problem, params, points):
    """Squared residuals, unreduced: two groups of losses."""
    return jax.tree.map(jnp.square, problem.residuals(params, points))


def by_adam(problem, plan, grad_fn, optimizer, carry, key):
    """Points are new at every step, the tasks' weights at the first one of the round, those of points at every one."""

    def step(carry, now):
        i, key = now
        params, opt_state, state = carry
        points = problem.draw(key, plan.n_points, jnp.float32)
        (_, state), gradient = grad_fn(params, state, points, refresh=i == 0)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), None

    keys = jax.random.split(key, plan.steps)
    carry, _ = jax.lax.scan(step, carry, (jnp.arange(plan.steps), keys))
    weights = dict(zip(sorted(("equation", problem.condition)), carry[2].outer.last_weights, strict=True))
    return carry, weights[problem.condition] / weights["equation"]


def by_lbfgs(problem, plan, task_weights, pointwise, params, key):
    """A line search compares values: one set of points, and all weights frozen, for the whole round."""
    points = problem.draw(key, 2 * plan.n_points, jnp.float64)
    losses = task_losses(problem, params, points)
    of_points = mtl.freeze(pointwise, pointwise.init(losses["equation"]), losses["equation"])
    frozen = mtl.nested(task_weights, {"equation": of_points, problem.condition: scalarization.mean()})
    state = frozen.init(losses)
    optimizer = optax.lbfgs(memory_size=plan.memory)

    params, as_tree = ravel_pytree(params)  # one vector: there is less to compile

    def value_fn(params):
        return frozen.apply(state, task_losses(problem, as_tree(params), points))[0]

    def step(carry, _):
        params, opt_state = carry
        value, gradient = optax.value_and_grad_from_state(value_fn)(params, state=opt_state)
        updates, opt_state = optimizer.update(
            gradient, opt_state, params, value=value, grad=gradient, value_fn=value_fn
        )
        return (optax.apply_updates(params, updates), opt_state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=plan.steps)
    return as_tree(params)


def first_stage(problem, plan, method, pointwise, tick, key):
    """Adam: the network and the method's state, and the error and the condition's share of weight after every round."""
    params_key, rounds_key, _ = jax.random.split(key, 3)
    groups = {"equation": pointwise, problem.condition: scalarization.mean()}
    grad_fn = mtl.value_and_grad(partial(task_losses, problem), mtl.nested(method, groups))
    adam = optax.adam(optax.cosine_decay_schedule(plan.lr, plan.adam * plan.steps, alpha=0.01))

    def adam_round(carry, key):
        carry, weight = by_adam(problem, plan, grad_fn, adam, carry, key)
        jax.debug.callback(tick)
        return carry, (error(problem, carry[0]), weight)

    params = problem.init_params(params_key)
    points = problem.draw(params_key, plan.n_points, jnp.float32)  # their number is what counts here
    carry = params, adam.init(params), grad_fn.init(params, points)
    (params, _, state), found = jax.lax.scan(adam_round, carry, jax.random.split(rounds_key, plan.adam))
    return (params, state.outer), found


def second_stage(problem, plan, method, pointwise, tick, carry, key):
    """L-BFGS from there: what the network predicts, and its error after every round."""
    # In float64: towards the end the values that a line search compares differ in their last digits.
    params, state = jax.tree.map(wide, carry)
    task_weights = mtl.freeze(method, state)

    def lbfgs_round(params, key):
        params = by_lbfgs(problem, plan, task_weights, pointwise, params, key)
        jax.debug.callback(tick)
        return params, error(problem, params)

    *_, rounds_key = jax.random.split(key, 3)
    params, errors = jax.lax.scan(lbfgs_round, params, jax.random.split(rounds_key, plan.lbfgs))
    return on_grid(problem, params), errors


def wide(x):
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def on_grid(problem, params):
    dtype = params[0][0].dtype
    grid = jnp.asarray(problem.grid, dtype)
    return problem.predict(params, grid.reshape(-1, 2)).reshape(grid.shape[:-1])


def error(problem, params):
    """The norm of what the network is off by, relative to that of the solution."""
    off = on_grid(problem, params) - jnp.asarray(problem.solution, jnp.float32)
    return (jnp.linalg.norm(off) / np.linalg.norm(problem.solution)).astype(jnp.float32)


# All trainings, and what came out.


def run(problem, plan, arms, keys, tick):
    """All seeds of all arms, in one program: what comes out by ``[arm][name][seed]``. The arms take turns in it.

    All of them have weights by hand, or none has.
    """

    def train_arm(numbers):
        weight, tol = numbers
        method = aggregation.grad_norm_weights()
        if arms[0].weight is not None:
            method = scalarization.constant({"equation": jnp.ones_like(weight), problem.condition: weight})
        # `amortize` keeps the weights of a call in the state, for the steps without new ones and for `freeze`.
        given = problem, plan, mtl.amortize(method), problem.pointwise(tol), tick
        carry, (first, weights) = jax.vmap(partial(first_stage, *given))(keys)
        # One after the other: under `vmap` a line search computes both sides of what it decides.
        u, second = jax.lax.map(lambda one: second_stage(*given, *one), (carry, keys))
        return {"u": u, "error": jnp.concatenate([first, second], axis=1), "weight": weights}

    numbers = np.array([(arm.weight or 0, arm.tol) for arm in arms], np.float32)
    found = jax.jit(partial(jax.lax.map, train_arm))(numbers)
    jax.effects_barrier()  # the last ticks
    return [jax.tree.map(lambda x, i=i: np.asarray(x[i]), found) for i in range(len(arms))]


def run_all(problem, plan, key, tick):
    """What came out of every arm."""
    keys = jax.random.split(key, plan.seeds)
    return {
        arm: result
        for arms in plan.arms
        for arm, result in zip(arms, run(problem, plan, arms, keys, tick), strict=True)
    }


def best_fixed(found):
    return min((arm for arm in found if arm.weight), key=lambda arm: np.median(found[arm]["error"][:, -1]))


def print_table(problem, plan, found):
    rows = []
    for arm, result in found.items():
        name = arm.name(plan) + (" (best)" if arm == best_fixed(found) else "")
        low, median, high = np.quantile(result["error"][:, -1], (0.25, 0.5, 0.75))
        weight, after_adam = np.median(result["weight"][:, -1]), np.median(result["error"][:, plan.adam - 1])
        rows.append((name, f"{weight:.4g}", f"{after_adam:.2g}", f"{median:.2g} ({low:.2g}-{high:.2g})"))
    columns = f"equation : {problem.condition}", "weight", "Adam", "then L-BFGS"
    about = (
        f"Relative error after both stages: median (quartiles) of {plan.seeds} seeds. 1 : w are weights by hand; which"
    )
    about += f" is best says this table. weight: the {problem.condition}'s in the end, the equation's being 1."
    show.print_table(problem.title, columns, rows, about)


def draw_panels(axes, problem, plan, found):
    """The network's solution, where it is off, and over the steps the errors and the weights."""
    u = found[Arm(None, max(plan.tols))]["u"][0]
    (first, second), low, high = problem.axes, problem.grid[0, 0], problem.grid[-1, -1]
    for ax, image, label in ((axes[0], u, "u"), (axes[1], np.abs(u - problem.solution), "error of u")):
        shown = ax.imshow(image.T, origin="lower", aspect="auto", extent=(low[0], high[0], low[1], high[1]))
        ax.figure.colorbar(shown, ax=ax, label=label)
        ax.set(xlabel=first, ylabel=second)
    axes[0].set_title(problem.title)

    steps, best = plan.steps * np.arange(1, plan.adam + plan.lbfgs + 1), best_fixed(found)
    curves = {Arm(1, max(plan.tols)): "0.45", best: "C0"}
    curves |= {Arm(None, tol): f"C{i + 1}" for i, tol in enumerate(plan.tols)}
    for arm, color in curves.items():
        name = arm.name(plan) + (", best by hand" if arm == best else "")
        draw_spread(axes[2], steps, found[arm]["error"], color, name)
        draw_spread(axes[3], steps[: plan.adam], found[arm]["weight"], color, name)
    axes[2].axvline(plan.adam * plan.steps, color="0.5", linewidth=1, linestyle=":", label="from here on L-BFGS")
    axes[2].set(xlabel="step", ylabel="relative error", yscale="log")
    axes[3].set(xlabel="step", ylabel=f"weight of the {problem.condition}", yscale="log")
    axes[3].legend(
        *axes[2].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.45, -0.28), frameon=False
    )


def draw_spread(ax, x, found, color, name):
    """The median of the seeds, and their quartiles."""
    low, median, high = np.quantile(found, (0.25, 0.5, 0.75), axis=0)
    ax.plot(x, median, color=color, label=name)
    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def main(argv=None):
    parser = show.arguments(__doc__, __file__, seed=0, steps=150)
    parser.add_argument("--full", action="store_true", help="Allen-Cahn to its end, and rounds of 1000 steps")
    args = parser.parse_args(argv)
    plans, found = make_plans(args.steps, args.full), []
    n_rounds = sum(plan.n_rounds for _, plan in plans)
    with jax.enable_x64(True), tqdm(total=n_rounds, unit="round") as progress:
        for problem, plan in plans:
            progress.set_description(problem.title)
            found.append(run_all(problem, plan, jax.random.key(args.seed), lambda: progress.update() and None))

    for (problem, plan), results in zip(plans, found, strict=True):
        print_table(problem, plan, results)
    with show.picture(args.output, "Solutions, errors and weights", 4, 2, grid=False, figsize=(7, 10)) as (_, axes):
        for column, (problem, plan), results in zip(axes.T, plans, found, strict=True):
            draw_panels(column, problem, plan, results)


if __name__ == "__main__":
    main()
