"""Do these losses need balancing? What a few batches say, before a method is chosen."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance.annotations import ArrayTree
from mtlbalance.diagnostics.evidence import (
    angle,
    collect,
    combined,
    is_below,
    is_beyond,
    mean_and_error,
    pairs,
    relative_differences,
)
from mtlbalance.losses import like_losses

LEVEL = 0.01  # the chance that noise alone is taken for anything, all comparisons together
FACTOR = 2.0  # tasks closer than that need no balancing
ORTHOGONAL = 0.05  # cosines nearer to 0 are no conflict
OPPOSITE = -0.9
SAME = 1e-3
SMALL_TURN = 5  # degrees
MOST_PAIRS = 6  # in the table
SUM = "the plain sum, scalarization.sum()"


class Estimate(NamedTuple):
    """A mean over batches.

    Attributes:
      mean: NaN if there is none.
      error: its standard error; NaN for fewer than two batches.
    """

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.error:.1g}"


class Audit(NamedTuple):
    """What :func:`audit` found, by the tasks' names; ``"a/b"`` is a pair of tasks. ``print`` shows it as a table.

    Attributes:
      n_batches: how many batches there were.
      loss: of each task.
      norm: of each task's gradient.
      cosine: between the gradients of each pair.
      cosine_with: of each task's gradient with the combined one: of the ``"sum"``, of the sum with ``weights``,
        ``"fixed"``, and of ``"upgrad"``. Below 0 the task's loss rises in a small step.
      turned: by how many degrees ``"fixed"`` and ``"upgrad"`` turn the sum's gradient. NaN where that is zero.
      loss_ratios: of the larger to the smaller loss, ``"larger/smaller"``, where it is above 2 beyond noise; the
        largest first.
      norm_ratios: the same of the gradients' norms.
      conflicts: the cosines of the pairs in which it is negative beyond noise; the most negative first.
      identical: the pairs whose losses and gradients are the same.
      weights: fixed ones in the losses' structure, for :func:`mtlbalance.scalarization.constant`: with them all
        gradients have the same norm on average. Their mean is 1.
      findings: what was found beyond noise, in words.
      advice: the cheapest thing to try first, in words.
    """

    n_batches: int
    loss: dict[str, Estimate]
    norm: dict[str, Estimate]
    cosine: dict[str, Estimate]
    cosine_with: dict[str, dict[str, Estimate]]
    turned: dict[str, float]
    loss_ratios: dict[str, float]
    norm_ratios: dict[str, float]
    conflicts: dict[str, float]
    identical: tuple[str, ...]
    weights: Any
    findings: tuple[str, ...]
    advice: tuple[str, ...]

    def __str__(self) -> str:
        return _table(self)

    def __repr__(self) -> str:
        return _table(self)  # for notebooks


def audit(
    losses_fn: Callable[..., Any],
    params: ArrayTree,
    batches: Iterable[Any],
    *,
    has_aux: bool = False,
    task_axis: int | None = None,
) -> Audit:
    r"""Do these losses need balancing, and what is the cheapest thing to try? To be printed before the training.

    On each batch it takes the losses and the inner products of their gradients, and asks of every two tasks whether

    * one loss, or one gradient, is more than twice as large as the other: the mean of
      :math:`(x_i - x_j) / (x_i + x_j)` is beyond a third;
    * the gradients conflict: the mean of their cosine is below -0.05;

    by Student's t-test over the batches. The level is 1%, divided by the number of all comparisons: of a hundred audits
    of tasks that differ by noise alone one at most says otherwise. With fewer than eight batches that is not so for
    losses that vary a thousandfold from batch to batch, nor for a model of one parameter. What is found is so *at these
    parameters*: look again after some training. A batch that is always the same has no noise: give it three times.

    Then it asks what balancing would change: the angle between each task's gradient and the combined one, for the plain
    sum, for fixed weights that make the gradients equally long, and for a method without conflict.

    Args:
      losses_fn: ``losses_fn(params, batch)`` returns the losses, as for :func:`~mtlbalance.value_and_grad`. An absent
        task is a :class:`~mtlbalance.Counted` loss of count 0.
      params: the parameters. Heads of single tasks make every cosine smaller: fix them inside ``losses_fn``, and give
        the shared ones.
      batches: at least three, better ten, each as ``losses_fn`` takes it.
      has_aux: ``losses_fn`` returns a pair ``(losses, aux)``.
      task_axis: as in :func:`~mtlbalance.value_and_gramian`.

    Returns:
      An :class:`Audit`: its fields are the numbers, in Python's floats, and ``print`` shows them as a table.

    Raises:
      TypeError: as :func:`~mtlbalance.value_and_gramian`.
      ValueError: as :func:`~mtlbalance.value_and_gramian`; if there are fewer than three batches, or they have
        different tasks.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> def losses_fn(params, x):
      ...     speed, height = jnp.mean((jnp.tanh(x @ params) - 1) ** 2, axis=0)
      ...     return {"speed": speed, "height": 1000 * height}
      >>> batches = jax.random.normal(jax.random.key(0), (10, 64, 3))
      >>> found = mtl.audit(losses_fn, jnp.ones((3, 2)), batches)
      >>> print("\n".join(found.findings))
      the loss of height is 1e+03 times that of speed
      the gradient of height is 1e+03 times as long as that of speed
      >>> print(found.advice[0])
      fixed weights, scalarization.constant({'height': 0.002, 'speed': 2.0}): no state, no cost, gradients equally long
    """
    evidence, losses = collect(losses_fn, params, batches, has_aux=has_aux, task_axis=task_axis)
    names, indices = evidence.tasks, pairs(evidence.tasks)
    live = evidence.present & (evidence.norms > 0)
    together, both_live = (x[:, :, None] & x[:, None, :] for x in (evidence.present, live))
    level = LEVEL / max(3 * len(indices) + 2 * len(names), 1)  # Bonferroni: the tests below, and those for advice

    weights = _fixed_weights(evidence, live)
    candidates = {"sum": np.ones_like(weights), "fixed": weights, "upgrad": evidence.upgrad}
    cosines_with = {name: combined(evidence, w)[0] for name, w in candidates.items()}
    loses = {name: is_below(x, live, ORTHOGONAL, level) for name, x in cosines_with.items()}
    rising = {name: [task for task, rises in zip(names, x, strict=True) if rises] for name, x in loses.items()}

    cosine = _by_pair(evidence.cosines, both_live, names)
    opposed = is_below(evidence.cosines, both_live, ORTHOGONAL, level)
    conflicts = {pair: cosine[pair].mean for pair, (i, j) in zip(cosine, indices, strict=True) if opposed[i, j]}
    found = Audit(
        n_batches=len(evidence.losses),
        loss=_by_task(evidence.losses, evidence.present, names),
        norm=_by_task(evidence.norms, evidence.present, names),
        cosine=cosine,
        cosine_with={name: _by_task(x, live, names) for name, x in cosines_with.items()},
        turned={name: angle(evidence, candidates["sum"], candidates[name]) for name in ("fixed", "upgrad")},
        loss_ratios=_ratios(evidence.losses, together, level, names),
        norm_ratios=_ratios(evidence.norms, both_live, level, names),
        conflicts=dict(sorted(conflicts.items(), key=lambda item: item[1])),
        identical=_identical(evidence, together),
        weights=jax.tree.map(_rounded, like_losses(jnp.asarray(weights), losses)),
        findings=(),
        advice=(),
    )
    return found._replace(findings=_findings(found, evidence), advice=_advice(found, rising))


def _fixed_weights(evidence, live):
    """One over the norms, of mean 1; 1 for what has no gradient."""
    norms = np.nan_to_num(mean_and_error(evidence.norms, live)[0])
    inverse = np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0)
    return np.where(norms > 0, inverse / inverse.mean(where=norms > 0), 1) if norms.any() else np.ones_like(norms)


def _rounded(x):
    """As Python's floats, of as many digits as a weight is worth."""
    return np.vectorize(lambda weight: float(f"{weight:.3g}"))(x).tolist()


