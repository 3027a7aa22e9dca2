"""Complex parameters are pairs of reals, for every method and on every path; gradients are those of ``jax.grad``."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mtlbalance as mtl
from mtlbalance import aggregation, diagnostics, scalarization
from mtlbalance.complex_parts import ComplexParts
from mtlbalance.gramian import combine, gramian
from tests.catalogue import AGGREGATORS

pytestmark = pytest.mark.unoptimized

CASES = {case.name: case for case in AGGREGATORS}
# Those whose formula has squared moduli or moduli of single entries: two coordinates are not the same for them.
BY_ENTRY = "excess_mtl", "m_config", "lr_annealing", "transform_rows-sum"
OF_MODULI = [name for name in CASES if any(part in name for part in BY_ENTRY)]
SHAPES = {"fourier": (2, 3), "bias": (3,), "scale": (), "none": (0, 2)}
COMPLEX = ("fourier", "scale", "none")


def tree(seed, lead=(), dtype=np.complex64):
    """Complex leaves, a real one, a scalar and one without entries."""
    rng = np.random.default_rng(seed)
    normal = lambda shape: rng.normal(size=(*lead, *shape))
    numbers = lambda name, shape: normal(shape) + 1j * normal(shape) if name in COMPLEX else normal(shape)
    kind = lambda name: dtype if name in COMPLEX else np.finfo(dtype).dtype
    return {name: np.asarray(numbers(name, shape), kind(name)) for name, shape in SHAPES.items()}


def halves(tree):
    """The same problem in reals: a real and an imaginary leaf for a complex one."""
    both = lambda x: {"0": np.real(x), "1": np.imag(x)} if np.iscomplexobj(x) else x
    return jax.tree.map(both, jax.device_get(tree))


def calls(method, state, jacobians):
    apply = jax.jit(lambda state, jacobian, values: method.apply(state, jacobian, values=values))
    for i, jacobian in enumerate(jacobians):
        gradient, state = apply(state, jacobian, np.float32([0.5, 2.0, 1.25]) + i)
        yield gradient, state


# Every method.


@pytest.mark.by_default("mgda", "graddrop", "trimmed_mean", "moco-libmtl", "chain-log-db_mtl", "cr_mogm-amortize-*")
@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_MODULI])
def test_a_method_sees_two_coordinates(name):
    method, params = CASES[name].make(), tree(0)
    jacobians = [tree(i, (3,)) for i in range(1, 4)]
    start = method.init((3, params))
    found = calls(method, start, jacobians)
    expected = calls(method, method.init((3, halves(params))), map(halves, jacobians))
    for (gradient, state), (of_halves, _) in zip(found, expected, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
        chex.assert_trees_all_close(halves(gradient), of_halves, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)


@pytest.mark.by_default(*BY_ENTRY)
@pytest.mark.parametrize("name", OF_MODULI)
def test_moduli_do_not_change_when_the_plane_is_turned(name):
    """Real gradients, each entry turned by an angle of its own: the real problem's gradient is turned by the same."""
    method, shapes = CASES[name].make(), {"w": (2, 3), "b": ()}
    rng = np.random.default_rng(0)
    turn = {name: np.exp(1j * rng.uniform(0, 6, shape)).astype(np.complex64) for name, shape in shapes.items()}
    real = [{name: np.float32(rng.normal(size=(3, *s))) for name, s in shapes.items()} for _ in range(4)]
    turned = [jax.tree.map(lambda x, turn: x * turn[None], x, turn) for x in real]
    start = method.init((3, turn))
    found = calls(method, start, turned)
    of_reals = calls(method, method.init((3, jax.tree.map(np.real, turn))), real)
    for (gradient, state), (of_real, _) in zip(found, of_reals, strict=True):
        expected = jax.tree.map(np.multiply, jax.device_get(of_real), turn)
        chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, start)


