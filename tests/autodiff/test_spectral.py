"""A Fourier neural operator's layer: complex weights that mix channels, against the same model in pairs of reals."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

RNG = np.random.default_rng(0)
N_POINTS, N_CHANNELS, N_MODES = 16, 3, 4
normal = lambda *shape: RNG.normal(size=shape) / 2
REAL = {
    "lift": normal(1, N_CHANNELS),
    "modes": {"0": normal(N_MODES, N_CHANNELS, N_CHANNELS), "1": normal(N_MODES, N_CHANNELS, N_CHANNELS)},
    "skip": normal(N_CHANNELS, N_CHANNELS),
    "heads": normal(N_CHANNELS, 3),
}
BATCH = normal(4, N_POINTS).astype(np.float32), normal(4, N_POINTS, 3).astype(np.float32)
SCALES = np.array([1.0, 10.0, 0.1], np.float32)


def pairs(tree):
    """A real and an imaginary leaf for a complex one."""
    return jax.tree.map(lambda x: {"0": np.real(x), "1": np.imag(x)} if np.iscomplexobj(x) else x, tree)


def complex_modes(params):
    """With the sign of :func:`jax.grad`, whose gradients are then those of the pairs."""
    return params | {"modes": params["modes"]["0"] - 1j * params["modes"]["1"]}


PAIRS = jax.tree.map(lambda x: x.astype(np.float32), REAL)
COMPLEX = complex_modes(PAIRS)


def spectral(params, x):
    """The modes that are kept, each with a matrix of its own; and from channels to channels at every point."""
    hidden = x[..., None] * params["lift"][None]
    modes = jnp.fft.rfft(hidden, axis=1)
    mixed = jnp.einsum("bki,kio->bko", modes[:, :N_MODES], params["modes"])
    back = jnp.fft.irfft(jnp.zeros_like(modes).at[:, :N_MODES].set(mixed), N_POINTS, axis=1)
    return jax.nn.gelu(back + hidden @ params["skip"])


def losses_fn(params, batch):
    x, y = batch
    errors = jnp.mean((spectral(params, x) @ params["heads"] - y) ** 2, axis=(0, 1)) * SCALES
    return {"pressure": errors[0], "velocity": errors[1], "heat": errors[2]}


def loss_of_one(params, batch):
    return sum(losses_fn(params, batch).values())


def trunk(params, batch):
    """Complex features: the modes after they are mixed."""
    modes = jnp.fft.rfft(batch[0][..., None] * params["lift"][None], axis=1)[:, :N_MODES]
    return jnp.einsum("bki,kio->bko", modes, params["modes"])


def head(k):
    def loss(params, features, batch):
        back = jnp.fft.irfft(features, N_POINTS, axis=1)
        return SCALES[k] * jnp.mean((jax.nn.gelu(back) @ params - batch[1][..., k]) ** 2)

    return loss


KINDS = {
    "losses": (scalarization.dwa(steps_per_epoch=100), [None]),
    "gramian": (aggregation.upgrad(), ["vmap", 2, "two_pass"]),
    "rowwise": (aggregation.db_mtl(beta=0.5), ["vmap", "stream"]),
    "by coordinate": (aggregation.graddrop(key=0), ["vmap", 1]),
}


def in_pairs(losses):
    """The same losses of a model in pairs; of a trunk and heads, the trunk, as heads are real."""
    if isinstance(losses, tuple):
        return in_pairs(losses[0]), losses[1]
    return jax.tree.map(lambda function: lambda params, batch: function(complex_modes(params), batch), losses)


def two_steps(method, losses_fn, params, batch, **options):
    """The gradients of two calls."""
    grad_fn = mtl.value_and_grad(losses_fn, method, **options)

    def both(params, batch):
        state = grad_fn.init(params, batch)
        (first, state), gradient = grad_fn(params, state, batch)
        further = jax.tree.map(lambda p, g: p - 0.1 * jnp.conj(g), params, gradient)
        (second, _), again = grad_fn(further, state, batch)
        return first, gradient, second, again

    return jax.device_get(jax.jit(both)(params, batch))


def assert_same(found, expected):
    chex.assert_trees_all_equal_shapes_and_dtypes(pairs(found), expected)
    chex.assert_trees_all_close(pairs(found), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.by_default("gramian")
def test_every_way_to_the_rows_is_that_of_pairs(kind):
    method, ways = KINDS[kind]
    expected = two_steps(method, in_pairs(losses_fn), PAIRS, BATCH, rows=ways[0])
    assert np.max(np.abs(expected[1]["modes"]["1"])) > 1e-3
    for rows in ways:
        found = two_steps(method, losses_fn, COMPLEX, BATCH, rows=rows)
        assert found[1]["modes"].dtype == jnp.complex64
        assert_same(found, expected)


def trunk_and_heads(params):
    return {name: params[name] for name in ("lift", "modes")}, list(params["heads"].T)


BATCHES = [BATCH, jax.tree.map(lambda x: 1 - 2 * x, BATCH)]
STACKED = jax.tree.map(lambda *x: np.stack(x), *BATCHES)
FORMS = {
    "task_axis": (loss_of_one, lambda params: params, STACKED, {"task_axis": 0}),
    "functions": ([loss_of_one] * 2, lambda params: params, BATCHES, {}),
    "microbatches": (losses_fn, lambda params: params, BATCH, {"microbatches": 2}),
    "features": ((trunk, [head(k) for k in range(3)]), trunk_and_heads, BATCH, {"at": "features"}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.by_default("features")
def test_every_form_of_the_losses_is_that_of_pairs(form):
    losses, params_of, batch, options = FORMS[form]
    method = aggregation.upgrad()
    expected = two_steps(method, in_pairs(losses), params_of(PAIRS), batch, **options)
    assert_same(two_steps(method, losses, params_of(COMPLEX), batch, **options), expected)
