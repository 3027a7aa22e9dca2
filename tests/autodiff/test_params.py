"""What may be given: parameters of any kind, any arguments, any form of losses; and what is said of the rest."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

N_TASKS = 3


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, TARGETS = _normal(1, 8, 4), _normal(2, 8, N_TASKS)


def _losses(outputs):
    return jnp.mean((outputs - TARGETS) ** 2, axis=0)


def _arrays():
    return jax.device_put((0.5 * _normal(3, 4, 5), 0.1 * _normal(4, 5), _normal(5, 5, N_TASKS)))


def _mlp(w, b, heads):
    return _losses(jnp.tanh(X @ w + b[None]) @ heads)


@functools.partial(jax.jit, static_argnums=0)
def _init(method, params):
    return method.init(N_TASKS if isinstance(method, mtl.Scalarizer) else (N_TASKS, params))


# With jaxlib 0.12 products of matrices round twice as much as with 0.10: two of JAX's own ways differ by this.
ROUNDING = 1e-6 if jaxlib.version.__version_info__ < (0, 11) else 2e-6


def _assert_close(found, expected, rtol=1e-5):
    """Trees of one structure, and leaves of one dtype that are close."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)

    def compare(path, x, y):
        assert x.dtype == y.dtype, path
        assert x.shape == y.shape, path
        if x.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(x, y, rtol=rtol, atol=ROUNDING, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, found, expected)


def _by_jax(losses, params):
    """The losses and their Jacobian."""
    return jax.device_get(jax.jit(lambda params: (losses(params), jax.jacrev(losses)(params)))(params))


def _gramian(jacobian):
    leaves = jax.tree.leaves(jax.device_get(jacobian))
    rows = np.concatenate([np.reshape(x, (len(x), -1)) for x in leaves], axis=1)
    return rows @ rows.T


def _combine(weights, jacobian):
    return jax.tree.map(lambda rows: np.tensordot(weights, rows, 1), jacobian)


# Parameters of every kind: each gives them, and the losses as a function of them.


def _drawn(shapes):
    """Numbers in a framework's own structure: as it draws them itself they are a program for every leaf."""
    rng = np.random.default_rng(0)
    draw = lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype))
    return jax.tree.map(lambda x: draw(x) if isinstance(x, jax.ShapeDtypeStruct) else x, shapes)


def flax_linen():
    nn = pytest.importorskip("flax.linen")
    model = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(N_TASKS)])
    params = _drawn(jax.eval_shape(lambda: model.init(jax.random.key(0), X)))
    return params, lambda params: _losses(model.apply(params, X))


def flax_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(4, 5, rngs=rngs)
            self.out = nnx.Linear(5, N_TASKS, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    definition, shapes = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
    return _drawn(shapes), lambda params: _losses(nnx.merge(definition, params)(X))


def equinox():
    """The half of a partition that has arrays has ``None`` elsewhere."""
    eqx = pytest.importorskip("equinox")
    model = _drawn(eqx.filter_eval_shape(lambda: eqx.nn.MLP(4, N_TASKS, 5, 1, key=jax.random.key(0))))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params: _losses(jax.vmap(eqx.combine(params, static))(X))


def haiku():
    hk = pytest.importorskip("haiku")
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5, N_TASKS], activation=jnp.tanh)(x)))
    params = _drawn(jax.eval_shape(lambda: model.init(jax.random.key(0), X)))
    return params, lambda params: _losses(model.apply(params, X))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Mlp:
    w: jax.Array
    b: jax.Array
    heads: jax.Array
    activation: str = dataclasses.field(metadata={"static": True}, default="tanh")


def of_dataclass():
    return Mlp(*_arrays()), lambda params: _mlp(params.w, params.b, params.heads)


def of_tuple():
    return _arrays(), lambda params: _mlp(*params)


def of_list_with_none():
    w, b, heads = _arrays()
    return [w, None, (b, {"heads": heads})], lambda params: _mlp(params[0], params[2][0], params[2][1]["heads"])


def of_scalars():
    """Leaves without axes, one of them a Python float."""
    params = {"a": jax.device_put(np.float32(0.5)), "b": 2.0}
    return params, lambda params: _losses(jnp.tanh(params["a"] * X[:, :3]) * params["b"])


