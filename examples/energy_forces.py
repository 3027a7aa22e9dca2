"""Energy and forces of small clusters: a machine-learned potential, whose force loss is a gradient of the energy's.

Clusters of four to seven Lennard-Jones atoms are drawn by Monte Carlo at several temperatures, in reduced units: energy
in the depth of the well, lengths in its zero. A small network of radial functions gives each atom an energy. Their sum
is the cluster's, and its gradient to the positions the forces: of both together come the losses, the energy's per atom.
So the gradients that a method sees are second derivatives, and the step is the same as ever.

Their balance is set by hand where such potentials are trained, and MACE turns it around near the end: forces a hundred
times the energy, then energy ten times the forces. Here seven fixed weights, that schedule and methods of both families
get the same number of steps and the same seeds, each with the better of two learning rates. What is best is the
smallest product of both errors, whatever their units, on clusters that are neither trained nor tested on.

Run it with ``python examples/energy_forces.py``. It needs ``mtlbalance[examples]``.
"""

import itertools
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
N_CHUNKS = 20  # of a training, between which the bar moves
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
    """Mean absolute errors."""
    energy, forces, atoms = differences(params, clusters)
    return {"energy": jnp.mean(jnp.abs(energy)), "forces": jnp.mean(jnp.abs(forces), where=atoms)}


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

    def draw(key):
        return jax.tree.map(lambda x: x[jax.random.randint(key, (BATCH_SIZE,), 0, N_TRAIN)], train_clusters)

    def start(run):
        grad_fn, optimizer = parts(run)
        params = init_params(jax.random.key(run["seed"]))
        return params, optimizer.init(params), grad_fn.init(params, draw(jax.random.key(0)))

    def advance(run, carry, steps):
        grad_fn, optimizer = parts(run)

        def step(carry, number):
            params, opt_state, state = carry
            batch = draw(jax.random.fold_in(jax.random.key(run["seed"]), number))
            (_, state, weights), gradient = grad_fn(params, state, batch)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state, state), weights

        carry, weights = jax.lax.scan(step, carry, steps)
        return carry, jax.tree.map(jnp.mean, weights)

    return start, advance


def train(build, runs, n_steps, clusters, progress):
    """All runs of a method in one program: both errors of each, on either set, and its weights in every chunk."""
    train_clusters, *others = clusters
    start, advance = make_training(build, n_steps, train_clusters)
    advance = jax.jit(jax.vmap(advance, in_axes=(0, 0, None)), donate_argnums=1)
    carry, weights = jax.jit(jax.vmap(start))(runs), []
    for steps in np.array_split(np.arange(n_steps), min(N_CHUNKS, n_steps)):
        carry, of_chunk = advance(runs, carry, steps)
        weights.append(jax.device_get(of_chunk))
        progress.update(len(steps))
    found = (np.stack([*errors_of_all(carry[0], those).values()]) for those in others)
    return *found, np.stack([chunk["energy"] / chunk["forces"] for chunk in weights], axis=-1)


def list_runs(weights, seeds):
    """Every weight with every learning rate and every seed, as arrays."""
    columns = "weight", "learning rate", "seed"
    values = zip(*itertools.product(weights, LEARNING_RATES, range(seeds)), strict=True)
    return {column: np.array(x) for column, x in zip(columns, values, strict=True)}


class Row(NamedTuple):
    """Of one method, or of one fixed weight, with the better learning rate: arrays with an entry for each seed."""

    validation: np.ndarray  # the product of both errors
    test: np.ndarray  # energy and forces
    ratios: np.ndarray  # the energy's weight over the forces' in every chunk
    learning_rate: float


def choose(rows):
    """The name of the best on the clusters to choose by."""
    return min(rows, key=lambda name: geometric_mean(rows[name].validation))


def geometric_mean(x):
    return np.exp(np.mean(np.log(x), axis=-1))


