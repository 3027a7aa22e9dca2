"""This library against numbers of its peers, held as data: no peer is needed here.

``torchjd.json`` was recorded by ``record.py``; ``comparisons.py`` states the tolerances. ``official.json`` holds the
numbers that LibMTL and the official ExcessMTL code print. The other official codes are in ``test_official.py``.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import aggregation, scalarization
from tests.golden import comparisons

pytestmark = pytest.mark.unoptimized

TORCHJD, OFFICIAL = (
    json.loads(Path(__file__).with_name(name).read_text()) for name in ("torchjd.json", "official.json")
)
PROBLEM, LIBMTL, EXCESS_MTL = OFFICIAL["problem"], OFFICIAL["libmtl"], OFFICIAL["excess_mtl"]


def shaped(case):
    return f"{case.get('method', '')}{list(np.shape(case['losses']))}"


def epochs(case):
    return f"{list(np.shape(case['losses'])[1:])}-T{case['temperature']}-epochs{case['epoch_lengths'][0]}"


def arguments(case):
    given = "-".join(name if np.ndim(x) else f"{name}{x:.3g}" for name, x in case["arguments"].items())
    return f"{shaped(case)}-{given}"


# TorchJD.


@pytest.mark.parametrize("case", TORCHJD["uw"], ids=shaped)
def test_uw(case):
    comparisons.check_uw(case)


@pytest.mark.parametrize("case", TORCHJD["imtl_l"], ids=shaped)
def test_imtl_l(case):
    comparisons.check_imtl_l(case)


@pytest.mark.parametrize("case", TORCHJD["scalarizers"], ids=shaped)
def test_baseline_scalarizers(case):
    comparisons.check_baseline_scalarizer(case)


@pytest.mark.parametrize("case", TORCHJD["aggregators"], ids=lambda case: case["method"])
def test_baseline_aggregators(case):
    comparisons.check_baseline_aggregator(case)


@pytest.mark.parametrize("case", TORCHJD["dwa"], ids=epochs)
def test_dwa(case):
    comparisons.check_dwa(case)


@pytest.mark.parametrize("case", [c for c in TORCHJD["dwa"] if len(set(c["epoch_lengths"])) == 1], ids=epochs)
def test_dwa_with_steps_per_epoch(case):
    comparisons.check_dwa_with_steps_per_epoch(case)


@pytest.mark.parametrize("case", TORCHJD["stateless"], ids=arguments)
def test_stateless(case):
    comparisons.check_stateless(case)


@pytest.mark.parametrize("case", TORCHJD["famo"], ids=lambda case: f"lr{case['lr']}-{np.shape(case['min_losses'])}")
def test_famo(case):
    comparisons.check_famo(case)


@pytest.mark.parametrize("case", TORCHJD["random"], ids=lambda case: str(case["shape"]))
def test_random(case):
    comparisons.check_random(case)


@pytest.mark.parametrize("run", range(6))
@pytest.mark.parametrize("case", TORCHJD["excess_mtl"], ids=lambda case: f"{len(case['jacobians'][0])}-tasks")
def test_excess_mtl(case, run):
    comparisons.check_excess_mtl(case["jacobians"], case["runs"][run])


# LibMTL and the official ExcessMTL code.

# Six significant digits are printed: half a unit of the last is at most 5e-6 of the number.
SIX_DIGITS = 5e-6
# Six decimals are printed: 5e-7 of rounding. float32 adds a few 6e-8 for a number near 1.
SIX_DECIMALS = 2e-6


@jax.jit
def problem_losses(x):
    centers, curvatures, offsets = (np.array(PROBLEM[name], x.dtype) for name in ("centers", "curvatures", "offsets"))
    return 0.5 * curvatures * jnp.sum((x[None] - centers) ** 2, axis=1) + offsets


START = np.array(PROBLEM["start"], np.float32)
problem_jacobian = jax.jit(jax.jacrev(problem_losses))


def test_problem():
    """Its losses and Jacobian as the reference prints them: the other tests rest on it."""
    np.testing.assert_allclose(problem_losses(START), PROBLEM["losses"], rtol=SIX_DIGITS)
    np.testing.assert_allclose(problem_jacobian(START), PROBLEM["jacobian"], rtol=SIX_DIGITS)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (scalarization.sum(), "equal_weights"),
        (scalarization.uw(initial_log_var=-0.5), "uw"),
        (scalarization.imtl_l(), "imtl_l"),
        (scalarization.dwa(temperature=2.0), "dwa"),
        (scalarization.geometric_mean(), "gls"),
        (scalarization.famo(), "famo"),
    ],
    ids=lambda argument: argument if isinstance(argument, str) else "",
)
def test_libmtl_scalarizers(method, name):
    """Weights, gradient of the parameters, and gradient of what is learned, on the problem above."""
    expected = LIBMTL[name]
    state = method.init(3)
    for losses in expected.get("epochs", []):
        _, state = method.apply(state, np.array(losses, np.float32))
        state = method.end_epoch(state)

    @jax.jit
    def gradients(x, state):
        losses, pull = jax.vjp(problem_losses, x)
        scalar_of = lambda state, losses: method.apply(state, losses)[0]
        of_state, weights = jax.grad(scalar_of, argnums=(0, 1), allow_int=True)(state, losses)
        return pull(weights)[0], weights, {field: getattr(of_state, field) for field in method.learned}

    gradient, weights, of_learned = gradients(START, state)
    found = {"gradient": gradient, "weights": weights}
    found |= {f"{field}_gradient": x for field, x in of_learned.items()}
    compared = found.keys() & expected.keys()
    assert compared
    for key in compared:
        np.testing.assert_allclose(found[key], expected[key], rtol=SIX_DIGITS, err_msg=key)


def test_libmtl_famo():
    """The logits after each of two updates, in a training with the losses of the same batch after the step."""
    method, expected = scalarization.famo(), LIBMTL["famo"]

    @jax.jit
    def step(x, state):
        gradient, state = jax.grad(lambda x, state: method.apply(state, problem_losses(x)), has_aux=True)(x, state)
        x = x - expected["learning_rate"] * gradient
        return x, method.observe(state, problem_losses(x))

    x, state = START, method.init(3)
    for logits in expected["logits"]:
        x, state = step(x, state)
        # A gradient is made of differences of 0.01 between logarithms up to 3, which float32 knows to 3e-5 of
        # themselves, and the step of 0.025 by as much.
        np.testing.assert_allclose(state.logits, logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("trajectory", EXCESS_MTL["trajectories"], ids=lambda case: f"eta{case['robust_step_size']}")
def test_official_excess_mtl(trajectory):
    """Four steps of gradient descent: the excess risks and the weights of each.

    The official weights sum to m and ours to 1.
    """
    method = aggregation.excess_mtl(trajectory["robust_step_size"])
    x, state = START, method.init((3, START))
    for excess, weights in zip(trajectory["excess"], trajectory["weights"], strict=True):
        jacobian = np.asarray(problem_jacobian(x))
        found_excess = [method.rowwise.visit(state, i, jacobian[i])[1] for i in range(3)]
        gradient, state = method.apply(state, jacobian)
        np.testing.assert_allclose(3 * np.exp(state.log_weights), weights, rtol=0, atol=SIX_DECIMALS)
        # Up to 19.2, where float32 is spaced by 2e-6.
        np.testing.assert_allclose(found_excess, excess, rtol=2e-7, atol=SIX_DECIMALS)
        x = x - EXCESS_MTL["learning_rate"] * 3 * np.asarray(gradient)


@pytest.mark.parametrize("source", ["official", "torchjd"])
def test_first_call_of_excess_mtl(source):
    """Where TorchJD departs from the official code, by default we do not."""
    method = aggregation.excess_mtl(normalize_first_step=source == "official")
    state = method.init((2, 2))
    for jacobian, weights in zip(
        EXCESS_MTL["two_matrices"]["jacobians"], EXCESS_MTL["two_matrices"][source], strict=True
    ):
        _, state = method.apply(state, np.array(jacobian, np.float32))
        np.testing.assert_allclose(np.exp(state.log_weights), weights, rtol=0, atol=SIX_DECIMALS)
