"""What is logged: against numbers made by hand, in the losses' structure, and under every transformation of JAX.

Where a tolerance is 1e-6 the numbers are of order 1 and few roundings of float32 lie between them.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, diagnostics, scalarization
from mtlbalance.gramian import combine, gramian
from tests.catalogue import SCALARIZERS

pytestmark = pytest.mark.unoptimized

# Norms 1, 5 and 2; the first two conflict, the last two too, the first and the last are orthogonal.
ROWS = np.float32([[1.0, 0.0], [-3.0, -4.0], [0.0, 2.0]])
COSINES = np.array([[1.0, -0.6, 0.0], [-0.6, 1.0, -0.8], [0.0, -0.8, 1.0]])
CONFLICTS = np.array([[False, True, False], [True, False, True], [False, True, False]])
RATIOS = np.array([0.375, 1.875, 0.75])
UPDATE = np.float32([-0.3, 0.4])  # of norm 0.5
CHANGES, UPDATE_COSINES = np.array([-0.3, -0.7, 0.8]), np.array([-0.6, -0.28, 0.8])

OF_GRAMIAN = diagnostics.cosine_similarities, diagnostics.conflicts, diagnostics.magnitude_ratios
OF_UPDATE = diagnostics.directional_derivatives, diagnostics.update_cosines
close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)

RNG = np.random.default_rng(0)
# Rows of norm about 1; the wide leaf is contracted in chunks on a CPU, with a rest.
SHAPES = {"w": (5, 6), "wide": (9001,), "s": ()}
TREE = {name: np.float32(RNG.normal(size=(3, *shape)) / 95) for name, shape in SHAPES.items()}
TREE_UPDATE = jax.tree.map(lambda x: x[0] - 2 * x[2], TREE)


def everything(jacobian, updates, losses=None, mask=None):
    products = gramian(jacobian)
    answers = {f.__name__: f(products, losses, mask=mask) for f in OF_GRAMIAN}
    return answers | {f.__name__: f(jacobian, updates, losses, mask=mask) for f in OF_UPDATE}


compiled = jax.jit(everything)


def numbers(*args):
    """Everything, from one program: one function after the other is dozens of small ones for each shape."""
    return jax.device_get(compiled(*args))


def with_middle_times(factor):
    return ROWS * np.float32([[1.0], [factor], [1.0]])


EXPECTED = {
    "cosine_similarities": COSINES,
    "conflicts": CONFLICTS,
    "magnitude_ratios": RATIOS,
    "directional_derivatives": CHANGES,
    "update_cosines": UPDATE_COSINES,
}


def test_numbers_made_by_hand():
    jax.tree.map(close, numbers(ROWS, UPDATE), EXPECTED)


def test_a_tree_gives_what_its_matrix_gives_in_float64():
    """1e-5: sums of 9032 products in float32, relative to norms of order 1."""
    leaves, update = jax.tree.leaves(TREE), jax.tree.leaves(TREE_UPDATE)
    matrix = np.concatenate([np.reshape(leaf, (3, -1)) for leaf in leaves], axis=1).astype(np.float64)
    update = np.concatenate([np.ravel(leaf) for leaf in update]).astype(np.float64)
    norms, norm = np.linalg.norm(matrix, axis=1), np.linalg.norm(update)
    answers = numbers(TREE, TREE_UPDATE)
    cosines = matrix @ matrix.T / norms[:, None] / norms
    np.testing.assert_allclose(answers["cosine_similarities"], cosines, atol=1e-5)
    np.testing.assert_allclose(answers["magnitude_ratios"], norms / norms.mean(), rtol=1e-5)
    np.testing.assert_allclose(answers["directional_derivatives"], matrix @ update, atol=1e-5)
    np.testing.assert_allclose(answers["update_cosines"], matrix @ update / norms / norm, atol=1e-5)


def test_directional_derivatives_are_those_of_forward_mode():
    """As the docstring promises; 1e-5 for two ways through tanh in float32."""
    losses_fn = lambda params: {"a": jnp.sum(jnp.tanh(params) ** 2), "b": jnp.sum(jnp.exp(params))}

    @jax.jit
    def both_ways(params):
        losses, jacobian = mtl.value_and_jac(losses_fn)(params)
        _, forward = jax.jvp(losses_fn, (params,), (UPDATE,))
        return diagnostics.directional_derivatives(jacobian, UPDATE, losses), forward

    chex.assert_trees_all_close(*both_ways(np.float32([0.3, -0.7])), rtol=1e-5)


def test_adams_update_goes_against_a_task_that_the_gradient_does_not_hurt():
    """What the functions are for. Adam's first update is minus the signs of the gradient."""
    jacobian = np.float32([[3.0, -4.0], [0.0, 1.0]])
    gradient = jacobian[0] + 4.5 * jacobian[1]  # (3, 0.5)
    close(numbers(jacobian, -gradient)["directional_derivatives"], [-7.0, -0.5])
    optimizer = optax.adam(0.1)
    updates = jax.jit(lambda gradient: optimizer.update(gradient, optimizer.init(gradient))[0])(gradient)
    answers = numbers(jacobian, updates)
    close(answers["directional_derivatives"], [0.1, -0.1])
    close(answers["update_cosines"], [1 / 5 / 2**0.5, -1 / 2**0.5])


