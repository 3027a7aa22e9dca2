"""Energy and forces of small clusters: a machine-learned potential, whose force loss is itself a gradient.

Clusters of four to seven Lennard-Jones atoms are drawn by Monte Carlo at several temperatures, in reduced units. A
small network of radial functions gives each atom an energy. Their sum is the cluster's, and its gradient to the
positions the forces: the losses are the mean squares of what both are off by, the energy's per atom. So the gradients
that a method sees are second derivatives, and the training step is the same as ever.

Who trains such potentials sets the balance by hand, and MACE turns it around for the last quarter: forces a hundred
times the energy, then the energy ten times the forces. That schedule, nine fixed weights and methods of both families
get the same number of steps and the same seeds, each with the best of three learning rates. What is best is the
smallest product of both errors, whatever their units, on clusters that are neither trained nor tested on.

Found: UW, whose weight of the energy rises from 1 to 250 as the energy's loss falls, is as good as the best fixed
weight, 30, without a sweep: its product of both errors is 0.97 ± 0.23 of the other's, and was 0.82 ± 0.11 with other
random batches. The plain sum has 2.2, the two stages 1.6. Gradient norms, IMTL-G and UPGrad do not reach what a sweep
of fixed weights finds: 1.3 to 1.7.

MACE's losses and weights are those of https://github.com/ACEsuit/mace.

Run it with ``python examples/energy_forces.py``: about two minutes on two CPU cores. It needs
``mtlbalance[examples]``.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from matplotlib.ticker import LogLocator
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

N_ATOMS = 4, 5, 6, 7
# Seven atoms of the lowest energy: two on an axis, five around it. The first four to seven of them hold together.
RING = [(0.95 * np.cos(t), 0.95 * np.sin(t), 0.0) for t in 2 * np.pi * np.arange(5) / 5]
START = jnp.array([(0.0, 0.0, 0.57), (0.0, 0.0, -0.57), *RING])
N_TRAIN, N_VALID, N_TEST = 192, 256, 512
CUTOFF = 3.0
CENTERS = np.linspace(0.8, CUTOFF, 20)
WIDTH = 32
BATCH_SIZE = 16
LEARNING_RATES = 1e-2, 3e-2, 1e-1
ENERGY_WEIGHTS = 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0  # of the sweep; the forces' is 1


# The clusters: positions with padding, and which atoms there are.


def pair_distances(positions, atoms):
    """All distances, and which of them are those of a pair; the others are 1, for their derivatives to be finite."""
    pairs = atoms[:, None] & atoms & ~np.eye(len(atoms), dtype=bool)
    squares = jnp.sum((positions[:, None] - positions) ** 2, axis=-1)
    return jnp.sqrt(jnp.where(pairs, squares, 1.0)), pairs


def lennard_jones(positions, atoms):
    distances, pairs = pair_distances(positions, atoms)
    return jnp.sum(4 * (distances**-12 - distances**-6), where=pairs) / 2


def draw_cluster(key, n_steps=2000):
    """The end of a Metropolis walk, inside of a soft sphere that keeps the atoms from flying away."""
    size_key, temperature_key, walk_key = jax.random.split(key, 3)
    atoms = jnp.arange(max(N_ATOMS)) < jax.random.choice(size_key, np.array(N_ATOMS))
    temperature = jax.random.uniform(temperature_key, minval=0.1, maxval=0.5)

    def energy_in_sphere(positions):
        outside = jnp.maximum(jnp.linalg.norm(positions, axis=-1) - 1.8, 0)
        return lennard_jones(positions, atoms) + 10 * jnp.sum(outside**2, where=atoms)

    def step(carry, key):
        positions, energy = carry
        move_key, accept_key = jax.random.split(key)
        moved = positions + 0.06 * jax.random.normal(move_key, positions.shape)
        moved_energy = energy_in_sphere(moved)
        accepted = jnp.log(jax.random.uniform(accept_key)) < (energy - moved_energy) / temperature
        return jax.tree.map(partial(jnp.where, accepted), (moved, moved_energy), carry), None

    start = START, energy_in_sphere(START)
    (positions, _), _ = jax.lax.scan(step, start, jax.random.split(walk_key, n_steps))
    energy, slope = jax.value_and_grad(lennard_jones)(positions, atoms)
    return {"positions": positions, "atoms": atoms, "energy": energy, "forces": -slope}


def load_clusters(key):
    """Those to train on, to choose by, and to test on."""
    clusters = jax.jit(jax.vmap(draw_cluster))(jax.random.split(key, N_TRAIN + N_VALID + N_TEST))
    cut = lambda start, stop: jax.tree.map(lambda x: x[start:stop], clusters)
    return cut(0, N_TRAIN), cut(N_TRAIN, N_TRAIN + N_VALID), cut(N_TRAIN + N_VALID, None)


# The potential, and its losses.


def init_params(key):
    shapes, draw = ((len(CENTERS), WIDTH), (WIDTH, WIDTH), (WIDTH, 1)), jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(shapes))
    return [(draw(key, shape), jnp.zeros(shape[1])) for key, shape in zip(keys, shapes, strict=True)]


def energy_of(params, positions, atoms):
    """The sum of all atoms' energies, each a function of the distances to the others."""
    distances, pairs = pair_distances(positions, atoms)
    fades = jnp.where(pairs & (distances < CUTOFF), 0.5 * (1 + jnp.cos(np.pi * distances / CUTOFF)), 0)
    radial = jnp.exp(-0.5 * ((distances[..., None] - CENTERS) / (CENTERS[1] - CENTERS[0])) ** 2)
    x = jnp.sum(fades[..., None] * radial, axis=1)
    *hidden, (last, offset) = params
    for weight, bias in hidden:
        x = jax.nn.silu(x @ weight + bias)
    return jnp.sum((x @ last + offset)[:, 0], where=atoms)


