"""Auto-Lambda's step: its hypergradient against differentiating twice, absent tasks, transformations, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation
from tests.autodiff.models import normal_batch, normal_layers, squared_errors

pytestmark = pytest.mark.unoptimized

NAMES = ("depth", "edges", "seg")
BATCH, OTHER = (normal_batch(seed, 8, n_in=4, n_out=3) for seed in (1, 2))
PARAMS = normal_layers(0, (4, 5, 3))
ADAM = optax.adam(0.05)
# In the middle of a training.
OPT_STATE = jax.jit(lambda params: ADAM.update(params, ADAM.init(params), params)[1])(PARAMS)


def losses_fn(params, batch):
    return dict(zip(NAMES, squared_errors(params, batch), strict=True))


@jax.jit
def plain_gradient(weights):
    return jax.grad(lambda params: jnp.sum(weights * squared_errors(params, BATCH)))(PARAMS)


@jax.jit
def plain_hypergradients(weights):
    """By differentiating a step that has a gradient in it, of an array of weights; and the losses after that step."""

    def after(weights):
        updates, _ = ADAM.update(plain_gradient(weights), OPT_STATE, PARAMS)
        return squared_errors(optax.apply_updates(PARAMS, updates), OTHER)

    return jax.jacrev(after)(weights), after(weights)


def step(grad_fn, **kwargs):
    given = {"validation": (OTHER,), "opt_state": OPT_STATE} | kwargs
    start_and_step = lambda params, batch, given: grad_fn(params, grad_fn.init(params, batch), batch, **given)
    return jax.device_get(jax.jit(start_and_step)(PARAMS, BATCH, given))


@pytest.mark.parametrize(("primary", "at"), [("seg", [2]), (("depth", "seg"), [0, 2]), (None, [0, 1, 2])])
def test_the_hypergradient_is_exact_through_any_optimizer(primary, at):
    """Adam's: what it makes of a gradient is not linear in the weights."""
    (_, state), _ = step(mtl.auto_lambda(losses_fn, ADAM, primary, optax.sgd(1.0)))
    rows, _ = jax.device_get(plain_hypergradients(np.full(3, 0.1, np.float32)))
    expected = np.sum(rows[at], axis=0)
    np.testing.assert_allclose(0.1 - state.raw_weights, expected, rtol=1e-3, atol=1e-6)


def test_an_optimizer_that_reads_the_value_is_differentiated_by_it():
    """Polyak's step: as long as the weighted losses are large."""
    losses_fn = lambda x, target: jnp.stack([jnp.sum((x - target) ** 2), 1.0 + jnp.sum((x + 1) ** 2)])
    optimizer = optax.polyak_sgd(max_learning_rate=100.0)
    x, raw = np.array([0.3, -0.2], np.float32), np.array([0.5, 0.2], np.float32)

    def after(weights):
        value, gradient = jax.value_and_grad(lambda x: jnp.sum(weights * losses_fn(x, 1.0)))(x)
        updates, _ = optimizer.update(gradient, optimizer.init(x), x, value=value)
        return losses_fn(x + updates, 2.0)[0]

    grad_fn = mtl.auto_lambda(losses_fn, optimizer, 0, optax.sgd(1.0), initial_weights=raw)

    @jax.jit
    def new_weights(x):
        return grad_fn(x, grad_fn.init(x, 1.0), 1.0, validation=(2.0,), opt_state=optimizer.init(x))[0][1].raw_weights

    np.testing.assert_allclose(raw - np.asarray(new_weights(x)), jax.jit(jax.grad(after))(raw), rtol=1e-5)


def test_parameters_without_any_gradient_move_no_weight():
    """As of a pixel that is always black: Adam's derivative by a gradient of zero is none at its first step."""
    losses_fn = lambda x, scale: {"main": jnp.sum((scale * x - 1) ** 2), "other": jnp.sum((scale * x + 1) ** 2)}
    grad_fn = mtl.auto_lambda(losses_fn, optax.adam(0.1, eps=0.1), "main", optax.sgd(1.0))

    @jax.jit
    def new_weights(x, scale, validation):
        opt_state = optax.adam(0.1).init(x)
        (_, state), _ = grad_fn(x, grad_fn.init(x, scale), scale, validation=(validation,), opt_state=opt_state)
        return state.raw_weights

    of = lambda n: np.asarray(new_weights(*np.array([n * [0.3], np.eye(n)[0], n * [1]], np.float32)))
    assert np.all(of(1) != 0.1)
    np.testing.assert_allclose(of(2), of(1), rtol=1e-6)


def test_the_gradient_is_that_of_the_new_weights():
    grad_fn = mtl.auto_lambda(losses_fn, ADAM, "seg", optax.sgd(1.0), return_weights=True)
    (losses, state, weights), grads = step(grad_fn)
    assert tuple(weights) == tuple(losses) == NAMES
    np.testing.assert_array_equal(list(weights.values()), state.raw_weights)
    expected = plain_gradient(state.raw_weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), grads, expected)
    np.testing.assert_array_equal(state.seen, 1)


