"""The README's first training step with every method that needs no argument: each does something in it."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.test_readme import README, block_below

pytestmark = pytest.mark.unoptimized

BLOCK = block_below("One training step for every method")
FAMILIES = {"scalarization": (scalarization, SCALARIZERS), "aggregation": (aggregation, AGGREGATORS)}


def public_factories(family):
    return {name: getattr(family, name) for name in family.__all__ if name.islower()}


def needs_no_argument(factory):
    return all(each.default is not each.empty for each in inspect.signature(factory).parameters.values())


METHODS = [
    (family, name)
    for family, (module, _) in FAMILIES.items()
    for name, factory in public_factories(module).items()
    if needs_no_argument(factory)
]
# Their weights never are anything else.
EQUAL_WEIGHTS = {"mean": 0.5, "sum": 1.0, "coba": 0.5}  # CoBa's warm-up is longer than the run


def build(family, name):
    """As the text below the block says: a task by its name, and a method that learns in ``mtl.learn``."""
    module, cases = FAMILIES[family]
    argument = next(case.names_task for case in cases if case.name == name)
    method = getattr(module, name)(**{argument: "pressure"} if argument else {})
    return mtl.learn(method, optax.adam(1e-2)) if method.learned else method


def train(method, observed, monkeypatch):
    """Runs the block with this method; the parameters and gradients of its steps, and its variables."""
    steps, adam = [], optax.adam

    def recorded(gradient, params):
        jax.debug.callback(lambda *step: steps.append(step), params, gradient, ordered=True)
        return gradient

    monkeypatch.setattr(optax, "adam", lambda rate: optax.chain(optax.stateless(recorded), adam(rate)))
    block, found = re.subn(r"^method = .*$", "method = given", BLOCK, flags=re.MULTILINE)
    assert found == 1 and "method.observe(state, task_losses(params, batch))" in block
    block = block.replace("method.observe(state, task_losses(", "method.observe(state, observed(task_losses)(")
    variables = {"given": method, "observed": observed}
    exec(compile(block, "README.md", "exec"), variables)
    jax.effects_barrier()
    return steps, variables


def weights_of(gradient, jacobian):
    """The gradient as a weighted sum of the rows, and what of it is none, relative to its length."""
    flat = lambda tree, m: np.hstack([np.asarray(leaf, float).reshape(m, -1) for leaf in jax.tree.leaves(tree)])
    (gradient,), rows = flat(gradient, 1), flat(jacobian, 2)
    weights = np.linalg.lstsq(rows.T, gradient)[0]
    length = np.linalg.norm(gradient) or 1.0  # M-ConFIG's first steps are 0: it takes in one task at a time
    return weights, np.linalg.norm(gradient - weights @ rows) / length


@pytest.mark.by_default(
    "scalarization-sum",
    "scalarization-dwa",  # with epochs
    "scalarization-famo",  # looks again
    "scalarization-dtp",  # at accuracies
    "scalarization-uw",  # learned
    "aggregation-upgrad",
    "aggregation-lr_annealing",  # takes a name
    "aggregation-m_config",  # makes no weights
)
@pytest.mark.parametrize(("family", "name"), METHODS, ids=[f"{family}-{name}" for family, name in METHODS])
def test_every_method_without_arguments_does_something(family, name, monkeypatch):
    accuracies = lambda task_losses: lambda *args: jax.tree.map(lambda loss: jnp.exp(-loss), task_losses(*args))
    as_it_stands = lambda task_losses: task_losses
    method = build(family, name)
    steps, variables = train(method, accuracies if name == "dtp" else as_it_stands, monkeypatch)
    assert len(steps) == 30

    jacobian = jax.jit(lambda params: mtl.value_and_jac(variables["task_losses"])(params, variables["batch"])[1])
    found = [weights_of(gradient, jacobian(params)) for params, gradient in steps]
    weights, residuals = np.array([pair[0] for pair in found]), np.array([pair[1] for pair in found])
    if name in EQUAL_WEIGHTS:
        np.testing.assert_allclose(weights, EQUAL_WEIGHTS[name], atol=1e-4)
        return
    # Another direction than the sum's, or another length from step to step.
    size = np.abs(weights).max()
    unequal, changes = np.ptp(weights, axis=1).max() / size, np.ptp(weights, axis=0).max() / size
    least = 3e-4 if name == "brdr" else 1e-3  # of whose weights each step keeps 0.999
    assert max(unequal, changes, residuals.max()) > least
    if name == "famo":
        assert jnp.any(variables["state"].logits != 0)  # which only the second look changes


def test_there_are_all_of_them():
    """Those with arguments too, whose catalogue's rows have what is required."""
    given = {(family, case.name) for family, (_, cases) in FAMILIES.items() for case in cases if case.required}
    public = {(family, name) for family, (module, _) in FAMILIES.items() for name in public_factories(module)}
    assert public - set(METHODS) == given
    assert len(METHODS) > 40


def test_the_text_says_which_methods_are_learned():
    said = re.search(r"learns its weights\s+\((.*?)\)", README.partition(BLOCK)[2])[1]
    learned = {name for family, name in METHODS if getattr(FAMILIES[family][0], name)().learned}
    assert set(re.findall(r"`(\w+)`", said)) == learned
