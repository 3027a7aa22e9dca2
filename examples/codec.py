"""A codec of digits against a discriminator: three losses at its output, two optimizers, one compiled program.

The generator packs a digit of 8x8 pixels into four numbers of five levels each, 9.3 bits, and unpacks it again. It has
a reconstruction loss (the mean absolute difference), a feature loss (the distance of what a classifier sees, VQGAN's
perceptual loss) and an adversarial one, by a discriminator that is trained beside it. They have no common unit. Three
ways to weigh them:

* fixed weights;
* VQGAN's adaptive weight: the adversarial gradient at the last layer is brought to the length of the others';
* EnCodec's gradient shares: the gradient of each loss at the output is brought to the length asked for.

Each way has two numbers to choose, the feature's and the adversarial factor. The table has all of them at 1, and the
best of the same grid of sixteen. What is best is the smallest product of the reconstruction error and a Fréchet
distance to real digits, by another classifier that nobody trains against, on digits that are neither trained nor tested
on.

Run it with ``python examples/codec.py``. It needs ``mtlbalance[examples]``.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from digits import init_layers, load_images
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

# Widths of the layers.
CODEC = {"encoder": (64, 64, 4), "decoder": (4, 64, 64, 64)}
DISCRIMINATOR = 64, 64, 32, 1
CLASSIFIER = 64, 48, 32, 10
N_VALID = 347  # of 1347 training images
BATCH_SIZE = 32
LEARNING_RATE = 2e-3  # of all models, the classifiers too
FACTORS = 0.01, 0.1, 1.0, 10.0
N_CHUNKS = 20  # of a training, between which the bar moves


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
        x = jax.nn.leaky_relu(x, 0.1)
    return outputs


def features_of(classifier, images):
    return jnp.concatenate(run_layers(classifier, images)[:-1], axis=-1)


def round_to_levels(x, n_levels=5):
    """Finite scalar quantisation, https://arxiv.org/abs/2309.15505, with the gradient straight through."""
    x = n_levels // 2 * jnp.tanh(x)
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def codec(params, images, *_):
    code = round_to_levels(run_layers(params["encoder"], images)[-1])
    return jax.nn.sigmoid(run_layers(params["decoder"], code)[-1])


def judge(discriminator, images):
    return run_layers(discriminator, images)[-1][:, 0]


def train_classifier(key, images, labels, n_steps):
    params, optimizer = init_network(key, CLASSIFIER), optax.adam(LEARNING_RATE)

    def loss_fn(params, batch):
        logits = run_layers(params, images[batch])[-1]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]))

    def step(carry, key):
        params, opt_state = carry
        gradient = jax.grad(loss_fn)(params, jax.random.randint(key, (BATCH_SIZE,), 0, len(images)))
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, n_steps))[0][0]


# The losses, and what is measured.


def make_heads(classifier):
    """The losses of the codec's output; none has parameters of its own that the codec's optimizer trains."""

    def feature(_, output, images, discriminator):
        return jnp.mean((features_of(classifier, output) - features_of(classifier, images)) ** 2)

    return {
        "nll": {
            "reconstruction": lambda _, output, images, discriminator: jnp.mean(jnp.abs(output - images)),
            "feature": feature,
        },
        "adversarial": lambda _, output, images, discriminator: -jnp.mean(judge(discriminator, output)),
    }


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


def measure(classifier, other_classifier, params, images, labels):
    output = codec(params, images)
    seen = lambda x: run_layers(other_classifier, x)
    return {
        "reconstruction": jnp.mean(jnp.abs(output - images)),
        "feature": jnp.mean((features_of(classifier, output) - features_of(classifier, images)) ** 2),
        "Fréchet": frechet_distance(seen(output)[-2], seen(images)[-2]),
        "read as": jnp.mean(jnp.argmax(seen(output)[-1], axis=1) == labels),
    }


# The ways to weigh, given the two factors; and the options of the step.


def fixed(feature, adversarial):
    return scalarization.constant({"nll": {"reconstruction": 1.0, "feature": feature}, "adversarial": adversarial})


def adaptive(feature, adversarial):
    inner = {"nll": scalarization.constant({"reconstruction": 1.0, "feature": feature}), "adversarial": scalarization.sum()}
    outer = aggregation.match_norm("nll", relax=1.0, decay=0.0, clip=1e4, eps=1e-4)
    return mtl.prioritize(mtl.nested(outer, inner), {"nll": 1.0, "adversarial": adversarial})


def shares(feature, adversarial):
    asked = {"nll": {"reconstruction": 1.0, "feature": feature}, "adversarial": adversarial}
    return aggregation.gradient_shares(asked, per_example=True)


LAST_LAYER = {"encoder": False, "decoder": {"layer_0": False, "layer_1": False, "layer_2": True}}
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
    no_params = jax.tree.map(lambda _: (), heads, is_leaf=callable)

    def gradient_of(run):
        method = build(run["feature"], run["adversarial"])
        return mtl.value_and_grad((codec, heads), method, return_weights=True, **options)

    def draw(key):
        return images[jax.random.randint(key, (BATCH_SIZE,), 0, len(images))]

    def start(run):
        codec_key, discriminator_key = jax.random.split(jax.random.key(run["seed"]))
        params, discriminator = init_codec(codec_key), init_network(discriminator_key, DISCRIMINATOR)
        state = gradient_of(run).init((params, no_params), images[:BATCH_SIZE], discriminator)
        return (params, optimizer.init(params), state), (discriminator, optimizer.init(discriminator))

    def advance(run, carry, steps):
        grad_fn = gradient_of(run)

        def step(carry, number):
            (params, opt_state, state), (discriminator, discriminator_opt_state) = carry
            batch = draw(jax.random.fold_in(jax.random.key(run["seed"]), number))
            (_, state, weights), (gradient, _) = grad_fn((params, no_params), state, batch, discriminator)
            updates, opt_state = optimizer.update(gradient, opt_state)
            params = optax.apply_updates(params, updates)
            gradient = jax.grad(discriminator_loss)(discriminator, batch, codec(params, batch))
            updates, discriminator_opt_state = optimizer.update(gradient, discriminator_opt_state)
            discriminator = optax.apply_updates(discriminator, updates)
            return ((params, opt_state, state), (discriminator, discriminator_opt_state)), weights

        carry, weights = jax.lax.scan(step, carry, steps)
        return carry, found_shares(carry, jax.tree.map(jnp.mean, weights))

    def found_shares(carry, weights):
        """Which part of the gradient's length at the output each loss has, on one batch."""
        (params, *_), (discriminator, _) = carry
        images_seen = images[: 4 * BATCH_SIZE]
        losses = lambda output: jax.tree.map(lambda head: head((), output, images_seen, discriminator), heads, is_leaf=callable)
        _, rows = mtl.value_and_jac(losses)(codec(params, images_seen))
        lengths = jnp.mean(jnp.linalg.norm(rows, axis=-1), axis=1) * jnp.stack(jax.tree.leaves(weights))
        return lengths / jnp.sum(lengths)

    return start, advance
