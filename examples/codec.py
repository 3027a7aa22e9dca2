"""A codec of digits against a discriminator: three losses at its output, two optimizers, one compiled program.

The generator packs a digit of 8x8 pixels into four numbers of five levels each, 9.3 bits, and unpacks it again. It has
a reconstruction loss (the mean absolute difference), a feature loss (the distance of what a classifier sees, VQGAN's
perceptual loss) and an adversarial one, by a discriminator that is trained beside it. They have no common unit. Three
ways to weigh them, each with a factor of the feature loss and one of the adversarial to choose:

* fixed weights;
* VQGAN's adaptive weight: the adversarial gradient at the last layer as long as that of the others together;
* EnCodec's gradient shares: every loss's gradient at the output has the length that is asked for.

The table has both factors at 1, which for fixed weights is the plain sum, and the best of the same grid of sixteen.
What is best is the smallest product of the reconstruction error and a Fréchet distance to the digits that went in, in
the features of another classifier that nobody trains against, on digits that are neither trained nor tested on. All
have the same steps, seeds and learning rate.

Found: with the best factors each, neither is better than the best fixed weights: 1.02 ± 0.07 times their product for
the adaptive weight, 1.01 ± 0.07 for gradient shares. What they save is the search. With factors of 1 it is 2.2 times
for the plain sum, 1.8 for the adaptive weight, 1.2 for gradient shares, as much as reconstruction alone has; and 4, 6
and 13 of the sixteen factors come within a quarter of the best fixed weights.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021, https://arxiv.org/abs/2012.09841;
Défossez et al., "High Fidelity Neural Audio Compression", TMLR 2023, https://arxiv.org/abs/2210.13438.

Run it with ``python examples/codec.py``: about two minutes on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from digits import init_layers, load_images
from sklearn.neural_network import MLPClassifier
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

# Widths of the layers.
CODEC = {"encoder": (64, 64, 4), "decoder": (4, 64, 64, 64)}
DISCRIMINATOR = 64, 64, 32, 1
N_VALID = 347  # of 1347 training images
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
GRID = [*itertools.product((0.01, 0.1, 1.0, 10.0), (0.001, 0.01, 0.1, 1.0))]  # feature and adversarial
ALONE, ONES = (0.0, 0.0), (1.0, 1.0)
CHOICES = [ALONE, *GRID]
N_SHOWN = 10


# The networks.


def init_network(key, widths):
    shapes = {f"layer_{i}": shape for i, shape in enumerate(itertools.pairwise(widths))}
    return init_layers(key, shapes, jax.nn.initializers.he_normal())


def init_codec(key):
    return {name: init_network(jax.random.fold_in(key, i), widths) for i, (name, widths) in enumerate(CODEC.items())}


def run_layers(params, x):
    """The outputs of all layers."""
    outputs = []
    for _, layer in sorted(params.items()):
        x = x @ layer["w"] + layer["b"]
        outputs.append(x)
        x = jax.nn.relu(x)
    return outputs


def features_of(classifier, images):
    """What its hidden layers see."""
    return jnp.concatenate(run_layers(classifier, images)[:-1], axis=-1)


def feature_distance(classifier, output, images):
    return jnp.mean((features_of(classifier, output) - features_of(classifier, images)) ** 2)


def round_to_levels(x, n_levels=5):
    """Finite scalar quantisation, https://arxiv.org/abs/2309.15505, with the gradient straight through."""
    x = n_levels // 2 * jnp.tanh(x)
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def codec(params, images, *_):
    code = round_to_levels(run_layers(params["encoder"], images)[-1])
    return jax.nn.sigmoid(run_layers(params["decoder"], code)[-1])


def judge(discriminator, images):
    return run_layers(discriminator, images)[-1][:, 0]


def train_classifier(images, labels, seed):
    found = MLPClassifier((48, 32), random_state=seed, max_iter=1000).fit(images, labels)
    layers = zip(found.coefs_, found.intercepts_, strict=True)
    return {f"layer_{i}": {"w": jnp.asarray(w), "b": jnp.asarray(b)} for i, (w, b) in enumerate(layers)}


