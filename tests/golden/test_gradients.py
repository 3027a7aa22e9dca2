"""Methods on the gradients over many calls against the official codes, held as data: none of them is needed here.

``official_gradients.json`` was recorded by ``record_gradients.py``. Where a code departs from its paper, or from what
we do, a test pins its way beside ours. The formulas of codes that may not be copied are stated here anew.

In float64 a difference is one of method: the records have nine digits, which leaves what the codes add (1e-8) to avoid
a division by zero, and we do not. In float32 it is rounding too.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization
from tests.golden.comparisons import ROUNDING

pytestmark = pytest.mark.unoptimized

RECORDED = json.loads(Path(__file__).with_name("official_gradients.json").read_text())
# Stored with the few digits that tell a float32 from its neighbours.
SEQUENCES = [
    {name: np.array(numbers, np.float32).astype(float) for name, numbers in sequence.items()}
    for sequence in RECORDED["sequences"]
]
OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam}
DIGITS = 1e-8  # of records rounded to nine digits, in sums of a few terms


@pytest.fixture(params=[pytest.param("float32", marks=pytest.mark.slow), "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


def parametrize(name):
    cases = RECORDED[name]
    shapes = ["x".join(map(str, SEQUENCES[case["sequence"]]["jacobians"].shape[1:])) for case in cases]
    return pytest.mark.parametrize("case", cases, ids=[f"{i}-{shape}" for i, shape in enumerate(shapes)])


def read(case):
    """The sequence that the code was given, and what it computed."""
    return SEQUENCES[case["sequence"]], {name: np.array(x) for name, x in case.items() if isinstance(x, list)}


def run(method, sequence, dtype=jnp.float32):
    """The gradients of all calls in a row, and the state after each."""
    losses, jacobians = (jnp.array(sequence[name], dtype) for name in ("losses", "jacobians"))

    def call(state, inputs):
        losses, jacobian = inputs
        gradient, state = method.apply(state, jacobian, values=losses)
        return state, (gradient, state)

    state = method.init((losses.shape[1], jacobians[0, 0]))
    gradients, states = jax.lax.scan(call, state, (losses, jacobians))[1]
    assert gradients.dtype == dtype
    return np.array(gradients, float), states


def lengths(rows):
    return np.linalg.norm(rows, axis=-1)


def check(found, recorded, tolerance):
    """Of every call, relative to its largest entry."""
    found, largest = np.array(found, float), np.max(np.abs(recorded), axis=-1, keepdims=True)
    assert found.shape == recorded.shape
    excess = np.abs(found - recorded) / np.where(largest == 0, 1, largest)
    assert np.max(excess) <= tolerance, np.max(excess, axis=1)


def added(numbers):
    """What 1e-8 beside these positive numbers makes of quotients by them, in sums of a few."""
    return 5e-8 / np.min(numbers)


# LibMTL.


@parametrize("gradnorm")
def test_gradnorm(case, dtype):
    """With a softmax, and initial losses in the place of the first epoch's mean."""
    sequence, recorded = read(case)
    optimizer = OPTIMIZERS[case["optimizer"]](case["lr"])
    method = aggregation.gradnorm(case["alpha"], optimizer, jnp.array(sequence["losses"][0], dtype), softmax=True)
    gradients, states = run(method, sequence, dtype)
    tolerance = optimizer_rounding(case) if dtype == jnp.float32 else DIGITS
    check(states.raw_weights, recorded["learned"], tolerance)
    check(gradients, recorded["gradients"], 3 * tolerance)


def optimizer_rounding(case):
    """Of what it learned over these calls, in float32.

    optax corrects Adam's second moment by 1 - 0.999 ** k, in float32 only known to 6e-5 on the first call, and half
    that in its root: 3e-5 of a step, and of the next ones less; and Adam stretches small gradients with their errors.
    """
    return {"sgd": 2 * ROUNDING, "adam": 20 * ROUNDING}[case["optimizer"]]


@parametrize("moco")
def test_moco(case, dtype):
    """As LibMTL has it, normalised and with a softmax."""
    sequence, recorded = read(case)
    settings = {name.replace("gamma", "lr"): value for name, value in case["settings"].items()}
    gradients, states = run(aggregation.moco(**settings, normalize=True, softmax=True), sequence, dtype)
    # Few roundings, as nothing cancels: what is followed adds up, and the products enter a softmax.
    tolerance = 2 * ROUNDING if dtype == jnp.float32 else DIGITS + added(lengths(sequence["jacobians"]))
    check(states.weights, recorded["weights"], tolerance)
    check(gradients, recorded["gradients"], tolerance)