def differences(params, clusters):
    """By which the energies per atom are off, and the components of the forces; and which atoms there are."""
    predict = jax.vmap(jax.value_and_grad(energy_of, argnums=1), in_axes=(None, 0, 0))
    energies, slopes = predict(params, clusters["positions"], clusters["atoms"])
    energy = (energies - clusters["energy"]) / jnp.sum(clusters["atoms"], axis=1)
    return energy, -slopes - clusters["forces"], clusters["atoms"][..., None]


def task_losses(params, clusters):
    energy, forces, atoms = differences(params, clusters)
    return {"energy": jnp.mean(energy**2), "forces": jnp.mean(forces**2, where=atoms)}


def errors(params, clusters):
    """The mean absolute ones of energy and forces."""
    energy, forces, atoms = differences(params, clusters)
    return jnp.stack([jnp.mean(jnp.abs(energy)), jnp.mean(jnp.abs(forces), where=atoms)])


errors_of_all = jax.jit(jax.vmap(errors, in_axes=(0, None)))


# The methods: functions of the fixed weight, which only the sweep reads, and of the number of steps.


def turned_around(step_of_turn, step):
    """MACE's weights and those of its second stage, over the forces'."""
    return {"energy": jnp.where(step < step_of_turn, 1 / 100, 1000 / 100), "forces": 1.0}


