"""The diagonal of the neural tangent kernel, against the explicit kernel's; and the weights made of it."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import scalarization
from tests.autodiff.models import network, normal_layers

RNG = np.random.default_rng(0)
PARAMS = normal_layers(0, [2, 8, 1])
POINTS = {name: RNG.uniform(size=(n, 2)).astype(np.float32) for name, n in {"ics": 6, "bcs": 5, "res": 13}.items()}


def u(params, x):
    return network(params, x)[0]


def of_u(params, x):
    return jax.vmap(u, (None, 0))(params, x)


def residual(params, x):
    """Of Helmholtz' equation at one point: a derivative of a derivative."""
    along = lambda v: jax.jvp(lambda x: jax.jvp(partial(u, params), (x,), (v,))[1], (x,), (v,))[1]
    return sum(map(along, np.eye(2, dtype=x.dtype))) + u(params, x)


def residuals_fn(params, points, scale=1.0):
    """Of three losses, each at its own points; at a boundary there are three equations, of which two in a vector."""
    each = lambda f, x: jax.vmap(f, (None, 0))(params, x)
    slopes = each(jax.grad(u, argnums=1), points["bcs"])
    bcs = {"slopes": slopes, "value": scale * each(u, points["bcs"])}
    return {"ics": each(u, points["ics"]), "bcs": bcs, "res": each(residual, points["res"])}


@partial(jax.jit, static_argnums=0)
def explicit(residuals_fn, params, *args, **kwargs):
    """The diagonal of J J*, J made by :func:`jax.jacrev`, in two coordinates for a complex parameter."""
    jacobian = jax.jacrev(partial(residuals_fn, **kwargs))(params, *args)
    shapes = jax.eval_shape(partial(residuals_fn, **kwargs), params, *args)
    squares = lambda like, x: jnp.sum(jnp.abs(x.reshape(*like.shape, -1)) ** 2, axis=-1)
    total = lambda like, rows: sum(squares(like, x) for x in jax.tree.leaves(rows))
    return jax.tree.map(total, shapes, jacobian)


def assert_close(found, expected, rtol=1e-5):
    expected = jax.tree.map(np.asarray, expected)
    chex.assert_trees_all_equal_shapes(found, expected)
    chex.assert_trees_all_close(found, expected, rtol=rtol)


unoptimized = pytest.mark.unoptimized


@unoptimized
@pytest.mark.parametrize("block_size", [None, 4, 1])
@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.by_default("True-4")
def test_the_diagonal_is_that_of_the_explicit_kernel(pointwise, block_size):
    diagonal_fn = jax.jit(mtl.diag_ntk(residuals_fn, block_size=block_size, pointwise=pointwise))
    assert_close(diagonal_fn(PARAMS, POINTS, scale=3.0), explicit(residuals_fn, PARAMS, POINTS, scale=3.0))


@unoptimized
def test_in_float64():
    with jax.enable_x64(True):
        params, points = jax.tree.map(lambda x: x.astype(np.float64), (PARAMS, POINTS))
        found = jax.jit(mtl.diag_ntk(residuals_fn, block_size=4))(params, points)
        assert_close(found, explicit(residuals_fn, params, points), rtol=1e-12)
        assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype("float64")}


SPECTRAL = {
    "lift": np.array([[0.5, -1.0, 2.0]], np.float32),
    "modes": (RNG.normal(size=(3, 2)) @ [[1], [1j]]).astype(np.complex64),
}


def spectral(params, x, y):
    """Complex parameters, and residuals of all kinds at the same points, which come in two arguments."""
    hidden = jnp.tanh(x @ params["lift"])
    out = hidden.astype(params["modes"].dtype) @ params["modes"]
    return jnp.real(out[:, 0]) - y, (jnp.abs(out) ** 2, jnp.imag(out[:, 0]) * y)


@unoptimized
@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.by_default("False")
def test_complex_parameters_and_points_for_all(pointwise):
    x, y = POINTS["res"][:, :1], POINTS["res"][:, 1]
    expected = explicit(spectral, SPECTRAL, x, y)
    for diagonal_fn in (f := mtl.diag_ntk(spectral, block_size=5, pointwise=pointwise)), jax.jit(f):
        assert_close(diagonal_fn(SPECTRAL, x, y), expected)


