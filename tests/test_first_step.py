"""The guide's first training step with every method that needs no argument: each does something in it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.pages import block_below, read

pytestmark = pytest.mark.unoptimized

GUIDE = "guides/training_steps.md"
BLOCK = block_below(GUIDE, "One training step for every method")
CASES = {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}
METHODS = {f"{info.family}-{info.name}": info for info in mtl.methods() if not info.required}
# Their weights never are anything else.
EQUAL_WEIGHTS = {"mean": 0.5, "sum": 1.0, "coba": 0.5}  # CoBa's warm-up is longer than the run


def build(info):
    """As the text below the block says: a task by its name, and a method that learns in ``mtl.learn``."""
    argument = next(case.names_task for case in CASES[info.family] if case.name == info.name)
    method = info.factory(**{argument: "pressure"} if argument else {})
    return mtl.learn(method, optax.adam(1e-2)) if "learn" in info.needs else method


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
    exec(compile(block, GUIDE, "exec"), variables)
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
@pytest.mark.parametrize("info", METHODS.values(), ids=METHODS)
def test_every_method_without_arguments_does_something(info, monkeypatch):
    accuracies = lambda task_losses: lambda *args: jax.tree.map(lambda loss: jnp.exp(-loss), task_losses(*args))
    as_it_stands = lambda task_losses: task_losses
    name, method = info.name, build(info)
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
    given = {f"{family}-{case.name}" for family, cases in CASES.items() for case in cases if case.required}
    public = {f"{info.family}-{info.name}" for info in mtl.methods()}
    assert public - METHODS.keys() == given
    assert len(METHODS) > 40


def test_the_text_says_which_methods_are_learned():
    said = re.search(r"learns its weights\s+\((.*?)\)", read(GUIDE).partition(BLOCK)[2])[1]
    learned = {info.name for info in mtl.methods() if "learn" in info.needs}
    assert set(re.findall(r"`(\w+)`", said)) == learned