def bare_array():
    return jax.device_put(_normal(3, 4, N_TASKS)), lambda params: _losses(jnp.tanh(X @ params))


@functools.cache
def _made(container):
    """The parameters, the losses as a function of them, and by JAX the losses and their Jacobian."""
    params, losses = container()
    return params, losses, *_by_jax(losses, params)


CONTAINERS = [flax_linen, flax_nnx, equinox, haiku, of_dataclass, of_tuple, of_list_with_none, of_scalars, bare_array]


@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.by_default("*-None")
def test_jacobian(container, rows):
    params, losses, expected_values, expected = _made(container)
    values, jacobian = jax.jit(mtl.value_and_jac(losses, rows=rows))(params)
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    _assert_close(jacobian, expected)


@pytest.mark.parametrize("container", CONTAINERS)
def test_gramian(container):
    params, losses, _, jacobian = _made(container)
    expected, ways = _gramian(jacobian), (None, 1, "two_pass")
    for found in jax.jit(lambda params: [mtl.value_and_gramian(losses, rows=rows)(params)[1] for rows in ways])(params):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.max(expected))


def test_gramian_of_a_python_float_not_compiled():
    """Where it is not an array yet."""
    params, losses, _, jacobian = _made(of_scalars)
    expected = _gramian(jacobian)
    for rows in (None, 1, "two_pass"):
        _, found = mtl.value_and_gramian(losses, rows=rows)(params)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.max(expected))


@pytest.mark.parametrize("make", [scalarization.geometric_mean, aggregation.excess_mtl])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.by_default("*-geometric_mean", "of_list_with_none-*", "of_scalars-*")
def test_gradient(container, make):
    """It has the parameters' structure, and is the weighted sum of the Jacobian's rows."""
    params, losses, _, jacobian = _made(container)
    method = make()
    grad_fn = mtl.value_and_grad(losses, method, return_weights=True)
    (_, _, weights), gradient = jax.jit(lambda params: grad_fn(params, _init(method, params)))(params)
    weights = np.asarray(weights)
    assert np.all(weights != 0)
    _assert_close(gradient, _combine(weights, jacobian), rtol=1e-4)


# Leaves that are no floating point numbers.


def _with_integers():
    w, b, heads = _arrays()
    order, on = jax.device_put((np.arange(8, dtype=np.int32)[::-1], np.array(True)))
    params = {"w": w, "b": b, "heads": heads, "order": order, "flags": {"on": on}}

    def losses(params):
        hidden = jnp.tanh(jnp.asarray(X)[params["order"]] @ params["w"] + params["b"][None]) * params["flags"]["on"]
        return _losses(hidden @ params["heads"])

    return params, losses


def _split(params):
    """The floating point leaves of the parameters, and the others."""
    others = ("order", "flags")
    return {k: v for k, v in params.items() if k not in others}, {k: params[k] for k in others}


@functools.cache
def _floats_alone():
    """The same parameters and losses, the other leaves being constants; and the Jacobian by JAX."""
    params, losses = _with_integers()
    floats, others = _split(params)
    losses_of_floats = lambda floats: losses({**floats, **others})
    return floats, losses_of_floats, _by_jax(losses_of_floats, floats)[1]


def _is_of_no_type(tree, params, lead=()):
    """All leaves are of float0, in the parameters' shapes."""
    same = lambda x, p: x.dtype == jax.dtypes.float0 and x.shape == (*lead, *p.shape)
    return all(jax.tree.leaves(jax.tree.map(same, tree, params)))


@pytest.mark.parametrize("rows", [None, 1])
def test_integer_leaf_is_refused(rows):
    params, losses = _with_integers()
    _, flags = _split(params)
    del params["flags"]
    losses_of = lambda params: losses({**params, **flags})
    with pytest.raises(TypeError, match=r"params\['order'\]: .*int32"):
        mtl.value_and_jac(losses_of, rows=rows)(params)
    with pytest.raises(TypeError, match=r"params\['order'\]: .*int32"):
        mtl.value_and_gramian(losses_of, rows=rows)(params)
    for method in (scalarization.mean(), aggregation.upgrad()):
        with pytest.raises(TypeError, match=r"params\['order'\]: .*int32"):
            mtl.value_and_grad(losses_of, method, rows=rows)(params, _init(method, params))


