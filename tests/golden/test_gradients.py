"""Methods on the gradients over many calls against the official codes, held as data: none of them is needed here.

``official_gradients.json`` was recorded by ``record_gradients.py``. Where a code departs from its paper, or from what
we do, a test pins its way beside ours. The formulas of codes that may not be copied are stated here anew.

In float64 a difference is one of method: the records have nine digits, which leaves what the codes add (1e-8) to avoid
a division by zero, and we do not. In float32 it is rounding too.
"""

import functools
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


def run(make, sequence, dtype=np.float32, **settings):
    """The gradients of all calls in a row, and the state after each, of the method that ``make`` makes of settings."""
    losses, jacobians = (sequence[name].astype(dtype) for name in ("losses", "jacobians"))
    gradients, states = jax.device_get(calls(make, settings, losses, jacobians))
    assert gradients.dtype == dtype
    return gradients.astype(float), states


@functools.partial(jax.jit, static_argnums=0)
def calls(make, settings, losses, jacobians):
    """Compiled once for all settings."""
    method = make(**settings)

    def call(state, inputs):
        losses, jacobian = inputs
        gradient, state = method.apply(state, jacobian, values=losses)
        return state, (gradient, state)

    state = method.init((losses.shape[1], jacobians[0, 0]))
    return jax.lax.scan(call, state, (losses, jacobians))[1]


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


def gradnorm_by(optimizer):
    return lambda alpha, lr, losses: aggregation.gradnorm(alpha, OPTIMIZERS[optimizer](lr), losses, softmax=True)


GRADNORM = {name: gradnorm_by(name) for name in OPTIMIZERS}


@parametrize("gradnorm")
def test_gradnorm(case, dtype):
    """With a softmax, and initial losses in the place of the first epoch's mean."""
    sequence, recorded = read(case)
    settings = {"alpha": case["alpha"], "lr": case["lr"], "losses": sequence["losses"][0].astype(dtype)}
    gradients, states = run(GRADNORM[case["optimizer"]], sequence, dtype, **settings)
    tolerance = optimizer_rounding(case) if dtype == jnp.float32 else DIGITS
    check(states.raw_weights, recorded["learned"], tolerance)
    check(gradients, recorded["gradients"], 3 * tolerance)


def optimizer_rounding(case):
    """Of what it learned over these calls, in float32.

    optax corrects Adam's second moment by 1 - 0.999 ** k, in float32 only known to 6e-5 on the first call, and half
    that in its root: 3e-5 of a step, and of the next ones less; and Adam stretches small gradients with their errors.
    """
    return {"sgd": 2 * ROUNDING, "adam": 20 * ROUNDING}[case["optimizer"]]


MOCO = functools.partial(aggregation.moco, normalize=True, softmax=True)


@parametrize("moco")
def test_moco(case, dtype):
    """As LibMTL has it, normalised and with a softmax."""
    sequence, recorded = read(case)
    settings = {name.replace("gamma", "lr"): value for name, value in case["settings"].items()}
    gradients, states = run(MOCO, sequence, dtype, **settings)
    # Few roundings, as nothing cancels: what is followed adds up, and the products enter a softmax.
    tolerance = 2 * ROUNDING if dtype == jnp.float32 else DIGITS + added(lengths(sequence["jacobians"]))
    check(states.weights, recorded["weights"], tolerance)
    check(gradients, recorded["gradients"], tolerance)


def log_db_mtl(**settings):
    return mtl.chain(scalarization.scale_invariant(), aggregation.db_mtl(**settings))


@parametrize("db_mtl")
def test_db_mtl(case, dtype):
    """The whole method, on logarithms of losses to which LibMTL adds 1e-8."""
    sequence, recorded = read(case)
    settings = {name: case[name] for name in ("beta", "beta_sigma")}
    gradients, _ = run(log_db_mtl, sequence, dtype, **settings)
    rounding = 2 * ROUNDING if dtype == jnp.float32 else DIGITS
    check(gradients, recorded["gradients"], rounding + added(sequence["losses"]))


def imtl_by(optimizer):
    learned = lambda lr: mtl.learn(scalarization.imtl_l(), OPTIMIZERS[optimizer](lr))
    return lambda lr: mtl.chain(learned(lr), aggregation.imtl_g())


