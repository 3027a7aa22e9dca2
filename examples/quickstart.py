"""A network of two losses in different units: equal weights, weights by hand, and six methods that find theirs.

A small network learns the solution of Helmholtz's equation on a square from two losses: what the equation is off by
inside, and what the solution is off by on the rim, where it is 0 (``pinn_problems.py``). The first starts thousands of
times as large as the second, only because there are second derivatives in it. With equal weights the network learns the
equation and not the rim. Each method decides in its own way how much either should count.

What came out, in median of five seeds: with equal weights the solution is off by 0.195, with the best of six weights by
hand by 0.018. UW and IMTL-L (0.019), the gradients' norms (0.015) and Nash-MTL (0.012) get there in one training. The
search took six, its best is chosen by the very errors that are shown, and three times that weight is too much (0.12).
DWA, which sees how fast losses fall, stays at equal weights; ExcessMTL gives the equation everything. Two other sets of
five seeds said the same. The learning rate is one for all: with three times as much equal weights come to 0.16, and
Nash-MTL (0.018) is no better than the best by hand (0.019).

Run it with ``python examples/quickstart.py``: little more than a minute on two CPU cores, half of it compiling. It
needs ``mtlbalance[examples]``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from pinn_problems import helmholtz
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

PROBLEM = helmholtz(2)  # u_xx + u_yy + u = f inside, u = 0 on the rim; a network with three layers of 32
LEARNING_RATE, N_POINTS, STEPS_PER_ROUND = 1e-2, 64, 50

# Some methods give weights that sum to 1, some to 2, some to anything. Under Adam, which divides the scale of a
# gradient out, only each task's share matters; with another optimizer, retune the learning rate.
METHODS = {
    "UW": mtl.learn(scalarization.uw(), optax.adam(1e-2)),
    "IMTL-L": mtl.learn(scalarization.imtl_l(), optax.adam(1e-2)),
    "DWA": scalarization.dwa(temperature=2.0),
    "ExcessMTL": aggregation.excess_mtl(robust_step_size=0.01),  # as in its authors' code
    "Nash-MTL": aggregation.nash_mtl(),
    "gradient norms": aggregation.grad_norm_weights(),
}
# Of the boundary, where that of the equation is 1.
BY_HAND = {"equal weights": 1.0, "1 : 10": 10.0, "1 : 100": 100.0, "1 : 300": 300.0, "1 : 1000": 1e3, "1 : 3000": 3e3}


def task_losses(params, points):
    residuals = PROBLEM.residuals(params, points)
    return {name: jnp.mean(off_by**2) for name, off_by in residuals.items()}


# The training, the same for every method.


def train(method, n_rounds, key):
    """One model: what it predicts, and after every round its error and the boundary's weight."""
    start_key, rounds_key = jax.random.split(key)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, n_rounds * STEPS_PER_ROUND))
    grad_fn = mtl.value_and_grad(task_losses, method, return_weights=True, hooks=True)  # below, end_epoch is called

    def step(carry, key):
        params, opt_state, state = carry
        points = PROBLEM.draw(key, N_POINTS, jnp.float32)
        (_, state, weights), gradient = grad_fn(params, state, points)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), weights

    def train_round(carry, key):
        carry, weights = jax.lax.scan(step, carry, jax.random.split(key, STEPS_PER_ROUND))
        params, opt_state, state = carry
        carry = params, opt_state, method.end_epoch(state)  # for DWA; the others return the state as it is
        return carry, (error(params), weights["boundary"][-1] / weights["equation"][-1])

    params = PROBLEM.init_params(start_key)
    carry = params, optimizer.init(params), grad_fn.init(params, PROBLEM.draw(start_key, N_POINTS, jnp.float32))
    (params, _, _), (errors, weights) = jax.lax.scan(train_round, carry, jax.random.split(rounds_key, n_rounds))
    return {"u": predict(params), "error": errors, "weight": weights}


def predict(params):
    return PROBLEM.predict(params, PROBLEM.grid.reshape(-1, 2)).reshape(PROBLEM.solution.shape)


def error(params):
    return jnp.linalg.norm(predict(params) - PROBLEM.solution) / np.linalg.norm(PROBLEM.solution)