METHODS = {
    "fixed": lambda weight, n_steps: scalarization.constant({"energy": weight, "forces": 1.0}),
    "two stages": lambda _, n_steps: mtl.prioritize(scalarization.sum(), partial(turned_around, 3 * n_steps // 4)),
    "UW": lambda *_: mtl.learn(scalarization.uw(), optax.adam(1e-2)),
    "gradient norms": lambda *_: aggregation.grad_norm_weights(),
    "IMTL-G": lambda *_: aggregation.imtl_g(),
    "UPGrad": lambda *_: aggregation.upgrad(),
}


# The training.


def make_training(build, n_steps, train_clusters):
    """``start`` and ``advance`` of one training, given its learning rate, seed and, for the sweep, weight."""

    def parts(run):
        grad_fn = mtl.value_and_grad(task_losses, build(run["weight"], n_steps), return_weights=True)
        return grad_fn, optax.adam(optax.cosine_decay_schedule(run["learning rate"], n_steps))

    def keys(run):
        return jax.random.split(jax.random.key(run["seed"]))

    def draw_batch(key):
        return jax.tree.map(lambda x: x[jax.random.randint(key, (BATCH_SIZE,), 0, N_TRAIN)], train_clusters)

    def start(run):
        grad_fn, optimizer = parts(run)
        params_key, batch_key = keys(run)
        params = init_params(params_key)
        return params, optimizer.init(params), grad_fn.init(params, draw_batch(batch_key))

    def advance(run, carry, steps):
        grad_fn, optimizer = parts(run)
        _, batch_key = keys(run)

        def step(carry, number):
            params, opt_state, state = carry
            batch = draw_batch(jax.random.fold_in(batch_key, number))
            (_, state, weights), gradient = grad_fn(params, state, batch)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state, state), weights

        carry, weights = jax.lax.scan(step, carry, steps)
        return carry, jax.tree.map(jnp.mean, weights)

    return start, advance


class Row(NamedTuple):
    """Of one method, or of one fixed weight, with its best learning rate: arrays with an entry for each seed."""

    validation: np.ndarray  # the product of both errors, on the clusters to choose by
    test: np.ndarray  # energy and forces
    ratios: np.ndarray  # the energy's weight over the forces' in every part
    learning_rate: float


def train(build, weights, n_steps, seeds, clusters, progress):
    """All weights, learning rates and seeds in one program; a row for every weight."""
    names, grid = ("weight", "learning rate", "seed"), (weights, LEARNING_RATES, np.arange(seeds))
    runs = {name: x.ravel() for name, x in zip(names, np.meshgrid(*grid, indexing="ij"), strict=True)}
    train_clusters, valid_clusters, test_clusters = clusters
    start, advance = make_training(build, n_steps, train_clusters)
    advance = jax.jit(jax.vmap(advance, in_axes=(0, 0, None)), donate_argnums=1)
    carry, used = show.in_parts(partial(advance, runs), jax.jit(jax.vmap(start))(runs), n_steps, progress)
    ratios = [of_part["energy"] / of_part["forces"] for of_part in used]

    product = np.prod(errors_of_all(carry[0], valid_clusters), axis=-1)
    found = product, errors_of_all(carry[0], test_clusters), np.stack(ratios, axis=-1)
    found = [np.reshape(x, (*map(len, grid), *x.shape[1:])) for x in found]
    of_rates = lambda i: {rate: Row(*(x[i, j] for x in found), rate) for j, rate in enumerate(LEARNING_RATES)}
    return [rows[choose(rows)] for rows in map(of_rates, range(len(weights)))]


def geometric_mean(x):
    return np.exp(np.mean(np.log(x), axis=0))


def choose(rows):
    """The name of the best."""
    return min(rows, key=lambda name: geometric_mean(rows[name].validation))


# The results.


def print_table(fixed, best, others):
    shown = {"sum": fixed[1.0], f"best fixed: {best:g}": fixed[best]} | others
    cells = []
    for name, row in shown.items():
        product = np.prod(row.test, axis=1) / np.prod(fixed[best].test, axis=1)
        numbers = show.spread(row.test[:, 0], 4), show.spread(row.test[:, 1], 3), show.spread(product)
        start, end = geometric_mean(row.ratios)[[0, -1]]
        cells.append((name, *numbers, f"{start:.2g} to {end:.0f}", f"{row.learning_rate:g}"))
    columns = "weights", "energy ↓", "forces ↓", "product ↓", "energy : forces", "rate"
    about = "Mean absolute errors of the energy per atom and the forces' components, in reduced units; mean and "
    about += "standard deviation of the seeds. product: of both, over that of the best fixed weight on the same seed. "
    about += "energy : forces: of the weights, at first and at last. rate: the learning rate, best of three."
    show.print_table("On the test clusters", columns, cells, about, width=100)


def draw(fixed, best, others, n_steps, output):
    """The plane of both errors, with the front of the fixed weights; and the weights over the training."""
    with show.picture(output, "Both errors, and the weights", 1, 2, figsize=(9.6, 4.4)) as (fig, (plane, ax)):
        front = {weight: geometric_mean(row.test) for weight, row in fixed.items()}
        plane.plot(*np.array([*front.values()]).T, ".-", color="0.4", label="fixed weights")
        for weight in (*ENERGY_WEIGHTS[:3], best, *ENERGY_WEIGHTS[-2:]):
            below = -12 if weight == best else 4
            plane.annotate(f"{weight:g}", front[weight], (4, below), textcoords="offset points", color="0.3")
        for row in fixed.values():
            plane.plot(*row.test.T, ".", color="0.4", alpha=0.25, markeredgewidth=0)
        for i, (name, row) in enumerate(others.items()):
            plane.plot(*row.test.T, ".", color=f"C{i}", alpha=0.5, markeredgewidth=0)
            plane.plot(*geometric_mean(row.test)[:, None], "D", color=f"C{i}", markersize=10 - 1.2 * i, label=name)
            steps = n_steps * (np.arange(row.ratios.shape[1]) + 0.5) / row.ratios.shape[1]
            ax.plot(steps, geometric_mean(row.ratios), color=f"C{i}")
        ax.axhline(best, color="0.4", linestyle="--", label="best fixed weight")
        title = "errors on the test clusters (small: one seed)"
        plane.set(xlabel=r"energy per atom [$\epsilon$]", ylabel=r"forces [$\epsilon/\sigma$]", title=title)
        plane.set(xscale="log", yscale="log")
        for axis in plane.xaxis, plane.yaxis:
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        ax.set(xlabel="step", title="weight of the energy, over the forces'", yscale="log")
        fig.legend(loc="outside lower center", ncols=4, frameon=False)


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, steps=1000, seeds=5).parse_args(argv)
    clusters = load_clusters(jax.random.key(args.seed))
    rows = {}
    with tqdm(total=len(METHODS) * args.steps, unit="step") as progress:
        for name, build in METHODS.items():
            progress.set_description(f"{name:14}")
            weights = ENERGY_WEIGHTS if name == "fixed" else (1.0,)
            rows[name] = train(build, weights, args.steps, args.seeds, clusters, progress)
    fixed = dict(zip(ENERGY_WEIGHTS, rows.pop("fixed"), strict=True))
    others, best = {name: row for name, (row,) in rows.items()}, choose(fixed)
    print_table(fixed, best, others)
    draw(fixed, best, others, args.steps, args.output)


if __name__ == "__main__":
    main()
