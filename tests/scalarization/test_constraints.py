"""Methods with multipliers: saddle points, oscillation, projection, masks, names."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import diagnostics, scalarization
from mtlbalance.scalarization import capu, geco, lagrangian

pytestmark = pytest.mark.unoptimized

INF = np.inf
FACTORIES = {"lagrangian": lagrangian, "geco": geco, "capu": capu}


# Known saddle points. `losses_fn` gives the objective first.


def half_plane(x):
    """The squared distance from (2, 1), where x1 + x2 is at most 2: at (3/2, 1/2), with multiplier 1."""
    return jnp.stack([jnp.sum((x - np.array([2.0, 1.0])) ** 2), jnp.sum(x)])


A = np.array([0.7, 0.7])


def concave(x):
    """Two losses from 0 to 1 with a concave front between their minima a and -a: weighted sums end at one of those."""
    return 1 - jnp.exp(-jnp.stack([jnp.sum((x - A) ** 2), jnp.sum((x + A) ** 2)]))


def concave_saddle(bound):
    """On the segment between the minima at the distance that the bound allows: the multiplier is the front's slope."""
    norm, to_a = np.linalg.norm(A), 2 * np.linalg.norm(A)
    distance = np.sqrt(-np.log(1 - bound))
    slope = (to_a - distance) * np.exp(-((to_a - distance) ** 2)) / (distance * np.exp(-(distance**2)))
    return -A + distance * A / norm, slope


def descend(method, losses_fn, n_steps=4000, start=(0.1, -0.3), step_size=0.01):
    """Gradient descent: the last point and state, and the losses on the way."""
    grad_fn = mtl.value_and_grad(losses_fn, method)

    def step(carry, _):
        x, state = carry
        (losses, state), gradient = grad_fn(x, state)
        return (x - step_size * gradient, state), losses

    run = jax.jit(lambda start: jax.lax.scan(step, (start, method.init(2)), length=n_steps))
    (x, state), losses = jax.device_get(run(np.float32(start)))
    return x, state, losses


@partial(jax.jit, static_argnums=0)
def scalar_and_weights(method, state, losses, mask=None):
    return jax.value_and_grad(method.apply, argnums=1, has_aux=True)(state, losses, mask=mask)


effective_weights = jax.jit(diagnostics.effective_weights, static_argnums=0)


def swing(losses):
    return float(np.ptp(losses[-500:, 1]) / 2)


CONVEX = {
    "plain": partial(lagrangian, lr=1.0),
    "simultaneous": partial(lagrangian, lr=0.1, simultaneous=True),
    "damped": partial(lagrangian, lr=1.0, damping=3.0),
    "proportional": partial(lagrangian, lr=1.0, kappa_p=3.0, nu=0.5),
    "equality": partial(lagrangian, lr=1.0, equality=(1,)),
    "geco": partial(geco, lr=0.01, alpha=0.9, initial_multipliers=0.1),
    "capu": partial(capu, omega=0.0),
}


@pytest.mark.parametrize("name", CONVEX)
def test_the_saddle_point_of_a_convex_problem(name):
    x, state, _ = descend(CONVEX[name]([INF, 2.0]), half_plane)
    multipliers = np.exp(state.log_multipliers) if name == "geco" else state.multipliers
    np.testing.assert_allclose(x, [1.5, 0.5], atol=1e-4)
    np.testing.assert_allclose(multipliers[1], 1.0, atol=1e-4)


def test_an_equality_may_pull_the_other_way():
    """Where the free minimum has x1 + x2 = 3, to have 4: the multiplier, and the weight, is -1."""
    method = lagrangian([INF, 4.0], lr=1.0, equality=(1,))
    x, state, _ = descend(method, half_plane)
    np.testing.assert_allclose(x, [2.5, 1.5], atol=1e-4)
    np.testing.assert_allclose(state.multipliers[1], -1.0, atol=1e-4)
    weights = effective_weights(method, state, jax.jit(half_plane)(x))
    np.testing.assert_allclose(weights, [1.0, -1.0], atol=1e-3)


def test_capu_meets_a_squared_residual():
    """As it is used: the constraint is a loss of at least 0 with the bound 0, and its multiplier grows and grows."""

    def losses_fn(x):
        distance, on_line = half_plane(x)
        return jnp.stack([distance, (on_line - 2) ** 2])

    x, state, _ = descend(capu([INF, 0.0]), losses_fn)
    np.testing.assert_allclose(x, [1.5, 0.5], atol=0.02)
    assert state.multipliers[1] > 10