# The losses, and what is measured.


def make_heads(classifier):
    """The losses of the codec's output; none has parameters of its own that the codec's optimizer trains."""
    reconstruction = lambda _, output, images, discriminator: jnp.mean(jnp.abs(output - images))
    feature = lambda _, output, images, discriminator: feature_distance(classifier, output, images)
    adversarial = lambda _, output, images, discriminator: -jnp.mean(judge(discriminator, output))
    return {"nll": {"reconstruction": reconstruction, "feature": feature}, "adversarial": adversarial}


def discriminator_loss(discriminator, real, fake):
    hinge = jax.nn.relu(1 - judge(discriminator, real)) + jax.nn.relu(1 + judge(discriminator, fake))
    return jnp.mean(hinge)


def frechet_distance(x, y):
    """Between normal distributions with the means and covariances of two sets of features."""
    covariances = jnp.cov(x, rowvar=False), jnp.cov(y, rowvar=False)
    values, vectors = jnp.linalg.eigh(covariances[0])
    root = vectors * jnp.sqrt(jnp.maximum(values, 0)) @ vectors.T
    cross = jnp.sum(jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(root @ covariances[1] @ root), 0)))
    square = jnp.sum((x.mean(0) - y.mean(0)) ** 2) + sum(map(jnp.trace, covariances)) - 2 * cross
    return jnp.sqrt(jnp.maximum(square, 0))


def measure(networks, params, images, labels):
    """The errors of the reconstructions; the last two by the classifier that no loss has seen."""
    classifier, other = networks
    output = codec(params, images)
    read = run_layers(other, output)
    return {
        "reconstruction": jnp.mean(jnp.abs(output - images)),
        "feature": feature_distance(classifier, output, images),
        "Fréchet": frechet_distance(read[-2], run_layers(other, images)[-2]),
        "read": jnp.mean(jnp.argmax(read[-1], axis=1) == labels),
    }


# The ways to weigh, given the two factors; and the options of the step.


def factors(feature, adversarial):
    return {"nll": {"reconstruction": 1.0, "feature": feature}, "adversarial": adversarial}


def fixed(feature, adversarial):
    return scalarization.constant(factors(feature, adversarial))


def adaptive(feature, adversarial):
    inner = {"nll": scalarization.constant(factors(feature, adversarial)["nll"]), "adversarial": scalarization.sum()}
    outer = aggregation.match_norm("nll", relax=1.0, decay=0.0, clip=1e4, eps=1e-4)
    return mtl.prioritize(mtl.nested(outer, inner), {"nll": 1.0, "adversarial": adversarial})


def shares(feature, adversarial):
    return aggregation.gradient_shares(factors(feature, adversarial), per_example=True)


# VQGAN decides on the weights of the last layer, without its bias.
LAST_LAYER = {"encoder": False, "decoder": {"layer_0": False, "layer_1": False, "layer_2": {"w": True, "b": False}}}
WAYS = {
    "fixed weights": (fixed, {}),
    "adaptive weight": (adaptive, {"decide_on": (LAST_LAYER, False)}),
    "gradient shares": (shares, {"at": "features"}),
}


# The training.


