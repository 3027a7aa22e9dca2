"""Small models with several losses, for the tests of this folder."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np


def layers(key, sizes):
    """Weights and biases of a fully connected network, drawn on the device."""
    keys = jax.random.split(key, len(sizes) - 1)
    shapes = list(itertools.pairwise(sizes))
    return [
        {"w": jax.random.normal(k, shape) / np.sqrt(shape[0]), "b": jnp.zeros(shape[1])}
        for k, shape in zip(keys, shapes, strict=True)
    ]


def normal_layers(seed, sizes):
    """The same of NumPy: JAX would compile a program for every shape."""
    rng = np.random.default_rng(seed)
    of = lambda shape: (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)
    return [{"w": of(shape), "b": np.zeros(shape[1], np.float32)} for shape in itertools.pairwise(sizes)]


def affine(x, layer):
    """A bias for every row is meant here: said, as who has JAX raise on ranks that differ must say it."""
    product = x @ layer["w"]
    return product + jnp.broadcast_to(layer["b"], product.shape)


def network(params, x, activation=jnp.tanh):
    for layer in params[:-1]:
        x = activation(affine(x, layer))
    return affine(x, params[-1])


def squared_errors(params, batch, activation=jnp.tanh):
    """One mean squared error per output, of different scales."""
    x, y = batch
    return jnp.mean((network(params, x, activation) - y) ** 2, axis=0) * 1.5 ** jnp.arange(y.shape[1])


def squared_error(params, batch):
    """The loss of one task that has its own data."""
    x, y = batch
    return jnp.mean((network(params, x) - y) ** 2)


def normal_batch(seed, *shape, n_in, n_out):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(*shape, n)).astype(np.float32) for n in (n_in, n_out))


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    """Also where one is a NumPy array, or Python's numbers."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), found, expected)