@parametrize("db_mtl")
def test_db_mtl(case, dtype):
    """The whole method, on logarithms of losses to which LibMTL adds 1e-8."""
    sequence, recorded = read(case)
    balanced = aggregation.db_mtl(case["beta"], case["beta_sigma"])
    gradients, _ = run(mtl.chain(scalarization.scale_invariant(), balanced), sequence, dtype)
    rounding = 2 * ROUNDING if dtype == jnp.float32 else DIGITS
    check(gradients, recorded["gradients"], rounding + added(sequence["losses"]))


@parametrize("imtl")
def test_imtl(case, dtype):
    """IMTL-L stepped once a call beside IMTL-G. LibMTL solves m - 1 equations where we invert the cosines."""
    sequence, recorded = read(case)
    learned = mtl.learn(scalarization.imtl_l(), OPTIMIZERS[case["optimizer"]](case["lr"]))
    gradients, states = run(mtl.chain(learned, aggregation.imtl_g()), sequence, dtype)
    tolerance = optimizer_rounding(case) if dtype == jnp.float32 else DIGITS
    check(states.scalarizer.inner.log_scale, recorded["learned"], tolerance)
    check(gradients, recorded["gradients"], 3 * tolerance)


# ConFIG.


@parametrize("m_config")
def test_m_config(case, dtype):
    """Given one gradient a call, in turn; it decomposes the directions themselves, or for two tasks has a formula."""
    sequence, recorded = read(case)
    gradients, states = run(aggregation.m_config(case["beta_1"], case["beta_2"]), sequence, dtype)
    n_calls, m, _ = sequence["jacobians"].shape
    assert np.all(gradients[: m - 1] == 0)
    assert np.all(np.abs(gradients[m - 1]) > 0.99)  # Adam's first step is the sign
    np.testing.assert_array_equal(states.last_turn[-1], [np.max(np.arange(i + 1, n_calls + 1, m)) for i in range(m)])
    # Entries are divided by their own running size: of an entry that nearly cancels in the direction little is left.
    check(gradients, recorded["gradients"], 10 * ROUNDING if dtype == jnp.float32 else DIGITS)


@parametrize("m_config")
def test_m_config_by_rows(case):
    """Visited with the one row whose turn it is, as an engine does."""
    sequence, recorded = read(case)
    method = aggregation.m_config(case["beta_1"], case["beta_2"])
    jacobians = jnp.array(sequence["jacobians"], jnp.float32)

    def call(state, jacobian):
        (i,) = method.rowwise.visits(state)
        state, _ = method.rowwise.visit(state, i, jacobian[i])
        gradient, state = method.rowwise.finish(state, ())
        return state, (gradient, i)

    gradients, turns = jax.lax.scan(call, method.init(jacobians[0].shape), jacobians)[1]
    np.testing.assert_array_equal(turns, np.arange(len(jacobians)) % jacobians.shape[1])
    check(gradients, recorded["gradients"], 10 * ROUNDING)


# Weights for physics-informed networks.


def annealed(sequence, alpha, statistic, weighted=True):
    """Learning-rate annealing with task 0 as the reference; ``weighted`` is whether the weight is in the quotient."""
    sizes = np.abs(sequence["jacobians"])
    largest, means = np.max(sizes, axis=2), np.mean(sizes, axis=2)
    weights = np.ones(sizes.shape[1])
    for reference, mean in zip(largest if statistic == "max" else means, means, strict=True):
        target = reference[0] / (weights * mean if weighted else mean)
        weights = (1 - alpha) * weights + alpha * target
        weights[0] = 1
        yield weights


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: f"{sequence['losses'].shape[1]}tasks")
@pytest.mark.parametrize(("alpha", "statistic"), [(0.1, "max"), (0.5, "mean")])
def test_lr_annealing(sequence, alpha, statistic):
    """The paper's algorithm 1. The parameters are one array, or two whose entries count alike."""
    expected = np.array(list(annealed(sequence, alpha, statistic)))
    method = aggregation.lr_annealing(0, alpha, statistic)
    gradients, states = run(method, sequence)
    # Positive terms, and the errors of older weights fade.
    np.testing.assert_allclose(states.weights, expected, rtol=3 * ROUNDING)
    combined = np.einsum("tm,tmn->tn", expected, sequence["jacobians"])
    terms = np.einsum("tm,tmn->tn", expected, np.abs(sequence["jacobians"]))
    assert np.all(np.abs(gradients - combined) <= 3 * ROUNDING * terms)

    split = lambda jacobians: {"a": jacobians[..., :1], "b": jacobians[..., 1:]}
    jacobians = jnp.array(sequence["jacobians"], jnp.float32)
    state = method.init((jacobians.shape[1], split(jacobians[0, 0])))
    _, weights = jax.lax.scan(lambda s, j: method.weighting.apply(s, j)[::-1], state, split(jacobians))
    np.testing.assert_allclose(weights, expected, rtol=3 * ROUNDING)


