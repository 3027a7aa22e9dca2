"""What each method does with one bad value, found by calling it: the tables of ``docs/numerics.md``, which it writes.

python -m tests.bad_values
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtlbalance as mtl
from tests.catalogue import AGGREGATORS, SCALARIZERS
from tests.conformance.helpers import Built, scalar_and_gradient
from tests.pages import DOCS

PAGE = DOCS / "numerics.md"
LOSSES = np.array([1.0, 0.5, 2.0], np.float32)
ROWS = np.array([[1.0, 0.2, 0.0, 0.1], [-0.3, 0.9, 0.4, 0.0], [0.1, -0.4, 1.5, 0.6]], np.float32)
BAD, OTHERS = 1, [0, 2]
PRESENT = np.arange(3) != BAD
N_BEFORE, N_AFTER = 4, 20  # calls, of which each second one ends an epoch; the bad one is in the midst of one
OF_LOSSES = ["loss 0", "loss below 0", "loss NaN, ∞: state"]
TABLES = {"scalarization": OF_LOSSES, "aggregation": ["gradient 0", "gradient NaN, ∞: state", *OF_LOSSES]}


class Trial:
    """A method that has seen a few ordinary calls, and what it does in the next one."""

    def __init__(self, case, family):
        method = case.make()
        learned = lambda: mtl.learn(method, optax.sgd(0.01))
        self.built = Built(case._replace(make=learned) if method.learned else case, family)
        self.method, self.reads_losses = self.built.method, self.built.is_scalarizer or case.reads_losses
        self.state = self.method.init(3 if self.built.is_scalarizer else (3, ROWS.shape[1]))
        for i in range(N_BEFORE):
            falling = np.array([0.9, 0.95, 0.93], np.float32) ** i
            _, self.state = self.step(self.state, falling * LOSSES, falling[:, None] * ROWS, ends_epoch=i % 2 == 0)

    def step(self, state, losses=LOSSES, rows=ROWS, mask=None, ends_epoch=False):
        """The output, of a scalarizer with its weights, and the next state."""
        if self.built.is_scalarizer:
            (scalar, state), weights = scalar_and_gradient(self.method)(state, losses, mask=mask)
            output, state = (scalar, weights), self.built.hooks(state, losses, mask, ends_epoch=ends_epoch)
        else:
            output, state = self.method.apply(state, rows, values=losses if self.reads_losses else None, mask=mask)
            state = self.method.end_epoch(state) if ends_epoch else state
        return jax.device_get((output, state))

    def weights(self, losses):
        """Those of these losses and ordinary gradients."""
        if self.built.is_scalarizer:
            return self.step(self.state, losses)[0][1]
        return np.asarray(self.method.weighting.apply(self.state, ROWS, values=losses)[0])

    def of_loss(self, value):
        """The weight of a task with this loss, beside what it is with an ordinary one."""
        weights, ordinary = self.weights(with_bad(value)[0]), self.weights(LOSSES)
        if not np.all(np.isfinite(weights)):
            return "NaN"
        if not np.any(weights):
            return "all weights 0"
        if weights[BAD] == 0:
            return "weight 0"
        if np.max(np.abs(weights[OTHERS])) < 1e-3 * np.abs(weights[BAD]):
            return "all the weight"
        if np.isclose(weights[BAD], ordinary[BAD], rtol=1e-3):
            return "as any other"
        return "less weight" if weights[BAD] < ordinary[BAD] else "more weight"

    def of_zero_gradient(self):
        """What becomes of the gradient, beside that of the others alone."""
        found, _ = self.step(self.state, rows=with_bad(0.0)[1])
        alone, _ = self.step(self.state, mask=PRESENT)
        length = np.linalg.norm(found)
        if not np.isfinite(length):
            return "NaN"
        if length < 1e-3:
            return "the result is 0"
        if not np.isclose(found @ alone, length * np.linalg.norm(alone), rtol=1e-5):
            return "counts"
        if np.isclose(length, np.linalg.norm(alone), rtol=1e-3):
            return "left out"
        return "shorter" if length < np.linalg.norm(alone) else "longer"

    def after(self, **bad):
        """The state after a call with something in it that is not finite, and then after ordinary ones."""
        _, state = self.step(self.state, **bad)
        was_finite = all_finite(state)
        _, untouched = self.step(self.state)
        for i in range(N_AFTER):
            output, state = self.step(state, ends_epoch=i % 2 == 1)
            expected, untouched = self.step(untouched, ends_epoch=i % 2 == 1)
        if not all_finite((output, state)):
            return "NaN for good"
        is_alike = all(np.allclose(x, y, rtol=0.1) for x, y in in_pairs(output, expected))
        return ("finite" if is_alike else "not forgotten") if was_finite else "heals"

    def after_nan_or_infinity(self, of_losses):
        """The same in one word, or in one for NaN and one for infinity."""
        words = []
        for value in np.nan, np.inf:
            losses, rows = with_bad(value)
            words.append(self.after(losses=losses) if of_losses else self.after(rows=rows))
        return words[0] if words[0] == words[1] else ", ".join(words)

    def shows_nan(self):
        """Whether the output shows a gradient that is not finite, and a loss, if it is read, each alone."""
        losses, rows = with_bad(np.nan)
        bad = [{"losses": losses}] if self.reads_losses else []
        bad += [] if self.built.is_scalarizer else [{"rows": rows}]
        return not any(all_finite(self.step(self.state, **given)[0]) for given in bad)

    def leaves_out_the_absent(self):
        """Whether what stands there for an absent task changes nothing, and nothing of its own changes."""
        losses, rows = with_bad(np.nan)
        found, state = self.step(self.state, losses, rows, PRESENT)
        expected, _ = self.step(self.state, mask=PRESENT)
        own = [(x[BAD], y[BAD]) for x, y in in_pairs(state, self.state) if x.shape[:1] == (3,)]
        return all_finite(found) and all(np.array_equal(x, y) for x, y in [*in_pairs(found, expected), *own])


def with_bad(value):
    """The losses and the rows with ``value`` in the bad task's place."""
    losses, rows = LOSSES.copy(), ROWS.copy()
    losses[BAD], rows[BAD] = value, value
    return losses, rows


