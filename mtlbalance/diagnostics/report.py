"""One flat dict of named scalars for a logger, with the same keys at every step."""

import collections
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtlbalance import gramian as gramians
from mtlbalance.annotations import ArrayTree
from mtlbalance.diagnostics.between_tasks import alignment, conflicts, cosine_similarities
from mtlbalance.diagnostics.reading import read_gramian_of, read_present
from mtlbalance.hyperparameters import flatten, is_number, reject
from mtlbalance.losses import read_losses, sums
from mtlbalance.names import names_of

_OWN = {"present", "loss", "weight", "norm", "cosine", "conflict", "alignment"}


def report(
    losses: ArrayTree | None = None,
    weights: ArrayTree | None = None,
    *,
    gramian: ArrayTree | None = None,
    jacobian: ArrayTree | None = None,
    mask: ArrayTree | None = None,
    prefix: str = "",
    **per_task: ArrayTree,
) -> dict[str, jax.Array]:
    r"""One flat dict of named scalars, from whatever a step has at hand: for TensorBoard, W&B or a line of JSON.

    Which keys there are depends on which arguments are given and on the losses' names, and on nothing else: not on
    what is masked, nor on whether a step made new weights. So it may be what a ``scan`` returns for every step. An
    absent task has ``present/<task>`` 0 and zeros, so that a mean over steps is ``sum(x) / sum(present)``.

    ====================================  =========================================================================
    ``present/a``                         1, or 0 where the mask or a count of 0 says that the task is absent
    ``loss/a``                            the loss, a :class:`~mtlbalance.Counted` one divided by its count
    ``weight/a``                          of ``weights``
    ``norm/a``                            the norm of the task's gradient; of the Gramian or the Jacobian, as all below
    ``cosine/a/b``                        :func:`~mtlbalance.diagnostics.cosine_similarities`, each pair once
    ``conflict/a/b``                      1 where the two gradients conflict: its mean is the share of such steps
    ``alignment``                         :func:`~mtlbalance.diagnostics.alignment` of all gradients
    ``change/a``, for ``change=changes``  any other tree with a number per task
    ====================================  =========================================================================

    Losses without names have their positions: ``loss/0``. Names inside names are joined by dots: ``loss/pose.depth``.

    Args:
      losses: the losses of the step. They may be left out: the names are then those of ``weights``, or positions.
      weights: one per task, as ``mtl.value_and_grad(..., return_weights=True)`` returns them.
      gramian: the inner products of the tasks' gradients, as :func:`~mtlbalance.value_and_gramian` gives them.
      jacobian: in the place of the Gramian, as :func:`~mtlbalance.value_and_jac` gives it. Under :func:`jax.shard_map`
        give the Gramian, made with ``axis_name=``.
      mask: which tasks are present: booleans of the losses' shapes; all by default.
      prefix: of every key, such as ``"train/"``.
      **per_task: what else there is for each task, by the word that stands before the tasks' names, such as
        ``change=diagnostics.directional_derivatives(jacobian, updates, losses)`` or ``accuracy=accuracies``; what a
        state has for each task by ``nonfinite=diagnostics.by_task(state.nonfinite, losses)``.

    Returns:
      Scalars in float32 or wider. ``json.dumps(log, default=float)`` writes them, and for what a ``scan`` has stacked
      ``json.dumps(log, default=lambda x: x.tolist())``.

    Raises:
      TypeError: if something is not made of floating point numbers, or the mask has other than booleans.
      ValueError: if something has other tasks than the losses, or is named as what the report has itself; if both a
        Gramian and a Jacobian are given, or nothing; or if two keys would be the same.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> losses, weights = {"lift": 0.5, "drag": 2.0}, {"lift": 4.0, "drag": 1.0}
      >>> log = mtl.report(losses, weights, jacobian=jnp.array([[1.0, 0.0], [-3.0, 4.0]]), prefix="train/")
      >>> for key, value in log.items():
      ...     print(f"{key} {value:.2f}")
      train/present/drag 1.00
      train/present/lift 1.00
      train/loss/drag 2.00
      train/loss/lift 0.50
      train/weight/drag 1.00
      train/weight/lift 4.00
      train/norm/drag 1.00
      train/norm/lift 5.00
      train/cosine/drag/lift -0.60
      train/conflict/drag/lift 1.00
      train/alignment -0.60
    """
    if clashes := sorted(_OWN & per_task.keys()):
        due = "another word: the report has this one itself, of 'losses', 'weights', 'gramian' or 'jacobian'"
        reject(clashes[0], due, f"{clashes[0]}=")
    source = "gramian" if jacobian is None else "jacobian"
    if jacobian is not None:
        if gramian is not None:
            reject("gramian", "either the Gramian or the Jacobian", "both")
        gramian = gramians.gramian(jacobian)
    named = {"losses": losses, "weights": weights, **per_task}
    labels = next((tree for tree in named.values() if tree is not None), None)
    tasks = _tasks(labels, gramian)
    present, _ = read_present(len(tasks), labels, mask)

    entries = [("present", present)]
    if losses is not None:
        entries.append(("loss", jnp.ravel(read_losses("losses", losses))))
    for word, argument in [("weight", "weights"), *((word, word) for word in per_task)]:
        if named[argument] is not None:
            entries.append((word, _read(argument, named[argument], labels, tasks)))
    log = [(f"{word}/{task}", x) for word, xs in entries for task, x in zip(tasks, _masked(xs, present), strict=True)]
    if gramian is not None:
        if jnp.ndim(gramian) == 2 and len(gramian) != len(tasks):
            reject(source, f"a row for each of the tasks {list(tasks)}", f"{len(gramian)} rows")
        log += _between_tasks(gramian, present, tasks)
    return _flat(log, prefix)