def test_boolean_leaf_is_refused():
    with pytest.raises(TypeError, match=r"params\['flags'\]\['on'\]: .*bool"):
        mtl.value_and_jac(lambda params: params["w"])({"w": np.ones(3, np.float32), "flags": {"on": np.array(True)}})


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("rows", [None, "vmap", 1])
def test_integer_leaf_jacobian(rows, jit):
    params, losses = _with_integers()
    jac_fn = mtl.value_and_jac(losses, rows=rows, allow_int=True)
    _, jacobian = (jax.jit(jac_fn) if jit else jac_fn)(params)
    _, others = _split(params)
    found, of_others = _split(jacobian)
    _assert_close(found, _floats_alone()[-1])
    assert _is_of_no_type(of_others, others, lead=(N_TASKS,))


def test_integer_leaf_gramian():
    params, losses = _with_integers()
    expected, ways = _gramian(_floats_alone()[-1]), (None, "vmap", 1, "two_pass")
    of = lambda rows, params: mtl.value_and_gramian(losses, rows=rows, allow_int=True)(params)[1]
    for found in jax.jit(lambda params: [of(rows, params) for rows in ways])(params):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.max(expected))


METHODS_AND_WAYS = [
    (scalarization.geometric_mean, None),
    *[(aggregation.upgrad, rows) for rows in ("vmap", 1, "two_pass")],
    *[(aggregation.excess_mtl, rows) for rows in ("vmap", 1, "stream")],
]


@pytest.mark.parametrize(("make", "rows"), METHODS_AND_WAYS)
@pytest.mark.by_default("geometric_mean-*", "upgrad-two_pass", "excess_mtl-stream")
def test_integer_leaf_gradient(make, rows):
    """The same numbers as without those leaves, and for them what :func:`jax.grad` gives."""
    params, losses = _with_integers()
    floats, losses_of_floats, _ = _floats_alone()
    method = make()
    grad_fn = mtl.value_and_grad(losses, method, rows=rows, allow_int=True)
    plain_fn = mtl.value_and_grad(losses_of_floats, method, rows=rows)
    _, gradient = jax.jit(lambda params: grad_fn(params, _init(method, params)))(params)
    _, expected = jax.jit(lambda floats: plain_fn(floats, _init(method, floats)))(floats)
    found, of_others = _split(gradient)
    _assert_close(found, expected)
    assert _is_of_no_type(of_others, _split(params)[1])
    by_jax = jax.eval_shape(jax.grad(lambda params: jnp.sum(losses(params)), allow_int=True), params)
    assert jax.tree.map(lambda x: x.dtype, gradient) == jax.tree.map(lambda x: x.dtype, by_jax)


@pytest.mark.parametrize(("make", "rows"), [(aggregation.upgrad, None), (aggregation.excess_mtl, "stream")])
def test_integer_leaf_shared(make, rows):
    """The heads get the gradient of the sum; there are integers on either side of the mask."""
    params, losses = _with_integers()
    floats, losses_of_floats, jacobian = _floats_alone()
    method = make()
    shared = {"w": True, "b": True, "heads": False}
    mask = {**shared, "order": True, "flags": False}
    grad_fn = mtl.value_and_grad(losses, method, rows=rows, allow_int=True, shared=mask)
    plain_fn = mtl.value_and_grad(losses_of_floats, method, rows=rows, shared=shared)
    _, gradient = jax.jit(lambda params: grad_fn(params, _init(method, mtl.subset(params, mask))))(params)
    _, expected = jax.jit(lambda floats: plain_fn(floats, _init(method, mtl.subset(floats, shared))))(floats)
    found, of_others = _split(gradient)
    _assert_close(found, expected)
    assert _is_of_no_type(of_others, _split(params)[1])
    _assert_close(found["heads"], np.sum(jacobian["heads"], axis=0))


# Arguments.


def _of_arguments(w, x, heads, *, scale=1.0):
    """Losses of two arguments that can be parameters, and of one between them."""
    return scale * jnp.mean((jnp.tanh(x @ w["w"]) @ heads - TARGETS) ** 2, axis=0)


