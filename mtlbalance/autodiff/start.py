"""How a training starts: the method's state for these losses and parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp

from mtlbalance.annotations import State, Tree
from mtlbalance.autodiff.apart import is_one_for_each
from mtlbalance.autodiff.options import LARGE, cheapest_rows, check_params, check_per_task, evaluate_at
from mtlbalance.autodiff.point import Point, pair_of
from mtlbalance.autodiff.subsets import Subset, read_option, read_subset, select_subset, whole
from mtlbalance.contract import Aggregator, Scalarizer
from mtlbalance.losses import sums
from mtlbalance.names import names_of, with_names
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
    apart: bool = False

    @property
    def own_data(self) -> bool:
        """Whether each task has its own."""
        return self.task_axis is not None or is_one_for_each(self.losses_fn)

    def cheapest_rows(self, possible: tuple[str, ...], point: Point, params: chex.ArrayTree) -> int | str:
        """How rows are computed where that is not asked for."""
        if is_one_for_each(self.losses_fn):
            # A step computes all rows at the cost of one gradient: streamed ones would be computed twice.
            return cheapest_rows(possible, True, point, params, small=LARGE)
        return cheapest_rows(possible, self.own_data, point, params)

    def subsets(self, params: chex.ArrayTree) -> tuple[chex.ArrayTree | None, Callable[..., Any]]:
        """Which parameters are shared, if not all are; and from a gradient to the part that decides."""
        check_params(params, self.allow_int)
        has_features = isinstance(self.losses_fn, tuple)
        is_shared = read_option("shared", self.shared, params)
        if has_features:
            is_shared = read_subset("shared", pair_of(params).unflatten((True, False)), params)
        decides = is_shared if self.decide_on is None else read_option("decide_on", self.decide_on, params)
        return is_shared, whole if decides is None else partial(select_subset, subset=decides)

    def evaluate(self, params: chex.ArrayTree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Point:
        """The losses at some parameters."""
        forms = {"has_aux": self.has_aux, "task_axis": self.task_axis, "microbatches": self.microbatches}
        forms["apart"] = self.apart
        return evaluate_at(self.losses_fn, params, args, kwargs, **forms)


class GradFn(Protocol[State]):
    """What :func:`value_and_grad` returns."""

    init: Callable[..., State]

    def __call__(
        self, params: Tree, state: State, /, *args: Any, mask: Any = None, refresh: Any = None, **kwargs: Any
    ) -> tuple[tuple[Any, ...], Tree]:
        """One step: ``(losses, new_state), grads``; weights and auxiliary output follow the state."""
        ...


def with_init(grad_fn: Any, problem: Problem, method: Scalarizer[State] | Aggregator[State]) -> GradFn[State]:
    """The step with the function that makes its first state, also where it is wrapped in :func:`jax.jit`."""
    grad_fn.init = _initializer(problem, method)
    return grad_fn


def _initializer(problem, method):
    def init(params, /, *args, mask=None, refresh=None, **kwargs):
        del mask, refresh  # a step's own: nothing of a new state depends on them
        _, restrict = problem.subsets(params)  # as in a step before the losses meet the parameters
        return _new_state(method, params, restrict, *_shapes(problem, params, args, kwargs))

    return init


def _shapes(problem, params, args, kwargs):
    """The shapes and dtypes of the losses, and of the features' rows; nothing is computed for them."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    abstract = [i for i, x in enumerate(leaves) if isinstance(x, jax.ShapeDtypeStruct)]

    def evaluate(params, given):
        filled = dict(enumerate(leaves)) | dict(zip(abstract, given, strict=True))
        args, kwargs = treedef.unflatten(filled.values())
        point = problem.evaluate(params, args, kwargs)
        check_per_task(point.evaluated)
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


def _new_state(method, params, restrict, losses, rows_of_features):
    """The method's state for losses of these shapes and names, and what it sees: the parameters, or the features."""
    with with_names(names_of(losses)):
        if isinstance(method, Scalarizer):
            is_array = jax.tree_util.all_leaves([losses])  # else of one axis each, lest they look like a network
            flat = lambda x: x if is_array or x.ndim < 2 else jax.ShapeDtypeStruct((x.size,), x.dtype)
            return place(method.init(jax.tree.map(flat, sums(losses))), params)
        seen = restrict(params)
        if rows_of_features is not None:
            seen = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), rows_of_features)
        return method.init((sum(x.size for x in jax.tree.leaves(sums(losses))), seen))