@pytest.mark.parametrize("official", ["config", "physicsnemo"])
@pytest.mark.parametrize("i", range(len(SEQUENCES)), ids=lambda i: f"{SEQUENCES[i]['losses'].shape[1]}tasks")
def test_lr_annealing_of_other_codes(official, i):
    """Neither has the weight in the quotient: theirs goes where ours would from weights of 1, at every call.

    So they agree on the first call, and at rest their weights are the squares of ours. PhysicsNeMo adds 1e-8 to the
    means.
    """
    case = RECORDED[f"lr_annealing_of_{official}"][i]
    sequence, recorded = read(case)
    statistic = {"config": "max", "physicsnemo": "mean"}[official]
    alpha, constant = case["alpha"], added(np.mean(np.abs(sequence["jacobians"]), axis=2))
    rounding = 3 * ROUNDING + constant
    theirs = np.array(list(annealed(sequence, alpha, statistic, weighted=False)))
    np.testing.assert_allclose(theirs, recorded["weights"], rtol=constant)

    jacobians = jnp.array(sequence["jacobians"], jnp.float32)
    at_once = aggregation.lr_annealing(0, 1.0, statistic)
    start = at_once.init(jacobians[0].shape)
    targets, _ = jax.vmap(lambda jacobian: at_once.weighting.apply(start, jacobian))(jacobians)
    weights = np.ones(jacobians.shape[1])
    for target, expected in zip(np.array(targets, float), recorded["weights"], strict=True):
        weights = (1 - alpha) * weights + alpha * target
        np.testing.assert_allclose(weights, expected, rtol=rounding)

    method = aggregation.lr_annealing(0, alpha, statistic)
    _, states = run(method, sequence)
    np.testing.assert_allclose(states.weights[0], recorded["weights"][0], rtol=rounding)
    assert np.max(np.abs(states.weights[-1] / recorded["weights"][-1] - 1)) > 1e-3
    at_rest, _ = method.weighting.apply(start._replace(weights=jnp.sqrt(targets[0])), jacobians[0])
    np.testing.assert_allclose(at_rest**2, targets[0], rtol=3 * ROUNDING)


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: f"{sequence['losses'].shape[1]}tasks")
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_grad_norm_weights(sequence, momentum):
    """The rule of the official code, with the mean of the lengths where the paper has their sum."""
    norms, weights, expected = lengths(sequence["jacobians"]), np.ones(sequence["losses"].shape[1]), []
    for call in norms:
        weights = momentum * weights + (1 - momentum) * np.mean(call) / call
        expected.append(weights)
    gradients, states = run(aggregation.grad_norm_weights(momentum), sequence)
    np.testing.assert_allclose(states.weights, expected, rtol=3 * ROUNDING)
    combined = np.einsum("tm,tmn->tn", expected, sequence["jacobians"])
    terms = np.einsum("tm,tmn->tn", expected, np.abs(sequence["jacobians"]))
    assert np.all(np.abs(gradients - combined) <= 3 * ROUNDING * terms)