def _arguments():
    w, _, heads = _arrays()
    return {"w": w}, X, heads


@pytest.mark.parametrize("argnums", [0, 1, 2, -1, -3, (0, 2), (2, 0), (0,), (-1, 0), (0, 1, 2), (2, 1, 0), (1, -3)])
def test_argnums(argnums):
    args = _arguments()
    values, jacobian = mtl.value_and_jac(_of_arguments, argnums)(*args)
    expected = jax.jacrev(_of_arguments, argnums)(*args)
    np.testing.assert_allclose(values, _of_arguments(*args), rtol=1e-6)
    _assert_close(jacobian, expected)
    _, found = mtl.value_and_gramian(_of_arguments, argnums)(*args)
    expected = _gramian(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.max(expected))


@pytest.mark.parametrize("argnums", [3, -4, (0, 3), (-4, 1), (0, 0), (1, -2)])
@pytest.mark.parametrize("transform", [mtl.value_and_jac, mtl.value_and_gramian])
def test_argnums_out_of_range(transform, argnums):
    with pytest.raises(ValueError, match=r"^argnums: .*3 positional"):
        transform(_of_arguments, argnums)(*_arguments())


def test_no_positional_argument():
    with pytest.raises(ValueError, match=r"^argnums: .*0 positional"):
        mtl.value_and_jac(_of_arguments)(**dict(zip(("w", "x", "heads"), _arguments(), strict=True)))


def test_keyword_arguments():
    args = _arguments()
    values, jacobian = mtl.value_and_jac(_of_arguments, (0, 2))(*args, scale=3.0)
    np.testing.assert_allclose(values, 3 * _of_arguments(*args), rtol=1e-6)
    _assert_close(jacobian, jax.tree.map(lambda x: 3 * x, jax.jacrev(_of_arguments, (0, 2))(*args)))
    values, products = mtl.value_and_gramian(_of_arguments)(*args, scale=3.0)
    _, plain = mtl.value_and_gramian(_of_arguments)(*args)
    np.testing.assert_allclose(values, 3 * _of_arguments(*args), rtol=1e-6)
    np.testing.assert_allclose(products, 9 * plain, rtol=1e-5)


@pytest.mark.parametrize("make", [scalarization.mean, aggregation.upgrad, aggregation.excess_mtl])
def test_keyword_arguments_of_the_training_step(make):
    params, x, heads = _arguments()
    method = make()
    grad_fn = mtl.value_and_grad(_of_arguments, method)
    state = _init(method, params)
    (values, _), gradient = grad_fn(params, state, x, heads, scale=3.0)
    bound = mtl.value_and_grad(lambda params: _of_arguments(params, x, heads, scale=3.0), method)
    (expected, _), plain = bound(params, state)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    _assert_close(gradient, plain)


def test_aux():
    """It is returned beside the losses, whatever it holds."""
    params, x, heads = _arguments()

    def with_aux(w, x, heads, *, scale=1.0):
        return _of_arguments(w, x, heads, scale=scale), {"features": jnp.tanh(x @ w["w"]), "n": jnp.arange(2)}

    features = jnp.tanh(x @ params["w"])
    (values, aux), jacobian = mtl.value_and_jac(with_aux, (0, 2), has_aux=True)(params, x, heads, scale=2.0)
    _assert_close(jacobian, jax.jacrev(with_aux, (0, 2), has_aux=True)(params, x, heads, scale=2.0)[0])
    np.testing.assert_allclose(aux["features"], features, rtol=1e-6)
    for rows in ("vmap", 1, "two_pass"):
        (again, aux), _ = mtl.value_and_gramian(with_aux, has_aux=True, rows=rows)(params, x, heads, scale=2.0)
        np.testing.assert_allclose(again, values, rtol=1e-6)
        np.testing.assert_array_equal(aux["n"], [0, 1])
    for method in (scalarization.mean(), aggregation.upgrad()):
        grad_fn = mtl.value_and_grad(with_aux, method, has_aux=True)
        (again, _, aux), _ = grad_fn(params, _init(method, params), x, heads, scale=2.0)
        np.testing.assert_allclose(again, values, rtol=1e-6)
        np.testing.assert_allclose(aux["features"], features, rtol=1e-6)


