"""The two passes of the Gramian differentiate a backward pass: here are models where that is not a matter of course."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mtlbalance as mtl
from mtlbalance import aggregation
from mtlbalance.autodiff import jacobian, options
from mtlbalance.gramian import gramian

pytestmark = pytest.mark.unoptimized

WAYS = ["vmap", 1, 2, "two_pass"]
N_TASKS = 3


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, TARGETS = jax.device_put((_normal(1, 8, 4), _normal(2, 8, N_TASKS)))  # `custom_root` takes no array of NumPy


def _mlp_params():
    return {"w": 0.5 * _normal(3, 4, 5), "b": 0.1 * _normal(4, 5), "heads": _normal(5, 5, N_TASKS)}


def _read_out(params, features):
    """One loss for each task, from features ``[batch, 5]``."""
    return jnp.mean((features @ params["heads"] - TARGETS) ** 2, axis=0)


def _with_activation(activation):
    """A model of one hidden layer with this activation."""
    return _mlp_params(), lambda params: _read_out(params, activation(X @ params["w"] + params["b"][None]))


# The models: each gives its parameters, and the losses as a function of them.


def batch_norm():
    def normalize(h):
        return jnp.tanh((h - jnp.mean(h, axis=0, keepdims=True)) / jnp.sqrt(jnp.var(h, axis=0, keepdims=True) + 1e-3))

    return _with_activation(normalize)


def recurrent():
    params = {**_mlp_params(), "recurrent": 0.3 * _normal(6, 5, 5)}
    sequence = _normal(7, 6, 8, 4)

    def losses(params):
        def cell(h, x):
            return jnp.tanh(x @ params["w"] + h @ params["recurrent"] + params["b"][None]), None

        return _read_out(params, lax.scan(cell, jnp.zeros((8, 5)), sequence)[0])

    return params, losses


def shared_twice():
    """The first layer's transpose is the last layer, as with tied embeddings, and the heads are used twice."""

    def losses(params):
        h = jnp.tanh(X @ params["w"] + params["b"][None])
        h = jnp.tanh(h @ params["w"].T @ params["w"] + params["b"][None])
        return _read_out(params, h) + jnp.mean(jnp.tanh(params["heads"]) ** 2, axis=0)

    return _mlp_params(), losses


def checkpointed():
    params = {**_mlp_params(), "blocks": 0.5 * _normal(6, 3, 5, 5)}

    def losses(params):
        h = jnp.tanh(X @ params["w"] + params["b"][None])
        block = jax.checkpoint(lambda h, w: h + jnp.tanh(h @ w))
        for w in params["blocks"]:
            h = block(h, w)
        return _read_out(params, h)

    return params, losses


def gradient_reversal():
    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda _, g: (-g,))
    return _with_activation(lambda h: reverse(jnp.tanh(h)))


def straight_through():
    @jax.custom_vjp
    def quantize(x):
        return jnp.round(4 * x) / 4

    quantize.defvjp(lambda x: (quantize(x), None), lambda _, g: (g,))
    return _with_activation(lambda h: quantize(jnp.tanh(h)))


def straight_through_by_stop_gradient():
    return _with_activation(lambda h: h + lax.stop_gradient(jnp.round(4 * h) / 4 - h))


def custom_vjp():
    """A backward pass that is no derivative of the forward pass, and mixes the cotangent's entries."""

    @jax.custom_vjp
    def layer(h):
        return jnp.tanh(h)

    layer.defvjp(lambda h: (jnp.tanh(h), h), lambda h, g: (jnp.cos(h) * jnp.roll(g, 1, axis=1) + jnp.cumsum(g, 0),))
    return _with_activation(layer)


def attention():
    params = {name: 0.5 * _normal(10 + i, 4, 5) for i, name in enumerate(["query", "key", "value"])}
    params["heads"] = _normal(5, 5, N_TASKS)

    def losses(params):
        query, key, value = (X @ params[name] for name in ("query", "key", "value"))
        return _read_out(params, jax.nn.softmax(query @ key.T / jnp.sqrt(5.0)) @ value)

    return params, losses


def fixed_point():
    """The state of rest ``z = tanh(z W + x U)``, differentiated implicitly."""
    params = {**_mlp_params(), "recurrent": 0.2 * _normal(6, 5, 5)}

    def solve(residual, z):
        return lax.fori_loop(0, 60, lambda _, z: z - residual(z), z)

    def tangent_solve(linear, y):
        return jnp.linalg.solve(jax.jacobian(linear)(jnp.zeros_like(y)), y)

    def losses(params):
        def rest(x):
            residual = lambda z: z - jnp.tanh(z @ params["recurrent"] + x @ params["w"] + params["b"])
            return lax.custom_root(residual, jnp.zeros(5), solve, tangent_solve)

        return _read_out(params, jax.vmap(rest)(X))

    return params, losses