# The structure of the losses.


def test_named_losses_name_the_answers():
    names = {"c": 2.0, "a": 0.5, "b": 1.0}  # in the order of the rows: a, b, c
    answers, expected = numbers(ROWS, UPDATE, names), numbers(ROWS, UPDATE)
    for name in "cosine_similarities", "conflicts":
        assert answers[name].keys() == {"a", "b", "c"}
        for i, x in enumerate("abc"):
            for j, y in enumerate("abc"):
                assert answers[name][x][y] == expected[name][i, j]
    for name in "magnitude_ratios", "directional_derivatives", "update_cosines":
        assert answers[name] == dict(zip("abc", expected[name], strict=True))


def test_pairs_have_the_structure_of_a_hessian():
    """Rows first: told apart by a matrix that is not symmetric, as no Gramian is."""
    losses = {"b": np.zeros((2, 2), np.float32), "a": [np.float32(0.0), np.zeros(3, np.float32)]}
    added = lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(x))
    hessian = jax.eval_shape(jax.hessian(lambda x: added(x) ** 2), losses)
    products = np.where(np.arange(8)[:, None] < np.arange(8)[None], np.float32(-1.0), np.float32(1.0))
    answer = jax.device_get(jax.jit(diagnostics.conflicts)(products, losses))
    chex.assert_trees_all_equal_shapes(answer, hessian)
    assert np.all(answer["a"][0]["b"]) and not np.any(answer["b"]["a"][0])
    np.testing.assert_array_equal(np.reshape(answer["b"]["b"], (4, 4)), products[4:, 4:] < 0)
    ratios = jax.eval_shape(diagnostics.magnitude_ratios, products, losses)
    assert jax.tree.map(np.shape, ratios) == {"b": (2, 2), "a": [(), (3,)]}


def test_an_array_of_losses_gives_its_shape():
    jacobian = np.concatenate([ROWS, -ROWS])
    answers = numbers(jacobian, UPDATE, np.zeros((2, 3), np.float32))
    assert answers["cosine_similarities"].shape == (2, 3, 2, 3)
    close(answers["cosine_similarities"][0, :, 1], -COSINES)
    close(answers["update_cosines"], np.stack([UPDATE_COSINES, -UPDATE_COSINES]))


# Absent tasks.


def masked(losses, mask):
    """The rows with NaN for the middle task, which is absent."""
    return numbers(with_middle_times(np.nan), UPDATE, losses, mask)


ABSENT = {
    "cosine_similarities": np.diag([1.0, 0.0, 1.0]),
    "conflicts": np.zeros((3, 3), bool),
    "magnitude_ratios": np.array([2 / 3, 0.0, 4 / 3]),  # the mean is that of the tasks present
    "directional_derivatives": np.array([-0.3, 0.0, 0.8]),
    "update_cosines": np.array([-0.6, 0.0, 0.8]),
}


def test_an_absent_task_has_zeros_and_counts_in_no_mean():
    jax.tree.map(close, masked(None, np.array([True, False, True])), ABSENT)
    jax.tree.map(close, masked(np.ones(3, np.float32), np.array([True, False, True])), ABSENT)


@pytest.mark.parametrize("counted", [True, False])
def test_named_masks_and_counts_say_the_same(counted):
    mask = {"a": True, "b": False, "c": True}
    losses = {name: mtl.Counted(1.0, 4 * there) if counted else 1.0 for name, there in mask.items()}
    answers = masked(losses, None if counted else mask)
    expected = masked({"a": 1.0, "b": 1.0, "c": 1.0}, np.array([True, False, True]))
    chex.assert_trees_all_equal(answers, expected)
    assert not answers["conflicts"]["a"]["b"]
    close(answers["magnitude_ratios"]["c"], 4 / 3)