@parametrize("gradnorm_of_physicsnemo")
def test_gradnorm_of_physicsnemo(case):
    """It learns logarithms of weights, and rescales them before each call: by the chain rule, w times our gradient.

    Its step is another: ours goes down the gradient with respect to the weights themselves, as in the paper.
    """
    sequence, recorded = read(case)
    # As an optimizer it changes nothing, and its state is the gradient that it was given.
    keeps = optax.GradientTransformation(
        lambda fields: optax.tree.zeros_like(fields), lambda grad, *_: (optax.tree.zeros_like(grad), grad)
    )
    losses, jacobians, weights = (
        jnp.array(x, jnp.float32) for x in (sequence["losses"], sequence["jacobians"], recorded["weights"])
    )
    method = aggregation.gradnorm(case["alpha"], keeps, initial_losses=losses[0])
    start = method.init(jacobians[0].shape)

    def call(losses, jacobian, weights):
        used, state = method.weighting.apply(start._replace(raw_weights=weights), jacobian, values=losses)
        return used, state.opt_state["raw_weights"]

    used, grads = jax.vmap(call)(losses, jacobians, weights)
    np.testing.assert_allclose(used, recorded["weights"], rtol=ROUNDING)
    np.testing.assert_allclose(weights * grads, recorded["log_weights_grads"], rtol=ROUNDING)


# FAMO's methods in log space: its code adds 1e-8 to the losses.


def in_log_space(aggregator, sequence):
    """Our gradients, and the gradients of the logarithms that they combine."""
    gradients, _ = run(mtl.chain(scalarization.scale_invariant(), aggregator), sequence)
    return gradients, sequence["jacobians"] / sequence["losses"][:, :, None]


@parametrize("log_imtl_g")
def test_log_imtl_g(case):
    sequence, recorded = read(case)
    gradients, _ = in_log_space(aggregation.imtl_g(), sequence)
    # In float32 the inverse of the cosines is known to some roundings times its condition, about 10 here.
    check(gradients, recorded["gradients"], 5 * ROUNDING + added(sequence["losses"]))


@parametrize("log_mgda")
def test_log_mgda(case):
    """Its weights are divided by the sum of w_i / l_i, and those it starts from are 0.001 from the corners.

    What it finds is near the shortest combination, and at times stuck; for two tasks, where it starts is where it ends.
    By the theorem of projections the squared distance of two combinations, if one is the shortest, is at most the
    difference of their squares.
    """
    sequence, recorded = read(case)
    ours, logs = in_log_space(aggregation.mgda(), sequence)
    weights = recorded["weights"]
    theirs = np.einsum("tm,tmn->tn", weights, logs)
    factor = np.sum(weights / sequence["losses"], axis=1, keepdims=True)
    check(recorded["gradients"] * factor, theirs, DIGITS + added(sequence["losses"]))

    # Ours is the shortest: no gradient has a projection on it that is shorter than it is.
    rounding = 10 * ROUNDING * lengths(ours) * np.max(lengths(logs), axis=1)
    assert np.all(np.min(np.einsum("tmn,tn->tm", logs, ours), axis=1) >= lengths(ours) ** 2 - rounding)
    assert np.all(lengths(theirs - ours) ** 2 <= lengths(theirs) ** 2 - lengths(ours) ** 2 + rounding)
    inner = np.min(weights, axis=1) > 0.0011 if weights.shape[1] == 2 else np.ones(len(weights), bool)
    distances = lengths(theirs - ours)[inner] / lengths(ours)[inner]
    assert np.median(distances) < (1e-5 if weights.shape[1] == 2 else 1e-3)


@parametrize("log_cagrad")
def test_log_cagrad(case):
    """Its gradient is m times as long ("to match the sum loss"), before it is clipped to length 1.

    Its solver stops where the objective falls by less than 1e-6: the gradient is within about the root of that.
    """
    sequence, recorded = read(case)
    ours, logs = in_log_space(aggregation.cagrad(case["c"], rescale=1), sequence)
    theirs = recorded["gradients"] / logs.shape[1]
    assert np.all(lengths(theirs - ours) <= 2e-3 * lengths(ours))
    # What the method seeks to make large: the least gain among the tasks.
    gains, their_gains = (np.min(np.einsum("tmn,tn->tm", logs, x), axis=1) for x in (ours, theirs))
    rounding = 3 * ROUNDING * lengths(ours) * np.max(lengths(logs), axis=1)
    assert np.all(gains >= their_gains - rounding)
    clipped = recorded["gradients"] / np.maximum(lengths(recorded["gradients"]), 1)[:, None]
    check(recorded["clipped"], clipped, 2 * ROUNDING)  # it divides by the length + 1e-6