def linear_solve():
    """The features solve ``(A A' + I) z = x`` by :func:`jax.lax.custom_linear_solve`."""
    params = {**_mlp_params(), "a": 0.5 * _normal(6, 5, 5)}

    def losses(params):
        matrix = params["a"] @ params["a"].T + jnp.eye(5)
        product = lambda z: matrix @ z
        solve = lambda _, y: jnp.linalg.solve(matrix, y)
        z = lax.custom_linear_solve(product, (X @ params["w"] + params["b"][None]).T, solve, symmetric=True)
        return _read_out(params, jnp.tanh(z.T))

    return params, losses


def forces():
    """The losses compare derivatives of an energy with respect to positions, as those of molecular potentials do."""
    params = {"w": 0.5 * _normal(3, 3, 5), "b": 0.1 * _normal(4, 5), "v": _normal(5, 5)}
    positions = _normal(6, 8, 3)

    def losses(params):
        energy = lambda x: jnp.sum(jnp.tanh(x @ params["w"] + params["b"][None]) @ params["v"])
        return jnp.mean((-jax.grad(energy)(positions) - TARGETS) ** 2, axis=0)

    return params, losses


def conditional():
    """Which branch is taken depends on the parameters."""

    def branches(h):
        return lax.cond(jnp.sum(h) > 0, jnp.tanh, lambda h: lax.cond(jnp.sum(h) > -1e3, jnp.sin, jnp.cos, h), h)

    return _with_activation(branches)


def embedding():
    params = {"table": _normal(3, 7, 5), "heads": _normal(5, 5, N_TASKS)}
    tokens = np.array([[0, 3], [3, 3], [5, 1], [0, 6], [2, 2], [1, 1], [6, 0], [5, 3]])
    return params, lambda params: _read_out(params, jnp.tanh(jnp.mean(params["table"][tokens], axis=1)))


def convolution():
    params = {"kernel": 0.5 * _normal(3, 5, 2, 3, 3), "heads": _normal(5, 5, N_TASKS)}
    images = _normal(4, 8, 2, 6, 6)

    def losses(params):
        h = lax.conv_general_dilated(images, params["kernel"], (2, 2), "SAME")
        return _read_out(params, jnp.mean(jnp.tanh(h), axis=(2, 3)))

    return params, losses


def max_pool():
    params = {"kernel": 0.5 * _normal(3, 5, 2, 3, 3), "heads": _normal(5, 5, N_TASKS)}
    images = _normal(4, 8, 2, 6, 6)

    def losses(params):
        h = lax.conv_general_dilated(images, params["kernel"], (1, 1), "SAME")
        h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 3, 3), "VALID")
        return _read_out(params, jnp.mean(jnp.tanh(h), axis=(2, 3)))

    return params, losses


def per_example():
    def losses(params):
        def of_one(x, target):
            return (jnp.tanh(x @ params["w"] + params["b"]) @ params["heads"] - target) ** 2

        return jnp.mean(jax.vmap(of_one)(X, TARGETS), axis=0)

    return _mlp_params(), losses


MODELS = [
    batch_norm,
    recurrent,
    shared_twice,
    checkpointed,
    gradient_reversal,
    straight_through,
    straight_through_by_stop_gradient,
    custom_vjp,
    attention,
    fixed_point,
    linear_solve,
    forces,
    conditional,
    embedding,
    convolution,
    max_pool,
    per_example,
]


def _maybe_jit(fun, jit):
    return jax.jit(fun) if jit else fun


def _assert_same_gramian(found, expected, tolerance=1e-5):
    """Relative to the geometric means of the diagonal's entries."""
    found, expected = np.asarray(found), np.asarray(expected)
    norms = np.sqrt(np.diag(expected))
    assert np.all(norms > 0)
    assert found.dtype == expected.dtype
    np.testing.assert_array_less(np.abs(found - expected) / np.outer(norms, norms), tolerance)
    np.testing.assert_array_equal(found, found.T)