def test_a_mask_and_counts_leave_out_both_tasks():
    losses = {"a": mtl.Counted(1.0, 0), "b": mtl.Counted(1.0, 1), "c": mtl.Counted(1.0, 1)}
    answers = numbers(ROWS, UPDATE, losses, np.array([True, False, True]))
    assert answers["magnitude_ratios"] == {"a": 0, "b": 0, "c": 1}


def test_no_task_present_gives_zeros():
    answers = numbers(ROWS * np.nan, UPDATE, None, np.zeros(3, bool))
    chex.assert_trees_all_equal(answers, jax.tree.map(np.zeros_like, answers))


# Values.


def test_a_zero_gradient_has_cosine_zero_also_with_itself():
    answers = numbers(with_middle_times(0.0), UPDATE)
    expected = ABSENT | {"magnitude_ratios": np.array([1.0, 0.0, 2.0])}  # but it counts in the mean
    jax.tree.map(close, answers, expected)


def test_nothing_moves():
    answers = numbers(0 * ROWS, 0 * UPDATE)
    chex.assert_trees_all_equal(answers, jax.tree.map(np.zeros_like, answers))
    assert np.all(numbers(ROWS, 0 * UPDATE)["update_cosines"] == 0)


def test_one_task():
    answers = numbers(ROWS[1:2], UPDATE, {"only": 1.0})
    assert not answers.pop("conflicts")["only"]["only"]
    jax.tree.map(
        close,
        answers,
        {
            "cosine_similarities": {"only": {"only": 1.0}},
            "magnitude_ratios": {"only": 1.0},
            "directional_derivatives": {"only": -0.7},
            "update_cosines": {"only": -0.28},
        },
    )


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_all_but_the_changes_do_not_depend_on_the_scale(scale):
    answers = numbers(scale * ROWS, UPDATE)
    changes = answers.pop("directional_derivatives") / scale
    close(changes, CHANGES)
    jax.tree.map(close, answers, {name: EXPECTED[name] for name in answers})
    close(numbers(ROWS, scale * UPDATE)["update_cosines"], UPDATE_COSINES)


def test_rows_of_very_different_norm():
    answers = numbers(ROWS * np.float32([[1e-18], [1.0], [1e18]]), UPDATE)
    close(answers["cosine_similarities"], COSINES)
    close(answers["update_cosines"], UPDATE_COSINES)


def test_a_square_that_underflows_is_a_gradient_of_zero():
    answers = numbers(with_middle_times(1e-30), UPDATE)
    for name in "update_cosines", "cosine_similarities":
        close(answers[name], ABSENT[name])
    close(answers["directional_derivatives"][1] * 1e30, CHANGES[1])


def test_a_square_that_overflows_shows():
    """In place of cosines of 0, which would look orthogonal."""
    answers = numbers(with_middle_times(1e25), UPDATE)
    assert np.all(np.isnan(answers["cosine_similarities"][1])) and np.isnan(answers["update_cosines"][1])
    close(answers["cosine_similarities"][0, [0, 2]], COSINES[0, [0, 2]])
    assert np.all(np.isnan(answers["magnitude_ratios"]))
    np.testing.assert_array_equal(answers["conflicts"], CONFLICTS)  # products that do not overflow
    assert np.all(np.isnan(numbers(ROWS, 1e25 * UPDATE)["update_cosines"]))


def test_rounding_leaves_no_cosine_beyond_one():
    row = np.float32(RNG.normal(size=(1, 7)))
    jacobian = row * np.float32(RNG.normal(size=(40, 1)))  # all along one line
    answers = numbers(jacobian, row[0])
    for name in "cosine_similarities", "update_cosines":
        assert np.max(np.abs(answers[name])) <= 1


def test_a_gradient_that_is_not_finite_shows_and_leaves_the_others():
    answers = numbers(with_middle_times(np.nan), UPDATE)
    for name in "directional_derivatives", "update_cosines", "cosine_similarities":
        assert np.all(np.isnan(answers[name][1])), name
        others = np.ix_(*[[0, 2]] * answers[name].ndim)
        close(answers[name][others], EXPECTED[name][others])
    assert np.all(np.isnan(answers["magnitude_ratios"]))  # their mean is not known


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_in_float32_out(dtype):
    """The rows are whole numbers, exact in either dtype; the update stays float32, where 1e-9 is not zero."""
    answers = numbers(ROWS.astype(jnp.dtype(dtype)), 1e-9 * UPDATE)
    changes = answers.pop("directional_derivatives")
    assert changes.dtype == jnp.float32
    np.testing.assert_allclose(changes, 1e-9 * CHANGES, rtol=1e-6)
    jax.tree.map(close, answers, {name: EXPECTED[name] for name in answers})
    assert {str(x.dtype) for x in answers.values()} == {"float32", "bool"}


