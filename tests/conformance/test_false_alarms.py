"""No method makes NaN, or divides by zero, on its way to finite numbers: JAX's own checks find nothing.

Looking at every operation sees what looking at what a compiled step returns sees: that is for one of each kind. One
more, ``jax_debug_infs`` operation by operation, would raise by design: the largest of no numbers is -inf.
"""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify

pytestmark = pytest.mark.unoptimized

ONE_ABSENT, NOBODY = jnp.array([True, False, True]), jnp.zeros(3, bool)
ALL_ERRORS = checkify.float_checks | checkify.index_checks | checkify.user_checks


def throwing(checkified):
    """A function that ``checkify`` has made, with its error raised."""

    def call(*args):
        error, output = checkified(*args)
        error.throw()
        return output

    return call


def quiet(function):
    return function


MODES = {
    "returned": (quiet, [lambda: jax.debug_nans(True), lambda: jax.debug_infs(True)]),
    "each operation": (quiet, [lambda: jax.debug_nans(True), jax.disable_jit]),
    "checkify": (lambda f: throwing(checkify.checkify(f, errors=ALL_ERRORS)), [jax.disable_jit]),
    "checkify compiled": (lambda f: throwing(jax.jit(checkify.checkify(f, errors=ALL_ERRORS))), []),
}

# What once gave NaN: a softmax over no task, a mean of none, a NaN that `where` leaves out; and an index under `vmap`.
BY_DEFAULT = [
    *(f"scalarization-{name}-each operation" for name in ("softadapt", "famo", "skip-dwa")),
    *(f"aggregation-{name}-each operation" for name in ("excess_mtl", "krum", "mgda")),
    *("scalarization-slaw-checkify", "aggregation-pcgrad-checkify"),
]


def run(built, mode):
    checking, flags = MODES[mode]
    state, samples = built.init(), [built.sample(i) for i in range(4)]  # before operations are looked at
    with contextlib.ExitStack() as stack:
        for flag in flags:
            stack.enter_context(flag())
        step = checking(lambda state, x, mask: built.step(state, x, mask))
        for x, mask in zip(samples, (None, None, ONE_ABSENT, NOBODY), strict=True):
            _, state = step(state, x, mask)
        if built.is_scalarizer:
            checking(lambda state, x: jax.grad(lambda x: built.apply(state, x)[0])(x))(built.init(), samples[0])


@pytest.mark.every_method
@pytest.mark.parametrize("mode", ["each operation", "checkify"])
@pytest.mark.by_default(*BY_DEFAULT)
def test_good_inputs_raise_no_alarm(built, mode):
    run(built, mode)


COMPILED = pytest.mark.parametrize("mode", ["returned", "checkify compiled"])


@pytest.mark.slow
@pytest.mark.one_of_a_kind("engine")
@COMPILED
def test_good_inputs_raise_no_alarm_in_a_compiled_step(built, mode):
    """The operations are those of the uncompiled one; what may differ, a loop, is of the kind's engine or a solver."""
    run(built, mode)


@pytest.mark.slow
@pytest.mark.cases(lambda built: built.case.name in ("upgrad", "cagrad", "epo", "nash_mtl", "gradvac"))
@COMPILED
def test_loops_raise_no_alarm_in_a_compiled_step(built, mode):
    run(built, mode)