def _by_task(x, where, names):
    mean, error, _ = mean_and_error(x, where)
    return {name: Estimate(*map(float, of_task)) for name, *of_task in zip(names, mean, error, strict=True)}


def _by_pair(x, where, names):
    mean, error, _ = mean_and_error(x, where)
    return {f"{names[i]}/{names[j]}": Estimate(float(mean[i, j]), float(error[i, j])) for i, j in pairs(names)}


def _ratios(sizes, together, level, names):
    """Of the pairs in which one is more than twice as large as the other, the largest ratio first."""
    bound = (FACTOR - 1) / (FACTOR + 1)
    differ = is_beyond(relative_differences(sizes), together, bound, level)
    means = mean_and_error(np.abs(sizes)[:, :, None], together)[0]  # of i on the batches that have j too
    found = {}
    for i, j in pairs(names):
        if differ[i, j]:
            large, small = (i, j) if means[i, j] > means[j, i] else (j, i)
            ratio = means[large, small] / means[small, large] if means[small, large] else np.inf
            found[f"{names[large]}/{names[small]}"] = float(ratio)
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _identical(evidence, together):
    """The pairs that have the same losses and gradients on every batch."""
    same = (np.abs(relative_differences(x)) < SAME for x in (evidence.losses, evidence.norms))
    one_direction = (evidence.cosines > 1 - SAME) | (evidence.norms == 0)[:, :, None]
    everywhere = np.all(np.logical_and(*same) & one_direction | ~together, axis=0) & together.any(axis=0)
    return tuple(f"{evidence.tasks[i]}/{evidence.tasks[j]}" for i, j in pairs(evidence.tasks) if everywhere[i, j])