def test_float16_products_do_not_overflow():
    answers = numbers(np.full((2, 100), 300.0, np.float16), np.full(100, -300.0, np.float16))
    np.testing.assert_array_equal(answers["directional_derivatives"], [-9e6, -9e6])
    close(answers["update_cosines"], [-1.0, -1.0])


def test_float64():
    with jax.enable_x64(True):
        answers = numbers(np.float64(ROWS), np.array([-0.3, 0.4]))
        assert {str(x.dtype) for x in answers.values()} == {"float64", "bool"}
        np.testing.assert_allclose(answers["update_cosines"], UPDATE_COSINES, rtol=1e-14)  # a few roundings


# Transformations and devices.

LOSSES = {"a": np.float32(1.0), "b": np.ones(2, np.float32)}
same = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)  # thousands of products, added up in another order


def test_bare_calls_give_what_compiled_ones_do():
    """As somebody makes them in a notebook: all other numbers here come from one program."""
    losses, mask = {"c": 2.0, "a": 0.5, "b": 1.0}, np.array([True, False, True])
    given = ROWS, UPDATE, losses, mask
    chex.assert_trees_all_close(everything(*given), numbers(*given), rtol=1e-6)
    close(diagnostics.alignment(gramian(ROWS), losses, mask=mask), alignment(ROWS, losses, mask))


@pytest.mark.slow
def test_jit_scan_and_vmap_are_the_plain_call():
    rows = jax.tree.map(lambda x: np.stack([x, -2 * x, x[::-1]]), TREE)
    updates = jax.tree.map(lambda u: np.stack([u, u, -u]), TREE_UPDATE)
    masks = np.array([[True, True, True], [True, False, True], [False, False, True]])
    at = lambda i: jax.tree.map(lambda x: x[i], (rows, updates, masks))
    plain = [everything(*at(i)[:2], LOSSES, at(i)[2]) for i in range(3)]
    plain = jax.tree.map(lambda *x: np.stack(x), *plain)
    call = lambda jacobian, update, mask: everything(jacobian, update, LOSSES, mask)
    same(jax.jit(jax.vmap(call))(rows, updates, masks), plain)
    same(jax.jit(lambda *xs: jax.lax.map(lambda x: call(*x), xs))(rows, updates, masks), plain)
    same(jax.jit(call)(*at(1)), jax.tree.map(lambda x: x[1], plain))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.by_default("Explicit")
def test_eight_devices_give_what_one_gives_without_a_gather(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), 2 * (getattr(AxisType, kind),))
    specs = {"w": PartitionSpec("x", "y"), "v": PartitionSpec(("x", "y")), "s": PartitionSpec()}
    shapes = {"w": (4, 6), "v": (16_000,), "s": ()}
    jacobian = {name: np.float32(RNG.normal(size=(3, *shape)) / 127) for name, shape in shapes.items()}
    updates = jax.tree.map(lambda x: x[0] - 2 * x[2], jacobian)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    sharded = {name: put(x, None, *specs[name]) for name, x in jacobian.items()}
    sharded_updates = {name: put(x, *specs[name]) for name, x in updates.items()}
    for mask in None, np.array([True, False, True]):
        losses = jax.tree.map(put, LOSSES)
        call = jax.jit(lambda *args, mask=mask: everything(*args, mask=mask))
        compiled = call.lower(sharded, sharded_updates, losses).compile()
        assert "all-gather" not in compiled.as_text()
        answers = jax.device_get(compiled(sharded, sharded_updates, losses))
        same(answers, numbers(jacobian, updates, LOSSES, mask))


@pytest.mark.parametrize("function", OF_UPDATE)
def test_shard_map_adds_up_over_the_axis(function):
    mesh, spec = jax.make_mesh((8,), ("x",), (AxisType.Auto,)), PartitionSpec("x")
    jacobian = {name: np.float32(RNG.normal(size=(3, n))) for name, n in (("split", 64), ("whole", 5))}
    update = jax.tree.map(lambda rows: rows[0] - 2 * rows[2], jacobian)
    whole = PartitionSpec()
    in_specs = {"split": PartitionSpec(None, "x"), "whole": whole}, {"split": spec, "whole": whole}
    call = partial(jax.shard_map, partial(function, axis_name="x"), mesh=mesh, in_specs=in_specs, out_specs=whole)
    same(jax.jit(call())(jacobian, update), jax.jit(function)(jacobian, update))
    with pytest.raises(ValueError, match=r"axis_name: .*check_vma=True.*parameter \['split'\], if whole"):
        jax.eval_shape(call(check_vma=False), jacobian, update)