def _assert_same_gradient(found, expected, tolerance=1e-5):
    """Relative to the expected gradient's norm."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    trees = jax.device_get((found, expected))
    found, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in trees)
    assert 0 <= np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def _gramians(losses, params, ways):
    """With the losses, by each way; all in one program, which compiles fast."""
    return jax.jit(lambda params: [mtl.value_and_gramian(losses, rows=rows)(params) for rows in ways])(params)


def _by_jax(losses, params):
    """The losses, and the Gramian of their Jacobian."""
    both = lambda params: (losses(params), gramian(jax.jacrev(losses)(params)))
    return jax.device_get(jax.jit(both)(params))


def _by_hand(losses, params, method):
    """The losses, and what the method makes of their Jacobian: weights, and a gradient."""

    def by_hand(params):
        values, jacobian, state = losses(params), jax.jacrev(losses)(params), method.init((N_TASKS, params))
        weights, _ = method.weighting.apply(state, jacobian, values=values)
        return values, weights, method.apply(state, jacobian, values=values)[0]

    return jax.jit(by_hand)(params)


def _first_step(losses, method, n_tasks=N_TASKS, **options):
    grad_fn = mtl.value_and_grad(losses, method, **options)
    return lambda params: grad_fn(params, method.init((n_tasks, params)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.by_default("shared_twice", "custom_vjp", "conditional", "forces")
def test_gramian(model):
    """Compiled."""
    params, losses = model()
    expected_values, expected = _by_jax(losses, params)
    for values, found in _gramians(losses, params, WAYS):
        np.testing.assert_allclose(values, expected_values, rtol=1e-5)
        _assert_same_gramian(found, expected)


@pytest.mark.parametrize("model", [custom_vjp, conditional])
def test_gramian_not_compiled(model):
    params, losses = model()
    values, found = mtl.value_and_gramian(losses, rows="two_pass")(params)
    expected_values, expected = _by_jax(losses, params)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    _assert_same_gramian(found, expected)


@pytest.mark.parametrize("model", [batch_norm, custom_vjp, conditional, forces])
@pytest.mark.by_default("custom_vjp")
def test_gradient(model):
    params, losses = model()
    method = aggregation.upgrad()
    expected_values, _, expected = _by_hand(losses, params, method)
    fun = jax.jit(lambda params: [_first_step(losses, method, rows=rows)(params) for rows in (1, "two_pass")])
    for (values, _), found in fun(params):
        np.testing.assert_allclose(values, expected_values, rtol=1e-5)
        _assert_same_gradient(found, expected)


# Backward passes without a transpose: in each model the layer is the identity with one's own backward pass.


def _halve_thrice(_, g):
    """As a loop whose length is not known."""
    return (lax.while_loop(lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, carry[1] / 2), (0, g))[1],)


def _clip(_, g):
    return (jnp.clip(g, -0.05, 0.05),)


def _call_back(_, g):
    return (jax.pure_callback(lambda g: 2 * np.asarray(g), jax.ShapeDtypeStruct(g.shape, g.dtype), g, **_SEQUENTIAL),)


def _double(_, g):
    return (2 * g,)


_SEQUENTIAL = {"vmap_method": "sequential"}
UNTRANSPOSABLE = [_halve_thrice, _clip, _call_back]


def _wide_model(backward):
    """One wide matrix and one example, so that two passes are the default once ``_SMALL`` is nothing."""

    @jax.custom_vjp
    def layer(x):
        return x

    layer.defvjp(lambda x: (x, None), backward)
    x, heads, targets = _normal(1, 1, 16), 0.3 * _normal(2, 12, N_TASKS), _normal(4, 1, N_TASKS)
    losses = lambda params: jnp.mean((layer(jnp.tanh(x @ params["w"])) @ heads - targets) ** 2, axis=0)
    return {"w": 0.2 * _normal(3, 16, 12)}, losses


@pytest.fixture
def two_passes(monkeypatch):
    """Makes them the default for the wide model, and lists whether each attempt gave a Gramian."""
    attempts = []
    plain = jacobian._obstacle_to_two_passes

    def spy(*args):
        obstacle, by_design = plain(*args)
        attempts.append(obstacle is None)
        return obstacle, by_design

    monkeypatch.setattr(options, "_SMALL", 0)
    monkeypatch.setattr(jacobian, "_obstacle_to_two_passes", spy)
    return attempts


@pytest.mark.parametrize("backward", UNTRANSPOSABLE)
def test_untransposable_two_pass_is_refused(backward):
    params, losses = _wide_model(backward)
    with pytest.raises(ValueError, match=r"^rows: .*transpose"):
        mtl.value_and_gramian(losses, rows="two_pass")(params)
    with pytest.raises(ValueError, match=r"^rows: .*transpose"):
        jax.jit(_first_step(losses, aggregation.upgrad(), rows="two_pass"))(params)


@pytest.mark.parametrize("backward", UNTRANSPOSABLE)
def test_untransposable_by_rows(backward):
    params, losses = _wide_model(backward)
    _, expected = _by_jax(losses, params)
    for _, found in _gramians(losses, params, ["vmap", 1]):
        _assert_same_gramian(found, expected)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.by_default("jit")
def test_two_passes_are_the_wide_models_default(two_passes, jit):
    """What the fallback's tests need in order to mean something."""
    params, losses = _wide_model(_double)
    _, found = _maybe_jit(mtl.value_and_gramian(losses), jit)(params)
    _assert_same_gramian(found, _by_jax(losses, params)[1])
    method = aggregation.upgrad()
    (_, _), gradient = _maybe_jit(_first_step(losses, method), jit)(params)
    _assert_same_gradient(gradient, _by_hand(losses, params, method)[2])
    assert two_passes == [True, True]


