"""Aggregators on one problem of three tasks, of which LibMTL's and TorchJD's numbers are known.

The losses are l_i = c_i |x - a_i|^2 / 2 + o_i. LibMTL's numbers (of its commit 4336804, two calls of its own classes,
with x moved by -0.05 times the gradient between them) and those of TorchJD 0.18 have six digits: hence 1e-4 throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

START = np.array([0.3, -0.7, 0.2, 0.5])
CENTRES = np.array([[1, 0, 2, -1], [-2, 1, 0.5, 0], [0.5, -3, 1, 2]])
FACTORS, OFFSETS = np.array([1, 4, 0.25]), np.array([0.1, 0.2, 0.3])


def losses(x):
    return 0.5 * FACTORS * np.sum((x - CENTRES) ** 2, axis=1) + OFFSETS


def jacobian(x):
    return jnp.array(FACTORS[:, None] * (x[None] - CENTRES), jnp.float32)


ROWS = jacobian(START)
GRAMIAN = np.array(ROWS, float) @ np.array(ROWS, float).T


def gradient_of(method, rows=ROWS):
    return method.apply(method.init(rows.shape), rows)[0]


def weights_of(method):
    return method.weighting.apply(method.init(ROWS.shape), ROWS)[0]


def assert_near(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


# TorchJD's, but the exact ones of Nash-MTL, where TorchJD is elsewhere, and of MGDA, of which it has three digits.
GRADIENTS = {
    "upgrad": [2.71325, -0.441375, -2.03463, -0.0892692],
    "dual_proj": [2.66133, -0.521924, -1.68803, -0.123383],
    "cagrad": [2.67941, -0.729939, -1.61567, 0.0122789],
    "aligned_mtl": [0.157921, -0.0346487, -0.269855, 0.0552546],
    "fairgrad": [0.772645, 0.227249, -1.53325, 0.0231176],
    "imtl_g": [0.268269, 0.0926802, -0.447298, -0.0330248],
    "mgda": [0.168283, 0.22528, -0.387234, -0.118911],
    "config": [2.81216, 0.971533, -4.68887, -0.346187],
    "nash_mtl": [0.446087, 0.131203, -0.88522, 0.013347],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    assert_near(gradient_of(getattr(aggregation, name)()), GRADIENTS[name])


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (aggregation.mgda(), [0.09797, 0.030483, 0.871548]),
        (aggregation.imtl_g(), [0.127459, 0.043364, 0.829177]),
        (aggregation.fairgrad(), [0.47742, 0.134243, 2.564]),
        (aggregation.fairgrad(alpha=2.0), [0.417085, 0.107447, 2.673753]),
        (aggregation.upgrad(), [0.458063, 0.351202, 3.94338]),
        (aggregation.aligned_mtl(pref_vector=np.ones(3)), [0.276971, 0.078463, 1.084316]),
    ],
    ids=["mgda", "imtl_g", "fairgrad", "fairgrad, alpha 2", "upgrad", "aligned_mtl"],
)
def test_libmtl_weights(method, expected):
    """Of MGDA and FairGrad the exact ones, from which LibMTL's are up to 4e-5; Aligned-MTL's preference is a sum."""
    assert_near(weights_of(method), expected)


def test_libmtl_gradients():
    assert_near(gradient_of(aggregation.cagrad(rescale=1)), [2.14353, -0.583951, -1.29254, 0.00982311])
    assert_near(gradient_of(aggregation.aligned_mtl(np.ones(3))), [0.473764, -0.103946, -0.809566, 0.165764])
    # With one batch in the place of three.
    assert_near(gradient_of(aggregation.sdmgrad(lr=5.0)), [0.611538, -0.0903846, -0.4, -0.0480769])


def test_two_calls_of_modo():
    method = aggregation.modo(lr=1e-3, rho=0.1)
    weights, state = method.weighting.apply(method.init(ROWS.shape), ROWS)
    assert_near(weights, [0.345692, 0.303845, 0.350464])
    gradient = np.array(weights, float) @ np.array(ROWS)
    assert_near(gradient, [2.53587, -2.10661, -1.05695, 0.994803])
    weights, _ = method.weighting.apply(state, jacobian(START - 0.05 * gradient))
    assert_near(weights, [0.355406, 0.280648, 0.363946])


def calls(method, n_calls):
    """Gradients and states of calls in a row, x moved by -0.05 times the gradient between them."""
    x, state = START, method.init(ROWS.shape)
    for _ in range(n_calls):
        gradient, state = method.apply(state, jacobian(x), values=jnp.array(losses(x), jnp.float32))
        yield np.array(gradient, float), state
        x = x - 0.05 * np.array(gradient, float)


def test_two_calls_of_db_mtl():
    """LibMTL adds 1e-8 to the losses, which are above 1 here."""
    method = mtl.chain(scalarization.scale_invariant(), aggregation.db_mtl(beta=0.9))
    (first, _), (second, _) = calls(method, 2)
    assert_near(first, [0.0337886, -0.00422475, -0.0830938, 0.0181389])
    assert_near(second, [0.0641126, -0.00806225, -0.157702, 0.0344672])


def test_two_calls_of_moco():
    method = aggregation.moco(normalize=True, softmax=True)
    (first, state), (_, later) = calls(method, 2)
    assert_near(state.weights, [0.420185, 0.0427874, 0.537028])
    assert_near(first, [0.0729387, -0.121677, -0.633192, 0.289874])
    assert_near(later.weights, [0.345549, 0.208284, 0.446167])


@pytest.mark.parametrize(
    ("start", "weights", "step"),
    [
        ([0.5, -0.2, 0.1], [1.38446, 0.687504, 0.928033], [5.90774, -6.84208, 0.934336]),
        ([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [-5.3487, 8.87054, -3.52184]),
    ],
)
def test_gradnorm(start, weights, step):
    """Its learned numbers, after SGD at rate 1; and the gradient where LibMTL's is known."""
    method = aggregation.gradnorm(optimizer=optax.sgd(1.0), initial_losses=jnp.array([4.0, 10.0, 3.0]), softmax=True)
    state = method.init(ROWS.shape)._replace(raw_weights=jnp.array(start))
    values = jnp.array(losses(START), jnp.float32)
    found, new_state = method.weighting.apply(state, ROWS, values=values)
    assert_near(found, weights)
    assert_near(np.subtract(start, new_state.raw_weights), step)
    if weights[0] != 1:
        assert_near(method.apply(state, ROWS, values=values)[0], [5.30951, -5.11053, -3.50264, 3.10369])