# The weights.


@pytest.mark.parametrize("case", [x for x in SCALARIZERS if not x.own_names], ids=lambda case: case.name)
@pytest.mark.by_default("geometric_mean", "famo", "uw", "dwa-steps", "learn-uw", "skip-dwa")
def test_effective_weights_are_those_of_the_training_step(case):
    """At the third state, all tasks present and without one; 1e-6 for one derivative compiled twice."""
    method = case.make(tasks={"a": 0, "b": np.array([1, 2])}) if case.per_task else case.make()
    params = {"a": np.float32(1.5), "b": np.float32([0.3, 4.0])}
    targets = {"a": np.float32(0.5), "b": np.float32([1.5, 0.25])}
    losses_fn = lambda params: jax.tree.map(lambda p, t: p * t, params, targets)

    @jax.jit
    def both_ways(mask):
        losses, state = losses_fn(params), method.init(3)
        for scale in 1, 2:
            _, state = method.apply(state, jax.tree.map(lambda x, scale=scale: scale * x, losses))
            state = method.end_epoch(state)
        trained, start = method, state
        if method.learned:  # value_and_grad takes them wrapped: one derivative, whatever the step on the fields
            trained = mtl.learn(method, optax.sgd(0.1))
            start = trained.init(3)._replace(inner=state)
        grad_fn = mtl.value_and_grad(losses_fn, trained, return_weights=True, hooks=True)
        found = [diagnostics.effective_weights(method, state, losses, mask=given) for given in (None, mask)]
        return found, [grad_fn(params, start, mask=given)[0][2] for given in (None, mask)], losses, state

    mask = np.array([True, False, True])
    found, expected, losses, state = both_ways(mask)
    before = jax.device_get(state)
    found = jax.device_get([*found, diagnostics.effective_weights(method, state, losses, mask=mask)])
    chex.assert_trees_all_close(found, jax.device_get([*expected, expected[1]]), rtol=1e-6)
    chex.assert_trees_all_equal(jax.device_get(state), before)
    assert found[1]["b"][0] == found[2]["b"][0] == 0


def test_effective_weights_under_jit_and_of_one_array():
    method, values = scalarization.constant(np.float32([[0.5, 2.0]])), np.ones((1, 2), np.float16)
    weights = jax.jit(partial(diagnostics.effective_weights, method))(method.init((1, 2)), values)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, [[0.5, 2.0]])


def test_effective_weights_of_counted_losses_are_of_their_values():
    """The mean of two values weighs each 1/2, however many labels they have; one without labels has no weight."""
    method = scalarization.mean()
    losses = {"a": mtl.Counted(6.0, 4), "b": mtl.Counted(8.0, 2), "c": mtl.Counted(np.nan, 0)}
    state = method.init({"a": 0.0, "b": 0.0, "c": 0.0})
    weigh = jax.jit(partial(diagnostics.effective_weights, method))
    weights = lambda mask: jax.device_get(weigh(state, losses, mask=mask))
    assert weights(None) == {"a": 0.5, "b": 0.5, "c": 0.0}
    assert weights({"a": True, "b": False, "c": True}) == {"a": 1.0, "b": 0.0, "c": 0.0}


def test_effective_weights_make_the_gradient_of_the_scalar():
    """1e-6: three products of order 1."""
    method = scalarization.geometric_mean()
    losses_fn = lambda params: jnp.array([1.0, 2.0, 3.0]) * jnp.sum(params**2) + params[0]
    state = method.init(3)

    @jax.jit
    def both(params):
        weights = diagnostics.effective_weights(method, state, losses_fn(params))
        gradient = jax.grad(lambda params: method.apply(state, losses_fn(params))[0])(params)
        return combine(weights, jax.jacrev(losses_fn)(params)), gradient

    np.testing.assert_allclose(*both(np.float32([1.0, -0.5])), rtol=1e-6)


# Errors.