IMTL = {name: imtl_by(name) for name in OPTIMIZERS}


@parametrize("imtl")
def test_imtl(case, dtype):
    """IMTL-L stepped once a call beside IMTL-G. LibMTL solves m - 1 equations where we invert the cosines."""
    sequence, recorded = read(case)
    gradients, states = run(IMTL[case["optimizer"]], sequence, dtype, lr=case["lr"])
    tolerance = optimizer_rounding(case) if dtype == jnp.float32 else DIGITS
    check(states.scalarizer.inner.log_scale, recorded["learned"], tolerance)
    check(gradients, recorded["gradients"], 3 * tolerance)


# ConFIG.


@parametrize("m_config")
def test_m_config(case, dtype):
    """Given one gradient a call, in turn; it decomposes the directions themselves, or for two tasks has a formula."""
    sequence, recorded = read(case)
    betas = {name: case[name] for name in ("beta_1", "beta_2")}
    gradients, states = run(aggregation.m_config, sequence, dtype, **betas)
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
    jacobians = sequence["jacobians"].astype(np.float32)
    gradients, turns = calls_by_rows(case["beta_1"], case["beta_2"], jacobians)
    np.testing.assert_array_equal(turns, np.arange(len(jacobians)) % jacobians.shape[1])
    check(gradients, recorded["gradients"], 10 * ROUNDING)


@jax.jit
def calls_by_rows(beta_1, beta_2, jacobians):
    method = aggregation.m_config(beta_1, beta_2)

    def call(state, jacobian):
        (i,) = method.rowwise.visits(state)
        state, _ = method.rowwise.visit(state, i, jacobian[i])
        gradient, state = method.rowwise.finish(state, ())
        return state, (gradient, i)

    return jax.lax.scan(call, method.init(jacobians[0].shape), jacobians)[1]


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


LR_ANNEALING = {
    statistic: functools.partial(aggregation.lr_annealing, 0, statistic=statistic) for statistic in ("max", "mean")
}


@functools.partial(jax.jit, static_argnums=0)
def annealing_weights(statistic, alpha, jacobians):
    """The weights of all calls in a row, without a gradient."""
    method = LR_ANNEALING[statistic](alpha=alpha)
    state = method.init((jacobians["a"].shape[1], jax.tree.map(lambda x: x[0, 0], jacobians)))
    return jax.lax.scan(lambda state, x: method.weighting.apply(state, x)[::-1], state, jacobians)[1]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: f"{sequence['losses'].shape[1]}tasks")
@pytest.mark.parametrize(("alpha", "statistic"), [(0.1, "max"), (0.5, "mean")])
def test_lr_annealing(sequence, alpha, statistic):
    """The paper's algorithm 1. The parameters are one array, or two whose entries count alike."""
    expected = np.array(list(annealed(sequence, alpha, statistic)))
    gradients, states = run(LR_ANNEALING[statistic], sequence, alpha=alpha)
    # Positive terms, and the errors of older weights fade.
    np.testing.assert_allclose(states.weights, expected, rtol=3 * ROUNDING)
    combined = np.einsum("tm,tmn->tn", expected, sequence["jacobians"])
    terms = np.einsum("tm,tmn->tn", expected, np.abs(sequence["jacobians"]))
    assert np.all(np.abs(gradients - combined) <= 3 * ROUNDING * terms)

    jacobians = sequence["jacobians"].astype(np.float32)
    weights = annealing_weights(statistic, alpha, {"a": jacobians[..., :1], "b": jacobians[..., 1:]})
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

    jacobians = sequence["jacobians"].astype(np.float32)
    targets, at_rest = jax.device_get(annealed_at_once(statistic, alpha, jacobians))
    weights = np.ones(jacobians.shape[1])
    for target, expected in zip(targets.astype(float), recorded["weights"], strict=True):
        weights = (1 - alpha) * weights + alpha * target
        np.testing.assert_allclose(weights, expected, rtol=rounding)

    _, states = run(LR_ANNEALING[statistic], sequence, alpha=alpha)
    np.testing.assert_allclose(states.weights[0], recorded["weights"][0], rtol=rounding)
    assert np.max(np.abs(states.weights[-1] / recorded["weights"][-1] - 1)) > 1e-3
    np.testing.assert_allclose(at_rest**2, targets[0], rtol=3 * ROUNDING)


