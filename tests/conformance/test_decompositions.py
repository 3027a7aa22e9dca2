"""Decompositions side by side may wait for each other on a CPU (``mtlbalance.decompositions``): no method has two."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from mtlbalance import aggregation

pytestmark = pytest.mark.unoptimized

DECOMPOSE = {"cholesky", "eig", "eigh", "geqrf", "householder_product", "lu", "svd", "triangular_solve"}
CALLS = {"jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "custom_vmap_call", "remat"}


def side_by_side(program):
    """The pairs of decompositions in a program of which neither needs what the other one gives."""
    names, needs = [], []

    def walk(jaxpr, needed_by_inputs):
        """The decompositions that each output needs; of loops and branches, which are one after the other, all."""
        known = dict(zip(jaxpr.invars, needed_by_inputs, strict=True))
        of = lambda x: known.get(x, set()) if isinstance(x, core.Var) else set()
        for eqn in jaxpr.eqns:
            given = set().union(*map(of, eqn.invars))
            inside = [x for x in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_program) if is_program(x)]
            bodies = [getattr(x, "jaxpr", x) for x in inside]
            if eqn.primitive.name in CALLS and len(bodies) == 1:
                outputs = walk(bodies[0], map(of, eqn.invars))
            else:
                if eqn.primitive.name in DECOMPOSE:
                    names.append(eqn.primitive.name)
                    needs.append(given)
                    given = given | {len(needs) - 1}
                for body in bodies:
                    given = given.union(*walk(body, [given] * len(body.invars)))
                outputs = [given] * len(eqn.outvars)
            known |= zip(eqn.outvars, outputs, strict=True)
        return [of(x) for x in jaxpr.outvars]

    walk(program.jaxpr, [set()] * len(program.jaxpr.invars))
    pairs = itertools.combinations(range(len(needs)), 2)
    return [(names[a], names[b]) for a, b in pairs if a not in needs[b]]


def is_program(x):
    return isinstance(x, core.ClosedJaxpr | core.Jaxpr)


def test_two_decompositions_are_found_where_they_are():
    both = lambda x: jnp.linalg.eigh(x)[1] + jnp.linalg.cholesky(x)
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, jnp.linalg.cholesky, lambda x: jnp.linalg.eigh(x)[1], x)
    one, batch = jnp.eye(2), jnp.ones((3, 2, 2))
    assert side_by_side(jax.make_jaxpr(both)(one)) == [("eigh", "cholesky")]
    assert side_by_side(jax.make_jaxpr(lambda x: both(both(x)))(one)) == [("eigh", "cholesky")] * 2
    assert not side_by_side(jax.make_jaxpr(branches)(one))
    assert len(side_by_side(jax.make_jaxpr(jax.vmap(branches))(batch))) == 1  # both run


def test_a_sweep_of_any_size_is_exported():
    method = aggregation.imtl_g()
    sweep = jax.vmap(lambda rows: method.apply(method.init((3, 5)), rows)[0])
    shape = jax.export.symbolic_shape("n, 3, 5")
    exported = jax.export.export(jax.jit(sweep))(jax.ShapeDtypeStruct(shape, jnp.float32))
    rows = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(exported.call(rows), sweep(rows), rtol=1e-4, atol=1e-5)


def test_no_two_decompositions_stand_side_by_side(aggregator):
    """In a sweep, in which some lack a task. Scalarizers decompose nothing, nor does the engine."""
    step = lambda x, present: aggregator.step(aggregator.init(), x, mask=present)
    assert not side_by_side(jax.make_jaxpr(jax.vmap(step))(aggregator.stack(2), np.ones((2, 3), bool)))