@pytest.mark.parametrize("function", OF_GRAMIAN)
def test_wrong_gramians_losses_and_masks_raise(function):
    products = ROWS @ ROWS.T
    for wrong, error, match in [
        (ROWS, ValueError, r"gramian: expected a square matrix.*Jacobian.*found shape \(3, 2\)"),
        (np.ones(3, np.float32), ValueError, r"gramian: expected a square matrix.*found shape \(3,\)"),
        ({"w": ROWS}, TypeError, r"gramian: expected an array \(of a Jacobian.*found dict"),
        (np.ones((3, 3), int), TypeError, "gramian: expected floating point numbers"),
    ]:
        with pytest.raises(error, match=match):
            function(wrong)
    with pytest.raises(ValueError, match="losses: expected 3 numbers, one per task of the gradients, found 2"):
        function(products, {"a": 1.0, "b": 1.0})
    with pytest.raises(ValueError, match=r"mask: expected shape \(3,\)"):
        function(products, mask=np.ones(2, bool))
    with pytest.raises(TypeError, match="mask: expected booleans"):
        function(products, mask=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="mask: expected one array, or the shapes of values"):
        function(products, {"a": 1.0, "b": 1.0, "c": 1.0}, mask={"a": True, "b": True, "d": True})


@pytest.mark.parametrize("function", OF_UPDATE)
def test_wrong_jacobians_and_updates_raise(function):
    for jacobian, updates, error, match in [
        ({}, {}, ValueError, "jacobian: expected leaves with a leading axis"),
        (np.float32(1.0), np.float32(1.0), ValueError, "jacobian: expected leaves with a leading axis"),
        ({"a": ROWS, "b": ROWS[:2]}, {"a": UPDATE, "b": UPDATE}, ValueError, r"jacobian\['b'\]: expected a leading"),
        (np.ones((3, 2), int), UPDATE, TypeError, "jacobian: expected floating point numbers"),
        ({"w": ROWS}, UPDATE, ValueError, "updates: expected the params' tree"),
        ({"w": ROWS}, {"w": ROWS}, ValueError, r"updates\['w'\]: expected shape \(2,\), found shape \(3, 2\)"),
    ]:
        with pytest.raises(error, match=match):
            function(jacobian, updates)
    with pytest.raises(ValueError, match="losses: expected 3 numbers"):
        function(ROWS, UPDATE, {"a": 1.0})


def test_wrong_scalarizers_and_losses_raise():
    with pytest.raises(TypeError, match=r"scalarizer: expected a Scalarizer.*weighting.apply\), found Aggregator"):
        diagnostics.effective_weights(aggregation.mean(), (), np.ones(3, np.float32))
    method = scalarization.mean()
    with pytest.raises(TypeError, match="values: expected floating point numbers"):
        diagnostics.effective_weights(method, method.init(3), np.ones(3, int))
    with pytest.raises(ValueError, match=r"values: expected shape \(3,\), as given to init, found shape \(2,\)"):
        diagnostics.effective_weights(method, method.init(3), np.ones(2, np.float32))


# The alignment score.


@jax.jit
def alignment(rows, losses=None, mask=None):
    return diagnostics.alignment(gramian(rows), losses, mask=mask)


def test_alignment_is_that_of_the_unit_gradients():
    """As the formula has it, with one of zero and an absent one left out; of two gradients it is the cosine."""
    units = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    score = lambda units: 2 * np.sum(np.mean(units, axis=0) ** 2) - 1
    close(alignment(ROWS), score(units))
    with_zero = np.concatenate([ROWS, np.zeros((1, 2), np.float32), np.full((1, 2), np.nan, np.float32)])
    close(alignment(with_zero, mask=np.arange(5) < 4), score(units))
    close(alignment(ROWS[:2]), COSINES[0, 1])
    counted = {"a": 1.0, "b": mtl.Counted(1.0, 0), "c": 1.0}
    close(alignment(ROWS, counted), COSINES[0, 2])


@pytest.mark.parametrize(
    ("rows", "score"),
    [
        (np.eye(5), 2 / 5 - 1),
        (1e-9 * np.ones((4, 3)), 1.0),
        ([[1e9, 0.0], [-1.0, 0.0]], -1.0),
        (np.ones((1, 3)), 1.0),
        (np.zeros((3, 2)), 0.0),
        ([[1.0, 0.0], [np.inf, 0.0]], np.nan),
        ([[1.0, 0.0], [1e25, 0.0]], np.nan),  # whose square overflows
    ],
)
def test_alignment_at_its_bounds(rows, score):
    close(alignment(np.float32(rows)), score)
