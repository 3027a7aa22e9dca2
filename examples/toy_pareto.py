"""Which methods reach the Pareto front, on the toy problem of the CAGrad, Nash-MTL and FAMO papers?

Two losses of two numbers. Below the middle each is a bowl, and between the two minima lies the front. Above it each
has a ravine with walls so steep that gradients reach 1e5: a path that falls into one may stay there. The second loss
counts ten times as much as the first. The papers draw which methods get from five starts to the front. Here every
method of the library tries it, its five starts in one compiled program, by the training step that all methods share.

The problem is that of Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021,
https://arxiv.org/abs/2110.14048, with the scales and starts of Navon et al., "Multi-Task Learning as a Bargaining
Game", ICML 2022, https://arxiv.org/abs/2202.01017, in the setting of Liu et al., "FAMO: Fast Adaptive Multitask
Optimization", NeurIPS 2023, https://arxiv.org/abs/2306.03792: 50,000 steps of Adam, each gradient clipped to norm 1.

Run it with ``python examples/toy_pareto.py``: some two minutes on two CPU cores, a third of them for CAGrad; or add
``--methods sum FAMO Nash-MTL`` for a few seconds. It needs ``mtlbalance[examples]``.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
import show
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

SCALES = np.array([0.1, 1.0])
LOWEST = -21 * SCALES  # below both losses everywhere: the least are -19.99 times the scales
BOUNDS = (np.inf, -15.0)  # of methods with constraints: the least of the first loss where the second is at most -15
STARTS = {"A": (-8.5, 7.5), "B": (0.0, 0.0), "C": (9.0, 9.0), "D": (-7.5, -0.5), "E": (9.0, -1.0)}
EVERY = 100  # steps between the points of a path that are kept


class Run(NamedTuple):
    """A method, how it is run, and what is published.

    Attributes:
      build: makes the method, or what makes of the losses' function a step of its own.
      shifted: runs on the losses less ``LOWEST``, because the method is for losses that are positive.
      optimizer: what descends.
      published: from how many starts it arrives in the papers' figures.
      seconds: what FAMO's authors report for their 50,000 steps.
    """

    build: Callable[[], Any]
    shifted: bool = False
    optimizer: optax.GradientTransformation = optax.adam(1e-3)
    published: str = ""
    seconds: int | None = None


def learned(method):
    """Trained along with the numbers, by the optimizer that the papers use for what a method learns."""
    return mtl.learn(method, optax.adam(0.025))


AUTO_LAMBDA = {"optimizer": optax.sgd(1e-3), "meta_optimizer": optax.adam(0.025), "softmax": True}

METHODS = {
    # Losses to one scalar.
    "sum": Run(scalarization.sum, published="4 of 5", seconds=33),
    "mean": Run(scalarization.mean),
    "constant (10, 1)": Run(lambda: scalarization.constant(1 / SCALES)),
    "random": Run(lambda: scalarization.random(key=0)),
    "geometric mean": Run(scalarization.geometric_mean, shifted=True),
    "scale-invariant": Run(scalarization.scale_invariant, shifted=True),
    "STCH": Run(lambda: scalarization.stch(mu=0.1, n_warmup_epochs=1, steps_per_epoch=1), shifted=True),
    "COSMOS": Run(lambda: scalarization.cosmos(lambda_=1.0, weights=1 / SCALES), shifted=True),
    "PBI": Run(lambda: scalarization.pbi(theta=5.0, weights=SCALES, reference=LOWEST)),
    "FAMO": Run(lambda: scalarization.famo(LOWEST, weight_decay=0.0), published="5 of 5", seconds=39),
    "UW": Run(lambda: learned(scalarization.uw()), shifted=True),
    "revised UW": Run(lambda: learned(scalarization.revised_uw()), shifted=True),
    "UW-O": Run(scalarization.uw_o, shifted=True),
    "UW-SO": Run(scalarization.uw_so, shifted=True),
    "IMTL-L": Run(lambda: learned(scalarization.imtl_l()), shifted=True),
    "DWA": Run(lambda: scalarization.dwa(steps_per_epoch=25), shifted=True),
    "LBTW": Run(scalarization.lbtw, shifted=True),
    "CoV-weighting": Run(scalarization.cov_weighting, shifted=True),
    "SLAW": Run(scalarization.slaw),
    "CoBa": Run(lambda: scalarization.coba(window=50, n_warmup_steps=10), shifted=True),
    "SoftAdapt": Run(scalarization.softadapt),
    "ReLoBRaLo": Run(lambda: scalarization.relobralo(temperature=0.1), shifted=True),
    "GroupDRO": Run(scalarization.group_dro),
    "min-max": Run(lambda: learned(scalarization.minmax())),
    "self-adaptive": Run(lambda: learned(scalarization.self_adaptive()), shifted=True),
    "Lagrangian": Run(lambda: scalarization.lagrangian(BOUNDS, damping=0.1)),
    "GECO": Run(lambda: scalarization.geco(BOUNDS, lr=1e-4)),
    "CAPU": Run(lambda: scalarization.capu(BOUNDS, initial_multipliers=0.0, initial_penalties=0.01, omega=0.0)),
    # One gradient per loss to one gradient.
    "UPGrad": Run(aggregation.upgrad),
    "DualProj": Run(aggregation.dual_proj),
    "MGDA": Run(aggregation.mgda, published="5 of 5", seconds=60),
    "MGDA, normalised": Run(lambda: aggregation.mgda("l2", combine_normalized=True)),
    "CAGrad": Run(lambda: aggregation.cagrad(c=0.4), published="5 of 5", seconds=89),
    "Nash-MTL": Run(aggregation.nash_mtl, published="5 of 5", seconds=995),
    "FairGrad, alpha 1": Run(aggregation.fairgrad, published="arrive"),
    "FairGrad, alpha 2": Run(lambda: aggregation.fairgrad(alpha=2.0), published="arrive"),
    "FairGrad, alpha 5": Run(lambda: aggregation.fairgrad(alpha=5.0), published="arrive"),
    "IMTL-G": Run(aggregation.imtl_g),
    "ConFIG": Run(aggregation.config, published="5 of 5"),
    # Its gradient is scaled as Adam's step is.
    "M-ConFIG": Run(aggregation.m_config, optimizer=optax.sgd(1e-3)),
    "Aligned-MTL": Run(aggregation.aligned_mtl),
    "PCGrad": Run(aggregation.pcgrad, published="5 of 5", seconds=54),
    "GradDrop": Run(aggregation.graddrop),
    "GradVac": Run(aggregation.gradvac),
    "PCD": Run(aggregation.pcd),
    "GradNorm": Run(aggregation.gradnorm, shifted=True),
    "inverse Dirichlet": Run(aggregation.inverse_dirichlet),
    "gradient norms": Run(aggregation.grad_norm_weights),
    "LR annealing": Run(aggregation.lr_annealing),
    "gradient shares": Run(lambda: aggregation.gradient_shares(1.0)),
    "MetaBalance": Run(aggregation.match_norm),
    "Bloop": Run(aggregation.bloop),
    "cosine gate": Run(aggregation.cosine_gate),
    "MoCo": Run(aggregation.moco),
    "MoDo": Run(aggregation.modo),
    "SDMGrad": Run(aggregation.sdmgrad),
    "CR-MOGM of MGDA": Run(lambda: aggregation.cr_mogm(aggregation.mgda())),
    "EPO": Run(lambda: aggregation.epo(1 / SCALES), shifted=True),
    "ExcessMTL": Run(aggregation.excess_mtl),
    # By what a step does to the losses: each weight climbs while its gradient lowers their sum.
    "Auto-Lambda": Run(lambda: partial(mtl.auto_lambda, **AUTO_LAMBDA)),
    # Losses to losses, and their gradients to one.
    "IMTL": Run(lambda: mtl.chain(learned(scalarization.imtl_l()), aggregation.imtl_g()), shifted=True),
    "DB-MTL": Run(lambda: mtl.chain(scalarization.scale_invariant(), aggregation.db_mtl(beta=0.9)), shifted=True),
    "log-space MGDA": Run(lambda: mtl.chain(scalarization.scale_invariant(), aggregation.mgda()), shifted=True),
}

# Those that are drawn, if they are run.
PANELS = [
    *("sum", "UW", "GroupDRO", "FAMO"),
    *("PCGrad", "UPGrad", "CAGrad", "MGDA"),
    *("Nash-MTL", "DB-MTL", "Aligned-MTL", "ExcessMTL"),
]
COLOURS = dict(zip(STARTS, ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7B4FA3"), strict=True))


# The problem, and what is known about it.


def task_losses(x, scales=SCALES):
    """Two losses of two numbers: ravines where the second is positive, bowls where it is negative."""
    x1, x2 = x

    def log(value):
        return jnp.log(jnp.maximum(jnp.abs(value), 5e-6)) + 6

    # At the start (0, 0) the whole gradient comes through these two kinks. `maximum` passes half of it there, and that
    # is enough; `relu` would pass none, and nothing would ever move.
    above, below = jnp.maximum(jnp.tanh(x2 / 2), 0), jnp.maximum(jnp.tanh(-x2 / 2), 0)
    logs = jnp.stack([log((-x1 - 7) / 2 + jnp.tanh(x2)), log((-x1 + 3) / 2 - jnp.tanh(x2) + 2)])
    bowls = (jnp.stack([x1 - 7, x1 + 7]) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    return scales * (above * logs + below * bowls)


def shortest_combination(x, scales=SCALES):
    """The norm of the shortest gradient between those of the two losses: zero on the front."""
    first, second = jax.jacrev(task_losses)(x, scales)
    weight = jnp.clip(jnp.dot(second - first, second) / jnp.sum((first - second) ** 2), 0, 1)
    return jnp.linalg.norm(weight * first + (1 - weight) * second)


def on_front(points, scales=SCALES):
    """Which points are on the front: nearly the line from (-7, -8.43) over (0, -8.36) to (7, -8.43)."""
    with jax.enable_x64(True):
        shortest = np.asarray(jax.vmap(partial(shortest_combination, scales=scales))(jnp.asarray(points)))
    x1, x2 = np.asarray(points).T
    # FAMO still drifts along the front after 50000 steps, a little above it: a hundredth is left for that.
    return (shortest < 1e-3) & (np.abs(x1) <= 7) & (x2 > -8.44) & (x2 < -8.345)


# The training.


def training(method, scales=SCALES, lowest=0.0, max_norm=1.0, optimizer=None):
    """How a path begins at a start, and how it goes on for a hundred steps; by any method."""
    losses_fn = lambda x: task_losses(x, scales) - lowest
    if isinstance(method, mtl.Scalarizer | mtl.Aggregator):
        grad_fn, given, observe = mtl.value_and_grad(losses_fn, method, hooks=True), {}, method.observe
    else:  # a step of its own, here without other data
        grad_fn, given, observe = method(losses_fn), {"validation": ()}, lambda state, losses: state
    optimizer = optax.chain(optax.clip_by_global_norm(max_norm), optimizer or optax.adam(1e-3))

    def begin(start):
        return start, optimizer.init(start), grad_fn.init(start)

    def step(carry, _):
        x, opt_state, state = carry
        (_, state), gradient = grad_fn(x, state, **given)
        updates, opt_state = optimizer.update(gradient, opt_state)
        x = optax.apply_updates(x, updates)
        return (x, opt_state, observe(state, losses_fn(x))), None  # free where nothing is observed

    return begin, lambda carry: jax.lax.scan(step, carry, length=EVERY)[0]


def descend(method, n_steps, start, **setting):
    """One path: where it is at the start and after every hundred steps."""
    begin, go_on = training(method, **setting)

    def keep(carry, _):
        carry = go_on(carry)
        return carry, carry[0]

    _, path = jax.lax.scan(keep, begin(start), length=n_steps // EVERY)
    return jnp.concatenate([start[None], path])


def trace_paths(run, n_steps):
    """The paths from all starts in one compiled program."""
    # In float64: in the ravines rounding decides where a path goes.
    with jax.enable_x64(True):
        setting = {"lowest": LOWEST if run.shifted else 0.0, "optimizer": run.optimizer}
        path = partial(descend, run.build(), n_steps, **setting)
        return np.asarray(jax.jit(jax.vmap(path))(np.array(list(STARTS.values()))))


# The results.


ABOUT = (
    "A to E: x1 at the end, where that is on the front; the front goes from -7 to 7. papers: what their figures show, "
    "or the notebook of ConFIG's authors; MGDA, Nash-MTL and FairGrad after 35,000 steps. From A the sum has not "
    "arrived after 50,000 clipped steps; unclipped it does after some 40,000. seconds: all five starts, with "
    "compiling. theirs: what FAMO's authors report for 50,000 steps in PyTorch on their machine. *: run on the losses "
    "plus 21 times their scale, because the method is for losses that are positive, or of one sign. mean, sum, "
    "constant and random are the same in both families. Not run: Krum and the trimmed mean, which need three tasks, "
    "and DTP, which needs an indicator for each."
)


def print_table(paths, seconds):
    rows = []
    for name, path in paths.items():
        run, there = METHODS[name], on_front(path[:, -1])
        x1 = np.round(path[:, -1, 0], 2) + 0.0  # not -0.00
        ends = [f"{end:.2f}" if arrived else "-" for end, arrived in zip(x1, there, strict=True)]
        theirs = "" if run.seconds is None else f"{run.seconds}"
        counts = f"{there.sum()} of {len(STARTS)}", run.published
        rows.append((name + "*" * run.shifted, *ends, *counts, f"{seconds[name]:.1f}", theirs))
    style = {"box": rich.box.SIMPLE, "padding": 0, "show_edge": False}
    columns = "method", *STARTS, "arrive", "papers", "seconds", "theirs"
    show.print_table("Where each start ends", columns, rows, ABOUT, **style)


def print_summary(paths):
    everywhere = [name for name, path in paths.items() if on_front(path[:, -1]).all()]
    from_losses = [name for name in everywhere if isinstance(METHODS[name].build(), mtl.Scalarizer)]
    print(f"Arrived from all starts: {len(everywhere)} of {len(paths)} methods.")
    print(f"Those of them that read the losses alone, in one backward pass a step: {', '.join(from_losses) or 'none'}.")


def draw_ground(ax):
    """The mean of the two losses, each in units of its scale; the front; and the ravines."""
    sides, above = np.linspace(-11, 11, 401), np.linspace(0, 11, 100)
    places = np.stack(np.meshgrid(sides, sides)).reshape(2, -1)
    heights = np.mean(jax.vmap(task_losses, -1, -1)(places) / SCALES[:, None], axis=0).reshape(401, 401)
    ax.contourf(sides, sides, heights, levels=np.arange(-16, 9, 2), extend="both", cmap="Greys_r", alpha=0.45)
    front = [-7, -3.5, 0, 3.5, 7], [-8.43, -8.38, -8.36, -8.38, -8.43]
    ax.plot(*front, color="gold", linewidth=6, label="Pareto set")
    # The ravines are thinner than the contours' grid is fine.
    for side, label in ((1, "ravine"), (-1, None)):
        ax.plot(side * (7 - 2 * np.tanh(above)), above, "k:", linewidth=1, label=label)
    ax.set(aspect="equal", xlim=(-11, 11), ylim=(-11, 11), xticks=[-7, 0, 7], yticks=[-8, 0, 8])


def draw_path(ax, path, arrived, start):
    """A path from its start to its end, which is at the frame where the path leaves it."""
    ax.plot(*path.T, color=COLOURS[start], linewidth=1.6)
    ax.plot(*STARTS[start], "o", color=COLOURS[start], markersize=5)
    mark = {"marker": "*", "markersize": 10} if arrived else {"marker": "X", "markersize": 8}
    edge = {"markeredgecolor": "black", "markeredgewidth": 0.7, "zorder": 3}
    ax.plot(*np.clip(path[-1], -10.5, 10.5), color=COLOURS[start], **edge, **mark)


def draw_paths(paths, output):
    """One panel per method: its paths on the ground."""
    names = [name for name in PANELS if name in paths] or list(paths)[: len(PANELS)]
    n_columns = min(4, len(names))
    n_rows = -(-len(names) // n_columns)
    shared = {"sharex": True, "sharey": True, "squeeze": False, "layout": "compressed", "grid": False}
    size = 2.4 * max(n_columns, 4), 0.5 + 2.5 * n_rows
    with show.picture(output, "The paths", n_rows, n_columns, figsize=size, **shared) as (fig, axes):
        for mark, label in ("o", "start"), ("*", "end, on the front"), ("X", "end, elsewhere"):
            axes[0, 0].plot([], [], color="0.5", marker=mark, linestyle="", label=label)
        for ax, name in zip(axes.flat, names, strict=False):
            draw_ground(ax)
            there = on_front(paths[name][:, -1])
            for path, arrived, start in zip(paths[name], there, STARTS, strict=True):
                draw_path(ax, path, arrived, start)
            ax.set_title(f"{name}: {there.sum()} of {len(STARTS)}", fontsize="medium")
        for start, (x1, x2) in STARTS.items():
            side, place = (-1, "right") if x1 < 0 else (1, "left")
            axes[0, 0].text(x1 + 0.6 * side, x2, start, ha=place, va="center", color=COLOURS[start])
        for ax in axes[-1]:
            ax.set_xlabel("x1")
        for ax in axes[:, 0]:
            ax.set_ylabel("x2", labelpad=0)
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()
        fig.suptitle("Shading: the mean of the two losses, each over its scale; dark is small", fontsize="medium")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


def main(argv=None):
    parser = show.arguments(__doc__, __file__, steps=50_000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    args = parser.parse_args(argv)
    if args.steps % EVERY:
        parser.error(f"--steps must be a multiple of {EVERY}, found {args.steps}")

    paths, seconds = {}, {}
    with tqdm(args.methods, unit="method") as progress:
        for name in progress:
            progress.set_description(name)
            begin = time.perf_counter()
            paths[name] = trace_paths(METHODS[name], args.steps)
            seconds[name] = time.perf_counter() - begin

    print_table(paths, seconds)
    print_summary(paths)
    draw_paths(paths, args.output)


if __name__ == "__main__":
    main()
