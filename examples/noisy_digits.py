"""Two tasks of which one has noise in its training labels: the overlaid digits of `digits.py`, from a finite set.

``clean`` reads the upper left digit, ``noisy`` the lower right one. Tests have no noise. No script: `label_noise.py`
imports it.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import draw_pairs, init_layers

import mtlbalance as mtl

TASKS = ("clean", "noisy")  # sorted, the order in which JAX flattens a dict
N_CLASSES = 10
N_PARTS = 50  # of a training, in each of which the weights are averaged


# The noise: of the labels, or of the images. `level` says how much.


def is_hit(rng, n, level):
    """Which of n examples have noise: exactly the part ``level``, rounded to whole ones."""
    return rng.permutation(n) < round(level * n)


def redraw(rng, labels, level):
    """That part of the labels is drawn again from all ten, the true one included."""
    return np.where(is_hit(rng, len(labels), level), rng.integers(N_CLASSES, size=len(labels)), labels)


def next_digit(rng, labels, level):
    """That part of the labels is the next digit: from a level of .5 on most are."""
    return np.where(is_hit(rng, len(labels), level), (labels + 1) % N_CLASSES, labels)


def add_normal(rng, labels, level):
    """All targets of a regression are off by normal numbers with a standard deviation of ``level``."""
    return to_targets(labels) + level * rng.normal(size=(len(labels), N_CLASSES))


def cover(rng, images, level):
    """The pixels of the lower right digit alone are off by normal numbers: no label is wrong."""
    alone = np.zeros((1, 12, 12))
    alone[:, 4:, 4:] = 1
    alone[:, 4:8, 4:8] = 0
    return images + level * alone * rng.normal(size=images.shape)


def to_targets(labels):
    """Ten numbers each; what has them already stays."""
    return labels if labels.ndim > 1 else jax.nn.one_hot(labels, N_CLASSES)


# What is trained, and on what.


class Setting(NamedTuple):
    """What is trained, and on what; but for the method and the amount of noise."""

    width: int = 32
    depth: int = 2  # of the shared trunk
    pairs: int = 1000  # to train on; a batch draws from them
    batch: int = 50
    steps: int = 1000
    lr: float = 3e-3
    optimizer: Callable = optax.adam
    noise: Callable = redraw  # drawn once
    again: bool = False  # at every look the labels that are noisy are other ones, as in the official code
    squared: bool = False  # in place of the cross-entropies squared errors of the ten outputs

    @property
    def epoch(self):
        """Its steps."""
        return self.pairs // self.batch


class Drawn(NamedTuple):
    """All that is random in a training."""

    images: chex.Array  # to train on
    targets: dict[str, chex.Array]
    params: chex.ArrayTree
    rows: chex.Array  # of the training set, ``[step, example]``
    again: tuple  # with `Setting.again`: which examples have noise, and their labels at every look


def draw(setting, digits, levels, seed):
    """What has noise has an axis for its levels: one task's targets or, with `cover`, the images. No more depends on
    them."""
    keys = jax.random.split(jax.random.key(seed))
    noise, other = lambda: np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    pairs = jax.device_get(draw_pairs(keys[0], digits, setting.pairs))
    images, labels, again = pairs["image"], pairs["right"], ()
    rows = other.integers(setting.pairs, size=(setting.steps, setting.batch))
    if setting.noise is cover:
        images = np.stack([cover(noise(), images, level) for level in levels])
    if setting.again:
        hits = np.stack([is_hit(noise(), setting.pairs, level) for level in levels])
        again = hits, other.integers(N_CLASSES, size=rows.shape)
    labels_at = lambda level: (
        labels if setting.noise is cover or setting.again else setting.noise(noise(), labels, level)
    )
    targets = np.stack([to_targets(labels_at(level)) for level in levels])
    targets = {"clean": to_targets(pairs["left"]), "noisy": targets}
    drawn = Drawn(images, targets, init_params(setting, keys[1]), rows, again)
    return jax.tree.map(lambda x: np.asarray(x, np.float32) if np.issubdtype(x.dtype, np.floating) else x, drawn)


def draw_all(setting, digits, levels, seeds):
    """The same with a first axis for the seeds."""
    return jax.tree.map(lambda *x: np.stack(x), *[draw(setting, digits, levels, seed) for seed in range(seeds)])


def by_level(setting):
    """The axis of levels of what `draw` returns."""
    images, hit = 0 if setting.noise is cover else None, 0 if setting.again else None
    return Drawn(images, {"clean": None, "noisy": 0}, None, None, (hit, None) if setting.again else ())


def batch_at(drawn, step):
    """The images of a step, and their targets."""
    rows = drawn.rows[step]
    targets = {name: x[rows] for name, x in drawn.targets.items()}
    if drawn.again:
        hit, labels = drawn.again
        targets["noisy"] = jnp.where(hit[rows][:, None], to_targets(labels[step]), targets["noisy"])
    return drawn.images[rows], targets


# The network: a shared trunk, and a linear head for each task.


def init_params(setting, key):
    trunk = {"layer_0": (144, setting.width)}
    trunk |= {f"layer_{i}": (setting.width, setting.width) for i in range(1, setting.depth)}
    keys = jax.random.split(key)
    draw = jax.nn.initializers.he_normal()
    heads = init_layers(keys[1], dict.fromkeys(TASKS, (setting.width, N_CLASSES)), draw)
    return init_layers(keys[0], trunk, draw), heads


def linear(params, x):
    return x @ params["w"] + params["b"]


def trunk(params, images, _):
    x = images.reshape(len(images), -1)
    for _, layer in sorted(params.items()):
        x = jax.nn.relu(linear(layer, x))
    return x


def make_heads(setting):
    def loss(name, params, features, _, targets):
        outputs = linear(params, features)
        if setting.squared:
            return jnp.mean(jnp.sum((outputs - targets[name]) ** 2, axis=-1))
        return jnp.mean(optax.softmax_cross_entropy(outputs, targets[name]))

    return {name: jax.tree_util.Partial(loss, name) for name in TASKS}


def accuracies(params, images, labels):
    """The part of the digits that is read, by task."""
    features = trunk(params[0], images, None)
    return {name: jnp.mean(jnp.argmax(linear(params[1][name], features), -1) == labels[name]) for name in TASKS}


# The training.


def train(setting, method, test_pairs, drawn):
    """One training from start to end.

    Returns:
      The accuracies on the test pairs and on the training set (its own labels), by task; and ``share``: which part of
      the weight the noisy task has, averaged over each of `N_PARTS` parts of the training.
    """
    grad_fn = mtl.value_and_grad((trunk, make_heads(setting)), method, return_weights=True)
    optimizer = setting.optimizer(setting.lr)

    def step(carry, number):
        params, opt_state, state = carry
        (_, state, weights), gradient = grad_fn(params, state, *batch_at(drawn, number))
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        carry = optax.apply_updates(params, updates), opt_state, state
        return carry, weights["noisy"] / (weights["clean"] + weights["noisy"])

    def part(carry, numbers):
        carry, shares = jax.lax.scan(step, carry, numbers)
        return carry, jnp.mean(shares)

    params = drawn.params
    carry = params, optimizer.init(params), grad_fn.init(params, *batch_at(drawn, 0))
    n_parts = min(N_PARTS, setting.steps)
    numbers = jnp.arange(setting.steps // n_parts * n_parts).reshape(n_parts, -1)
    (params, _, state), share = jax.lax.scan(part, carry, numbers)
    return {
        "test": accuracies(params, test_pairs["image"], {"clean": test_pairs["left"], "noisy": test_pairs["right"]}),
        "training": accuracies(
            params, drawn.images, {name: jnp.argmax(x, axis=-1) for name, x in drawn.targets.items()}
        ),
        "share": share,
        "state": state,
    }


def train_all(setting, make_method, test_pairs, drawn, knobs):
    """All trainings in one program, with ``make_method(knob)`` for each knob: what `train` returns, by ``[knob, level,
    seed]``."""

    def one(drawn, knob):
        return train(setting, make_method(knob), test_pairs, drawn)

    # The seeds outermost: the images of a batch are those of a seed, and one product for all of its trainings.
    run = jax.vmap(jax.vmap(jax.vmap(one, (None, 0)), (by_level(setting), None)), (0, None))
    found = jax.device_get(jax.jit(run)(drawn, jnp.array(knobs)))
    return jax.tree.map(lambda x: x.swapaxes(0, 2), found)
