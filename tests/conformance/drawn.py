"""Random calls of any method: what hypothesis draws, and the arrays and the verdict that follow from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import mtlbalance as mtl
from tests.catalogue import ADAM_BEARS
from tests.conformance.helpers import scalar_and_gradient

MOST_TASKS = 64
LONGEST = 1e16  # the longest gradient that is finite for `skip_nonfinite`: of longer ones a million squares overflow

# Their gradients are taken times one over the loss, and must be short enough then; a guard around a chain does not see
# that, as its docstring says.
OVER_LOSSES = "chain-log-db_mtl", "amortize-chain-log-mgda"

# Decades of the losses and of the lengths of rows.
SPANS = (0, 0), (-1, 1), (-6, 6), (-30, 15), (13, 15.5), (-30, -18), (15, 20), (-30, 30), (28, 30)
VALUES = {"zero": 0.0, "nan": np.nan, "inf": np.inf, "-inf": -np.inf}
FROM_THE_TASK_BEFORE = {"equal": 1.0, "opposite": -1.0}


class Drawn(NamedTuple):
    """One call of a training loop; what is not said here comes from the seed.

    Attributes:
      seed: of directions, signs and who is absent.
      span: the decades of the magnitudes, uniform between these two.
      marks: tasks that are zero or not finite, or like the one before, as pairs of an index, modulo the number of
        tasks, and a word.
      n_absent: of 64; of fewer tasks the same part.
      signed: whether losses have signs.
      ends_epoch: whether an epoch ends after it.
    """

    seed: int
    span: tuple[float, float] = (0, 0)
    marks: tuple[tuple[int, str], ...] = ()
    n_absent: int = 0
    signed: bool = False
    ends_epoch: bool = False


# Two of three calls have no number that is not finite, one of two nobody absent.
_TAME, _ANY = ["zero", *FROM_THE_TASK_BEFORE], [*VALUES, *FROM_THE_TASK_BEFORE]
_marks = lambda words: st.lists(st.tuples(st.integers(0, MOST_TASKS - 1), st.sampled_from(words)), max_size=3)
_one_call = st.builds(
    Drawn,
    seed=st.integers(0, 2**31 - 1),
    span=st.sampled_from(SPANS),
    marks=st.one_of(st.just([]), _marks(_TAME), _marks(_ANY)).map(tuple),
    n_absent=st.one_of(st.just(0), st.integers(0, MOST_TASKS)),
    signed=st.booleans(),
    ends_epoch=st.booleans(),
)
calls = st.lists(_one_call, min_size=1, max_size=3)


class Call(NamedTuple):
    """The arrays of one call; losses, and for an aggregator a Jacobian too."""

    losses: np.ndarray
    jacobian: dict | np.ndarray | None
    mask: np.ndarray

    def with_absent(self, value):
        """The same with ``value`` wherever a task is absent."""

        def leaf(x):
            x = x.copy()
            x[~self.mask] = value
            return x

        return self._replace(losses=leaf(self.losses), jacobian=jax.tree.map(leaf, self.jacobian))

    def lengths(self):
        """Of the rows of the Jacobian; zeros for a scalarizer."""
        leaves = [np.reshape(leaf, (len(self.mask), -1)).astype(float) for leaf in jax.tree.leaves(self.jacobian)]
        return np.linalg.norm(np.concatenate(leaves, axis=1), axis=1) if leaves else np.zeros(len(self.mask))


class Form:
    """A case of the catalogue for so many tasks, losses or rows of some shape and dtype, alone or under a guard."""

    def __init__(self, built, n_tasks, params, dtype, guarded=False):
        self.case, self.is_scalarizer = built.case, built.is_scalarizer
        self.n_tasks, self.params, self.dtype, self.guarded = n_tasks, params, dtype, guarded
        self.make = lambda: (guard if guarded else lambda method: method)(built.method_for(jnp.arange(n_tasks)))
        self.method, self.over_losses = self.make(), built.case.name in OVER_LOSSES
        # Under the guard a learned method is trained by Adam.
        self.largest = min(built.case.largest, ADAM_BEARS if guarded and built.method.learned else np.inf)

    def init(self):
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, self.dtype), self.params)
        return self.method.init(self.n_tasks if self.is_scalarizer else (self.n_tasks, params))

    def call(self, drawn):
        """The arrays that a drawn call stands for."""
        rng, n = np.random.default_rng(drawn.seed), self.n_tasks
        present = rng.permutation(n) >= drawn.n_absent * n // MOST_TASKS
        losses = self._magnitudes(rng, drawn.span) * (rng.choice([-1, 1], n) if drawn.signed else 1)
        if self.is_scalarizer:
            return Call(self._cast(marked(losses, drawn.marks)), None, present)
        sizes = self._magnitudes(rng, drawn.span)
        row = lambda p: sizes.reshape(-1, *[1] * len(p.shape)) * rng.normal(size=(n, *p.shape))
        jacobian = jax.tree.map(lambda p: self._cast(marked(row(p), drawn.marks)), self.params)
        # Gradients and losses need not be bad together; losses of a model in float16 are in float32 at best.
        return Call(np.abs(losses).astype(np.float32), jacobian, present)

    def _magnitudes(self, rng, span):
        return 10.0 ** rng.uniform(*span, self.n_tasks)

    def _cast(self, x):
        largest = limit(self.dtype)
        return np.where(np.isfinite(x), np.clip(x, -largest, largest), x).astype(self.dtype)

    def step(self, state, call, ends_epoch, method=None):
        """What a step of a training loop gives, by name, and the new state."""
        method, mask = method or self.method, call.mask
        if self.is_scalarizer:
            (scalar, state), weights = scalar_and_gradient(method)(state, call.losses, mask=mask)
            output = {"scalar": scalar, "weights": weights}
            # Serves as the losses after an optimizer's step, and as DTP's indicator from 0 to 1.
            with np.errstate(invalid="ignore"):
                state = method.observe(state, np.abs(call.losses) / (1 + np.abs(call.losses)), mask=mask)
        else:
            values = call.losses if self.case.reads_losses else None
            what, path = ("weights", method.weighting) if self.guarded and self.case.total else ("gradient", method)
            found, state = path.apply(state, call.jacobian, values=values, mask=mask)
            output = {what: found}
        return output, method.end_epoch(state) if ends_epoch else state

    def is_meant_for(self, call):
        """Whether the inputs of a call are finite and within what the method says that it takes."""
        losses = call.losses[call.mask].astype(float)
        reads = self.is_scalarizer or self.case.reads_losses
        if reads and not np.all(np.abs(losses) <= self.largest):
            return False
        if self.is_scalarizer and self.case.needs_positive and np.any(losses < 0):
            return False
        lengths = call.lengths()[call.mask]
        if self.over_losses and np.any(lengths / np.where(losses == 0, 1, losses) > min(LONGEST, limit(self.dtype))):
            return False
        return bool(np.all(lengths <= LONGEST))

    def remembers_too_much(self, state):
        """Whether gradients beyond what a method is meant for are remembered: under a guard each row by itself."""
        return not self.is_scalarizer and any(np.any(np.abs(x) > LONGEST) for x in floats(state))

    def is_representable(self, state, call, ends_epoch):
        """Whether the same call in float64 gives numbers that float32, or a narrower gradient, can hold."""
        with jax.enable_x64(True):
            double = lambda x: np.asarray(x, float) if jnp.issubdtype(x.dtype, jnp.floating) else x
            wide = Call(*jax.tree.map(double, call[:2]), call.mask)
            output, new_state = self.step(jax.tree.map(double, state), wide, ends_epoch, self.make())
        # A scalar is in float32 at least, its gradient as narrow as the losses.
        dtypes = {"scalar": np.float32, "weights": self.dtype, "gradient": self.dtype}
        return all(holds(dtypes[name], x) for name, x in output.items()) and holds(np.float32, new_state)


def guard(method):
    """The method under ``skip_nonfinite``, with what is learned inside ``learn``."""
    return mtl.skip_nonfinite(mtl.learn(method, optax.adam(0.1)) if method.learned else method)


def marked(x, marks):
    """An array with a task axis in which some tasks are as marked."""
    for index, word in marks:
        i = index % len(x)
        x[i] = FROM_THE_TASK_BEFORE[word] * x[i - 1] if word in FROM_THE_TASK_BEFORE else VALUES[word]
    return x


def floats(tree):
    """The leaves that are no counts or keys."""
    return [np.asarray(x) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def holds(dtype, tree):
    return all(np.all(np.abs(x) < limit(dtype)) for x in floats(tree))


def limit(dtype):
    return float(jnp.finfo(dtype).max)


def all_finite(tree):
    return all(np.all(np.isfinite(x)) for x in floats(tree))