def test_an_aggregator_of_the_primary_tasks_hypergradients():
    """MOML: the shortest combination of what each validation loss asks of the logits."""
    method, raw = aggregation.mgda(), np.array([0.3, -0.2, 0.1], np.float32)
    grad_fn = mtl.auto_lambda(
        squared_errors,
        ADAM,
        meta_optimizer=optax.sgd(1.0),
        softmax=True,
        aggregator=method,
        initial_weights=raw,
        return_weights=True,
    )
    (_, state, weights), _ = step(grad_fn)
    softmax = np.exp(raw) / np.sum(np.exp(raw))
    of_weights, _ = jax.device_get(plain_hypergradients(softmax))
    rows = of_weights @ (np.diag(softmax) - np.outer(softmax, softmax))
    combined, _ = jax.jit(lambda rows: method.apply(method.init(rows.shape), rows))(rows)
    np.testing.assert_allclose(raw - state.raw_weights, combined, rtol=2e-3, atol=2e-6)
    np.testing.assert_allclose(np.sum(weights), 1, rtol=1e-6)
    np.testing.assert_array_equal(state.inner.seen, 1)


@pytest.mark.parametrize(
    ("names", "primary", "method"),
    [
        (NAMES, ("seg", "depth"), aggregation.epo({"depth": 1.0, "seg": 3.0})),
        (NAMES, None, aggregation.bloop("seg", 2.0)),
        (None, (2, 0), aggregation.epo([3.0, 1.0])),
    ],
)
def test_the_aggregator_goes_by_the_names_of_the_primary_tasks(names, primary, method):
    grad_fn = mtl.auto_lambda(losses_fn if names else squared_errors, ADAM, primary, optax.sgd(1.0), aggregator=method)
    (_, state), _ = step(grad_fn)
    at = [0, 1, 2] if primary is None else [0, 2]
    rows, values = jax.device_get(plain_hypergradients(np.full(3, 0.1, np.float32)))
    plain = aggregation.bloop(2, 2.0) if primary is None else aggregation.epo([1.0, 3.0])
    apply = lambda rows, values: plain.apply(plain.init(rows.shape), rows, values=values)
    expected, _ = jax.jit(apply)(rows[at], values[at])
    np.testing.assert_allclose(0.1 - state.raw_weights, expected, rtol=2e-3, atol=2e-6)


def test_an_absent_task_is_as_if_it_did_not_exist():
    mask = {"depth": True, "edges": False, "seg": True}
    grad_fn = mtl.auto_lambda(losses_fn, ADAM, "seg", optax.adam(0.1), softmax=True, return_weights=True)
    (_, state, weights), grads = step(grad_fn, mask=jax.tree.map(np.array, mask))

    two = lambda params, batch: {name: loss for name, loss in losses_fn(params, batch).items() if mask[name]}
    alone = mtl.auto_lambda(two, ADAM, "seg", optax.adam(0.1), softmax=True, return_weights=True)
    (_, _, weights_alone), grads_alone = step(alone)
    assert weights["edges"] == state.raw_weights[1] == 0
    present = {name: weights[name] for name in weights_alone}
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, (present, grads), (weights_alone, grads_alone))
    np.testing.assert_array_equal(state.seen, [1, 0, 1])
    np.testing.assert_array_equal(state.opt_state[0].mu["raw_weights"][1], 0)


def test_without_any_task_nothing_changes():
    grad_fn = mtl.auto_lambda(losses_fn, ADAM, "seg")
    (_, state), grads = step(grad_fn, mask=np.zeros(3, bool))
    jax.tree.map(np.testing.assert_array_equal, state, jax.jit(grad_fn.init)(PARAMS, BATCH))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def test_without_labels_for_the_primary_task_the_weights_stay():
    """Counts decide in either batch: the validation batch has no labels for it."""

    def counted(params, batch, n_labels):
        losses = losses_fn(params, batch)
        return losses | {"seg": mtl.Counted(n_labels * losses["seg"], n_labels)}

    grad_fn = mtl.auto_lambda(counted, ADAM, "seg", optax.adam(0.1))

    @jax.jit
    def weights(n_labels):
        """Before the step and after it."""
        state = grad_fn.init(PARAMS, BATCH, 4.0)
        given = {"validation": (OTHER, n_labels), "opt_state": OPT_STATE}
        (_, new), _ = grad_fn(PARAMS, state, BATCH, 4.0, **given)
        return state.raw_weights, new.raw_weights

    moved = []
    for n_labels in (0.0, 4.0):
        old, new = jax.device_get(weights(n_labels))
        moved.append(np.any(new != old))
        assert np.all(np.isfinite(new))
    assert moved == [False, True]


