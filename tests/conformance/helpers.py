"""A method of the catalogue built once, and inputs of either family, so that one check serves both."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

import mtlbalance as mtl
from mtlbalance import wrappers

PARAMS = {
    "dense": {"w": jax.ShapeDtypeStruct((4, 16), jnp.float32), "b": jax.ShapeDtypeStruct((8,), jnp.float32)},
    "scale": jax.ShapeDtypeStruct((), jnp.float32),
}

CHANGES_WEIGHTS = wrappers.TransformWeightsState, wrappers.PrioritizeState, wrappers.RegularizeState

SAME = {"rtol": 1e-5, "atol": 1e-6}  # one computation compiled in two ways, in float32


class Built:
    """A case of the catalogue with its method built, and inputs for it."""

    def __init__(self, case, family):
        self.case, self.family = case, family
        self.is_scalarizer = family == "scalarization"
        self.method = case.make()

    @functools.cached_property
    def paths(self):
        """What the engine and the boundary can tell of a method: the ways it offers."""
        rowwise = getattr(self.method, "rowwise", None)
        ways = {
            "weighting": getattr(self.method, "weighting", None),
            "gramian_weighting": getattr(self.method, "gramian_weighting", None),
            **(rowwise._asdict() if rowwise else {}),
            "jacobian_shaped": self.method.jacobian_shaped,
            "last_weights": self.method.last_weights,
            "learned": self.method.learned,
        }
        return self.family, *(name for name, has in ways.items() if has)

    @functools.cached_property
    def kind(self):
        """The paths, the hooks that do something, and whether the weights depend on the losses.

        Or, for a wrapper, which one, and whether a state shaped like the Jacobian is in it; those that change the
        weights are one.
        """
        state = jax.eval_shape(self.init)
        if any(isinstance(field, tuple) for field in state):  # another method's state, or those of several
            wrapper = CHANGES_WEIGHTS if isinstance(state, CHANGES_WEIGHTS) else type(state)
            return self.family, wrapper, bool(self.method.jacobian_shaped)
        more = {
            "end_epoch": jax.make_jaxpr(self.method.end_epoch)(state).eqns,
            "observe": jax.make_jaxpr(self.method.observe)(state, np.ones(3, np.float32)).eqns,
            "nonlinear": self.case.nonlinear,
        }
        return *self.paths, *(name for name, has in more.items() if has)

    def method_for(self, tasks):
        """The method for some of the tasks alone, in that order, or for tasks with names."""
        return self.case.make(tasks=tasks) if self.case.per_task else self.method

    def init(self, method=None, n_tasks=3, params=PARAMS):
        return (method or self.method).init(n_tasks if self.is_scalarizer else (n_tasks, params))

    def losses(self, x):
        """Losses that belong to a Jacobian, for the aggregators that read them; ``None`` for the others."""
        return 0.5 + abs(x["scale"].astype(np.float32)) if self.case.reads_losses else None

    def apply(self, state, x, mask=None, method=None):
        """``apply`` with the losses, where the method reads them."""
        method = method or self.method
        if self.is_scalarizer:
            return method.apply(state, x, mask=mask)
        return method.apply(state, x, values=self.losses(x), mask=mask)

    def step(self, state, x, mask=None, method=None, ends_epoch=True):
        """A step of a training loop: ``apply``, ``observe`` and, after the last one of an epoch, ``end_epoch``."""
        output, state = self.apply(state, x, mask, method)
        return output, self.hooks(state, x, mask, method, ends_epoch)

    def hooks(self, state, x, mask=None, method=None, ends_epoch=True):
        """What a training loop calls between one ``apply`` and the next."""
        method = method or self.method
        if self.is_scalarizer:
            # Serves as the losses after an optimizer's step, and as DTP's indicator from 0 to 1.
            state = method.observe(state, jnp.abs(x) / (1 + jnp.abs(x)), mask=mask)
        return method.end_epoch(state) if ends_epoch else state

    def sample(self, seed, n_tasks=3, dtype=jnp.float32):
        """Losses that span two orders of magnitude, or a Jacobian tree whose rows do."""
        rng = np.random.default_rng([seed, n_tasks])
        cast = lambda x: jnp.array(np.asarray(x, dtype))  # unlike `asarray` it compiles nothing
        scale = np.exp(rng.normal(size=n_tasks))
        if self.is_scalarizer:
            return cast(scale)
        row = lambda p: cast(scale.reshape(-1, *[1] * len(p.shape)) * rng.normal(size=(n_tasks, *p.shape)))
        return jax.tree.map(row, PARAMS)

    def stack(self, n_steps, seed=0, **kwargs):
        """Inputs of several steps along a leading axis."""
        samples = [self.sample(seed + i, **kwargs) for i in range(n_steps)]
        return jax.tree.map(lambda *xs: jnp.array(np.stack(xs)), *samples)

    def restrict(self, x, tasks):
        """The same inputs of some tasks only."""
        return jax.tree.map(lambda leaf: np.asarray(leaf)[tasks], x)

    def restrict_state(self, state, tasks):
        """The part of a state that belongs to some of three tasks."""

        def leaf(x):
            x = np.asarray(x)
            x = x[tasks] if x.shape[:1] == (3,) else x
            return x[:, tasks] if x.shape[1:] == (3,) else x

        return jax.tree.map(leaf, state)

    def poison(self, x, mask, value):
        """The same inputs with ``value`` wherever a task is absent."""

        def leaf(x):
            x = np.array(x)
            x[~np.asarray(mask)] = value
            return x

        return jax.tree.map(leaf, x)


@functools.cache
def scalar_and_gradient(method):
    """As in training: a scalar, the new state and the scalar's gradient from one program."""
    return jax.jit(jax.value_and_grad(method.apply, argnums=1, has_aux=True))


def assert_path_agrees(aggregator, path, state, x, mask=None):
    """The gradient and the new state by another way than ``apply`` itself."""
    method, given = aggregator.method, {"values": aggregator.losses(x), "mask": mask}
    if path == "weighting":
        found, new_state = method.weighting.apply(state, x, **given)
    elif path == "gramian_weighting":
        found, new_state = method.gramian_weighting.apply(state, mtl.gramian.gramian(x), **given)
    else:
        found, new_state = by_rows(method.rowwise, state, x, given)
    if path != "rowwise" or method.rowwise.weigh is not None:
        assert mask is None or np.all(np.where(mask, 0, found) == 0)
        found = mtl.gramian.combine(found, x if mask is None else aggregator.poison(x, mask, 0.0))
    expected = aggregator.apply(state, x, mask=mask)
    chex.assert_trees_all_close((found, new_state), expected, **SAME)
    return new_state


@functools.partial(jax.jit, static_argnums=0)
def by_rows(rowwise, state, x, given):
    """As an engine runs it: visits in a loop, then the weights or the gradient."""
    indices = jnp.arange(3) if rowwise.visits is None else rowwise.visits(state, mask=given["mask"])
    rows = jax.tree.map(lambda leaf: leaf[indices], x)
    state, visited = jax.lax.scan(lambda state, ix: rowwise.visit(state, *ix, **given), state, (indices, rows))
    statistics = jax.tree.map(lambda s: jnp.zeros((3, *s.shape[1:]), s.dtype).at[indices].set(s), visited)
    return (rowwise.weigh or rowwise.finish)(state, statistics, **given)
