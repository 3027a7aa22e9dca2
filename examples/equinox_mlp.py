"""The loop of ``train_loop.py`` for a network written with Equinox.

An Equinox model is a tree of parameters and of anything else, such as activation functions. ``eqx.partition`` takes the
parameters out, and the loop, the method and the optimizer see them as any other tree. The arguments are those of
``train_loop.py``::

    python examples/equinox_mlp.py famo

Twenty epochs take about ten seconds on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import train_loop


class Reader(eqx.Module):
    """Two shared layers, and one linear head per task. It reads one image."""

    trunk: eqx.nn.MLP
    heads: dict[str, eqx.nn.Linear]

    def __init__(self, width=128, *, key):
        keys = jax.random.split(key, 4)
        relu = jax.nn.relu
        self.trunk = eqx.nn.MLP(144, width, width, depth=1, activation=relu, final_activation=relu, key=keys[0])
        sizes = {"left": 10, "right": 10, "sum": "scalar"}
        self.heads = {
            task: eqx.nn.Linear(width, size, key=key) for key, (task, size) in zip(keys[1:], sizes.items(), strict=True)
        }

    def __call__(self, image):
        features = self.trunk(jnp.ravel(image))
        return {task: head(features) for task, head in self.heads.items()}


def to_function(model):
    """The model as a function of its parameters and a batch of images, and the parameters."""
    params, others = eqx.partition(model, eqx.is_inexact_array)

    def predict(params, images):
        return jax.vmap(eqx.combine(params, others))(images)

    return predict, params


def main(argv=None):
    train_loop.run(lambda key: to_function(Reader(key=key)), argv, __doc__, __file__)


if __name__ == "__main__":
    main()
