"""What stands between a method's weights and the losses or rows: transformations, priors, terms, frozen weights."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization, weights
from tests.catalogue import AGGREGATORS, SCALARIZERS

pytestmark = pytest.mark.unoptimized

WRAPPED = "learn-uw", "skip-famo", "amortize-dwa", "chain-imtl", "skip-excess_mtl", "cr_mogm-amortize-mgda"
CASES = {
    f"{family}-{case.name}": case.make
    for family, cases in {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}.items()
    for case in cases
    if "-" not in case.name or case.name in WRAPPED  # what wraps all methods alike is not for all their settings
}
WITH_WEIGHTS = {name: make for name, make in CASES.items() if getattr(make(), "weighting", not make().learned)}
SOME = "scalarization-famo", "scalarization-dwa", "aggregation-excess_mtl", "aggregation-upgrad"
NOTHING = {
    "transform_weights": lambda method: mtl.transform_weights(method, optax.identity()),
    "prioritize": lambda method: mtl.prioritize(method, 1.0),
}
PARAMS = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)}
LOSSES = np.array([0.9, 2.0, 0.4], np.float32)
ROWS = {
    "w": np.random.default_rng(0).normal(size=(3, 2, 3)).astype(np.float32),
    "b": np.array([1.0, -2.0, 0.5], np.float32),
}
OTHERS = np.array([True, False, True])


def everything(method, mask=None):
    """What a method gives at its start on each of its paths: weights, gradients, new states."""
    if not isinstance(method, mtl.Scalarizer):
        return every_path(method, mask)
    # Some are compared bit for bit, which in one program what is fused with them would change.
    weights, state = jax.grad(method.apply, argnums=1, has_aux=True)(start(method), LOSSES, mask=mask)
    return {"weights": weights, "state": method.observe(method.end_epoch(state), 0.9 * LOSSES, mask=mask)}


@partial(jax.jit, static_argnums=0)
def every_path(method, mask):
    state, given = start(method), {"values": LOSSES, "mask": mask}
    found = {"apply": method.apply(state, ROWS, **given), "weighting": method.weighting.apply(state, ROWS, **given)}
    if method.gramian_weighting is not None:
        found["gramian"] = method.gramian_weighting.apply(state, mtl.gramian.gramian(ROWS), **given)
    if method.rowwise is not None:
        visited, statistics = state, []
        for i in range(3):
            row = jax.tree.map(lambda leaf, i=i: leaf[i], ROWS)
            visited, statistic = method.rowwise.visit(visited, i, row, **given)
            statistics.append(statistic)
        statistics = jax.tree.map(lambda *parts: jnp.stack(parts), *statistics)
        found["rowwise"] = method.rowwise.weigh(visited, statistics, **given)
    return found


def without_wrapper(found):
    """The states inside."""
    is_state = lambda x: hasattr(x, "inner")
    return jax.tree.map(lambda x: x.inner if is_state(x) else x, found, is_leaf=is_state)


def start(method):
    return method.init(3 if isinstance(method, mtl.Scalarizer) else (3, PARAMS))


@pytest.mark.parametrize("name", WITH_WEIGHTS)
@pytest.mark.parametrize("wrap", NOTHING.values(), ids=NOTHING)
@pytest.mark.by_default(*SOME)
def test_what_does_nothing_changes_nothing(wrap, name):
    """Bit for bit but for a rounding; in its state there is no array of its own."""
    bare = WITH_WEIGHTS[name]()
    method = wrap(bare)
    state = jax.eval_shape(lambda: start(method))
    chex.assert_trees_all_close(without_wrapper(everything(method)), everything(bare), rtol=3e-7, atol=1e-7)
    own = [leaf for leaf in jax.tree.leaves(state._replace(inner=())) if jnp.ndim(leaf)]
    assert len(own) == (method.last_weights is not None and hasattr(state, "last_weights"))


@pytest.mark.parametrize("name", WITH_WEIGHTS)
@pytest.mark.by_default(*SOME, "aggregation-chain-imtl", "scalarization-skip-famo")
def test_a_prior_of_zero_is_an_absent_task(name):
    """Whatever its loss and gradient are: they are as they would be at a mask."""
    bare = WITH_WEIGHTS[name]()
    method = mtl.prioritize(bare, np.array([1.0, 0.0, 1.0], np.float32))
    found, expected = everything(method), everything(bare, OTHERS)
    chex.assert_trees_all_close(without_wrapper(found), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
@pytest.mark.by_default(*SOME)
def test_a_term_is_no_task(name):
    bare = WITH_WEIGHTS[name]()
    method = mtl.regularize(bare, {1: 0.25})
    found, expected = jax.device_get((everything(method), everything(bare, OTHERS)))
    if isinstance(bare, mtl.Scalarizer):
        np.testing.assert_allclose(found["weights"], np.where(OTHERS, expected["weights"], 0.25), rtol=3e-7)
        # What their states have of the last losses is a sum of products, which compilers fuse.
        rounding = 3e-7 if name in ("scalarization-capu", "scalarization-vrba") else 0
        chex.assert_trees_all_close(found["state"].inner, expected["state"], rtol=rounding, atol=0)
        return
    for path in found.keys() - {"apply"}:
        np.testing.assert_allclose(found[path][0], np.where(OTHERS, expected[path][0], 0.25), rtol=3e-7)
    gradient = jax.tree.map(lambda g, rows: g + 0.25 * rows[1], expected["apply"][0], ROWS)
    chex.assert_trees_all_close(found["apply"][0], gradient, rtol=1e-5, atol=1e-6)


def test_a_prior_of_zero_keeps_a_huge_gradient_from_the_solver():
    rows = np.array([[1.0, 0.5], [-1000.0, 300.0], [-0.5, 1.0]], np.float32)
    bare = aggregation.upgrad()
    method = mtl.prioritize(bare, np.array([1.0, 0.0, 1.0], np.float32))
    both = jax.jit(lambda: [of.apply(of.init(x.shape), x)[0] for of, x in ((method, rows), (bare, rows[::2]))])
    gradient, expected = both()
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_averages_are_those_of_the_calls_with_the_task():
    method = mtl.transform_weights(scalarization.uw_so(), optax.ema(0.5, debias=False))
    bare = scalarization.uw_so()

    @jax.jit
    def call(state, losses, mask):
        own, _ = jax.grad(bare.apply, argnums=1, has_aux=True)(bare.init(2), losses, mask=mask)
        return own, *jax.grad(method.apply, argnums=1, has_aux=True)(state, losses, mask=mask)

    state, average = method.init(2), np.zeros(2)
    for i, mask in enumerate([(True, True), (True, False), (True, True)]):
        own, found, state = call(state, np.array([1.0 + i, 2.0]), np.array(mask))
        average = np.where(mask, average / 2 + np.asarray(own) / 2, average)
        np.testing.assert_allclose(found, np.where(mask, average, 0), rtol=1e-6)


def test_warm_up_then_bounds_then_a_total():
    chain = optax.chain(weights.warm_up(1), weights.clip(0.3, 0.5), weights.normalize(3.0))
    method = mtl.transform_weights(aggregation.mgda(), chain)
    rows, state = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], np.float32), method.init((3, 2))
    for expected in [1.5, 1.5, 0], [1.875, 1.125, 0]:
        found, state = method.weighting.apply(state, rows, mask=np.array([True, True, False]))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_warm_up_of_a_traced_length():
    given = np.tile(np.array([0.25, 0.75], np.float32), (3, 1))

    @jax.jit
    @jax.vmap
    def found(n_steps):
        chain = weights.warm_up(n_steps)
        return jax.lax.scan(lambda state, w: chain.update(w, state)[::-1], chain.init(given[0]), given)[1]

    expected = [[0.5, 0.5] if i < n else [0.25, 0.75] for n in range(3) for i in range(3)]
    np.testing.assert_array_equal(np.reshape(found(np.arange(3)), (9, 2)), expected)


def test_a_schedule_counts_the_calls():
    method = mtl.prioritize(scalarization.sum(), lambda count: {"a": 1.0, "b": count / 2})
    losses = {"a": 1.0, "b": 10.0}
    run = lambda state, _: method.apply(state, losses)[::-1]
    np.testing.assert_allclose(jax.lax.scan(run, method.init(losses), length=3)[1], [1.0, 6.0, 11.0])
    method = mtl.regularize(scalarization.sum(), {"b": optax.linear_schedule(0.0, 1.0, 2)})
    np.testing.assert_allclose(jax.lax.scan(run, method.init(losses), length=3)[1], [1.0, 6.0, 11.0])


def test_a_term_or_a_prior_may_be_that_of_a_group():
    losses = {"pde": {"u": 1.0, "v": 2.0}, "bc": jnp.array([3.0, 4.0]), "kl": 5.0}
    method = mtl.prioritize(scalarization.sum(), {"pde": 0.5, "bc": 10.0, "kl": 0.0})
    assert method.apply(method.init(losses), losses)[0] == 1.5 + 70
    method = mtl.regularize(scalarization.mean(), {"bc": 1.0, "kl": 0.1})
    assert method.apply(method.init(losses), losses)[0] == 1.5 + 7 + 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mtl.prioritize(scalarization.sum(), {"a": 1.0}), r"prior: .*\['a', 'b'\], or groups.*\['a'\]"),
        (lambda: mtl.prioritize(scalarization.sum(), {"a": 1.0, "c": 1.0}), r"prior: .*\['a', 'b'\].*\['a', 'c'\]"),
        (lambda: mtl.prioritize(scalarization.sum(), jnp.ones(2)), "prior: .*'a'.*numbers without names"),
        (lambda: mtl.prioritize(scalarization.sum(), -1.0), "prior: .*at least 0"),
        (lambda: mtl.regularize(scalarization.sum(), {"c": 1.0}), r"terms: .*\['a', 'b'\].*'c'"),
        (lambda: mtl.regularize(scalarization.sum(), {0: 1.0}), r"terms: .*\['a', 'b'\].*index 0"),
        (lambda: mtl.regularize(scalarization.sum(), {"a": 1.0, "": 1.0}), "terms: .*''"),
        (lambda: mtl.regularize(scalarization.sum(), {}), "terms: expected a dict"),
        (lambda: mtl.regularize(scalarization.sum(), {"a": jnp.nan}), r"terms\['a'\]: .*finite"),
        (lambda: mtl.transform_weights(scalarization.uw(), optax.identity()), "method: .*learn"),
        (lambda: mtl.transform_weights(aggregation.graddrop(0), optax.identity()), "method: .*makes weights"),
    ],
)
def test_errors_name_what_is_wrong(make, message):
    losses = {"a": 1.0, "b": 2.0}
    with pytest.raises(ValueError, match=message):
        make().apply(make().init(losses), losses)


def test_terms_are_losses_each_once():
    """None is left out without a word: what is meant as a regulariser would be a task."""
    with pytest.raises(ValueError, match="terms: expected an index below the number of losses 3, found 7"):
        mtl.regularize(scalarization.sum(), {7: 1.0}).init(3)
    with pytest.raises(ValueError, match="terms: expected a name, or an int of at least 0, found -1"):
        mtl.regularize(scalarization.sum(), {-1: 1.0})
    with pytest.raises(TypeError, match="terms: expected the name or the index of a task, found float"):
        mtl.regularize(scalarization.sum(), {1.5: 1.0})
    losses = {"pose": {"angle": 1.0, "place": 2.0}, "seg": 3.0}
    with pytest.raises(ValueError, match="terms: expected each loss once"):
        mtl.regularize(scalarization.sum(), {"pose": 1.0, "pose.place": 2.0}).init(losses)
    for wrap in mtl.regularize, mtl.prioritize:
        with pytest.raises(ValueError, match=r"(terms|prior): .*'nope'"):  # before the training
            wrap(scalarization.sum(), {"nope": 1.0}).init(losses)


def test_the_last_weights_are_those_of_the_last_call_whatever_the_schedule_says_next():
    schedule = lambda count: 1.0 + count
    for wrap in (lambda x: mtl.prioritize(x, schedule)), (lambda x: mtl.regularize(x, {0: schedule})):
        method = wrap(mtl.amortize(aggregation.sum()))
        state = method.init((2, 3))
        for _ in range(2):
            expected, state = method.weighting.apply(state, jnp.ones((2, 3)))
            np.testing.assert_array_equal(method.last_weights(state), expected)


@pytest.mark.parametrize("bare", [scalarization.uw_so(), aggregation.mgda()])
def test_steps_without_a_refresh_take_terms_and_priors_by_name_too(bare):
    losses_fn = lambda x: {"pose": {"u": jnp.sum(x**2), "v": jnp.sum((x - 1) ** 2)}, "kl": jnp.sum(x**4)}
    kept, params = mtl.amortize(bare), np.array([1.0, 2.0], np.float32)

    @partial(jax.jit, static_argnums=0)
    def steps(method):
        """The weights of a step, of one without a refresh, the losses, and what frozen weights make of them."""
        grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True)
        (_, state, expected), _ = grad_fn(params, grad_fn.init(params))
        (_, _, found), _ = grad_fn(params, state, refresh=False)
        frozen, losses = mtl.freeze(method, state), losses_fn(params)
        return expected, found, losses, frozen.apply(frozen.init(losses), losses)[0]

    priority = mtl.prioritize(kept, {"pose": 0.5, "kl": 3.0})
    for method in mtl.regularize(kept, {"kl": 0.1}), priority, mtl.regularize(priority, {"kl": 0.1}):
        expected, found, losses, scalar = jax.device_get(steps(method))
        chex.assert_trees_all_equal(found, expected)
        total = sum(w * x for w, x in zip(jax.tree.leaves(expected), jax.tree.leaves(losses), strict=True))
        np.testing.assert_allclose(scalar, total, rtol=1e-6)
        for outer in mtl.transform_weights(method, optax.ema(0.5)), mtl.skip_zero(method):
            outer.init(3 if isinstance(method, mtl.Scalarizer) else (3, params))  # where names are not known yet


def test_a_transformation_that_remembers_nothing_costs_no_state():
    for transformation in optax.identity(), optax.clip_by_global_norm(1.0), weights.normalize():
        for bare in scalarization.dwa(steps_per_epoch=100), aggregation.mgda():
            state = mtl.transform_weights(bare, transformation).init(2 if isinstance(bare, mtl.Scalarizer) else (2, 3))
            assert len(jax.tree.leaves(state)) == len(jax.tree.leaves(state.inner))


def test_what_is_no_transformation_and_no_task_is_refused():
    with pytest.raises(TypeError, match=r"transformation: expected an optax transformation.*the function ema"):
        mtl.transform_weights(scalarization.sum(), optax.ema)
    for index in -1, 2:
        with pytest.raises(ValueError, match=rf"terms: expected .*{index}"):
            mtl.regularize(scalarization.sum(), {index: 1.0}).init(2)
    with pytest.raises(ValueError, match="upper: expected at least lower"):
        weights.clip(2.0, 1.0)


def test_frozen_weights_are_those_of_the_state():
    losses = {"a": 1.0, "b": 4.0}
    learned = mtl.learn(scalarization.uw(), optax.sgd(0.1))
    state = learned.apply(learned.init(losses), losses)[1]
    frozen = mtl.freeze(learned, state, losses)
    scalar, _ = frozen.apply(frozen.init(losses), {"a": 10.0, "b": 1.0})
    np.testing.assert_allclose(scalar, jnp.dot(0.5 * jnp.exp(-state.inner.log_var), jnp.array([10.0, 1.0])), rtol=1e-6)
    method = mtl.amortize(aggregation.mgda())
    _, state = method.apply(method.init((2, 2)), jnp.array([[1.0, 0.0], [0.0, 2.0]]))
    frozen = mtl.freeze(method, state)
    jax.jit(lambda state: state, donate_argnums=0)(state)  # what is frozen is not deleted with it
    np.testing.assert_allclose(frozen.apply(frozen.init(2), jnp.array([1.0, 1.0]))[0], 1.0)
    with pytest.raises(ValueError, match=r"method: expected .*mtl.amortize"):
        mtl.freeze(aggregation.mgda(), state.inner)
    with pytest.raises(ValueError, match="losses: expected"):
        mtl.freeze(scalarization.uw_so(), scalarization.uw_so().init(2))


def test_frozen_weights_are_for_the_losses_that_they_were_made_for():
    """A count is read, and neither other names nor another number of losses are taken without a word."""
    method = scalarization.geometric_mean()
    counted = lambda total, count: mtl.Counted(jnp.array(total), jnp.array(count))
    losses = {"a": counted(2.0, 2), "b": counted(8.0, 2), "none": counted(0.0, 0)}
    frozen = mtl.freeze(method, method.init(losses), losses)
    scalar, _ = frozen.apply(frozen.init(losses), {"a": 1.0, "b": 6.0, "none": 5.0})
    np.testing.assert_allclose(scalar, 2.5, rtol=1e-6)  # with weights (1, 1/4, 0)
    with pytest.raises(ValueError, match=r"weights: .*\['a', 'b', 'c'\]"):
        frozen.init({"a": 1.0, "b": 6.0, "c": 5.0})
    kept = mtl.amortize(aggregation.mgda())
    for m, n in (2, 3), (1, 3):
        with pytest.raises(ValueError, match=rf"losses: expected .* frozen weights, shape \({m},\), .*\({n},\)"):
            mtl.freeze(kept, kept.init((m, 2))).init(n)


def test_a_line_search_sees_one_function():
    """Adam with a method, then L-BFGS with its weights as they are then."""
    targets, start = {"near": 1.0, "far": 30.0}, np.zeros(3, np.float32)
    task_losses = lambda params: {name: jnp.sum((params - target) ** 2) for name, target in targets.items()}
    method = scalarization.uw_so()
    optimizer = optax.lbfgs()

    @jax.jit
    def train():
        losses = task_losses(start)
        frozen = mtl.freeze(method, method.init(losses), losses)
        value_fn = lambda params: frozen.apply(frozen.init(losses), task_losses(params))[0]

        def step(carry, _):
            params, state = carry
            value, grad = optax.value_and_grad_from_state(value_fn)(params, state=state)
            updates, state = optimizer.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
            return (optax.apply_updates(params, updates), state), value

        (params, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=5)
        return params, jax.grad(lambda losses: frozen.apply(frozen.init(losses), losses)[0])(losses)

    params, shares = train()
    shares = jax.device_get(jax.tree.leaves(shares))
    np.testing.assert_allclose(params, (30 * shares[0] + shares[1]) / sum(shares), rtol=1e-4)


def test_first_losses():
    method = scalarization.first_loss()
    state = method.init(3)
    calls = [((4.0, 0.0, -2.0), (1 / 4, 1, 1 / 2)), ((8.0, 0.5, jnp.nan), (1 / 4, 2, 1 / 2))]
    for losses, expected in calls:
        found, state = jax.grad(method.apply, argnums=1, has_aux=True)(state, jnp.array(losses))
        np.testing.assert_allclose(found, expected)