def _tasks(labels, gramian):
    """A name for each task."""
    if labels is None:
        if gramian is None:
            reject("report", "losses, weights, or a Gramian or Jacobian", "none of them", TypeError)
        read_gramian_of(gramian, None, None)
        return tuple(map(str, range(len(gramian))))
    return names_of(labels).entries or tuple(map(str, range(flatten("losses", sums(labels)).size)))


def _read(argument, tree, labels, tasks):
    """What is given for each task as one vector in the order of the tasks."""
    known, found = names_of(labels).entries, names_of(tree).entries
    n = sum(map(jnp.size, jax.tree.leaves(sums(tree))))
    if sorted(found) != sorted(known) or n != len(tasks):
        shown = list(found) if found else f"{n} numbers without names"
        reject(argument, f"a number for each of the tasks {list(tasks)}", f"{shown}")
    vector = jnp.ravel(read_losses(argument, jax.tree.map(_as_float, tree)))
    return vector[jnp.array([found.index(name) for name in known])] if found != known else vector


def _as_float(x):
    """Booleans and counts too are logged as numbers with a mean."""
    is_exact = is_number(x) and not jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    return jnp.asarray(x).astype(float) if is_exact else x


def _masked(vector, present):
    vector = vector.astype(jnp.result_type(jnp.float32, vector))
    return jnp.where(present, vector, 0)


def _between_tasks(gramian: jax.Array, present: jax.Array, tasks: Sequence[str]):
    _, inner_products = read_gramian_of(gramian, None, present)
    norms = jnp.sqrt(jnp.diagonal(inner_products))
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    matrices = {"cosine": cosine_similarities(gramian, mask=present), "conflict": conflicts(gramian, mask=present)}
    log = [(f"norm/{task}", norm) for task, norm in zip(tasks, norms, strict=True)]
    for word, matrix in matrices.items():
        log += [(f"{word}/{tasks[i]}/{tasks[j]}", matrix[i, j].astype(norms.dtype)) for i, j in pairs]
    return [*log, ("alignment", alignment(gramian, mask=present))]


def _flat(log, prefix):
    keys = collections.Counter(f"{prefix}{key}" for key, _ in log)
    if twice := [key for key, n in keys.items() if n > 1]:
        reject("losses", "names from which every key is made once", f"{twice[0]!r} twice")
    return dict(zip(keys, (x for _, x in log), strict=True))