@pytest.mark.parametrize("lr", [0.03, 0.1, 1.0])
def test_damping_and_a_proportional_term_end_the_oscillation(lr):
    """The docstring's table: on a concave front plain ascent circles, from one end of the front to the other."""
    make = partial(lagrangian, [INF, 0.5], lr=lr)
    plain = descend(make(), concave)[-1]
    np.testing.assert_allclose(swing(plain), {0.03: 0.480, 0.1: 0.367, 1.0: 0.078}[lr], atol=5e-3)
    where, slope = concave_saddle(0.5)
    for method in make(damping=3.0), make(kappa_p=3 / lr):
        x, state, losses = descend(method, concave)
        assert swing(losses) < 1e-4
        np.testing.assert_allclose(x, where, atol=1e-4)
        np.testing.assert_allclose(state.multipliers[1], slope, atol=1e-4)


def test_moving_before_weighing_damps():
    """The docstring's table: on the convex problem only the simultaneous form circles, unless it is damped."""
    make = partial(lagrangian, [INF, 2.0], lr=1.0)
    np.testing.assert_allclose(swing(descend(make(simultaneous=True), half_plane)[-1]), 0.141, atol=5e-3)
    for method in make(), make(damping=3.0, simultaneous=True), make(kappa_p=3.0, simultaneous=True):
        assert swing(descend(method, half_plane)[-1]) < 1e-4


# What a call does.


def test_a_constraint_that_is_met_keeps_its_multiplier_at_zero():
    """Exactly, and its weight with it."""
    _, state, losses = descend(lagrangian([INF, 5.0], lr=1.0, damping=2.0), half_plane, n_steps=300)
    assert state.multipliers[1] == 0.0
    assert np.all(losses[:, 1] < 5)
    weights = effective_weights(lagrangian([INF, 5.0], damping=2.0), state, losses[-1])
    np.testing.assert_array_equal(weights, [1.0, 0.0])


@pytest.mark.parametrize("name", FACTORIES)
def test_an_absent_constraint_keeps_its_multiplier(name):
    method = FACTORIES[name]([INF, 0.5, 0.5])
    state, losses = method.init(3), np.float32([1.0, 2.0, 3.0])
    for present in [True, True, True], [True, False, True], [False, False, True]:
        before = state
        (_, state), weights = scalar_and_weights(method, state, losses, np.array(present))
        multipliers = lambda state: np.asarray(getattr(state, "log_multipliers", getattr(state, "multipliers", None)))
        assert multipliers(state)[1] == multipliers(before)[1] or present[1]
        assert multipliers(state)[2] > multipliers(before)[2] or (name, present) == ("capu", [True, True, True])
        assert np.all(np.asarray(weights)[~np.array(present)] == 0)


def test_a_multiplier_stops_at_its_bound():
    method = lagrangian([INF, 0.0, 0.0], lr=1e3, max_multiplier=50.0, equality=(2,))
    _, state = method.apply(method.init(3), np.float32([0.0, 1.0, -1.0]))
    np.testing.assert_array_equal(state.multipliers, [0.0, 50.0, -50.0])


def test_the_weight_of_a_damped_inequality():
    """The augmented Lagrangian (Nocedal and Wright, eq. 17.65): ``(max(0, l + d g)^2 - l^2) / (2 d)``."""
    start, d, bounds, losses = np.array([0.0, 0.6, 0.6, 0.6]), 2.0, 1.0, np.array([0.9, 0.9, 0.5, 2.0])
    method = lagrangian(bounds, lr=0.0, damping=d, initial_multipliers=start)
    (scalar, _), weights = scalar_and_weights(method, method.init(4), losses)
    expected = np.maximum(0, start + d * (losses - bounds))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(scalar, np.sum(expected**2 - start**2) / (2 * d), rtol=1e-6)


def geco_transcript(losses, bound, lr, alpha):
    """Algorithm 1 of the paper: values, weights and multipliers after each call."""
    multiplier, average = 1.0, None
    for objective, constrained in losses:
        violation = constrained - bound
        average = violation if average is None else alpha * average + (1 - alpha) * violation
        value, weight = objective + multiplier * average, multiplier
        multiplier *= np.exp(lr * average)
        yield value, weight, multiplier


