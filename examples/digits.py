"""The tasks of most examples: two handwritten digits lie on top of each other, as in MultiMNIST, and one network reads

* ``left``: which digit is the upper left one? (cross-entropy)
* ``right``: which digit is the lower right one? (cross-entropy)
* ``sum``: what do they add up to? (squared error, in raw units from 0 to 18)

The loss of the third task starts some forty times as large as the others, only because of its units. No script: the
examples import it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TASKS = ("left", "right", "sum")  # sorted, the order in which JAX flattens a dict


# The data: pairs of digits on one canvas.


def load_images():
    """The 8x8 digits that come with scikit-learn, as (images, labels) for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).reshape(-1, 8, 8).astype(np.float32)
    # The single digits are split, not their pairs: no test pair shows an image that was seen in training.
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, split)
    return (train_images, train_labels), (test_images, test_labels)


def draw_pairs(key, digits, n_pairs):
    """Lays random pairs on a 12x12 canvas, one digit upper left and one lower right: a 4x4 square is in both."""
    images, labels = digits
    left, right = jax.random.randint(key, (2, n_pairs), 0, len(images))
    upper_left = jnp.pad(images[left], ((0, 0), (0, 4), (0, 4)))
    lower_right = jnp.pad(images[right], ((0, 0), (4, 0), (4, 0)))
    return {
        "image": jnp.maximum(upper_left, lower_right),
        "left": labels[left],
        "right": labels[right],
        "sum": (labels[left] + labels[right]).astype(jnp.float32),
    }


def load_data():
    """The digits to train on, and pairs of others to test on."""
    train_digits, test_digits = load_images()
    return train_digits, draw_pairs(jax.random.key(0), test_digits, 4000)


# The model: two shared layers, and one linear head per task.


def init_layers(key, shapes, initializer):
    """A linear layer of each shape, by name."""
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"w": initializer(layer_key, shape), "b": jnp.zeros(shape[1])}
        for layer_key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def init_params(key, width=128):
    shapes = {"trunk_1": (144, width), "trunk_2": (width, width)}
    shapes |= {"left": (width, 10), "right": (width, 10), "sum": (width, 1)}
    return init_layers(key, shapes, jax.nn.initializers.he_normal())


def predict(params, images):
    def layer(name, x):
        return x @ params[name]["w"] + params[name]["b"]

    x = images.reshape(len(images), -1)
    x = jax.nn.relu(layer("trunk_1", x))
    x = jax.nn.relu(layer("trunk_2", x))
    return {"left": layer("left", x), "right": layer("right", x), "sum": layer("sum", x)[:, 0]}


def losses_of(outputs, batch):
    """The losses by name: in mtlbalance a dict works wherever an array of losses does."""
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return {
        "left": jnp.mean(cross_entropy(outputs["left"], batch["left"])),
        "right": jnp.mean(cross_entropy(outputs["right"], batch["right"])),
        "sum": jnp.mean((outputs["sum"] - batch["sum"]) ** 2),
    }


def task_losses(params, batch):
    return losses_of(predict(params, batch["image"]), batch)


def evaluate(params, pairs):
    """Accuracy of the two digits; mean absolute error of the sum."""
    outputs = predict(params, pairs["image"])
    return {
        "left": jnp.mean(jnp.argmax(outputs["left"], axis=1) == pairs["left"]),
        "right": jnp.mean(jnp.argmax(outputs["right"], axis=1) == pairs["right"]),
        "sum": jnp.mean(jnp.abs(outputs["sum"] - pairs["sum"])),
    }
