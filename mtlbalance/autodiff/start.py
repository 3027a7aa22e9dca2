"""How a training starts: the method's state for these losses; and what a step says where it has no such state."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from mtlbalance.autodiff.options import check_params, check_per_task, evaluate_at
from mtlbalance.autodiff.point import Point, pair_of
from mtlbalance.autodiff.subsets import Subset, read_subset, select_subset, whole
from mtlbalance.contract import Aggregator, Scalarizer
from mtlbalance.hyperparameters import reject
from mtlbalance.losses import shape_of, sums
from mtlbalance.names import names_are_those_of
from mtlbalance.states import place

# What says that a program's flow depends on numbers, and not on shapes alone.
_DEPENDS_ON_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


class Problem(NamedTuple):
    """The losses, and the options that say how a method sees them, as :func:`value_and_grad` is given them."""

    losses_fn: Any
    shared: Subset | None
    decide_on: Subset | None
    at: str
    has_aux: bool
    task_axis: int | None
    microbatches: int | None
    allow_int: bool

    def subsets(self, params: chex.ArrayTree) -> tuple[chex.ArrayTree | None, Callable[..., Any]]:
        """Which parameters are shared, if not all are; and from a gradient to the part that decides."""
        check_params(params, self.allow_int)
        has_features = isinstance(self.losses_fn, tuple)
        given = pair_of(params).unflatten((True, False)) if has_features else self.shared
        is_shared = None if given is None else read_subset("shared", given, params)
        decides = is_shared if self.decide_on is None else read_subset("decide_on", self.decide_on, params)
        return is_shared, whole if decides is None else partial(select_subset, subset=decides)

    def evaluate(self, params: chex.ArrayTree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Point:
        """The losses at some parameters."""
        forms = {"has_aux": self.has_aux, "task_axis": self.task_axis, "microbatches": self.microbatches}
        return evaluate_at(self.losses_fn, params, args, kwargs, **forms)


class GradFn(Protocol):
    """What :func:`value_and_grad` returns."""

    init: Callable[..., Any]

    def __call__(self, params: Any, state: Any, /, *args: Any, mask: Any = None, refresh: Any = None, **kwargs: Any):
        """One step: ``(losses, new_state), grads``."""
        ...


def with_init(grad_fn: Any, problem: Problem, method: Scalarizer | Aggregator) -> GradFn:
    """The step with the function that makes its first state, also where it is wrapped in :func:`jax.jit`."""
    grad_fn.init = _initializer(problem, method)
    return grad_fn


def _initializer(problem, method):
    def init(params, /, *args, mask=None, refresh=None, **kwargs):
        del mask, refresh  # a step's own: nothing of a new state depends on them
        return _new_state(problem, method, params, *_shapes(problem, params, args, kwargs))

    return init


def check_state(problem: Problem, method: Scalarizer | Aggregator, state: Any, point: Point, params: Any) -> None:
    """Raises for what is no state of the method, and where ``has_aux`` may be missing, if the losses' number is wrong.

    Whatever has a first leaf of the right shape is left to the method: so nothing is spent where all is right.
    """
    losses, values = point.evaluated.losses, point.evaluated.values
    if shape_of(state) in (values.shape, (values.size,)):
        return
    shapes = _structs((losses, _rows_of_features(problem, point)))
    _check_is_state_like(state, lambda: _new_state(problem, method, params, *shapes))
    if not problem.has_aux and type(losses) is tuple and len(losses) == 2:
        expected = f"{shape_of(state)} losses, as the state was made for (or has_aux=True for a pair (losses, aux))"
        reject("losses_fn", expected, f"a pair, {values.size} losses in all")


def check_state_is_given(problem: Problem, method: Any, params: Any, state: Any, args: Any, kwargs: Any) -> None:
    """After an error: raises if the losses take one argument more than they were given, and the "state" is that."""
    function = problem.losses_fn[0] if isinstance(problem.losses_fn, tuple) else problem.losses_fn
    if _binds(function, params, args, kwargs) or not _binds(function, params, (state, *args), kwargs):
        return
    _check_is_state_like(state, lambda: _initializer(problem, method)(params, state, *args, **kwargs))


def _check_is_state_like(state, init):
    try:
        expected = jax.eval_shape(init)
    except Exception:  # whatever is wrong with it then is for the method to say
        return
    is_one = type(state) is type(expected) and hasattr(expected, "_fields")  # if for other parameters or tasks
    if not is_one and jax.tree.structure(state) != jax.tree.structure(expected):
        made = f"what grad_fn.init(params, ...) returned as the second argument, {_kind(expected)}"
        reject("state", made, _kind(state), TypeError)


def _shapes(problem, params, args, kwargs):
    """The shapes and dtypes of the losses, and of the features' rows; nothing is computed for them."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    abstract = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]

    def evaluate(params, given):
        filled = dict(enumerate(leaves)) | dict(zip(abstract, given, strict=True))
        args, kwargs = treedef.unflatten(filled.values())
        point = problem.evaluate(params, args, kwargs)
        check_per_task(point.evaluated.values)
        return point.evaluated.losses, _rows_of_features(problem, point)

    # What is a number stays one, as in a step: the losses may look at it.
    given = [leaves[i] for i in abstract]
    try:
        shapes = jax.eval_shape(evaluate, params, given)
    except _DEPENDS_ON_VALUES:
        if abstract or any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
            raise
        shapes = evaluate(params, given)
    return _structs(shapes)


def _rows_of_features(problem, point):
    """The gradients of the features, if the method sees these in place of the parameters."""
    return point.pull(lambda pullback: pullback.features[0]) if problem.at == "features" else None


def _structs(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)


def _new_state(problem, method, params, losses, rows_of_features):
    """The method's state for losses of these shapes and names, and what it sees: the parameters, or the features."""
    _, restrict = problem.subsets(params)
    with names_are_those_of(losses):
        if isinstance(method, Scalarizer):
            return place(method.init(losses), params)
        seen = restrict(params)
        if rows_of_features is not None:
            seen = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), rows_of_features)
        return method.init((sum(x.size for x in jax.tree.leaves(sums(losses))), seen))


def _binds(function, params, args, kwargs):
    try:
        inspect.signature(function).bind(params, *args, **kwargs)
    except ValueError:  # it has no signature that can be read
        return True
    except TypeError:
        return False
    return True


def _kind(x):
    """An argument by its type, and its fields or shape."""
    if hasattr(x, "_fields"):
        return f"{type(x).__name__}({', '.join(x._fields)})"
    return f"an array of shape {x.shape}" if hasattr(x, "shape") else f"a {type(x).__name__}"