# All trainings, and what came out.


def run_all(n_rounds, keys, progress):
    """What came out, by name. Seeds are trained side by side, and weights by hand in one compiled program."""
    train_seeds = lambda method, keys: jax.vmap(partial(train, method, n_rounds))(keys)
    fixed = lambda weight: scalarization.constant({"equation": 1.0, "boundary": weight})
    by_hand = jax.jit(lambda weight, keys: train_seeds(fixed(weight), keys))

    programs = {name: partial(by_hand, weight) for name, weight in BY_HAND.items()}
    programs |= {name: jax.jit(partial(train_seeds, method)) for name, method in METHODS.items()}
    found = {}
    for name, program in programs.items():
        progress.set_description(f"{name:14}")
        found[name] = jax.device_get(program(keys))
        progress.update()
    return found


def final(found, name):
    return np.median(found[name]["error"][:, -1])


def print_table(found, best):
    rows = []
    for name, result in found.items():
        errors, weight = result["error"][:, -1], np.median(result["weight"][:, -1])
        title = f"{name} (best by hand)" if name == best else name
        rows.append((title, f"{final(found, name):.3f}", f"{min(errors):.3f} to {max(errors):.3f}", f"{weight:,.0f}"))
    about = "error: the norm of what the solution is off by, relative to its own; median, and range of the seeds. "
    about += "weight: the boundary's in the end, where the equation's is 1. Which one is best by hand says this table."
    show.print_table("How far the solution is off", ("method", "error ↓", "seeds", "weight"), rows, about)


def draw(found, best, output):
    """The solution, what the median seeds of three methods are off by, and the errors of all over the steps."""
    options = {"grid": False, "figsize": (9, 4.9), "height_ratios": (1, 1.2)}
    with show.picture(output, "Solutions and errors", 2, 4, **options) as (fig, axes):
        draw_image(axes[0, 0], PROBLEM.solution, 1.0, "the solution")
        for ax, name in zip(axes[0, 1:], ("equal weights", "UW", "Nash-MTL"), strict=True):
            errors = found[name]["error"][:, -1]
            median = np.argsort(errors)[len(errors) // 2]
            off_by = found[name]["u"][median] - PROBLEM.solution
            draw_image(ax, off_by, 0.3, f"{name}: off by {errors[median]:.1%}")
        for ax in axes[1]:
            ax.remove()
        draw_errors(fig.add_subplot(axes[1, 0].get_gridspec()[1, :3]), found, best)


def draw_image(ax, image, limit, title):
    ax.imshow(image.T, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize="medium")
    ax.set_xlabel(f"colors: -{limit:g} to {limit:g}", fontsize="small", color="0.4")


def draw_errors(ax, found, best):
    """Medians of the seeds, and their quartiles; the legend goes from bad to good, as the curves do."""
    styles = dict.fromkeys(METHODS, "-") | {best: "k:", "equal weights": "k--", "UW": "c-"}
    for name in sorted(styles, key=partial(final, found), reverse=True):
        low, median, high = np.quantile(found[name]["error"], (0.25, 0.5, 0.75), axis=0)
        steps, width = STEPS_PER_ROUND * np.arange(1, len(median) + 1), 4 if name == "UW" else 2  # IMTL-L lies on UW
        label = f"{median[-1]:.3f}  {'best by hand' if name == best else name}"
        (line,) = ax.plot(steps, median, styles[name], linewidth=width, label=label)
        ax.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    ax.set(xlabel="step", ylabel="relative error", yscale="log")
    ax.grid(alpha=0.3)
    legend = ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="in the end", alignment="left")
    legend.set_in_layout(False)  # it stands in the grid's last cell


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, rounds=40, seeds=5).parse_args(argv)
    keys = jax.random.split(jax.random.key(args.seed), args.seeds)
    with tqdm(total=len(BY_HAND) + len(METHODS), unit="method") as progress:
        found = run_all(args.rounds, keys, progress)
    best = min(BY_HAND, key=partial(final, found))
    print_table(found, best)
    draw(found, best, args.output)


if __name__ == "__main__":
    main()