def test_geco_is_algorithm_1():
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(30, 2)) + np.array([1.0, 0.3])
    method = geco([INF, 0.2], lr=0.5, alpha=0.8)

    def call(state, losses):
        (value, state), weights = scalar_and_weights(method, state, losses)
        return state, (value, weights[1], jnp.exp(state.log_multipliers[1]))

    found = jax.jit(lambda: jax.lax.scan(call, method.init(2), np.float32(losses))[1])()
    expected = np.array(list(geco_transcript(losses, 0.2, 0.5, 0.8)))
    np.testing.assert_allclose(np.stack(found, axis=1), expected, rtol=2e-5, atol=2e-6)


def test_capu_waits_for_the_descent():
    """While the augmented Lagrangian falls by more than omega says, multipliers and penalties stay."""
    method = capu([INF, 0.0])
    state = jax.device_get(method.init(2))
    for i, (objective, moves) in enumerate([(8.0, False), (4.0, False), (2.0, False), (2.0, True), (1.0, False)]):
        new = jax.device_get(method.apply(state, np.float32([objective, 0.5]))[1])
        assert (new.multipliers[1] > state.multipliers[1]) == moves, i
        assert new.squares[1] > state.squares[1]
        state = new


# Names, and the tools around.


LOSSES = {"kl": np.float32(2.0), "rate": np.float32(3.0), "pose": {"x": np.float32(1.0), "y": np.float32(4.0)}}


def test_capu_rests_where_a_negative_lagrangian_stays():
    """There the official code's rule, at least omega times the last one, would never hold again."""
    method = capu([INF, 0.0])
    losses = np.float32([-8.0, 0.5])
    _, once = jax.device_get(method.apply(method.init(2), losses))
    _, twice = jax.device_get(method.apply(once, losses))
    assert np.sum(once.last) < 0
    assert twice.multipliers[1] > once.multipliers[1]


def test_gecos_multipliers_are_held_where_its_code_holds_them():
    method = geco([INF, 0.0, 0.0], lr=100.0)
    _, state = method.apply(method.init(3), np.float32([0.0, 5.0, -5.0]))
    np.testing.assert_allclose(np.exp(state.log_multipliers)[1:], [1e10, 1e-10], rtol=1e-4)


def test_bounds_go_by_name_and_the_others_are_objectives():
    expected = {"kl": 1.0, "rate": 1.0, "pose": {"x": 0.0, "y": 3.0}}
    group = {"pose": 1.0}
    part = {"pose": {"y": 1.0, "x": None}}
    full = {"kl": None, "rate": INF, "pose": {"x": 1.0, "y": 1.0}}
    for bounds, x in (group, 0.0), (part, 1.0), (full, 0.0):
        method = lagrangian(bounds, lr={"pose": {"y": 1.0}})
        _, weights = scalar_and_weights(method, method.init(LOSSES), LOSSES)
        chex.assert_trees_all_close(weights, expected | {"pose": {"x": x, "y": 3.0}})
    by_index = lagrangian([None, 1.0], lr=1.0)
    np.testing.assert_array_equal(by_index.apply(by_index.init(2), np.float32([1.0, 3.0]))[1].multipliers, [0.0, 2.0])


@pytest.mark.parametrize("factory", FACTORIES.values())
def test_wrong_bounds_raise(factory):
    with pytest.raises(TypeError, match=r"bounds: expected upper bounds by the names of the constraints.*found None"):
        factory(None).init(2)
    for impossible in [1.0, np.nan], [1.0, -INF]:
        with pytest.raises(ValueError, match=r"bounds: expected a number, or infinity \(or None, by name\)"):
            factory(impossible).init(2)
    with pytest.raises(ValueError, match=r"bounds: expected the losses' names \['kl', .*found \['lk'\]"):
        factory({"lk": 1.0}).init(LOSSES)
    with pytest.raises(ValueError, match=r"lr|eta"):
        factory({"kl": 1.0}, {"kl": -1.0}).init(LOSSES)
    with pytest.raises(ValueError, match="initial_multipliers"):
        factory({"kl": 1.0}, initial_multipliers=-1.0).init(LOSSES)
    method = factory({"kl": 1.0})
    with pytest.raises(ValueError, match=r"bounds: expected an array: the losses have no names"):
        method.apply(method.init(2), np.ones(2, np.float32))