@pytest.mark.parametrize(("backward", "jit"), [(_halve_thrice, False), *((b, True) for b in UNTRANSPOSABLE)])
def test_untransposable_gramian_falls_back(two_passes, backward, jit):
    params, losses = _wide_model(backward)
    _, expected = _by_jax(losses, params)
    with pytest.warns(UserWarning, match="rows=1") as seen:
        _, found = _maybe_jit(mtl.value_and_gramian(losses), jit)(params)
    assert len(seen) == 1
    assert two_passes == [False]
    _assert_same_gramian(found, expected)


@pytest.mark.parametrize(("backward", "jit"), [(_halve_thrice, False), *((b, True) for b in UNTRANSPOSABLE)])
@pytest.mark.by_default("_halve_thrice-True")
def test_untransposable_gradient_falls_back(two_passes, backward, jit):
    """The weights are right; where the backward pass clips, the gradient depends on the way, and is not checked."""
    params, losses = _wide_model(backward)
    method = aggregation.upgrad()
    _, expected_weights, expected = _by_hand(losses, params, method)
    with pytest.warns(UserWarning, match="rows=1") as seen:
        first_step = _maybe_jit(_first_step(losses, method, return_weights=True), jit)
        (_, _, weights), found = first_step(params)
        if jit:  # compiled, it does not warn again
            first_step(params)
    assert len(seen) == 1
    assert two_passes == [False]
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-4)
    _assert_same_gradient(found, expected)


def test_rows_that_are_asked_for_do_not_warn(two_passes):
    params, losses = _wide_model(_halve_thrice)
    jax.eval_shape(mtl.value_and_gramian(losses, rows=1), params)
    assert two_passes == []


# Other precisions.

NARROW = [jnp.bfloat16, jnp.float16]


def _narrow_model(dtype):
    """Some gradients have a squared norm that float16 cannot hold."""
    params = {"w": 0.5 * _normal(3, 4, 5), "heads": _normal(5, 5, N_TASKS)}
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    scales = np.array([1.0, 30.0, 200.0])

    def losses(params):
        x, targets = X.astype(params["w"].dtype), TARGETS.astype(params["w"].dtype)
        out = jnp.tanh(x @ params["w"]) @ params["heads"]
        return jnp.mean((out - targets) ** 2, axis=0) * scales.astype(out.dtype)

    return params, losses


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_gramian(dtype):
    params, losses = _narrow_model(dtype)
    wide = jax.tree.map(lambda x: x.astype(np.float32), params)
    _, expected = _by_jax(losses, wide)
    assert np.max(expected) > np.finfo(np.float16).max
    for _, found in _gramians(losses, params, [None, 1]):
        assert found.dtype == jnp.float32
        assert np.all(np.isfinite(found))
        _assert_same_gramian(found, expected, 2e-2)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.by_default("bfloat16")
def test_narrow_default_is_never_two_passes(two_passes, dtype):
    """Where they would be the default rows are taken, and nothing needs saying."""
    params, losses = _narrow_model(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jacobian, "cheapest_rows", lambda *args: "two_pass")
        _, found = jax.jit(mtl.value_and_gramian(losses))(params)
    assert two_passes == [False]
    _assert_same_gramian(found, _by_jax(losses, params)[1], 1e-2)


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_two_pass_is_refused(dtype):
    params, losses = _narrow_model(dtype)
    with pytest.raises(ValueError, match=f"^rows: .*{jnp.dtype(dtype).name}"):
        jax.eval_shape(mtl.value_and_gramian(losses, rows="two_pass"), params)


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("make", [aggregation.upgrad, aggregation.excess_mtl])
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.by_default("bfloat16-*-None")
def test_narrow_gradient(dtype, make, rows):
    params, losses = _narrow_model(dtype)
    _, gradient = jax.device_get(jax.jit(_first_step(losses, make(), rows=rows))(params))
    assert jax.tree.map(lambda x: x.dtype, gradient) == jax.tree.map(lambda x: x.dtype, params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))
    assert any(np.any(x != 0) for x in jax.tree.leaves(gradient))