def test_excess_mtl_accumulates_squared_moduli():
    """Equations 6, 7 and 9 in NumPy."""
    method, params = aggregation.excess_mtl(0.5), tree(0)
    start = method.init((3, params))
    assert jax.tree.map(jnp.shape, start.squared_gradients) == {name: (3, *shape) for name, shape in SHAPES.items()}
    jacobians = [tree(i, (3,)) for i in range(1, 4)]
    added, weights, baseline = dict.fromkeys(SHAPES, 0), np.full(3, 1 / 3), None
    for jacobian, (gradient, state) in zip(jacobians, calls(method, start, jacobians), strict=True):
        squares = {name: np.abs(np.asarray(x, np.complex128)) ** 2 for name, x in jacobian.items()}
        added = {name: added[name] + squares[name] for name in SHAPES}
        excess = sum((squares[n] / np.sqrt(added[n] + 1e-7)).reshape(3, -1).sum(1) for n in SHAPES)
        if baseline is not None:
            weights = weights * np.exp(0.5 * excess / (baseline + 1e-7))
            weights = weights / weights.sum()
        baseline = excess if baseline is None else baseline
        chex.assert_trees_all_close(state.squared_gradients, added, rtol=1e-5)
        expected = jax.tree.map(lambda x, w=weights: np.tensordot(w, np.asarray(x), 1), jacobian)
        chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_lr_annealing_takes_moduli():
    method = aggregation.lr_annealing(alpha=1.0)
    jacobian = {"a": np.complex64([[3 + 4j, 0j], [1j, 2 + 0j]]), "b": np.float32([[2.0], [-6.0]])}
    _, state = method.apply(method.init((2, jax.tree.map(lambda x: x[0], jacobian))), jacobian)
    np.testing.assert_allclose(state.weights, [1, 5 / 3], rtol=1e-6)  # the largest 5, the others' mean (1 + 2 + 6) / 3


def test_m_config_divides_by_moduli():
    """With one task and without averages its gradient is of modulus 1 everywhere, as Adam's first update is."""
    method, jacobian = aggregation.m_config(0.0, 0.0), {"a": np.complex64([[3 + 4j, 0.1j, -2 + 0j]])}
    gradient, _ = method.apply(method.init((1, {"a": jacobian["a"][0]})), jacobian)
    np.testing.assert_allclose(gradient["a"], [0.6 + 0.8j, 1j, -1], rtol=1e-5, atol=1e-6)


# The ways of a step.


def layer(params, x):
    """A Fourier layer: some of the frequencies are weighed by complex numbers."""
    frequencies = jnp.fft.rfft(x)
    kept = params["fourier"].reshape(-1)
    hidden = jnp.fft.irfft(frequencies.at[..., : kept.size].multiply(kept) * params["scale"], x.shape[-1])
    return jnp.tanh(hidden) * jnp.sum(params["bias"])


def features(params, x):
    return params["fourier"][None] * jnp.fft.fft(x)[:, None, :3] * params["scale"]


def losses_fn(params, x):
    y = layer(params, x)
    angles = jnp.mean(jnp.angle(params["fourier"])) + jnp.imag(params["scale"]) * jnp.mean(x)
    return {"mean": jnp.mean(y), "target": jnp.mean((y - x) ** 2), "angle": 0.1 * angles}


BATCH = np.float32(np.random.default_rng(1).normal(size=(4, 16)))


jacobian_of = jax.jit(mtl.value_and_jac(losses_fn))


def assert_is_weighted(found, weights, losses_fn, params, *args):
    weighted = lambda params: sum(map(jnp.vdot, *map(jax.tree.leaves, (weights, losses_fn(params, *args)))))
    chex.assert_trees_all_close(found, jax.jit(jax.grad(weighted))(params), rtol=2e-5, atol=1e-6)


def with_weights(method, params=None, losses_fn=losses_fn, args=(BATCH,), state_for=None, **options):
    """One step; the losses of every test here are three."""
    params = tree(0) if params is None else params
    grad_fn = jax.jit(mtl.value_and_grad(losses_fn, method, return_weights=True, **options))
    state = method.init(3 if isinstance(method, mtl.Scalarizer) else (3, params if state_for is None else state_for))
    (_, new_state, weights), gradient = grad_fn(params, state, *args)
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    return weights, gradient


@pytest.mark.by_default("dwa-None", "db_mtl-2", "db_mtl-two_pass", "excess_mtl-stream")
@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("dwa", None),
        *[("db_mtl", rows) for rows in ("vmap", 2, "two_pass", "stream")],
        ("mgda", "two_pass"),
        ("excess_mtl", "stream"),
        ("excess_mtl", "vmap"),
        ("chain-imtl", "two_pass"),
    ],
)
def test_a_step_is_the_gradient_of_the_weighted_sum(name, rows):
    method = scalarization.dwa(steps_per_epoch=100) if name == "dwa" else CASES[name].make()
    weights, gradient = with_weights(method, rows=rows)
    assert_is_weighted(gradient, weights, losses_fn, tree(0), BATCH)
    if name == "db_mtl":  # by its formula, of the Jacobian in two coordinates
        stacked = lambda params: jnp.stack(jax.tree.leaves(losses_fn(params, BATCH)))
        jacobian = halves(jax.jit(jax.jacrev(stacked))(tree(0)))
        norms = np.sqrt(sum(np.sum(x.reshape(3, -1) ** 2, axis=1) for x in jax.tree.leaves(jacobian)))
        np.testing.assert_allclose(jax.tree.leaves(weights), np.max(norms) / norms, rtol=1e-4)


