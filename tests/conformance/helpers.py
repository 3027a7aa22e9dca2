"""A method of the catalogue built once, and inputs of either family, so that one check serves both."""

import jax
import jax.numpy as jnp
import pytest

import mtlbalance as mtl

PARAMS = {
    "dense": {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32), "b": jax.ShapeDtypeStruct((8,), jnp.float32)},
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}


SAME = {"rtol": 1e-5, "atol": 1e-6}  # one computation compiled in two ways, in float32


class Built:
    """A case of the catalogue with its method built, and inputs for it."""

    def __init__(self, case, family):
        self.case, self.family = case, family
        self.is_scalarizer = family == "scalarization"
        self.method = case.make()

    def method_for(self, tasks):
        """The method for some of the tasks alone, in that order."""
        if len(jnp.ravel(tasks)) < self.case.fewest_tasks:
            pytest.skip("refuses so few tasks")
        return self.case.make(tasks=tasks) if self.case.per_task else self.method

    def init(self, method=None, n_tasks=3, params=PARAMS):
        return (method or self.method).init(n_tasks if self.is_scalarizer else (n_tasks, params))

    def step(self, state, x, mask=None, method=None, ends_epoch=True):
        """A step of a training loop: ``apply``, ``observe`` and, after the last one of an epoch, ``end_epoch``."""
        method = method or self.method
        output, state = method.apply(state, x, mask=mask)
        if self.is_scalarizer:
            # Serves as the losses after an optimizer's step, and as DTP's indicator from 0 to 1.
            state = method.observe(state, jnp.abs(x) / (1 + jnp.abs(x)), mask=mask)
        return output, method.end_epoch(state) if ends_epoch else state

    def sample(self, seed, n_tasks=3, dtype=jnp.float32):
        """Losses that span two orders of magnitude, or a Jacobian tree whose rows do."""
        scale_key, *keys = jax.random.split(jax.random.key(seed), 4)
        scale = jnp.exp(jax.random.normal(scale_key, (n_tasks,)))
        if self.is_scalarizer:
            return scale.astype(dtype)
        leaves, treedef = jax.tree.flatten(PARAMS)
        rows = [jax.random.normal(k, (n_tasks, *p.shape)) for k, p in zip(keys, leaves, strict=True)]
        return treedef.unflatten([(scale.reshape(-1, *[1] * (row.ndim - 1)) * row).astype(dtype) for row in rows])

    def stack(self, n_steps, seed=0, **kwargs):
        """Inputs of several steps along a leading axis."""
        samples = [self.sample(seed + i, **kwargs) for i in range(n_steps)]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *samples)

    def restrict(self, x, tasks):
        """The same inputs of some tasks only."""
        return jax.tree.map(lambda leaf: leaf[tasks], x)

    def restrict_state(self, state, tasks):
        """The part of a state that belongs to some of three tasks."""

        def leaf(x):
            x = x[tasks] if x.shape[:1] == (3,) else x
            return x[:, tasks] if x.shape[1:] == (3,) else x

        return jax.tree.map(leaf, state)

    def poison(self, x, mask, value):
        """The same inputs with ``value`` wherever a task is absent."""
        return jax.tree.map(lambda leaf: jnp.where(mtl.inputs.rows(mask, leaf), leaf, value), x)


def by_rows(aggregator, state, x, mask=None):
    """The rowwise path as an engine runs it: visits in a loop, then the weights."""
    visit = lambda state, ix: aggregator.method.rowwise.visit(state, *ix, mask=mask)
    state, statistics = jax.lax.scan(visit, state, (jnp.arange(3), x))
    return aggregator.method.rowwise.weigh(state, statistics, mask=mask)