@pytest.mark.parametrize("transform", [mtl.value_and_jac, mtl.value_and_gramian])
def test_aux_that_is_missing(transform):
    with pytest.raises(TypeError, match=r"^losses_fn: .*has_aux"):
        transform(_of_arguments, has_aux=True)(*_arguments())


# Losses.


def _task_losses(params):
    return _mlp(*params)


def _jacobian_and_gramians(losses, params, ways=("vmap", 1, "two_pass")):
    """In one program."""

    def both(params):
        gramians = [mtl.value_and_gramian(losses, rows=rows)(params) for rows in ways]
        return mtl.value_and_jac(losses)(params), gramians

    return jax.device_get(jax.jit(both)(params))


def test_named_losses():
    """The rows follow the order of the tree's leaves, not that in which the names were given."""
    params = _arrays()

    def named(params):
        losses = _task_losses(params)
        return {"z": losses[0], "a": losses[1:]}

    losses, rows = _by_jax(_task_losses, params)
    (values, jacobian), gramians = _jacobian_and_gramians(named, params)
    assert values.keys() == {"z", "a"}
    np.testing.assert_allclose(values["a"], losses[1:], rtol=1e-6)
    expected = jax.tree.map(lambda x: x[[1, 2, 0]], rows)
    _assert_close(jacobian, expected)
    for _, found in gramians:
        np.testing.assert_allclose(found, _gramian(expected), rtol=1e-4, atol=1e-5)


def test_named_losses_weights():
    """The weights have the losses' names."""
    params = _arrays()
    named = lambda params: dict(zip("zab", _task_losses(params), strict=True))
    method = scalarization.constant({"a": 2.0, "b": 3.0, "z": 5.0})
    grad_fn = mtl.value_and_grad(named, method, return_weights=True)
    step = lambda params: grad_fn(params, method.init(jax.eval_shape(named, params)))
    (_, _, weights), gradient = jax.jit(step)(params)
    assert {name: float(w) for name, w in weights.items()} == {"a": 2.0, "b": 3.0, "z": 5.0}
    _, jacobian = _by_jax(_task_losses, params)
    _assert_close(gradient, _combine(np.array([5.0, 2.0, 3.0], np.float32), jacobian))


@pytest.mark.slow
def test_losses_of_two_axes():
    """One row for each loss, in C order."""
    params = _arrays()

    def square(params):
        w, b, heads = params
        return (jnp.tanh(X[:2] @ w + b[None]) @ heads[:, :2] - 1) ** 2

    (values, jacobian), gramians = _jacobian_and_gramians(square, params, ("vmap", 1, 3, "two_pass"))
    assert values.shape == (2, 2)
    expected = jax.tree.map(lambda x: x.reshape(4, *x.shape[2:]), _by_jax(square, params)[1])
    _assert_close(jacobian, expected)
    for values, found in gramians:
        assert values.shape == (2, 2)
        np.testing.assert_allclose(found, _gramian(expected), rtol=1e-4, atol=1e-5)


def test_counted_losses():
    """They are worth their quotients."""
    params, counts = _arrays(), np.array([2, 3, 5], np.int32)
    counted = lambda params: mtl.Counted(_task_losses(params), counts)
    quotients = lambda params: _task_losses(params) / counts
    (values, jacobian), gramians = _jacobian_and_gramians(counted, params)
    expected_values, expected = _by_jax(quotients, params)
    np.testing.assert_allclose(values.sum, expected_values * counts, rtol=1e-6)
    np.testing.assert_array_equal(values.count, counts)
    _assert_close(jacobian, expected)
    for _, found in gramians:
        np.testing.assert_allclose(found, _gramian(expected), rtol=1e-4, atol=1e-6)

    @jax.jit
    def found_and_plain(params):
        methods = scalarization.geometric_mean(), aggregation.upgrad(), aggregation.excess_mtl()
        step = lambda losses, method: mtl.value_and_grad(losses, method)(params, _init(method, params))[1]
        return [[step(losses, method) for losses in (counted, quotients)] for method in methods]

    for found, plain in found_and_plain(params):
        _assert_close(found, plain, rtol=1e-4)