@pytest.mark.by_default("two_pass")
@pytest.mark.parametrize("rows", ["vmap", "two_pass"])
def test_the_gramian_of_a_fourier_layer(rows):
    _, found = jax.jit(mtl.value_and_gramian(losses_fn, rows=rows))(tree(0), BATCH)
    jacobian = jax.device_get(jacobian_of(tree(0), BATCH)[1])
    assert jax.tree.map(jnp.result_type, jacobian) == jax.tree.map(jnp.result_type, tree(0))
    conjugates = [np.asarray(x, np.complex128).reshape(3, -1) for x in jax.tree.leaves(jacobian)]
    np.testing.assert_allclose(found, sum((x @ x.conj().T).real for x in conjugates), rtol=1e-4, atol=1e-6)
    for i, row in enumerate(np.eye(3)):
        weights = dict(zip(("angle", "mean", "target"), row, strict=True))  # the order of jax.tree
        assert_is_weighted(jax.tree.map(lambda x, i=i: x[i], jacobian), weights, losses_fn, tree(0), BATCH)


@pytest.mark.by_default("subset", "microbatches")
@pytest.mark.parametrize("way", ["subset", "microbatches", "shared", "task_axis"])
def test_options_of_a_step(way):
    method, params = aggregation.db_mtl(), tree(0)
    if way == "task_axis":
        of_one = lambda params, x: jnp.mean((layer(params, x) - x) ** 2)
        batch = np.stack([BATCH, BATCH - 1, 2 * BATCH])
        weights, gradient = with_weights(method, losses_fn=of_one, args=(batch,), task_axis=0)
        of_all = lambda params, batch: jax.vmap(of_one, (None, 0))(params, batch)
        assert_is_weighted(gradient, weights, of_all, params, batch)
    elif way == "microbatches":
        weights, gradient = with_weights(method, microbatches=2)
        expected = with_weights(method)
        chex.assert_trees_all_close((weights, gradient), expected, rtol=1e-4, atol=1e-5)
    else:
        subset = {"fourier": True, "bias": False, "scale": True, "none": False}
        options = {"decide_on" if way == "subset" else "shared": subset}
        weights, gradient = with_weights(method, state_for=mtl.subset(params, subset), **options)
        if way == "shared":
            ones = jax.tree.map(np.ones_like, weights)
            for name, weighs in subset.items():
                chosen = weights if weighs else ones
                of_name = lambda x, name=name: losses_fn(params | {name: x}, BATCH)
                assert_is_weighted(gradient[name], chosen, of_name, params[name])
        else:
            assert_is_weighted(gradient, weights, losses_fn, params, BATCH)


@pytest.mark.by_default("features")
@pytest.mark.parametrize("at", ["parameters", "features"])
def test_complex_features(at):
    trunk, heads = {name: tree(0)[name] for name in ("fourier", "scale")}, list(tree(1, (3,))["fourier"])
    head = lambda w, z, x: jnp.mean(jnp.abs(w[None] * z - jnp.mean(x)) ** 2)
    method = aggregation.db_mtl()
    state_for = (
        jax.eval_shape(features, trunk, BATCH) if at == "features" else mtl.subset((trunk, heads), (True, False))
    )
    weights, gradient = with_weights(method, (trunk, heads), (features, [head] * 3), at=at, state_for=state_for)
    losses = lambda trunk: [head(w, features(trunk, BATCH), BATCH) for w in heads]
    assert_is_weighted(gradient[0], weights, losses, trunk)
    plain = jax.jit(lambda heads: [jax.grad(head)(w, features(trunk, BATCH), BATCH) for w in heads])(heads)
    chex.assert_trees_all_close(gradient[1], plain, rtol=1e-5)


def test_methods_without_weights_by_rows_and_visits():
    """What they remember is in parts; what they return is not."""
    method, params = aggregation.db_mtl(0.5), tree(0)
    results = []
    for rows in "vmap", "stream":
        state = method.init((3, params))
        (_, state), gradient = jax.jit(mtl.value_and_grad(losses_fn, method, rows=rows))(params, state, BATCH)
        results.append((gradient, state))
    chex.assert_trees_all_equal_shapes_and_dtypes(results[1][0], params)
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
    assert isinstance(state.averages["fourier"], ComplexParts)