def make_training(way, n_steps, images, classifier):
    """``start`` and ``advance`` of one training, given its two factors and seed."""
    build, options = way
    heads, optimizer = make_heads(classifier), optax.adam(LEARNING_RATE, b1=0.5)
    no_params = jax.tree.map(lambda _: (), heads)

    def gradient_of(run):
        method = build(run["feature"], run["adversarial"])
        return mtl.value_and_grad((codec, heads), method, return_weights=True, **options)

    def keys(run):
        return jax.random.split(jax.random.key(run["seed"]), 3)

    def start(run):
        codec_key, discriminator_key, _ = keys(run)
        params, discriminator = init_codec(codec_key), init_network(discriminator_key, DISCRIMINATOR)
        state = gradient_of(run).init((params, no_params), images[:BATCH_SIZE], discriminator)
        return (params, optimizer.init(params), state), (discriminator, optimizer.init(discriminator))

    def advance(run, carry, steps):
        grad_fn = gradient_of(run)
        *_, batch_key = keys(run)

        def step(carry, number):
            (params, opt_state, state), (discriminator, its_opt_state) = carry
            key = jax.random.fold_in(batch_key, number)
            batch = images[jax.random.randint(key, (BATCH_SIZE,), 0, len(images))]
            (_, state, weights), (gradient, _) = grad_fn((params, no_params), state, batch, discriminator)
            updates, opt_state = optimizer.update(gradient, opt_state)
            params = optax.apply_updates(params, updates)

            gradient = jax.grad(discriminator_loss)(discriminator, batch, codec(params, batch))
            updates, its_opt_state = optimizer.update(gradient, its_opt_state)
            discriminator = optax.apply_updates(discriminator, updates)
            return ((params, opt_state, state), (discriminator, its_opt_state)), weights

        carry, weights = jax.lax.scan(step, carry, steps)
        return carry, find_shares(carry, jax.tree.map(jnp.mean, weights))

    def find_shares(carry, weights):
        """Which part of the gradient's length at the output each loss has, whatever the way, on some images."""
        (params, *_), (discriminator, _) = carry
        seen = images[: 4 * BATCH_SIZE]
        losses_fn = lambda output: jax.tree.map(lambda head: head((), output, seen, discriminator), heads)
        _, rows = mtl.value_and_jac(losses_fn)(codec(params, seen))
        lengths = jnp.mean(jnp.linalg.norm(rows, axis=-1), axis=1) * jnp.stack(jax.tree.leaves(weights))
        return lengths / jnp.sum(lengths)

    return start, advance


measure_all = jax.jit(jax.vmap(measure, in_axes=(None, 0, None, None)))


def train(way, n_steps, seeds, data, networks, progress):
    """All choices and seeds of a way in one program: what was measured, ``[choice, seed]``, outputs, and shares."""
    runs = [(*choice, seed) for choice in CHOICES for seed in range(seeds)]
    runs = dict(zip(("feature", "adversarial", "seed"), map(np.array, zip(*runs, strict=True)), strict=True))
    start, advance = make_training(way, n_steps, data["training"][0], networks[0])
    advance = jax.jit(jax.vmap(advance, in_axes=(0, 0, None)), donate_argnums=1)
    carry, of_parts = show.in_parts(partial(advance, runs), jax.jit(jax.vmap(start))(runs), n_steps, progress)
    params = carry[0][0]
    by_choice = lambda tree: jax.tree.map(lambda x: np.reshape(x, (len(CHOICES), seeds, *x.shape[1:])), tree)
    return {
        "validation": by_choice(measure_all(networks, params, *data["validation"])),
        "test": by_choice(measure_all(networks, params, *data["test"])),
        "output": by_choice(jax.vmap(codec, in_axes=(0, None))(params, data["test"][0][:N_SHOWN])),
        "shares": by_choice(np.stack(of_parts, axis=1)),
    }


# The results.


def product(metrics):
    return metrics["reconstruction"] * metrics["Fréchet"]


def best_of(of_way):
    """The index of the choice that is best on the digits to choose by, and the products of all there."""
    products = product(of_way["validation"]).mean(axis=1)
    return 1 + int(np.argmin(products[1:])), products  # the first has no other loss


def list_rows(found):
    """Of the table and the picture: the way, and the index of the choice."""
    rows = {"reconstruction alone": ("fixed weights", CHOICES.index(ALONE))}
    for name, of_way in found.items():
        rows["sum" if name == "fixed weights" else name] = name, CHOICES.index(ONES)
        rows[f"{name}, best"] = name, best_of(of_way)[0]
    return rows