def train_all(n_steps, seeds, clusters):
    """A row for each method and each weight of the sweep."""
    rows = {}
    with tqdm(total=len(METHODS) * n_steps, unit="step") as progress:
        for name, build in METHODS.items():
            progress.set_description(f"{name:14}")
            weights = ENERGY_WEIGHTS if name == "fixed" else [1.0]
            validation, test, ratios = train(build, list_runs(weights, seeds), n_steps, clusters, progress)
            shape = len(weights), len(LEARNING_RATES), seeds
            by_run = np.prod(validation, 0).reshape(shape), test.reshape(2, *shape), ratios.reshape(*shape, -1)
            for i, weight in enumerate(weights):
                found = {
                    lr: Row(by_run[0][i, j], by_run[1][:, i, j], by_run[2][i, j], lr)
                    for j, lr in enumerate(LEARNING_RATES)
                }
                rows[f"fixed {weight:g}" if name == "fixed" else name] = found[choose(found)]
    return rows


# The results.


def print_table(rows, best):
    shown = {"sum": rows["fixed 1"], f"best: {best}": rows[best]}
    shown |= {name: row for name, row in rows.items() if name in METHODS}
    cells = []
    for name, row in shown.items():
        product = np.prod(row.test, axis=0) / np.prod(rows[best].test, axis=0)
        cell = lambda x, digits: f"{x.mean():.{digits}f} ± {x.std():.{digits}f}"
        numbers = cell(row.test[0], 4), cell(row.test[1], 3), cell(product, 2)
        start, end = geometric_mean(row.ratios[:, [0, -1]].T)
        cells.append((name, *numbers, f"{start:.2g} to {end:.0f}", f"{row.learning_rate:g}"))
    columns = "weights", "energy ↓", "forces ↓", "product ↓", "energy : forces", "rate"
    about = "Mean absolute errors of the energy per atom and the forces' components, in reduced units; mean and "
    about += "standard deviation of the seeds. product: of both, over that of the best fixed weight on the same seed. "
    about += "energy : forces: of the weights, at first and at last. rate: the learning rate, best of three."
    show.print_table("On the test clusters", columns, cells, about, width=100)


def draw(rows, best, n_steps, output):
    """The plane of both errors, with the front of the fixed weights; and the weights over the training."""
    fixed = {name: row for name, row in rows.items() if name not in METHODS}
    others = {name: row for name, row in rows.items() if name in METHODS}
    with show.picture(output, "Both errors, and the weights", 1, 2, figsize=(10.4, 4.4)) as (fig, (plane, ax)):
        front = np.array([geometric_mean(row.test) for row in fixed.values()]).T
        plane.plot(*front, ".-", color="0.4", label="fixed weights")
        for (name, row), x, y in zip(fixed.items(), *front, strict=True):
            plane.plot(*row.test, ".", color="0.4", alpha=0.25, markeredgewidth=0)
            plane.annotate(name.removeprefix("fixed "), (x, y), (4, 4), textcoords="offset points", color="0.3")
        for i, (name, row) in enumerate(others.items()):
            plane.plot(*row.test, ".", color=f"C{i}", alpha=0.5, markeredgewidth=0)
            plane.plot(*geometric_mean(row.test)[:, None], "D", color=f"C{i}", markersize=7, label=name)
            steps = n_steps * (np.arange(row.ratios.shape[1]) + 0.5) / row.ratios.shape[1]
            ax.plot(steps, geometric_mean(row.ratios.T), color=f"C{i}")
        ax.axhline(geometric_mean(rows[best].ratios[0]), color="0.4", linestyle="--", label=f"best: {best}")
        title = "test errors (small: one seed; large: mean)"
        plane.set(xlabel="energy per atom", ylabel="forces", title=title, xscale="log", yscale="log")
        for axis in plane.xaxis, plane.yaxis:
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("")
        ax.set(xlabel="step", title="weight of the energy, over the forces'", yscale="log")
        fig.legend(loc="outside lower center", ncols=4, frameon=False)


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, steps=1000, seeds=5).parse_args(argv)
    clusters = load_clusters(jax.random.key(args.seed))
    rows = train_all(args.steps, args.seeds, clusters)
    best = choose({name: row for name, row in rows.items() if name not in METHODS})
    print_table(rows, best)
    draw(rows, best, args.steps, args.output)


if __name__ == "__main__":
    main()