def test_integers_beside_complex_numbers():
    params = {"w": np.complex64([1 + 2j, 3j]), "order": np.array([1, 0])}
    losses_fn = lambda params: jnp.abs(params["w"][params["order"]]) ** 2
    method = aggregation.mgda()
    grad_fn = mtl.value_and_grad(losses_fn, method, allow_int=True, return_weights=True)
    (_, _, weights), gradient = jax.jit(grad_fn)(params, method.init((2, params)))
    assert gradient["order"].dtype == jax.dtypes.float0
    np.testing.assert_allclose(weights, [5 / 14, 9 / 14], rtol=1e-4)
    np.testing.assert_allclose(gradient["w"], [9 / 14 * (2 - 4j), 5 / 14 * -6j], rtol=1e-4)


# What stands around a method.


def test_adam_trains_a_fourier_layer():
    """By ``value_and_grad`` and as a link of a chain, with the conjugate that optax's rules go down along."""
    target = lambda x: {"shifted": jnp.roll(x, 1, -1), "smooth": (x + jnp.roll(x, 2, -1)) / 2}
    params = {"first": np.ones(9, np.complex64), "second": np.ones(9, np.complex64)}

    def losses_fn(params, x):
        filtered = jnp.fft.irfft(jnp.fft.rfft(x) * (params["first"] * params["second"])[None], 16)
        return jax.tree.map(lambda y: jnp.mean((filtered - y) ** 2), target(x))

    method, adam = aggregation.excess_mtl(0.01), optax.adam(0.03)
    chained = optax.chain(mtl.aggregate(method, 2), adam)

    def by_gradient(carry, _):
        params, state, opt_state = carry
        (losses, state), grads = mtl.value_and_grad(losses_fn, method)(params, state, BATCH)
        updates, opt_state = adam.update(jax.tree.map(jnp.conj, grads), opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), sum(losses.values())

    def by_chain(carry, _):
        params, opt_state = carry
        losses, jacobian = mtl.value_and_jac(losses_fn)(params, BATCH)
        updates, opt_state = chained.update(jax.tree.map(jnp.conj, jacobian), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), sum(losses.values())

    starts = jax.jit(
        lambda params: ((params, method.init((2, params)), adam.init(params)), (params, chained.init(params)))
    )(params)
    runs = []
    for step, start in zip((by_gradient, by_chain), starts, strict=True):
        run = jax.jit(lambda start, step=step: jax.lax.scan(step, start, length=60))
        (trained, *_), losses = jax.device_get(run(start))
        assert losses[-1] < 0.4 * losses[0]
        assert np.max(np.abs(trained["first"].imag)) > 0.1
        runs.append(losses)
    np.testing.assert_allclose(*runs, rtol=1e-3)


@pytest.mark.by_default("excess_mtl")
@pytest.mark.parametrize("name", ["excess_mtl", "moco", "m_config", "db_mtl-averages"])
def test_a_gradient_that_is_not_finite_in_one_part_is_skipped(name):
    method, params = mtl.skip_nonfinite(CASES[name].make()), tree(0)
    state, good = method.init((3, params)), tree(1, (3,))
    bad = good | {"fourier": good["fourier"].copy()}
    bad["fourier"][1, 0, 0] = complex(1, np.nan)
    apply = jax.jit(method.apply)
    state = jax.device_get(apply(state, good)[1])
    gradient, new_state = jax.device_get(apply(state, bad))
    assert all(np.all(np.isnan(part)) for part in jax.tree.leaves(halves(gradient)))
    chex.assert_trees_all_equal(new_state.nonfinite, np.array([0, 1, 0]))
    row = lambda state: [leaf[1] for leaf in jax.tree.leaves(state.inner) if leaf.ndim and len(leaf) == 3]
    chex.assert_trees_all_equal(row(new_state), row(state))
    chex.assert_tree_all_finite(new_state.inner)


def test_states_lie_as_the_parameters_do_and_are_real():
    mesh = jax.make_mesh((8,), ("x",))
    params = {"w": jax.device_put(np.ones((8, 2), np.complex64), NamedSharding(mesh, PartitionSpec("x")))}
    for case in CASES.values():
        method = case.make()
        for state in method.init((3, params)), jax.eval_shape(lambda p, method=method: method.init((3, p)), params):
            own = state._replace(transformation=()) if hasattr(state, "transformation") else state  # not optax's
            assert not any(map(jnp.iscomplexobj, jax.tree.leaves(own)))
            shaped = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (3, 8, 2)]
            assert bool(shaped) == bool(method.jacobian_shaped)
        for leaf in jax.tree.leaves(method.init((3, params))):
            if leaf.shape == (3, 8, 2):
                assert leaf.sharding.spec[:2] == (None, "x")


