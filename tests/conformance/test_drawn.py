"""What holds for whatever hypothesis draws: 1 to 64 tasks, dtypes, sixty decades, NaN, equal and opposite rows, masks.

The draws are the same in every run. Ten times as many, and others for every seed:

    pytest tests/conformance/test_drawn.py --hypothesis-profile=explore --hypothesis-seed=1
"""

import functools

import hypothesis
import jax
import numpy as np
import pytest

from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.conformance.drawn import Form, all_finite, calls
from tests.conformance.helpers import PARAMS

pytestmark = pytest.mark.unoptimized

EXAMPLES = 61  # of each method in each form: 20,000 examples in the slow run
MORE = 1 if hypothesis.settings.default.derandomize else 10
# Few shapes for each method: compiling is what costs time here. Fewer tasks are so many by absent ones.
FORMS = {
    "tree": lambda built: Form(built, 3, PARAMS, "float32"),
    "narrow": lambda built: Form(built, 8, vector(5), ("bfloat16", "float16")[len(built.case.name) % 2]),
    "guarded": lambda built: Form(built, 64, vector(12), "float32", guarded=True),
}
BY_DEFAULT = "famo", "coba", "mgda", "excess_mtl", "graddrop"  # hooks, a window, a solver, a memory, draws
MAY_VANISH = "imtl_g"  # there is not always a combination with equal projections
# Not only the total but the signs are ours to tell; those of equal projections are free, and of a user's method too.
SIMPLEX = {case.name for case in (*SCALARIZERS, *AGGREGATORS) if case.total and case.name != MAY_VANISH}
vector = lambda n: jax.ShapeDtypeStruct((n,), np.float32)
form_of = functools.cache(lambda built, name: FORMS[name](built))


def examples(test):
    """Runs the test on what is drawn, for each form."""
    test = hypothesis.settings(max_examples=MORE * EXAMPLES, deadline=None)(hypothesis.given(drawn=calls)(test))
    return pytest.mark.parametrize("name", FORMS)(test)


@pytest.mark.cases(lambda built: built.case.name in BY_DEFAULT)
@examples
def test_whatever_is_drawn(built, name, drawn):
    check(built, name, drawn)


@pytest.mark.slow
@pytest.mark.cases(lambda built: built.case.name not in BY_DEFAULT)
@examples
def test_whatever_is_drawn_for_all_others(built, name, drawn):
    check(built, name, drawn)


def check(built, name, drawn):
    """In up to three calls. After one that no formula can bear only a guarded method's state is still to be trusted."""
    form = form_of(built, name)
    state = form.init()
    all_meant = True
    for i, one in enumerate(drawn):
        call = form.call(one)
        output, new_state = form.step(state, call, one.ends_epoch)
        assert_alike(state, new_state)
        assert_absent_tasks_do_not_show(form, state, call, one, (output, new_state))
        all_meant &= form.is_meant_for(call)
        if form.is_meant_for(call) and (all_meant or not form.remembers_too_much(state)):
            if not all_finite((output, new_state)):
                assert not form.is_representable(state, call, one.ends_epoch), (output, new_state)
                assert not form.guarded or all_finite(new_state), new_state
                return
            assert_weights_have_their_total(form, call, output)
            if i == 0 and not np.any(call.lengths()[call.mask]):
                assert not any(np.any(leaf) for leaf in jax.tree.leaves(output.get("gradient")))
        elif not form.guarded or form.over_losses:
            return
        if form.guarded:
            assert all_finite(new_state), new_state
        state = new_state


def assert_alike(new, old):
    """In structure, shapes and dtypes."""
    assert jax.tree.structure(new) == jax.tree.structure(old)
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def assert_equal(new, old):
    """Bit for bit."""
    for x, y in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.tobytes() == y.tobytes() or np.array_equal(x.astype(float), y.astype(float), equal_nan=True)


def assert_absent_tasks_do_not_show(form, state, call, one, found):
    """Whatever stands there; and without anybody the step is nothing."""
    if call.mask.all():
        return
    assert_equal(form.step(state, call.with_absent(np.nan), one.ends_epoch), found)
    if not call.mask.any() and not one.ends_epoch:
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(found[0]))
        assert_equal(found[1], state)


def assert_weights_have_their_total(form, call, output):
    """Where the method has one: all of it for the tasks present; and of a method on the simplex none below 0."""
    weights, counted = output.get("weights"), call.mask
    if form.case.name.startswith("skip_zero"):  # as absent; a square below float32's least number is zero
        sizes, least = (call.losses.astype(float), 0) if form.is_scalarizer else (call.lengths(), 1e-19)
        counted = counted & (np.abs(sizes) > least)
    if weights is None or form.case.total is None or not counted.any():
        return
    weights = np.asarray(weights, float)
    if form.case.name == MAY_VANISH and not weights.any():
        return
    assert form.case.name not in SIMPLEX or np.all(weights >= 0)
    assert not np.any(weights[~counted])
    expected = {"1": 1, "m": counted.sum()}[form.case.total]
    # Rounding of up to 64 weights, each as large as their magnitudes; of narrow losses they are narrow.
    rounding = 1e-5 if form.dtype == "float32" else 1e-2
    np.testing.assert_allclose(weights.sum(), expected, atol=rounding * np.abs(weights).sum())
