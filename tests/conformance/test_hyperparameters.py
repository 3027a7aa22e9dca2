"""The gradient to a hyperparameter: the derivative, or zero where the docstring says so."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation, scalarization
from tests.conformance.helpers import PARAMS

pytestmark = pytest.mark.unoptimized

FACTORIES = {"scalarization": scalarization, "aggregation": aggregation}
ZERO = "The gradient to its hyperparameters is zero: they act through constants of differentiation."
CALLS = 4


def says_zero(built):
    """Whether the docstring of the public method in a case has the sentence; ``None`` for a user's method."""
    public = FACTORIES[built.family].__all__
    names = [name for name in built.case.name.split("-") if name in public]
    return ZERO in getattr(FACTORIES[built.family], names[0]).__doc__ if names else None


@pytest.mark.one_of_a_kind("engine")
@pytest.mark.cases(lambda built: built.case.hyperparameters)
def test_the_gradient_to_a_hyperparameter_is_the_derivative_or_said_to_be_zero(built):
    """Through ``init`` and a call, and through a later call with the state as it is then."""
    with jax.enable_x64(True):
        usual = {name: np.float64(values[1]) for name, values in built.case.hyperparameters.items()}
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
    for family, module in FACTORIES.items():
        for name in filter(str.islower, module.__all__):
            factory = getattr(module, name)
            annotations = [str(argument.annotation) for argument in inspect.signature(factory).parameters.values()]
            takes_floats = any("numpy.ndarray" in x and "Callable" not in x for x in annotations)
            assert (ZERO in factory.__doc__) == (takes_floats and name not in differentiated[family]), name
