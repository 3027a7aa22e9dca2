"""The same factory with equal arguments gives the same method, which is then compiled already."""

import dataclasses
import inspect
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation, base, scalarization
from tests import catalogue, events

pytestmark = pytest.mark.unoptimized

WRAPPERS = [mtl.learn, mtl.skip_nonfinite, mtl.amortize, mtl.chain, aggregation.cr_mogm, mtl.aggregate]
# For arguments without a default; what is not here is given an int.
ARGUMENTS = {"weights": (1.0, 2.0), "mu": 0.5, "lambda_": 1.0, "theta": 1.0, "method": aggregation.mgda()}


@pytest.mark.parametrize("info", mtl.methods(), ids=lambda info: info.full_name)
def test_every_factory_returns_one_method_for_equal_arguments(info):
    factory, given = info.factory, {name: ARGUMENTS.get(name, 1) for name in info.required}
    method = factory(**given)
    assert factory(**given) is method and factory(*given.values()) is method
    defaults = {p.name: p.default for p in inspect.signature(factory).parameters.values() if p.name not in given}
    assert factory(**given, **defaults) is method  # as spelt out as it can be


def of_plain_arguments(case):
    """Not those that build an array or an optimizer each time."""
    return not case.per_task and "learn" not in case.name and case.name not in ("chain-imtl", "test-only following")