def test_wrong_equalities_raise():
    with pytest.raises(TypeError, match="equality: expected a tuple of names or indices of losses, found 'kl'"):
        lagrangian({"kl": 1.0}, equality="kl")
    with pytest.raises(ValueError, match="equality: expected constraints with a finite bound"):
        lagrangian({"kl": 1.0}, equality=("rate",)).init(LOSSES)
    with pytest.raises(ValueError, match="equality: expected one of the losses' names"):
        lagrangian({"kl": 1.0}, equality=("lk",)).init(LOSSES)
    for index in 2, -1:
        with pytest.raises(ValueError, match=f"equality: expected a name, or an int of at least 0 below .*{index}$"):
            lagrangian([INF, 1.0], equality=(index,)).init(2)


@pytest.mark.parametrize("keyword", ["damping", "kappa_p", "nu", "max_multiplier"])
def test_lagrangian_bounds(keyword):
    wrong = {"nu": 1.0, "max_multiplier": 0.0}.get(keyword, -1.0)
    with pytest.raises(ValueError, match=keyword):
        lagrangian([INF, 1.0], **{keyword: wrong}).init(2)


def test_a_step_with_all_around_it():
    """Weights, a report, micro-batches, a guard, and a sweep of bounds by vmap."""
    data = np.linspace(-1.0, 1.0, 8, dtype=np.float32)[:, None]

    def losses_fn(x, batch):
        return {"fit": jnp.mean((batch + x - 1) ** 2), "size": jnp.mean((batch * x) ** 2)}

    method = mtl.skip_nonfinite(lagrangian({"size": 0.01}, lr=0.5, damping=0.1))
    grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True)
    x = np.float32(0.7)
    (losses, state, weights), gradient = jax.device_get(jax.jit(grad_fn)(x, grad_fn.init(x, data), data))
    assert weights["fit"] == 1.0
    expected = (0.5 + 0.1) * (losses["size"] - 0.01)
    np.testing.assert_allclose(weights["size"], expected, rtol=1e-6)
    log = mtl.report(losses, weights)
    assert log["weight/size"] == weights["size"]
    by_hand = jax.jit(jax.jacrev(losses_fn))(x, data)
    np.testing.assert_allclose(gradient, by_hand["fit"] + expected * np.asarray(by_hand["size"]), rtol=1e-5)
    in_two = jax.jit(mtl.value_and_grad(losses_fn, method, microbatches=2, return_weights=True))
    (_, _, again), same = in_two(x, state._replace(inner=method.init(losses).inner), data)
    chex.assert_trees_all_close((again, same), (weights, gradient), rtol=1e-5)

    def end(bound):
        swept = scalarization.lagrangian({"size": bound}, lr=0.5, damping=0.1)
        step_fn, optimizer = mtl.value_and_grad(losses_fn, swept), optax.sgd(0.05)

        def step(carry, _):
            x, state, opt_state = carry
            (losses, state), gradient = step_fn(x, state, data)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return (x + updates, state, opt_state), losses["size"]

        return jax.lax.scan(step, (x, swept.init(losses), optimizer.init(x)), length=2000)[1][-1]

    bounds = np.float32([0.1, 0.2, 10.0])
    ends = np.asarray(jax.jit(jax.vmap(end))(bounds))
    np.testing.assert_allclose(ends[:2], bounds[:2], rtol=1e-3)
    assert ends[2] < 10


@partial(jax.jit, static_argnums=0)
def ten_thousand_calls(method, state, loss):
    return jax.lax.scan(lambda state, _: method.apply(state, loss)[::-1], state, length=10_000)


@pytest.mark.parametrize("spike", [1e10, 1e15])
def test_averages_forget_a_finite_spike(spike):
    """To what float32 knows of an average, its last digit over 1 - decay; the multipliers may stay at their largest."""
    methods = {"average": scalarization.geco(0.5), "squares": scalarization.capu(0.5)}
    for field, method in methods.items():
        _, state = method.apply(method.init(()), np.float32(spike))
        state, scalars = jax.device_get(ten_thousand_calls(method, state, np.float32(0.6)))
        assert np.all(np.isfinite(scalars))
        violation = np.float32(0.6) - np.float32(0.5)
        np.testing.assert_allclose(getattr(state, field), violation ** (1 + (field == "squares")), rtol=1e-5)