@unoptimized
def test_bfloat16_is_squared_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    found = jax.jit(mtl.diag_ntk(of_u))(params, POINTS["ics"].astype(jnp.bfloat16))
    assert found.dtype == jnp.float32
    assert_close(found, explicit(of_u, PARAMS, POINTS["ics"]), rtol=0.05)


@unoptimized
def test_parameters_that_do_not_count():
    is_shared = [True, False]  # the layers
    frozen = lambda params, x: of_u([params[0], jax.lax.stop_gradient(params[1])], x)
    expected = explicit(frozen, PARAMS, POINTS["res"])
    for diagonal_fn in mtl.diag_ntk(of_u, shared=is_shared), mtl.diag_ntk(frozen):
        assert_close(jax.jit(diagonal_fn)(PARAMS, POINTS["res"]), expected)


def temporaries(function, *args):
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.by_default("1")
def test_temporaries_do_not_grow_with_the_points(n_seeds):
    """But for a copy of the points and of the results, by blocks."""
    seeds = jax.tree.map(lambda x: np.stack([x] * n_seeds), PARAMS)
    diagonal_fn = jax.vmap(mtl.diag_ntk(residuals_fn, block_size=128), (0, None))
    kept, given = [], []
    for n in 512, 8192:
        points = {name: jax.ShapeDtypeStruct((n, 2), jnp.float32) for name in POINTS}
        kept.append(temporaries(diagonal_fn, seeds, points))
        given.append(sum(4 * n * (2 + k * n_seeds) for k in (1, 3, 1)))  # coordinates, and so many residuals a point
    assert kept[1] - kept[0] <= given[1] - given[0]


@unoptimized
def test_seeds_by_vmap():
    seeds = [normal_layers(seed, [2, 8, 1]) for seed in range(2)]
    diagonal_fn = mtl.diag_ntk(of_u, block_size=4)
    together = jax.tree.map(lambda *x: np.stack(x), *seeds)
    found = jax.jit(jax.vmap(diagonal_fn, (0, None)))(together, POINTS["res"])
    assert_close(found, np.stack([explicit(of_u, params, POINTS["res"]) for params in seeds]))


@unoptimized
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.by_default("AxisType.Explicit")
def test_points_on_eight_devices_stay_there(kind):
    x = np.tile(POINTS["bcs"], (16, 1))[:64]
    expected = explicit(of_u, PARAMS, x)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        split, same = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
        params, x = jax.device_put(PARAMS, same), jax.device_put(x, split)
        step = jax.jit(mtl.diag_ntk(of_u, block_size=16))
        found = step(params, x)
        assert_close(found, expected)
        assert found.sharding.spec == split.spec
        text = step.lower(params, x).compile().as_text()
        assert "all-gather" not in text
        assert "all-to-all" not in text
        assert_close(jax.jit(mtl.diag_ntk(of_u, pointwise=False))(params, x), expected)
        if kind == AxisType.Explicit:
            with pytest.raises(ValueError, match="block_size: expected one that divides the number of points and is"):
                mtl.diag_ntk(of_u, block_size=12)(params, x)
        specs = {"in_specs": (PartitionSpec(), PartitionSpec("x")), "out_specs": PartitionSpec("x")}
        for pointwise in True, False:
            of_part = mtl.diag_ntk(of_u, block_size=3, pointwise=pointwise)
            assert_close(jax.jit(jax.shard_map(of_part, **specs))(params, x), expected)


# The weights.

DIAGONAL = {"ics": np.array([1, 3], np.float32), "res": np.array([[2, 4], [6, 8]], np.float32)}