def test_loss_without_labels():
    """Its row is zero even where its sum is not a number, and its weight too."""
    params, counts = _arrays(), np.array([2, 0, 5], np.int32)

    def counted(params):
        return mtl.Counted(_task_losses(params) + np.array([0, np.nan, 0], np.float32), counts)

    method = aggregation.upgrad()
    grad_fn = mtl.value_and_grad(counted, method, return_weights=True)

    @jax.jit
    def jacobian_and_step(params):
        return mtl.value_and_jac(counted)(params)[1], grad_fn(params, _init(method, params))

    jacobian, ((_, _, weights), gradient) = jax.device_get(jacobian_and_step(params))
    expected = _by_jax(lambda params: _task_losses(params) / np.maximum(counts, 1), params)[1]
    there = np.array([1, 0, 1], np.float32)
    _assert_close(jacobian, jax.tree.map(lambda x: (x.T * there).T, expected))
    np.testing.assert_array_equal(np.ravel(weights) > 0, [True, False, True])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradient))


# What is said of what cannot be.


def _calls(losses, **kwargs):
    """The three functions, ready to be called."""
    params, method = _arrays(), aggregation.upgrad()
    state = _init(method, params)
    return [
        lambda: mtl.value_and_jac(losses, **kwargs)(params),
        lambda: mtl.value_and_gramian(losses, **kwargs)(params),
        lambda: mtl.value_and_grad(losses, method, **kwargs)(params, state),
    ]


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: mtl.Counted(loss, 2)], ids=["bare", "counted"])
def test_scalar_loss_is_refused(wrap):
    for call in _calls(lambda params: wrap(jnp.sum(_task_losses(params)))):
        with pytest.raises(ValueError, match=r"^losses_fn: .*one loss for each task.*scalar"):
            call()


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_integer_losses_are_refused(dtype):
    for call in _calls(lambda params: _task_losses(params).astype(dtype)):
        with pytest.raises(TypeError, match=f"^losses_fn.*{jnp.dtype(dtype).name}"):
            call()


@pytest.mark.parametrize("rows", [0, -1, "nonsense", True, 1.5])
def test_rows_is_refused(rows):
    for call in _calls(_task_losses, rows=rows):
        with pytest.raises((ValueError, TypeError), match=r"^rows: "):
            call()


@pytest.mark.parametrize(("transform", "rows"), [("jac", "two_pass"), ("jac", "stream"), ("gramian", "stream")])
def test_rows_of_another_function(transform, rows):
    """A Jacobian is not made by two passes, and only a method can visit rows."""
    with pytest.raises(ValueError, match=f"^rows: .*{rows}"):
        getattr(mtl, f"value_and_{transform}")(_task_losses, rows=rows)


@pytest.mark.parametrize(("make", "rows"), [(aggregation.upgrad, "stream"), (aggregation.excess_mtl, "two_pass")])
def test_rows_that_the_method_cannot_use(make, rows):
    with pytest.raises(ValueError, match=f"^rows: .*{rows}"):
        mtl.value_and_grad(_task_losses, make(), rows=rows)


# Subsets of the parameters.


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"x": True}, ValueError, "expected booleans in the params' structure, or in a prefix of it"),
        ({"w": True, "b": True, "heads": [True]}, ValueError, "expected booleans in the params' structure"),
        ({"w": True, "b": 1, "heads": True}, TypeError, "expected booleans, known while tracing, found int"),
        (jnp.array(True), TypeError, "expected booleans, known while tracing"),
        (lambda params: {"x": True}, ValueError, "expected booleans in the params' structure"),
    ],
)
def test_masks_that_are_refused(mask, error, message):
    method, params = aggregation.mgda(), dict(zip(("w", "b", "heads"), _arrays(), strict=True))
    losses = lambda params: _mlp(**params)
    for name in "shared", "decide_on":
        with pytest.raises(error, match=f"^{name}: {message}"):
            mtl.value_and_grad(losses, method, **{name: mask})(params, method.init((N_TASKS, params)))
    with pytest.raises(error, match=f"^mask: {message}"):
        mtl.subset(params, mask)


