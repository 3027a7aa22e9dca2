"""The loop of ``train_loop.py`` for a network written with Flax NNX.

``nnx.split`` takes the parameters out of a model, and the loop, the method and the optimizer see them as any other
tree. For a training step with ``nnx.jit``, ``nnx.Optimizer``, batch statistics and dropout see "Flax and Equinox" in
``docs/guides/frameworks.md``. The arguments are those of ``train_loop.py``::

    python examples/flax_nnx.py famo

Twenty epochs take about ten seconds on two CPU cores. It needs ``mtlbalance[examples]``.
"""

from functools import partial

import train_loop
from flax import nnx


class Reader(nnx.Module):
    """Two shared layers, and one linear head per task."""

    def __init__(self, width=128, *, rngs):
        linear = partial(nnx.Linear, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
        self.trunk_1, self.trunk_2 = linear(144, width), linear(width, width)
        self.left, self.right, self.sum = linear(width, 10), linear(width, 10), linear(width, 1)

    def __call__(self, images):
        x = images.reshape(len(images), -1)
        x = nnx.relu(self.trunk_1(x))
        x = nnx.relu(self.trunk_2(x))
        return {"left": self.left(x), "right": self.right(x), "sum": self.sum(x)[:, 0]}


def to_function(model):
    """The model as a function of its parameters, and the parameters."""
    definition, params = nnx.split(model)

    def predict(params, images):
        return nnx.merge(definition, params)(images)

    return predict, params


def main(argv=None):
    train_loop.run(lambda key: to_function(Reader(rngs=nnx.Rngs(key))), argv, __doc__, __file__)


if __name__ == "__main__":
    main()
