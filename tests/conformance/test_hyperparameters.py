"""The gradient to a hyperparameter: the derivative, or zero where the docstring says so."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.conformance.helpers import PARAMS

pytestmark = pytest.mark.unoptimized

FACTORIES = {(info.family, info.name): info.factory for info in mtl.methods()}
ZERO = "The gradient to its hyperparameters is zero: they act through constants of differentiation."
CALLS = 4


def says_zero(built):
    """Whether the docstring of the public method in a case has the sentence; ``None`` for a user's method."""
    public = [FACTORIES.get((built.family, name)) for name in built.case.name.split("-")]
    return next((ZERO in factory.__doc__ for factory in public if factory), None)


def floats(built):
    """The hyperparameters that there is a gradient to, with the values that serve."""
    swept = built.case.hyperparameters.items()
    return {name: np.float64(values[1]) for name, values in swept if isinstance(values[1], float)}


@pytest.mark.one_of_a_kind("engine")
@pytest.mark.cases(lambda built: floats(built))
def test_the_gradient_to_a_hyperparameter_is_the_derivative_or_said_to_be_zero(built):
    """Through ``init`` and a call, and through a later call with the state as it is then."""
    with jax.enable_x64(True):
        usual = floats(built)
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, float), PARAMS)
        state = built.init(built.case.make(**usual), params=params)
        for i in range(CALLS):
            state = built.step(state, built.sample(i, dtype=float), method=built.case.make(**usual))[1]
        gradient, slope = jax.device_get(jax.jit(gradient_and_slope(built, state, params))(usual))
    if says_zero(built) is not False and not any(map(np.any, gradient.values())):
        return
    assert not says_zero(built)
    for name in usual:
        np.testing.assert_allclose(gradient[name], slope[name], rtol=1e-5, atol=1e-7, err_msg=name)


def gradient_and_slope(built, state, params):
    """Of what the first call gives, and one from this state, the derivatives as JAX gives them and by differences."""

    def outputs(given):
        method, x = built.case.make(**given), built.sample(CALLS, dtype=float)
        found = [built.apply(at, x, method=method)[0] for at in (built.init(method, params=params), state)]
        fixed = np.random.default_rng(0)
        dot = lambda leaf: jnp.sum(leaf * fixed.normal(size=leaf.shape))
        return jnp.stack([sum(map(dot, jax.tree.leaves(output))) for output in found])

    def difference(given, name):
        step = 1e-6 * jnp.maximum(jnp.abs(given[name]), 1)
        ahead, behind = (outputs(given | {name: given[name] + by}) for by in (step, -step))
        return (ahead - behind) / (2 * step)

    return lambda given: (jax.jacrev(outputs)(given), {name: difference(given, name) for name in given})


def test_every_method_with_a_float_argument_is_differentiated_or_says_so():
    """By the annotations of the public factories; numbers for each task are among them."""
    differentiated = {
        "scalarization": {"constant", "cosmos", "imtl_l", "pbi", "revised_uw", "scale_invariant", "stch", "uw"},
        "aggregation": {"constant", "graddrop"},
    }
    for (family, name), factory in FACTORIES.items():
        annotations = [str(argument.annotation) for argument in inspect.signature(factory).parameters.values()]
        takes_floats = any(re.search(r"\b(Number|PerTask)\b", x) and "Callable" not in x for x in annotations)
        assert (ZERO in factory.__doc__) == (takes_floats and name not in differentiated[family]), name


THREE = np.array([0.5, 2.0, 1.25])
OF_EACH_TASK = {
    "scalarization": {
        "constant": scalarization.constant,
        "scale_invariant": scalarization.scale_invariant,
        "stch": lambda each: scalarization.stch(0.5, each, each / 10),
        "cosmos": lambda each: scalarization.cosmos(2.0, each),
        "pbi": lambda each: scalarization.pbi(2.0, each, each / 10),
        "uw": scalarization.uw,
        "revised_uw": scalarization.revised_uw,
        "imtl_l": scalarization.imtl_l,
        "famo": lambda each: scalarization.famo(each / 10),
        "minmax": scalarization.minmax,
        "self_adaptive": scalarization.self_adaptive,
        "lagrangian": lambda each: scalarization.lagrangian(each / 2, each, each, initial_multipliers=each),
    },
    "aggregation": {
        "constant": aggregation.constant,
        "graddrop": lambda each: aggregation.graddrop(leak=each / 4),
        "upgrad": aggregation.upgrad,
        "dual_proj": aggregation.dual_proj,
        "config": aggregation.config,
        "aligned_mtl": aggregation.aligned_mtl,
        "pcd": lambda each: aggregation.pcd(each[1:] / 4),
        "sdmgrad": lambda each: aggregation.sdmgrad(0.1, pref_vector=each),
        "gradient_shares": aggregation.gradient_shares,
        "gradnorm": lambda each: aggregation.gradnorm(initial_losses=each),
        "cr_mogm": lambda each: aggregation.cr_mogm(aggregation.mgda(), initial_weights=each),
    },
}


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in OF_EACH_TASK for name in OF_EACH_TASK[family]]
)
@pytest.mark.by_default("scalarization-pbi", "scalarization-famo", "aggregation-constant", "aggregation-upgrad")
def test_numbers_for_each_task_have_the_derivative_or_none_by_docstring(family, name):
    """On every path that makes weights, too."""
    make = OF_EACH_TASK[family][name]
    fixed = np.random.default_rng(0)
    losses, rows, direction = np.array([1.3, 0.4, 2.2]), fixed.normal(size=(3, 4)), fixed.normal(size=4)

    def outputs(each):
        method = make(each)
        if family == "scalarization":
            return method.apply(method.init(3), losses)[0][None]
        state, given = method.init((3, 4)), {"values": losses}
        found = [method.apply(state, rows, **given)[0] @ direction]
        paths = (method.weighting, rows), (method.gramian_weighting, rows @ rows.T)
        found += [path.apply(state, x, **given)[0] @ direction[:3] for path, x in paths if path]
        return jnp.stack(found)

    with jax.enable_x64(True):
        steps = 1e-6 * jnp.eye(3)
        differences = jax.vmap(lambda step: (outputs(THREE + step) - outputs(THREE - step)) / 2e-6, out_axes=1)
        gradient, slope = jax.device_get(
            jax.jit(lambda: (jax.jacrev(outputs)(jnp.asarray(THREE)), differences(steps)))()
        )
    is_zero = ZERO in FACTORIES[family, name].__doc__
    np.testing.assert_allclose(gradient, 0 if is_zero else slope, rtol=1e-5, atol=1e-7)
    assert is_zero or np.any(gradient)
