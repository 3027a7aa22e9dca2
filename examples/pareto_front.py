"""Two hundred preferences in one compiled program, for each of five methods, on a convex and a concave Pareto front.

Two losses pull six numbers to different places, so the best for one is not the best for the other. A preference says
how important each loss is: the more important, the smaller it gets. Every preference is a training of its own, and
``jax.vmap`` over the preference runs all of them at once: the method is built inside the function that is mapped.

The fronts are known: ``loss 2 = 1 - sqrt(loss 1)`` is convex, ``loss 2 = 1 - (loss 1)**2`` is concave. So is the best
hypervolume, the area of the loss pairs that are worse than some point found, up to the pair (1.1, 1.1).

The problems are F1 and F4 of Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML
2024, https://arxiv.org/abs/2402.19078, whose official code gives them: https://github.com/Xi-L/STCH. EPO reads
losses and gradients: it is an aggregator, and the training step is the same.

Run it with ``python examples/pareto_front.py``: some twenty seconds on two CPU cores, with compiling. It needs
``mtlbalance[examples]``.
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

POWERS = {"convex": 0.5, "concave": 2.0}  # the front is loss 2 = 1 - (loss 1)**power
WORST = 1.1  # the corner of the hypervolume, in both losses
MARGIN = 0.05  # a point with a smaller loss is at an end of the front
N_PREFERENCES = 200

# Uniform: the middles of equal parts, so that no loss counts nothing.
FIRST = (np.arange(N_PREFERENCES) + 0.5) / N_PREFERENCES
PREFERENCES = np.stack([FIRST, 1 - FIRST], axis=1)

# The weighted sum and STCH take importance as it is. PBI and COSMOS take a direction to go in, where the less important
# loss may be the larger one: of two losses, the importance the other way round. (COSMOS also has a weighted sum in it.)
# EPO takes importance too, and asks for one ray, on which importance times loss is the same for both: that direction.
METHODS = {
    "weighted sum": scalarization.constant,
    "STCH": lambda importance: scalarization.stch(mu=0.01, weights=importance),
    "PBI": lambda importance: scalarization.pbi(theta=5.0, weights=importance[::-1]),
    "COSMOS": lambda importance: scalarization.cosmos(lambda_=8.0, weights=importance[::-1]),
    "EPO": lambda importance: aggregation.epo(importance, eps=1e-6),
}


# The problem, and what is known about it.


def task_losses(params, power):
    """Two losses of six numbers, which the sigmoid keeps between 0 and 1."""
    x = jax.nn.sigmoid(params)
    # Both are best where each other number is (2 x[0] - 1)**2; then only x[0] is left, and it trades one for the other.
    distance = (x[1:] - (2 * x[0] - 1) ** 2) ** 2
    scale_1, scale_2 = 1 + jnp.mean(distance[1::2]), 1 + jnp.mean(distance[0::2])
    return jnp.stack([scale_1 * x[0], scale_2 * (1 - (x[0] / scale_2) ** power)])


def best_hypervolume(power):
    """The hypervolume of the whole front: the square, less the area below the front."""
    return WORST**2 - power / (power + 1)


def hypervolume(points):
    """The area that is worse than one of the points in both losses, and better than ``WORST``."""
    first, second = np.minimum(points[np.argsort(points[:, 0])], WORST).T
    # Stairs: from each point to the next, as deep as the best second loss so far.
    return np.sum(np.diff(first, append=WORST) * (WORST - np.minimum.accumulate(second)))


def n_between(points):
    """How many points lie between the ends of the front, where one of the losses is zero."""
    return np.sum(np.all(points > MARGIN, axis=1))


def degrees_off_the_ray(points):
    """The angle of each point from the ray on which importance times loss is the same for both losses."""
    first, second = PREFERENCES.T
    return np.degrees(np.abs(np.arctan2(points[:, 1], points[:, 0]) - np.arctan2(first, second)))


# The training.


def train(build, power, n_steps, preference):
    """One training from start to end, for one preference: the two losses at the end."""
    grad_fn = mtl.value_and_grad(task_losses, build(preference))
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, n_steps))

    def step(carry, _):
        params, opt_state, state = carry
        (_, state), gradient = grad_fn(params, state, power)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), None

    params = jnp.zeros(6)
    (params, _, _), _ = jax.lax.scan(
        step, (params, optimizer.init(params), grad_fn.init(params, power)), length=n_steps
    )
    return task_losses(params, power)


def trace_front(build, power, n_steps):
    """The two losses at the end for every preference: all trainings in one compiled program."""
    return np.asarray(jax.jit(jax.vmap(partial(train, build, power, n_steps)))(PREFERENCES))


# The results.


def print_table(points):
    def format_front(name, front):
        found = points[name, front]
        area = hypervolume(found)
        degrees = np.median(degrees_off_the_ray(found))
        return f"{area:.4f} ({area / best_hypervolume(POWERS[front]):.1%})", f"{n_between(found)}", f"{degrees:.2f}°"

    columns = ["method", *(column for front in POWERS for column in (f"{front} ↑", "between", "off ↓"))]
    rows = [[name, *(cell for front in POWERS for cell in format_front(name, front))] for name in METHODS]
    caption = "In brackets: the share of what the whole front has. between: how many of the "
    caption += f"{N_PREFERENCES} points lie between the ends of the front, with both losses above {MARGIN}. "
    caption += "off: the median angle from the ray on which importance times loss is the same for both losses."
    show.print_table("Hypervolume", columns, rows, caption)


def draw_fronts(points, output):
    """One panel per method and front: the front as a line, and a point per preference."""
    line, ends = np.linspace(0, 1, 500), {"lim": (-0.06, 1.06), "ticks": [0, 0.5, 1]}
    shared = {"figsize": (11.6, 5.0), "sharex": True, "sharey": True, "layout": "compressed"}
    corners = {"convex": (0.95, 0.77, "right"), "concave": (0.05, 0.07, "left")}  # that the fronts leave free
    with show.picture(output, "The fronts", 2, len(METHODS), **shared) as (fig, axes):
        for ax, (front, name) in zip(axes.flat, itertools.product(POWERS, METHODS), strict=True):
            found, power = points[name, front], POWERS[front]
            ax.plot(line, 1 - line**power, color="0.8", linewidth=8, label="the front")
            dots = ax.scatter(*found.T, c=PREFERENCES[:, 0], vmin=0, vmax=1, s=22, linewidth=0, zorder=2)
            share, (x, y, side) = hypervolume(found) / best_hypervolume(power), corners[front]
            ax.text(x, y, f"{share:.1%} of the\nhypervolume", ha=side, transform=ax.transAxes)
            ax.set(aspect="equal", **{axis + key: value for axis in "xy" for key, value in ends.items()})
        for ax, name in zip(axes[0], METHODS, strict=True):
            ax.set_title(name)
        for ax, front in zip(axes[:, 0], POWERS, strict=True):
            ax.set_ylabel(f"{front} front\nloss 2")
        for ax in axes[1]:
            ax.set_xlabel("loss 1")
        axes[0, 0].legend(loc=(0.44, 0.5), fontsize="small", frameon=False)
        fig.colorbar(dots, ax=axes, label="importance of loss 1", aspect=40, pad=0.01)


def main(argv=None):
    args = show.arguments(__doc__, __file__, steps=3000).parse_args(argv)

    points = {}
    with tqdm([(name, front) for name in METHODS for front in POWERS], unit="front") as progress:
        for name, front in progress:
            progress.set_description(f"{name}, {front}")
            points[name, front] = trace_front(METHODS[name], POWERS[front], args.steps)

    print_table(points)
    linear, stch = (n_between(points[name, "concave"]) for name in ("weighted sum", "STCH"))
    print("Whatever the importance, a weighted sum is least at one of the two ends of a concave front.")
    print(f"Of its {N_PREFERENCES} points {linear} lie between them, of STCH's {stch}.")
    furthest = max(np.max(degrees_off_the_ray(points["EPO", front])) for front in POWERS)
    print(f"EPO's points lie on the rays asked for, the furthest {furthest:.2f} degrees off.")
    draw_fronts(points, args.output)


if __name__ == "__main__":
    main()