@pytest.mark.slow
def test_vmap_over_hyperparameters_is_a_loop():
    def weights(start, lr):
        grad_fn = mtl.auto_lambda(losses_fn, ADAM, "seg", optax.sgd(lr), start)
        state = grad_fn.init(PARAMS, BATCH)
        return grad_fn(PARAMS, state, BATCH, validation=(OTHER,), opt_state=OPT_STATE)[0][1].raw_weights

    starts, rates = np.array([0.1, 0.5], np.float32), np.array([1.0, 0.3], np.float32)
    mapped, alone = np.asarray(jax.jit(jax.vmap(weights))(starts, rates)), jax.jit(weights)
    for found, start, rate in zip(mapped, starts, rates, strict=True):
        np.testing.assert_allclose(found, alone(start, rate), rtol=1e-5)


def test_auxiliary_outputs_are_of_the_training_data():
    grad_fn = mtl.auto_lambda(lambda *args: (losses_fn(*args), args[1][0][0]), ADAM, "seg", has_aux=True)
    (_, _, aux), _ = step(grad_fn)
    np.testing.assert_array_equal(aux, BATCH[0][0])


def test_a_task_that_harms_loses_its_weight_and_one_that_helps_gains():
    """The auxiliary losses pull towards the validation loss's minimum, and away from it."""
    pull = lambda params, to: jnp.sum((params - to) ** 2)
    losses_fn = lambda params: {"harms": pull(params, -3.0), "helps": pull(params, 3.0), "main": pull(params, 2.0)}
    optimizer = optax.sgd(0.01)
    grad_fn = mtl.auto_lambda(losses_fn, optimizer, "main", optax.adam(0.02))

    def step(carry, _):
        params, opt_state, state = carry
        (_, state), grads = grad_fn(params, state, validation=(), opt_state=opt_state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, state), state.raw_weights

    @jax.jit
    def last_weights(params):
        carry = params, optimizer.init(params), grad_fn.init(params)
        return jax.lax.scan(step, carry, length=40)[1][-1]

    harms, helps, main = np.asarray(last_weights(np.zeros(2, np.float32)))
    assert harms < 0.1 < min(helps, main)


def test_a_validation_loss_that_is_not_finite_can_be_left_out():
    poisoned = lambda params, x: {"a": jnp.sum(params**2) * x, "b": jnp.sum(params)}
    for meta_optimizer, is_finite in ((optax.adam(0.1), False), (optax.apply_if_finite(optax.adam(0.1), 5), True)):
        grad_fn = mtl.auto_lambda(poisoned, optax.sgd(0.1), "a", meta_optimizer)
        new = lambda x, grad_fn=grad_fn: grad_fn(x, grad_fn.init(x, 1.0), 1.0, validation=(jnp.nan,))[0][1].raw_weights
        assert np.all(np.isfinite(jax.jit(new)(np.ones(2, np.float32)))) == is_finite


def test_errors_say_what_is_missing():
    grad_fn = mtl.auto_lambda(losses_fn, ADAM, "seg")
    state = jax.jit(grad_fn.init)(PARAMS, BATCH)
    with pytest.raises(TypeError, match=r"opt_state: expected the state of the parameters' optimizer.*found None"):
        grad_fn(PARAMS, state, BATCH, validation=(OTHER,))
    for wrong in (OTHER, list(OTHER), OTHER[0]):
        with pytest.raises(TypeError, match=r"validation: expected a tuple of 1.*validation=\(batch,\)"):
            grad_fn(PARAMS, state, BATCH, validation=wrong, opt_state=OPT_STATE)
    for primary, message in (("pose", "one of the losses' names"), (1, "index 1, which is a sorted position")):
        with pytest.raises(ValueError, match=message):
            mtl.auto_lambda(losses_fn, ADAM, primary).init(PARAMS, BATCH)
    with pytest.raises(ValueError, match="primary: expected at least one task"):
        mtl.auto_lambda(losses_fn, ADAM, ())
    with pytest.raises(ValueError, match="primary: expected each task once"):
        mtl.auto_lambda(losses_fn, ADAM, ("seg", "seg"))
    with pytest.raises(TypeError, match="losses_fn: expected one function"):
        mtl.auto_lambda((losses_fn, {"a": losses_fn}), ADAM)
    with pytest.raises(TypeError, match="meta_optimizer: expected an optax optimizer"):
        mtl.auto_lambda(losses_fn, ADAM, "seg", 0.1)
    with pytest.raises(ValueError, match="initial_weights: expected the losses' names"):
        mtl.auto_lambda(losses_fn, ADAM, "seg", initial_weights={"a": 1.0, "b": 1.0, "c": 1.0}).init(PARAMS, BATCH)
    with pytest.raises(TypeError, match="aggregator: expected an aggregator"):
        mtl.auto_lambda(losses_fn, ADAM, "seg", aggregator=aggregation.mgda)