def test_complex128_is_computed_in_float64():
    with jax.enable_x64(True):
        params, jacobian = tree(0, dtype=np.complex128), tree(1, (3,), np.complex128)
        method = aggregation.db_mtl(0.5)
        gradient, state = method.apply(method.init((3, params)), jacobian)
        assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {np.dtype("int32"), np.dtype("float64")}
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, params)
        assert jax.eval_shape(gramian, jacobian).dtype == np.float64


def test_gramian_and_combination():
    jacobian, weights = tree(0, (3,)), np.float32([0.5, 2.0, -1.0])
    rows = [np.asarray(x, np.complex128).reshape(3, -1) for x in jax.tree.leaves(jacobian)]
    np.testing.assert_allclose(jax.jit(gramian)(jacobian), sum((x @ x.conj().T).real for x in rows), rtol=1e-5)
    others = [np.asarray(x, np.complex128).reshape(3, -1) for x in jax.tree.leaves(tree(1, (3,)))]
    expected = sum((x @ y.conj().T).real for x, y in zip(rows, others, strict=True))
    np.testing.assert_allclose(jax.jit(gramian)(jacobian, tree(1, (3,))), expected, rtol=1e-5)
    expected = jax.tree.map(lambda x: np.asarray(np.tensordot(weights.astype(x.dtype), x, 1)), jacobian)
    combined = jax.jit(combine)(weights, jacobian)
    chex.assert_trees_all_close(combined, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(combined, expected)


def test_what_an_update_does_to_the_losses():
    """A gradient's products with what is added to the parameters are not those with another gradient."""
    params, updates = tree(0), tree(3)
    losses, jacobian = jax.device_get(jacobian_of(params, BATCH))
    expected = jax.jit(lambda *at: jax.jvp(lambda params: losses_fn(params, BATCH), *at)[1])((params,), (updates,))
    found = jax.jit(diagnostics.directional_derivatives)(jacobian, updates, losses)
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    down = jax.tree.map(lambda x: -np.conj(x[1]), jacobian)
    cosines = np.asarray(jax.jit(diagnostics.update_cosines)(jacobian, down))
    np.testing.assert_allclose(cosines[1], -1, rtol=1e-5)


def test_an_outer_derivative_goes_through_the_rows():
    jacobian, method = tree(0, (3,)), aggregation.constant(np.float32([0.5, 2.0, -1.0]))
    state = method.init((3, tree(0)))
    outer = lambda scale: method.apply(state, jax.tree.map(lambda x: scale * x, jacobian))[0]["fourier"][0, 0].imag
    expected = np.dot([0.5, 2.0, -1.0], jacobian["fourier"][:, 0, 0].imag)
    np.testing.assert_allclose(jax.jit(jax.grad(outer))(2.0), expected, rtol=1e-5)


# What is refused.


def test_complex_losses_are_refused():
    for method in scalarization.dwa(steps_per_epoch=100), aggregation.mgda():
        state = method.init(3 if isinstance(method, mtl.Scalarizer) else (3, 2))
        with pytest.raises(TypeError, match="losses_fn: expected floating point numbers, found dtype complex64"):
            mtl.value_and_grad(lambda params: params * np.ones(3, np.float32), method)(np.complex64(1.0), state)
    with pytest.raises(TypeError, match="gramian: expected floating point numbers, found dtype complex64"):
        method.gramian_weighting.apply(state, np.eye(3, dtype=np.complex64))


@pytest.mark.parametrize("name", ["db_mtl-averages", "skip-db_mtl", "moco", "m_config"])
def test_real_rows_of_complex_parameters_are_refused(name):
    method = aggregation.db_mtl(0.5) if name == "skip-db_mtl" else CASES[name].make()
    method = mtl.skip_nonfinite(method) if name == "skip-db_mtl" else method
    for given, found in ("real", "complex"), ("complex", "real"):
        kind = {"real": np.float32, "complex": np.complex64}
        state = method.init((3, {"w": np.ones(2, kind[given])}))
        message = f"expected {given} numbers, as the parameters are, found {found} numbers"
        with pytest.raises(TypeError, match=rf"jacobian\['w'\]: {message}"):
            method.apply(state, {"w": np.ones((3, 2), kind[found])})
        with pytest.raises(TypeError, match=rf"row\['w'\]: {message}"):
            method.rowwise.visit(state, 0, {"w": np.ones(2, kind[found])})
        optimizer = mtl.aggregate(aggregation.mgda(), 3)
        params = {"w": np.ones(2, kind[given])}
        with pytest.raises(TypeError, match=rf"jacobian\['w'\]: {message}"):
            optimizer.update({"w": np.ones((3, 2), kind[found])}, optimizer.init(params), params)