CASES = [case for case in catalogue.SCALARIZERS + catalogue.AGGREGATORS if of_plain_arguments(case)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_built_twice_is_one_method(case):
    assert case.make() is case.make()
    if case.sharded:
        assert case.make(axis_name="x") is case.make(axis_name="x") is not case.make()


def test_wrappers_of_equal_methods_are_one():
    optimizer = optax.adam(0.1)
    learned = lambda: mtl.learn(scalarization.uw(initial_log_var=0.0), optimizer)
    makes = {
        "learn": learned,
        "skip_nonfinite": lambda: mtl.skip_nonfinite(learned()),
        "amortize": lambda: mtl.amortize(method=learned()),
        "chain": lambda: mtl.chain(learned(), aggregation.imtl_g()),
        "cr_mogm": lambda: aggregation.cr_mogm(aggregation.mgda(), initial_weights=(1.0, 0.0)),
        "aggregate": lambda: mtl.aggregate(aggregation.mgda(), n_tasks=2),
        "gradnorm": lambda: aggregation.gradnorm(optimizer=optimizer),
    }
    for name, make in makes.items():
        assert make() is make(), name
    assert mtl.learn(scalarization.uw(), optax.adam(0.1)) is not learned()  # another optimizer, however alike


PAIRS = [(1, 1.0), (1.0, np.float32(1)), (1.0, np.float64(1)), (0.0, -0.0), ((0.0,), (-0.0,)), ((1, 2), (1.0, 2.0))]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_equal_numbers_of_other_kinds_are_not_mixed_up(pair):
    first, second = map(scalarization.constant, pair)
    assert first is not second
    assert (first, second) == tuple(map(scalarization.constant, pair))


def test_true_is_not_one():
    assert scalarization.uw(classification=True) is scalarization.uw(0.0, True)
    assert scalarization.famo(delayed=False) is scalarization.famo() is not scalarization.famo(delayed=True)
    scalarization.dwa(2.0, 1)
    with pytest.raises(TypeError, match=r"^steps_per_epoch: expected an int"):
        scalarization.dwa(2.0, True)


@pytest.mark.parametrize(
    "weights",
    [[1.0, 2.0], {"a": 1.0, "b": 2.0}, np.array([1.0, 2.0]), jnp.array([1.0, 2.0]), (jnp.array(1.0), 2.0)],
    ids=lambda weights: type(weights).__name__,
)
def test_what_may_change_is_not_compared(weights):
    assert scalarization.constant(weights) is not scalarization.constant(weights)


def test_a_changed_argument_counts():
    weights = {"a": 1.0, "b": 2.0}
    losses = {"a": jnp.array(1.0), "b": jnp.array(1.0)}
    for total in 3.0, 7.0:
        weights["b"] = total - 1.0
        method = scalarization.constant(weights)
        assert method.apply(method.init(losses), losses)[0] == total


def test_errors_are_raised_each_time_and_by_the_factory():
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^temperature: expected .* found -1.0"):
            scalarization.dwa(-1.0)
        with pytest.raises(TypeError, match=r"dwa\(\) got an unexpected keyword argument 'temp'"):
            scalarization.dwa(temp=1.0)
        with pytest.raises(TypeError, match=r"krum\(\) missing 1 required positional argument: 'n_byzantine'"):
            aggregation.krum()


@pytest.mark.parametrize("transform", [jax.make_jaxpr, jax.vmap, jax.grad], ids=lambda f: f.__name__)
def test_nothing_that_may_be_traced_is_kept(transform):
    plain = scalarization.mean()

    def scalar(rate):
        traced, optimizer = scalarization.dwa(rate), optax.sgd(rate)
        for factory, *given in (
            (scalarization.dwa, rate),
            (scalarization.constant, (rate, 1.0)),
            (mtl.skip_nonfinite, traced),
            (mtl.chain, traced, aggregation.mgda()),
            (mtl.learn, scalarization.uw(), optimizer),
            (mtl.amortize, plain),  # from outside, which is not known in here
        ):
            assert factory(*given) is not factory(*given)
        return rate

    transform(scalar)(jnp.ones(2 if transform is jax.vmap else ()))
    assert mtl.amortize(plain) is mtl.amortize(plain)


def test_inside_a_transformation_numbers_are_still_compared():
    outside = scalarization.dwa(3.5)
    found = []
    jax.make_jaxpr(lambda x: found.append(scalarization.dwa(3.5)) or x)(1.0)
    assert found[0] is outside


def test_in_another_thread_it_is_the_same():
    found = []
    optimizer = optax.sgd(0.1)
    make = lambda: found.append(mtl.learn(scalarization.uw(), optimizer))
    make()
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert found[0] is found[1]


@pytest.mark.parametrize("built_wide", [False, True])
def test_a_method_built_in_one_precision_is_right_in_the_other(built_wide):
    losses = np.array([1.0, 2.0])
    for factory, argument in (scalarization.dwa, 1.25), (scalarization.random, 7), (scalarization.famo, 0.5):
        with jax.enable_x64(built_wide):
            kept = factory(argument)
        for wide in False, True, False:
            with jax.enable_x64(wide):
                anew = inspect.unwrap(factory)(argument)
                found, expected = (method.apply(method.init(2), jnp.asarray(losses)) for method in (kept, anew))
                assert found[0].dtype == (np.float64 if wide else np.float32)
                chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
                chex.assert_trees_all_equal(found, expected)


def test_bounds_are_those_of_the_precision_at_hand():
    with jax.enable_x64(True):
        scalarization.dtp(gamma=1e300)
    with pytest.raises(ValueError, match=r"^gamma: expected a finite number"):
        scalarization.dtp(gamma=1e300)


LOOPS = {
    "scalarizer": (lambda: scalarization.dwa(temperature=1.5), 2),
    "wrapped": (lambda: mtl.amortize(mtl.skip_nonfinite(scalarization.uw_so(0.5))), 2),
    "gramian": (lambda: aggregation.upgrad(reg_eps=1e-3), (2, 3)),
    "rowwise": (lambda: mtl.chain(scalarization.mean(), aggregation.excess_mtl(0.25)), (2, 3)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_builds_its_method_compiles_once(name):
    make, shape = LOOPS[name]
    losses, rows = jnp.array([1.0, 4.0]), jnp.array([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])

    def step(state):
        method = make()
        if isinstance(method, mtl.Scalarizer):
            return method.apply(state, losses)[1]
        return method.apply(state, rows, values=losses)[1]

    state = step(make().init(shape))
    with events.recorded() as heard:
        step(state)
    assert not heard


FACTORIES = [*(info.factory for info in mtl.methods()), *WRAPPERS]


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda f: f.__module__.removeprefix("mtlbalance."))
def test_a_factory_reads_as_it_is_written(factory):
    written = inspect.unwrap(factory)
    assert written is not factory
    assert inspect.signature(factory) == inspect.signature(written)
    for name in "__name__", "__qualname__", "__module__", "__doc__", "__annotations__":
        assert getattr(factory, name) == getattr(written, name)


def test_your_own_factory():
    @base.memoized
    def mine(scale=1.0):
        """Docstring."""
        return scalarization.constant(scale)

    assert mine() is mine(1.0) is mine(scale=1.0) is not mine(2.0)


def test_what_may_change_or_is_equal_and_not_the_same_is_not_compared():
    @dataclasses.dataclass(frozen=True)
    class Schedule:
        rate: float

        def __call__(self, count):
            return self.rate * count

    class Model:
        def value(self):
            return 1

    factory = base.memoized(lambda given: object())
    assert factory(Schedule(1)) is not factory(Schedule(1.0))
    model = Model()
    assert factory(model.value) is not factory(model.value)
    assert factory(dataclasses.replace) is factory(dataclasses.replace)