def in_pairs(one, other):
    return zip(*([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other)), strict=True)


def all_finite(tree):
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return all(np.all(np.isfinite(leaf)) for leaf in leaves)


def row(trial):
    """The cells of a method's row, but for its name."""
    losses = [trial.of_loss(0.0), trial.of_loss(-0.5)] if trial.reads_losses else ["not read"]
    if trial.built.is_scalarizer:
        return [*losses, trial.after_nan_or_infinity(of_losses=True)]
    after = [trial.after_nan_or_infinity(of_losses=True)] if trial.reads_losses else ["", ""]
    return [trial.of_zero_gradient(), trial.after_nan_or_infinity(of_losses=False), *losses, *after]


def cases_of(family):
    """The rows of the catalogue that are public methods themselves, by name."""
    cases = {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}[family]
    public = {info.name for info in mtl.methods() if info.family == family}
    return {case.name: case for case in cases if case.name in public}


def trials(family):
    """Of every public method, by name."""
    return {name: Trial(case, family) for name, case in cases_of(family).items()}


def table(family, trials):
    """The lines of a family's table."""
    cells = [[f"`{family}`", *TABLES[family]], ["---"] * (1 + len(TABLES[family]))]
    cells += [[f"`{name}`", *row(trial)] for name, trial in trials.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def with_table(text, family, new):
    """The page's text with the family's table replaced."""
    before, _, rest = text.partition(f"| `{family}` |")
    return before + new + rest[rest.index("\n\n") :]


if __name__ == "__main__":
    jax.config.update("jax_disable_most_optimizations", True)  # the words are the same, in half the time
    for family in TABLES:
        PAGE.write_text(with_table(PAGE.read_text(), family, table(family, trials(family))))