def test_computing_in_bfloat16_costs_two_passes_what_it_costs_rows():
    """The usual mixed precision: parameters and losses in float32."""
    params = _mlp_params()

    def losses(params, dtype=jnp.bfloat16):
        w, b, heads = (params[name].astype(dtype) for name in ("w", "b", "heads"))
        outputs = jnp.tanh(X.astype(dtype) @ w + b[None]) @ heads
        return jnp.mean((outputs.astype(jnp.float32) - TARGETS) ** 2, axis=0)

    _, expected = _by_jax(lambda params: losses(params, jnp.float32), params)
    for _, found in _gramians(losses, params, WAYS):
        _assert_same_gramian(found, expected, 1e-2)


@pytest.mark.parametrize("rows", ["vmap", "two_pass"])
@pytest.mark.slow
def test_float64(rows):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(np.float64), _mlp_params())
        x, targets = np.asarray(X, np.float64), np.asarray(TARGETS, np.float64)

        def losses(params):
            return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) @ params["heads"] - targets) ** 2, axis=0)

        _, expected = _by_jax(losses, params)
        assert expected.dtype == jnp.float64
        _, found = jax.jit(mtl.value_and_gramian(losses, rows=rows))(params)
        _assert_same_gramian(found, expected, 1e-12)
        method = aggregation.upgrad()
        _, gradient = jax.jit(_first_step(losses, method, rows=rows))(params)
        _assert_same_gradient(gradient, _by_hand(losses, params, method)[2], 1e-11)


# Corner cases.

METHODS_AND_WAYS = [(aggregation.upgrad, rows) for rows in (1, "two_pass")]
METHODS_AND_WAYS += [(aggregation.excess_mtl, rows) for rows in ("vmap", "stream")]


def test_gramian_of_zero_gradients():
    params = _mlp_params()
    losses = lambda params: _read_out({"heads": np.zeros((5, N_TASKS), np.float32)}, X @ params["w"])
    for _, found in _gramians(losses, params, [1, "two_pass"]):
        np.testing.assert_array_equal(found, np.zeros((N_TASKS, N_TASKS)))


@pytest.mark.parametrize(("make", "rows"), METHODS_AND_WAYS)
@pytest.mark.by_default("upgrad-two_pass", "excess_mtl-stream")
def test_gradient_of_zero_gradients(make, rows):
    params = _mlp_params()
    losses = lambda params: _read_out({"heads": np.zeros((5, N_TASKS), np.float32)}, X @ params["w"])
    (values, state), gradient = jax.jit(_first_step(losses, make(), rows=rows))(params)
    np.testing.assert_allclose(values, jax.jit(losses)(params), rtol=1e-6)
    jax.tree.map(lambda x, p: np.testing.assert_array_equal(x, np.zeros_like(p)), gradient, params)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


def test_gramian_of_losses_that_ignore_the_parameters():
    losses = lambda params: jnp.arange(3.0)
    for _, found in _gramians(losses, _mlp_params(), [1, "two_pass"]):
        np.testing.assert_array_equal(found, np.zeros((N_TASKS, N_TASKS)))


def test_gramian_of_one_task():
    params, losses = batch_norm()
    first = lambda params: losses(params)[:1]
    gradient = jax.device_get(jax.jit(jax.grad(lambda params: losses(params)[0]))(params))
    expected = sum(np.sum(x**2) for x in jax.tree.leaves(gradient))
    for _, found in _gramians(first, params, [1, "two_pass"]):
        np.testing.assert_allclose(found, [[expected]], rtol=1e-5)


@pytest.mark.parametrize(("make", "rows"), METHODS_AND_WAYS)
@pytest.mark.by_default("upgrad-two_pass", "excess_mtl-stream")
def test_gradient_of_one_task(make, rows):
    """There is nothing to balance."""
    params, losses = batch_norm()
    first = lambda params: losses(params)[:1]
    _, found = jax.jit(_first_step(first, make(), n_tasks=1, rows=rows))(params)
    _assert_same_gradient(found, jax.jit(jax.grad(lambda params: losses(params)[0]))(params))