def print_table(found, rows):
    best, products = best_of(found["fixed weights"])
    cells = []
    for row, (name, i) in rows.items():
        metrics = {key: x[i] for key, x in found[name]["test"].items()}
        ratio = product(metrics) / product(found["fixed weights"]["test"])[best]
        near = np.sum(best_of(found[name])[1][1:] < 1.25 * products[best])
        numbers = [show.spread(metrics[key], 3) for key in ("reconstruction", "feature")]
        numbers += show.spread(metrics["Fréchet"]), f"{metrics['read'].mean():.1%}", show.spread(ratio)
        chosen = ", ".join(f"{factor:g}" for factor in CHOICES[i])
        cells.append((row, chosen, *numbers, f"{near} of {len(GRID)}" if row.endswith("best") else ""))
    columns = "weights", "factors", "pixels ↓", "features ↓", "Fréchet ↓", "read ↑", "product ↓", "near"
    about = "factors: the feature's and the adversarial one. pixels, features: reconstruction and feature loss. "
    about += "Fréchet, read: distance and accuracy by another classifier. Means and standard deviations of the seeds. "
    about += "product: of pixels and Fréchet, over that of the best fixed weights on the same seed. near: how many of "
    about += "the grid's factors are within a quarter of those, on the digits to choose by."
    show.print_table("On the test digits", columns, cells, about, width=124)


def draw(found, rows, images, n_steps, output):
    """Digits in and out; and which part of the gradient at the output each loss has, all factors at 1."""
    tiles = [images[:N_SHOWN], *(found[name]["output"][i, 0] for name, i in rows.values())]
    tiles = np.stack(tiles).reshape(len(tiles), N_SHOWN, 8, 8)
    tiles = np.pad(tiles, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=0.5)
    size = {"figsize": (9.6, 4.8), "width_ratios": (1.7, 1), "sharey": "col", "sharex": "col"}
    with show.picture(output, "Digits in and out", len(WAYS), 2, grid=False, **size) as (fig, axes):
        for ax in axes[:, 0]:
            ax.remove()
        mosaic = fig.add_subplot(axes[0, 0].get_gridspec()[:, 0])
        mosaic.imshow(tiles.transpose(0, 2, 1, 3).reshape(10 * len(tiles), -1), cmap="gray_r", vmin=0, vmax=1)
        mosaic.set_yticks(10 * np.arange(len(tiles)) + 4.5, ["digits in", *rows])
        mosaic.set_xticks([])
        for name, ax in zip(WAYS, axes[:, 1], strict=True):
            of_losses = found[name]["shares"][CHOICES.index(ONES)].mean(axis=0).T
            steps = n_steps * (np.arange(of_losses.shape[1]) + 1) / of_losses.shape[1]
            ax.stackplot(steps, of_losses, labels=("adversarial", "feature", "reconstruction"), alpha=0.8)
            ax.set(title="sum" if name == "fixed weights" else name, ylim=(0, 1), xlim=(steps[0], n_steps))
            ax.yaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes[-1, 1].set_xlabel("step")
        axes[1, 1].set_ylabel("share of the gradient at the output")
        fig.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)


def main(argv=None):
    args = show.arguments(__doc__, __file__, steps=1500, seeds=5).parse_args(argv)
    (images, labels), test = ((x.reshape(len(x), -1), y) for x, y in load_images())
    data = {"training": (images[N_VALID:], labels[N_VALID:]), "validation": (images[:N_VALID], labels[:N_VALID])}
    data["test"] = test
    networks = [train_classifier(*data["training"], seed) for seed in (0, 1)]
    found = {}
    with tqdm(total=len(WAYS) * args.steps, unit="step") as progress:
        for name, way in WAYS.items():
            progress.set_description(f"{name:15}")
            found[name] = train(way, args.steps, args.seeds, data, networks, progress)
    rows = list_rows(found)
    print_table(found, rows)
    draw(found, rows, data["test"][0], args.steps, args.output)


if __name__ == "__main__":
    main()