@pytest.mark.parametrize(
    ("log_scale", "weights", "gradient"),
    [
        ([0.0, 0.0, 0.0], [0.127459, 0.043364, 0.829177], [0.268269, 0.0926802, -0.447298, -0.0330248]),
        ([0.5, -0.2, 0.1], [0.0877956, 0.0601503, 0.852054], [0.304663, 0.105253, -0.50798, -0.0375051]),
    ],
)
def test_imtl(log_scale, weights, gradient):
    """The weights are LibMTL's of the scaled losses; the log-scales go down the gradient exp(s) l - 1."""
    learned = mtl.learn(scalarization.imtl_l(jnp.array(log_scale)), optax.sgd(1.0))
    method = mtl.chain(learned, aggregation.imtl_g())
    values = jnp.array(losses(START), jnp.float32)
    found, state = method.apply(method.init(ROWS.shape), ROWS, values=values)
    assert_near(found, gradient)
    assert_near(np.subtract(log_scale, state.scalarizer.inner.log_scale), np.exp(log_scale) * losses(START) - 1)
    of_gradients, _ = method.weighting.apply(method.init(ROWS.shape), ROWS, values=values)
    assert_near(of_gradients / np.exp(log_scale), weights)


def over_keys(make, n_calls):
    """The gradients of successive calls, by one seed in 1,000 each."""

    def run(seed):
        method, x, gradients = make(jax.random.key(seed)), jnp.array(START, jnp.float32), []
        state = method.init(ROWS.shape)
        for _ in range(n_calls):
            gradient, state = method.apply(state, jnp.array(FACTORS, jnp.float32)[:, None] * (x[None] - CENTRES))
            gradients.append(gradient)
            x = x - 0.05 * gradient
        return jnp.stack(gradients)

    return np.array(jax.jit(jax.vmap(run))(jnp.arange(1000)))


def assert_among(found, expected):
    distances = np.max(np.abs(found - np.array(expected)), axis=(1, 2))
    assert np.min(distances) < 1e-4, np.min(distances)


def test_orders_of_pcgrad():
    """With three tasks the orders give eight results: LibMTL's and TorchJD's are two of them."""
    found = over_keys(aggregation.pcgrad, n_calls=1)
    assert_among(found, [[8.08784, -1.42081, -6.07566, -0.177028]])
    assert_among(found, [[8.12201, -1.42263, -6.0437, -0.201412]])
    assert len(np.unique(found.round(3), axis=0)) == 8


def test_orders_of_gradvac():
    """64 pairs of results in two calls: LibMTL's is one of them."""
    found = over_keys(aggregation.gradvac, n_calls=2)
    assert_among(found[:, :1], [[7.99146, -1.32614, -6.02667, -0.229791]])  # TorchJD's
    assert_among(found, [[8.20074, -1.11686, -5.48853, -0.678239], [4.85177, -1.56134, -3.66395, 0.475976]])


def bargaining_residual(weights):
    """Of w_i (G w)_i = 1, up to a factor of the weights, as they may have been clipped."""
    products = weights * (GRAMIAN @ weights)
    return np.max(np.abs(products / np.mean(products) - 1))


def test_nash_mtl_where_the_peers_stop_too_soon():
    """At their point one task gains 8.7 times as much as each of the others; here all gain alike."""
    libmtl = np.array([0.631531, 0.222657, 5.74981])
    torchjd = np.linalg.lstsq(np.array(ROWS, float).T, [0.403809, 0.413338, -0.781943, -0.233786])[0]
    assert bargaining_residual(np.array(weights_of(aggregation.nash_mtl()), float)) < 1e-5
    # The same point, to the six digits of both.
    np.testing.assert_allclose([bargaining_residual(libmtl), bargaining_residual(torchjd)], 1.43754, rtol=1e-4)