def test_masks_may_be_callable_modules():
    """As in optax: a tree of booleans that happens to have a ``__call__`` is not called."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.Linear(2, 2, key=jax.random.key(0))
    mask = eqx.tree_at(lambda model: (model.weight, model.bias), model, (True, False))
    found = mtl.subset(model, mask)
    assert found.weight is model.weight
    assert jax.tree.leaves(found.bias) == []


def test_a_state_for_all_parameters_where_a_part_is_balanced():
    method, params = aggregation.excess_mtl(), dict(zip(("w", "b", "heads"), _arrays(), strict=True))
    grad_fn = mtl.value_and_grad(lambda params: _mlp(**params), method, shared={"w": True, "b": True, "heads": False})
    with pytest.raises(ValueError, match=r"mtl\.subset\(params, mask\)"):
        grad_fn(params, method.init((N_TASKS, params)))


def test_what_is_no_function_no_method_or_no_state():
    method, params = aggregation.mgda(), dict(zip(("w", "b", "heads"), _arrays(), strict=True))
    for losses_fn in None, [1.0, 2.0], [], (len, len, len):
        with pytest.raises(TypeError, match=r"^losses_fn: expected a function, a pair of a trunk and heads, or"):
            mtl.value_and_grad(losses_fn, method)
    with pytest.raises(TypeError, match=r"^losses_fn\[1\]: expected a function, as in a dict or list of functions"):
        mtl.value_and_grad([len, None], method)
    with pytest.raises(TypeError, match=r"^method: expected a Scalarizer or an Aggregator"):
        mtl.value_and_grad(_task_losses, aggregation.mgda)
    for state in None, ():
        with pytest.raises(TypeError, match=r"^state: expected what grad_fn.init\(params, \*batch\) returned"):
            mtl.value_and_grad(lambda params: _mlp(**params), method)(params, state)
    with pytest.raises(TypeError, match=r"^params\['w'\]: expected floating point numbers .*PjitFunction"):
        mtl.value_and_jac(lambda params: jnp.ones(3))({"w": jnp.tanh})


def test_keyword_arguments_may_have_our_names():
    method = scalarization.mean()
    losses = lambda weights, *, state, params: state * params * jnp.sum(weights) * jnp.arange(3.0)
    _, gradient = mtl.value_and_grad(losses, method)(jnp.ones(2), method.init(3), state=2.0, params=3.0)
    np.testing.assert_allclose(gradient, [6.0, 6.0])
    _, jacobian = mtl.value_and_jac(losses)(jnp.ones(2), state=2.0, params=3.0)
    np.testing.assert_allclose(jacobian[:, 0], [0.0, 6.0, 12.0])


def test_what_a_step_and_its_weights_are_made_of_may_be_differentiated_again():
    """Of a scalarizer that is not linear in the losses: second derivatives through the weights."""
    method, params = scalarization.scale_invariant(), np.array([0.5, -1.5], np.float32)
    losses_fn = lambda p: jnp.stack([1 + jnp.sum(p**2), jnp.sum(jnp.exp(p))])

    @jax.jit
    def derivatives(params):
        state, losses = method.init(2), losses_fn(params)
        step = mtl.value_and_grad(losses_fn, method)
        hessian = jax.hessian(lambda p: method.apply(state, losses_fn(p))[0])(params)
        weights = lambda losses: mtl.diagnostics.effective_weights(method, state, losses)
        return jax.jacobian(lambda p: step(p, state)[1])(params), hessian, losses, jax.jacobian(weights)(losses)

    of_step, hessian, losses, of_weights = jax.device_get(derivatives(params))
    np.testing.assert_allclose(of_step, hessian, rtol=1e-5)
    np.testing.assert_allclose(of_weights, np.diag(-1 / losses**2), rtol=1e-6)


@pytest.mark.parametrize("method", [aggregation.graddrop(), mtl.chain(scalarization.mean(), aggregation.graddrop())])
def test_a_step_on_one_scalar_may_be_differentiated(method):
    """Its Jacobian is a vector as the losses are, which ``apply`` refuses to differentiate."""
    losses_fn = lambda x: jnp.stack([x**2, jnp.sin(x), -x])
    step = lambda x: mtl.value_and_grad(losses_fn, method)(x, method.init((3, x)))[1]
    assert np.isfinite(jax.jit(jax.grad(step))(np.float32(1.5)))
