"""Models of Flax NNX and Equinox: parameters alone are trained, and what else is in a module is refused by name."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

pytestmark = pytest.mark.unoptimized

X, Y = np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5), np.ones((4, 2), np.float32)
RECIPE = r"expected parameters alone, nnx.Param \(definition, params, others = nnx.split\(model, nnx.Param, ...\)"
ALONE = r"of a module its parameters alone: eqx.filter\(model, eqx.is_inexact_array\) or eqx.partition"
OWN_DATA = np.stack([X, X]), np.stack([Y, Y])


class Linear(nnx.Module):
    def __init__(self, other=None):
        self.linear = nnx.Linear(5, 2, rngs=nnx.Rngs(0))
        self.other = other

    def __call__(self, x):
        return self.other(self.linear(x)) if isinstance(self.other, nnx.Module) else self.linear(x)


class Count(nnx.Variable):
    """A kind of state that Flax does not know."""


class Gain(nnx.Param):
    """A kind of parameter that Flax does not know."""


class Trained(nnx.Variable):
    """What its user trains, although it is no nnx.Param."""


def nnx_losses(model, x, y):
    return jnp.mean((model(x) - y) ** 2, axis=0)


def equinox_losses(model, x, y):
    return jnp.mean((jax.vmap(model)(x) - y) ** 2, axis=0)


ZEROS, ONES = np.zeros(2, np.float32), np.ones(2, np.float32)
STATE = {
    "batch statistics": (lambda: nnx.BatchNorm(2, rngs=nnx.Rngs(0)), r"\.other\.mean: .* found BatchStat"),
    "dropout": (lambda: nnx.Dropout(0.5, rngs=nnx.Rngs(0)), r"\.other\.rngs\.count: .* found RngCount"),
    "random state": (lambda: nnx.Rngs(0), r"\.other\.default\.count: .* found RngCount"),
    "a cache": (lambda: nnx.Cache(ZEROS), r"\.other: .* found Cache"),
    "a bare variable": (lambda: nnx.Variable(ZEROS), r"\.other: .* found Variable"),
    "a user's own": (lambda: Count(ZEROS), r"\.other: .* found Count"),
}

DOORS = {
    "value_and_grad of a scalarizer": lambda model, losses_fn: mtl.value_and_grad(losses_fn, scalarization.mean())(
        model, scalarization.mean().init(2), X, Y
    ),
    "value_and_grad of an aggregator": lambda model, losses_fn: mtl.value_and_grad(losses_fn, aggregation.mean())(
        model, aggregation.mean().init((2, 3)), X, Y
    ),
    "allow_int": lambda model, losses_fn: mtl.value_and_jac(losses_fn, allow_int=True)(model, X, Y),
    "own data": lambda model, losses_fn: mtl.value_and_jac(losses_fn, task_axis=0)(model, *OWN_DATA),
    "value_and_jac": lambda model, losses_fn: mtl.value_and_jac(losses_fn)(model, X, Y),
    "value_and_gramian": lambda model, losses_fn: mtl.value_and_gramian(losses_fn)(model, X, Y),
    "one argument of several": lambda model, losses_fn: mtl.value_and_jac(losses_fn, argnums=(0, 1))(model, X, Y),
    "init": lambda model, losses_fn: aggregation.mean().init((2, model)),
    "init of a method that remembers gradients": lambda model, losses_fn: aggregation.excess_mtl().init((2, model)),
    "init of a wrapper": lambda model, losses_fn: mtl.skip_nonfinite(aggregation.excess_mtl()).init((2, model)),
    "init in optax": lambda model, losses_fn: mtl.aggregate(aggregation.mgda(), 2).init(model),
    "update in optax": lambda model, losses_fn: mtl.aggregate(aggregation.mgda(), 2).update(
        {}, aggregation.mgda().init((2, ())), model
    ),
}


@pytest.mark.parametrize("kind", STATE)
def test_state_in_a_module_is_refused(kind):
    make, found = STATE[kind]
    model = Linear(make())
    with pytest.raises(TypeError, match=rf"^params{found}.*silently") as error:
        DOORS["value_and_grad of a scalarizer"](model, nnx_losses)
    assert error.match(RECIPE)
    nested = {"model": (model,), "scale": np.float32(1)}
    with pytest.raises(TypeError, match=rf"^params\['model'\]\[0\]{found}"):
        mtl.value_and_jac(lambda params: nnx_losses(params["model"][0], X, Y))(nested)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_state(door):
    model = Linear(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=rf"^params.*\.other\.mean: {RECIPE}.*, found BatchStat"):
        DOORS[door](model, nnx_losses)


def test_a_state_of_everything_is_refused():
    model = Linear(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=rf"^params\['other'\]\['mean'\]: {RECIPE}"):
        DOORS["value_and_jac"](nnx.state(model), nnx_losses)


def test_a_module_with_parameters_alone_goes_through():
    model = Linear(nnx.LayerNorm(2, rngs=nnx.Rngs(0)))

    @jax.jit
    def found_and_expected(model):
        _, gradient = DOORS["value_and_grad of a scalarizer"](model, nnx_losses)
        return gradient, jax.grad(lambda model: jnp.mean(nnx_losses(model, X, Y)))(model)

    for other in None, Gain(ONES), model.other, nnx.Dropout(0.0), nnx.LoRAParam(ONES):
        gradient, expected = found_and_expected(Linear(other))
        assert jax.tree.structure(gradient) == jax.tree.structure(expected)
        np.testing.assert_allclose(gradient.linear.kernel[...], expected.linear.kernel[...], rtol=1e-5)


def test_what_a_user_has_chosen_goes_through():
    """The recipe's parameters; and a state of a kind of variable that the user says is trained."""
    model = Linear(Trained(ONES))
    for chosen in (nnx.Param,), (nnx.Param, Trained), (Trained,):
        definition, params, others = nnx.split(model, chosen, ...)

        def losses_fn(params, definition=definition, others=others):
            model = nnx.merge(definition, params, others)
            return jnp.mean((model(X) * model.other[...][None] - Y) ** 2, axis=0)

        _, jacobian = jax.eval_shape(mtl.value_and_jac(losses_fn), params)
        assert jax.tree.structure(jacobian) == jax.tree.structure(params)