def _findings(found, evidence):
    n, findings = found.n_batches, []
    for i, task in enumerate(evidence.tasks):
        if n_lost := int(evidence.nonfinite[:, i].sum()):
            findings.append(
                f"the loss or gradient of {task} is not finite on {n_lost} of {n} batches; they do not count"
            )
        elif not evidence.present[:, i].any():
            findings.append(f"{task} is absent from all batches")
        elif not (evidence.norms * evidence.present)[:, i].any():
            findings.append(f"{task} has no gradient on any batch")
    for pair in found.identical:
        findings.append(
            "{} and {} are one task: losses and gradients agree on every batch".format(*_tasks(found, pair))
        )
    for ratios, sentence in (
        (found.loss_ratios, "the loss of {} is {:.3g} times that of {}"),
        (found.norm_ratios, "the gradient of {} is {:.3g} times as long as that of {}"),
    ):
        if ratios:
            pair, ratio = next(iter(ratios.items()))
            large, small = _tasks(found, pair)
            findings.append(sentence.format(large, ratio, small) + _more(ratios))
    if found.conflicts:
        pair, cosine = next(iter(found.conflicts.items()))
        sentence = "the gradients of {} and {} conflict: their cosine is {:.2f}"
        findings.append(sentence.format(*_tasks(found, pair), cosine) + _more(found.conflicts))
    if not (found.loss_ratios or found.norm_ratios or found.conflicts):
        nothing = "no loss or gradient is more than twice as large as another, and no two gradients conflict"
        findings.append(f"beyond the noise of {n} batches {nothing}")
    return tuple(findings)


def _tasks(found, pair):
    """The two names, each of which may have a slash."""
    return next((a, b) for a in found.loss for b in found.loss if f"{a}/{b}" == pair)


def _more(pairs_found):
    return f" ({len(pairs_found) - 1} more such pairs)" if len(pairs_found) > 1 else ""


def _advice(found, rising):
    """The first thing to try, and what may follow it."""
    turn, base = found.turned["fixed"], "sum"
    if found.norm_ratios and not turn < SMALL_TURN:
        first, base = f"fixed weights, scalarization.constant({found.weights}): no state, no cost", "fixed"
        first += ", gradients equally long"
    elif found.norm_ratios:
        first = f"{SUM}: fixed weights that make the gradients equally long would turn it by {turn:.0f} degrees only"
    elif found.loss_ratios:
        first = f"{SUM}: the losses differ in size, but it adds up gradients, and these do not"
    else:
        first = f"{SUM}: there is nothing here that balancing would change"
    if not found.conflicts:
        return (first,)
    pair, cosine = next(iter(found.conflicts.items()))
    if cosine < OPPOSITE:
        both = " and ".join(_tasks(found, pair))
        choice = f"a choice between {both}, which no method lowers together: several fixed weights, by jax.vmap"
        return (choice,) if len(found.loss) == 2 else (choice, first)
    if base == "sum" and not found.norm_ratios and not found.loss_ratios:
        first = f"{SUM}: the gradients are equally long"
    then = "then aggregation.upgrad(), with which no loss rises, at a backward pass per task"
    if rising[base]:
        return first, f"{then}: with the former {', '.join(rising[base])} would"
    return first, f"{then}; but with the former none does either: the tasks only slow each other down"


def _table(found):
    weights = np.concatenate([np.ravel(x) for x in jax.tree.leaves(found.weights)])
    columns = {"task": found.loss, "loss": found.loss.values(), "gradient norm": found.norm.values()}
    columns |= {f"with {name}": [f"{x.mean:.2f}" for x in of.values()] for name, of in found.cosine_with.items()}
    columns["fixed weight"] = [f"{weight:.3g}" for weight in weights]
    cells = [[title, *map(str, column)] for title, column in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    rows = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in zip(*cells, strict=True)]
    turn = {"fixed": "the fixed weights turn", "upgrad": "UPGrad turns"}
    turned = [f"{turn[name]} the sum's gradient by {x:.0f} degrees" for name, x in found.turned.items() if x >= 0]
    about = (
        f"{found.n_batches} batches, ± standard errors. `with`: the cosine of a task's gradient with that of the sum,",
        "of the sum with fixed weights, and of UPGrad. Where it is negative the task's loss rises.",
    )
    most_negative = sorted((x.mean, f"{pair} {x}") for pair, x in found.cosine.items() if x.mean <= 1)[:MOST_PAIRS]
    cosines = (
        [f"Cosines between gradients: {', '.join(text for _, text in most_negative)}", ""] if most_negative else []
    )
    found_lines = [f"- {line}" for line in (*found.findings, *turned)]
    advice = [f"- {line}" for line in found.advice]
    return "\n".join([*about, "", *rows, "", *cosines, "Found:", *found_lines, "", "Try first:", *advice])