def test_weights_of_the_paper_and_of_jaxpi():
    """Algorithm 1: tr(K) / tr(K_ii). In jaxpi: the mean of the losses' means over each loss's mean."""
    weights = jax.jit(mtl.ntk_weights, static_argnames="of_means")
    assert_close(weights(DIAGONAL), {"ics": 24 / 4, "res": 24 / 20})
    assert_close(weights(DIAGONAL, of_means=True), {"ics": 3.5 / 2, "res": 3.5 / 5})
    with_zero = weights(DIAGONAL | {"frozen": np.zeros(3, np.float32)})
    assert_close(with_zero, {"ics": 24 / 4, "res": 24 / 20, "frozen": 1.0})
    large = np.array([3e38], np.float32)
    assert_close(weights({"ics": large, "res": large}), {"ics": 2.0, "res": 2.0})
    gradient = jax.device_get(jax.jit(jax.grad(lambda diagonal: mtl.ntk_weights(diagonal)["res"]))(DIAGONAL))
    assert not any(np.any(x) for x in jax.tree.leaves(gradient))


@unoptimized
def test_a_run_with_weights_of_every_fourth_step():
    """In ``scan``, with jaxpi's running average, against the same step by step."""
    points = {"ics": POINTS["ics"], "res": POINTS["res"]}

    def residuals_fn(params, points):
        each = lambda f, x: jax.vmap(f, (None, 0))(params, x)
        return {"ics": each(u, points["ics"]) - jnp.sin(points["ics"][:, 0]), "res": each(u, points["res"]) ** 2}

    def losses_fn(params, points):
        return jax.tree.map(lambda r: jnp.mean(r**2), residuals_fn(params, points))

    diagonal_fn, start = mtl.diag_ntk(residuals_fn, block_size=4), {"ics": np.float32(1), "res": np.float32(1)}

    def step(carry, i):
        params, weights = carry
        new = lambda: mtl.ntk_weights(diagonal_fn(params, points), of_means=True)
        weights = jax.lax.cond(i % 4 == 0, lambda: optax.incremental_update(new(), weights, 0.1), lambda: weights)
        grad_fn = mtl.value_and_grad(losses_fn, scalarization.constant(weights))
        _, grads = grad_fn(params, grad_fn.init(params, points), points)
        return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), weights), weights

    @jax.jit
    @jax.grad
    def gradient(params, weights):
        losses = losses_fn(params, points)
        return sum(weights[name] * losses[name] for name in losses)

    _, found = jax.device_get(jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(8)))((PARAMS, start)))
    params, weights = PARAMS, start
    for i in range(8):
        if i % 4 == 0:
            means = jax.tree.map(np.mean, jax.device_get(explicit(residuals_fn, params, points)))
            new = jax.tree.map(lambda mean, means=means: sum(means.values()) / 2 / mean, means)
            weights = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, weights, new)
        assert_close(jax.tree.map(lambda x, i=i: x[i], found), weights, rtol=1e-4)
        params = jax.tree.map(lambda p, g: p - 0.1 * np.asarray(g), params, gradient(params, weights))


# What is refused.


def of_means(params, points):
    return jax.tree.map(jnp.mean, residuals_fn(params, points))


def at_own_points(params, points):
    return {"ics": jax.vmap(u, (None, 0))(params, POINTS["ics"]), "res": points["res"][:, 0]}


REFUSED = {
    "no function": (TypeError, r"residuals_fn: expected a function", {"ics": u}, {}, ({},)),
    "no block": (ValueError, r"block_size: expected an int of at least 1", residuals_fn, {"block_size": 0}, ()),
    "losses": (
        ValueError,
        r"residuals_fn\['bcs'\]\['slopes'\]: expected residuals of 5 points .*, found shape \(\)",
        of_means,
        {},
        (POINTS,),
    ),
    "no arguments": (
        ValueError,
        r"residuals_fn\['ics'\]: expected residuals of 1 points .*pointwise=False",
        at_own_points,
        {},
        ({"ics": POINTS["ics"], "res": POINTS["res"]},),
    ),
    "no points": (
        ValueError,
        "points: expected as many points on the first axis of every positional argument",
        lambda params, x, scale: scale * x[:, 0],
        {},
        (POINTS["res"], 3.0),
    ),
    "complex": (TypeError, "residuals_fn: expected floating point", lambda params, x: x * 1j, {}, (POINTS["res"],)),
    "integers": (TypeError, "params: expected real or complex floating", lambda params, x: x, {}, (POINTS["res"],)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    error, message, function, options, args = REFUSED[case]
    params = 3 if case == "integers" else PARAMS
    with pytest.raises(error, match=message):
        mtl.diag_ntk(function, **options)(params, *args)