def test_batch_statistics_are_trained_by_the_recipe():
    """The guide's; as it is given, the module's statistics would have stayed 0."""
    model = Linear(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    definition, params, others = nnx.split(model, nnx.Param, ...)

    def losses_fn(params):
        model = nnx.merge(definition, params, others, copy=True)
        return nnx_losses(model, X + 1, Y), nnx.state(model, nnx.Not(nnx.Param))

    method = scalarization.mean()
    step = lambda params: mtl.value_and_grad(losses_fn, method, has_aux=True)(params, method.init(2))
    (_, _, new), _ = jax.jit(step)(params)
    hidden = (X + 1) @ np.asarray(model.linear.kernel[...]) + np.asarray(model.linear.bias[...])
    expected = 0.01 * np.mean(hidden, axis=0)  # BatchNorm's momentum is 0.99
    np.testing.assert_allclose(new["other"]["mean"][...], expected, rtol=1e-4)


@functools.cache
def equinox_model():
    return eqx.filter_jit(lambda: eqx.nn.MLP(5, 2, 8, 1, key=jax.random.key(0)))()


@pytest.mark.parametrize("door", DOORS)
def test_an_equinox_module_as_it_is_gets_one_sentence(door):
    model = equinox_model()
    with pytest.raises(TypeError, match=rf"^params.*\.activation: expected floating point numbers \({ALONE}"):
        DOORS[door](model, equinox_losses)


def test_a_filtered_equinox_module_is_trained():
    model = equinox_model()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    losses_fn = lambda params: equinox_losses(eqx.combine(params, static), X, Y)
    optimizer = optax.chain(mtl.aggregate(aggregation.mean(), 2), optax.sgd(1.0))

    @jax.jit
    def updates_and_expected(params):
        _, jacobian = mtl.value_and_jac(losses_fn)(params)
        updates, _ = optimizer.update(jacobian, optimizer.init(eqx.filter(model, eqx.is_inexact_array)), params)
        return updates, jax.grad(lambda params: -jnp.mean(losses_fn(params)))(params)

    updates, expected = updates_and_expected(params)
    for found, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


# Random keys.


@jax.jit
def with_keys():
    return {"w": jnp.ones(3), "key": jax.random.key(0), "keys": jax.random.split(jax.random.key(1), 4)}


KEYS = with_keys()
METHODS = {
    "scalarizer": scalarization.mean(),
    "gramian": aggregation.mgda(),
    "rowwise": aggregation.excess_mtl(),
    "coordinatewise": aggregation.graddrop(0),
}


def keyed_losses(params):
    noise = jax.random.normal(params["key"], (3,))
    return jnp.stack([jnp.sum(params["w"] ** 2), jnp.sum(params["w"] * noise)])


def test_a_key_is_no_parameter():
    """As in :func:`jax.grad`; and the hint is not allow_int, which trains a key no more."""
    with pytest.raises(TypeError, match="key<fry>"):
        jax.grad(lambda params: jnp.sum(keyed_losses(params)))(KEYS)
    for door in mtl.value_and_jac(keyed_losses), mtl.value_and_gramian(keyed_losses):
        with pytest.raises(TypeError, match=r"^params\['key'\]: .*\(no random keys: eqx.filter.*nnx.split") as error:
            door(KEYS)
        assert "allow_int" not in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_keys_are_passed_through_as_jax_does(name):
    method = METHODS[name]

    @jax.jit
    def found_and_expected(params):
        state = method.init(2) if name == "scalarizer" else method.init((2, params))
        _, gradient = mtl.value_and_grad(keyed_losses, method, allow_int=True)(params, state)
        return gradient, jax.grad(lambda params: jnp.mean(keyed_losses(params)), allow_int=True)(params)

    gradient, expected = found_and_expected(KEYS)
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert shapes(gradient) == shapes(expected)
    if name == "scalarizer":
        np.testing.assert_allclose(gradient["w"], expected["w"], rtol=1e-5)


def test_keys_in_a_jacobian():
    _, jacobian = jax.jit(mtl.value_and_jac(keyed_losses, allow_int=True))(KEYS)
    _, gramian = jax.jit(mtl.value_and_gramian(keyed_losses, allow_int=True))(KEYS)
    rows = np.asarray(jacobian["w"])
    assert jacobian["key"].shape == (2,) and jacobian["keys"].shape == (2, 4)
    assert jacobian["key"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(gramian, rows @ rows.T, rtol=1e-5)
