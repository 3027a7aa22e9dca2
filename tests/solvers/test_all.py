"""What every solver promises: absent tasks, transformations, any scale, dtypes, compilation; one row each."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtlbalance import solvers
from tests.events import compilations, recorded, traces
from tests.solvers import problems


class Case(NamedTuple):
    """A solver and what the checks must know about it.

    Attributes:
      name: for the test's id.
      solve: takes a Gramian, the ``arguments`` and ``mask``.
      arguments: numbers, or arrays with an entry for each of five tasks.
      power: of a factor of the Gramian, by which the weights are multiplied.
      given: how many of the first weights do not depend on the Gramian.
      splits: between near-duplicates any split of the weight is as good.
    """

    name: str
    solve: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    power: float = 0
    given: int = 0
    splits: bool = False


def epo_corner(gramian, mask=None):
    """The fastest fall of the first loss with which none rises."""
    present = jnp.ones(len(gramian), bool) if mask is None else mask
    lower = jnp.where(present, jnp.zeros((), gramian.dtype), -jnp.inf)
    return solvers.simplex_lp(gramian[:, 0], gramian, lower, mask)[0]


CASES = [
    Case("simplex_qp", solvers.simplex_qp),
    Case("simplex_qp-linear", lambda matrix, mask=None: solvers.simplex_qp(matrix, matrix[0], mask)),
    Case("simplex_lp", lambda gramian, mask=None: epo_corner(gramian, mask)),
    # Of some tasks less than what resolves the conflicts below, of others more.
    Case("dual_cone", solvers.dual_cone, (np.array([0.1, 0.3, 0.0, 2.0, 0.0], np.float32),)),
    Case("cagrad_dual", solvers.cagrad_dual, (0.5,)),
    Case("alpha_fair", solvers.alpha_fair, (2.0,), power=-2 / 3),
    Case("nash_bargaining", solvers.nash_bargaining, power=-1 / 2),
    Case("priority_constrained", solvers.priority_constrained, (0.3,), given=1, splits=True),
]
JITTED = {case.name: jax.jit(case.solve) for case in CASES}
# Where one solution is the best, so that weights can be compared.
MATRICES = problems.gramians(5, count=4, kinds=("generic", "norms over 1e3"))
NEAR_DUPLICATES = problems.gramians(5, count=2, kinds=("near-duplicates",))
SOME = np.array([True, False, True, True, False])


@pytest.fixture(params=CASES, ids=[case.name for case in CASES])
def case(request):
    return request.param


def solved(case, matrix, *arguments, mask=None):
    mask = np.ones(5, bool) if mask is None else mask
    return np.asarray(JITTED[case.name](matrix, *(arguments or case.arguments), mask=mask))


def matrices(case):
    return MATRICES if case.splits else np.concatenate([MATRICES, NEAR_DUPLICATES])


def assert_close(found, expected, matrix):
    """In lengths of the weighted gradients, over the longest: two dozen roundings, which the condition multiplies."""
    lengths = np.sqrt(np.diag(matrix))
    np.testing.assert_allclose(lengths * found, lengths * expected, rtol=0, atol=3e-6 * np.max(lengths * expected))


def test_masked_is_the_smaller_problem(case):
    matrix = np.where(SOME[:, None] & SOME, MATRICES[0], np.nan).astype(np.float32)
    absent_nan = [np.where(SOME, x, np.nan).astype(np.float32) if np.ndim(x) else x for x in case.arguments]
    weights = solved(case, matrix, *absent_nan, mask=SOME)
    np.testing.assert_array_equal(weights[~SOME], 0)
    smaller, present = matrix[SOME][:, SOME], [x[SOME] if np.ndim(x) else x for x in case.arguments]
    assert_close(weights[SOME], np.asarray(JITTED[case.name](smaller, *present)), smaller)
    np.testing.assert_array_equal(solved(case, matrix, *absent_nan, mask=np.zeros(5, bool)), 0)


@pytest.mark.by_default("dual_cone", "cagrad_dual", "nash_bargaining")
def test_vmap_over_all_that_may_be_traced_is_a_loop(case):
    inputs = matrices(case)
    arguments = [np.stack([(0.5 + i / 2) * x for i in range(len(inputs))]).astype(np.float32) for x in case.arguments]
    mapped = jax.jit(jax.vmap(case.solve))(inputs, *arguments)
    for i, weights in enumerate(np.asarray(mapped)):
        assert_close(weights, solved(case, inputs[i], *(x[i] for x in arguments)), inputs[i])


@pytest.mark.parametrize("factor", [1e-20, 2.0**-60, 1e20])
def test_scale_comes_out(case, factor):
    for matrix in matrices(case):
        weights = solved(case, np.float32(factor) * matrix)
        assert_close(weights, factor**case.power * solved(case, matrix), matrix)


def test_what_is_not_finite_shows(case):
    for place, value in ((1, slice(None)), np.nan), ((0, 1), np.nan), ((1, 1), np.inf):
        matrix = np.eye(5, dtype=np.float32)
        matrix[place] = matrix.T[place] = value
        assert np.all(np.isnan(solved(case, matrix)[case.given :])), (place, value)
    for i, argument in enumerate(case.arguments):
        poisoned = list(case.arguments)
        poisoned[i] = np.where(SOME, argument, np.nan).astype(np.float32) if np.ndim(argument) else np.nan
        assert np.all(np.isnan(solved(case, MATRICES[0], *poisoned)[case.given :]))


@pytest.mark.by_default("dual_cone", "cagrad_dual", "nash_bargaining")
def test_float64_is_kept(case):
    """Each solver's own file asks for the digits."""
    weights = problems.in_float64(JITTED[case.name], MATRICES[0], *map(np.array, case.arguments))
    assert weights.dtype == np.float64
    assert_close(solved(case, MATRICES[0]), weights, MATRICES[0])


def test_float32_is_kept_where_float64_is_the_default(case):
    with jax.enable_x64(True):
        assert jax.eval_shape(case.solve, jax.ShapeDtypeStruct((5, 5), np.float32), *case.arguments).dtype == np.float32


def test_no_dtype_is_promoted(case):
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(case.solve, MATRICES[0], *case.arguments)


def test_a_second_bare_call_compiles_nothing(case):
    first, second = map(jnp.asarray, MATRICES[:2])
    case.solve(first, *case.arguments)
    with recorded() as events:
        weights = case.solve(second, *case.arguments)
    assert traces(events) == compilations(events) == 0
    assert_close(weights, solved(case, MATRICES[1]), MATRICES[1])


def test_exports_without_callbacks(case):
    exported = jax.export.export(JITTED[case.name], platforms=["cpu", "cuda", "tpu"])(MATRICES[0], *case.arguments)
    assert not re.search(r"custom_call @\S*callback", exported.mlir_module())