@functools.partial(jax.jit, static_argnums=0)
def annealed_at_once(statistic, alpha, jacobians):
    """Where the weights of each call would go from 1, and where they stay if they are the roots of the first call's."""
    at_once, method = (LR_ANNEALING[statistic](alpha=x) for x in (1.0, alpha))
    start = at_once.init(jacobians[0].shape)
    targets, _ = jax.vmap(lambda jacobian: at_once.weighting.apply(start, jacobian))(jacobians)
    at_rest, _ = method.weighting.apply(start._replace(weights=jnp.sqrt(targets[0])), jacobians[0])
    return targets, at_rest


@pytest.mark.parametrize("sequence", SEQUENCES, ids=lambda sequence: f"{sequence['losses'].shape[1]}tasks")
@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_grad_norm_weights(sequence, momentum):
    """The rule of the official code, with the mean of the lengths where the paper has their sum."""
    norms, weights, expected = lengths(sequence["jacobians"]), np.ones(sequence["losses"].shape[1]), []
    for call in norms:
        weights = momentum * weights + (1 - momentum) * np.mean(call) / call
        expected.append(weights)
    gradients, states = run(aggregation.grad_norm_weights, sequence, momentum=momentum)
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
    losses, jacobians, weights = (
        x.astype(np.float32) for x in (sequence["losses"], sequence["jacobians"], recorded["weights"])
    )
    used, grads = gradnorm_gradients(case["alpha"], losses, jacobians, weights)
    np.testing.assert_allclose(used, recorded["weights"], rtol=ROUNDING)
    np.testing.assert_allclose(weights * np.asarray(grads), recorded["log_weights_grads"], rtol=ROUNDING)


@jax.jit
def gradnorm_gradients(alpha, losses, jacobians, weights):
    """Of each call, from these weights: those it uses, and the gradient by them."""
    # As an optimizer it changes nothing, and its state is the gradient that it was given.
    keeps = optax.GradientTransformation(
        lambda fields: optax.tree.zeros_like(fields), lambda grad, *_: (optax.tree.zeros_like(grad), grad)
    )
    method = aggregation.gradnorm(alpha, keeps, initial_losses=losses[0])
    start = method.init(jacobians[0].shape)

    def call(losses, jacobian, weights):
        used, state = method.weighting.apply(start._replace(raw_weights=weights), jacobian, values=losses)
        return used, state.opt_state["raw_weights"]

    return jax.vmap(call)(losses, jacobians, weights)


# FAMO's methods in log space: its code adds 1e-8 to the losses.


def log_imtl_g():
    return mtl.chain(scalarization.scale_invariant(), aggregation.imtl_g())


def log_mgda():
    return mtl.chain(scalarization.scale_invariant(), aggregation.mgda())


def log_cagrad(c):
    return mtl.chain(scalarization.scale_invariant(), aggregation.cagrad(c, rescale=1))


def in_log_space(make, sequence, **settings):
    """Our gradients, and the gradients of the logarithms that they combine."""
    gradients, _ = run(make, sequence, **settings)
    return gradients, sequence["jacobians"] / sequence["losses"][:, :, None]


@parametrize("log_imtl_g")
def test_log_imtl_g(case):
    sequence, recorded = read(case)
    gradients, _ = in_log_space(log_imtl_g, sequence)
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
    ours, logs = in_log_space(log_mgda, sequence)
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
    ours, logs = in_log_space(log_cagrad, sequence, c=case["c"])
    theirs = recorded["gradients"] / logs.shape[1]
    assert np.all(lengths(theirs - ours) <= 2e-3 * lengths(ours))
    # What the method seeks to make large: the least gain among the tasks.
    gains, their_gains = (np.min(np.einsum("tmn,tn->tm", logs, x), axis=1) for x in (ours, theirs))
    rounding = 3 * ROUNDING * lengths(ours) * np.max(lengths(logs), axis=1)
    assert np.all(gains >= their_gains - rounding)
    clipped = recorded["gradients"] / np.maximum(lengths(recorded["gradients"]), 1)[:, None]
    check(recorded["clipped"], clipped, 2 * ROUNDING)  # it divides by the length + 1e-6
