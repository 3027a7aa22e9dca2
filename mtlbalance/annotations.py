"""What editors and type checkers know of a method: its functions' types, and the types of hyperparameters.

The docstrings of the functions' types are the text of ``help(method.apply)``, too: :func:`documented` puts them there.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NewType, Protocol, TypeAlias, TypeVar

import jax
import numpy as np

if TYPE_CHECKING:
    Number: TypeAlias = jax.Array | np.ndarray | np.bool_ | np.number | float | int
    PerTask: TypeAlias = (
        "jax.Array | np.ndarray | np.number | Sequence[PerTask | float] | Mapping[Any, PerTask | float]"
    )
    ArrayTree: TypeAlias = Any  # a checker knows no registered classes, such as Equinox's modules
else:
    # A union is printed in full by help() and in the docs: by name it can be read.
    Number = NewType("Number", Any)
    Number.__doc__ = "A real number, of Python or NumPy, or an array without axes."
    PerTask = NewType("PerTask", Any)
    PerTask.__doc__ = "One number for each task, as an array or a tree with the losses' names."
    ArrayTree = NewType("ArrayTree", Any)
    ArrayTree.__doc__ = "A tree of arrays."

State = TypeVar("State")
NewState = TypeVar("NewState", covariant=True)
Tree = TypeVar("Tree")


class ScalarizerInit(Protocol[NewState]):
    """The type of ``Scalarizer.init``."""

    def __call__(self, shape: Any) -> NewState:
        """The state before the first call.

        Args:
          shape: how many losses there are, an int, or the losses themselves: an array or a tree of names, of numbers or
            :class:`jax.ShapeDtypeStruct`; or the shape of an array of them.

        Returns:
          The state: a named tuple of arrays, for ``apply``.
        """
        ...


class ScalarizerApply(Protocol[State]):
    """The type of ``Scalarizer.apply``."""

    def __call__(self, state: State, values: Any, *, mask: Any = None) -> tuple[jax.Array, State]:
        """One scalar of several losses.

        Args:
          state: what ``init`` returned, or the call before.
          values: the losses, one number per task: an array or a tree of names; leaves may be
            :class:`mtlbalance.Counted`.
          mask: which tasks are present, booleans like ``values``; all by default.

        Returns:
          ``(scalar, new_state)``: what to differentiate, and the state for the next call; so
          ``jax.value_and_grad(..., has_aux=True)`` takes it as it is.
        """
        ...


class AggregatorInit(Protocol[NewState]):
    """The type of ``Aggregator.init``."""

    def __call__(self, shape: tuple[int, Any]) -> NewState:
        """The state before the first call.

        Args:
          shape: a pair, the number of tasks, and the parameters as the optimizer has them (a tree of arrays or
            :class:`jax.ShapeDtypeStruct`), or how many there are if the Jacobian is a matrix.

        Returns:
          The state: a named tuple of arrays, for ``apply``.
        """
        ...


class AggregatorApply(Protocol[State]):
    """The type of ``Aggregator.apply``."""

    def __call__(self, state: State, jacobian: Tree, *, values: Any = None, mask: Any = None) -> tuple[Tree, State]:
        """One gradient of several, one per task.

        Args:
          state: what ``init`` returned, or the call before.
          jacobian: the gradients: leaves ``[m, *param.shape]``, row i that of task i, as
            :func:`mtlbalance.value_and_jac` returns them.
          values: the losses, for the methods that read them: an array or a tree of names.
          mask: which tasks are present, booleans like ``values``; all by default.

        Returns:
          ``(gradient, new_state)``: the gradient with the parameters' shapes, for an optimizer, and the state for the
          next call.
        """
        ...


class WeightingApply(Protocol[State]):
    """The type of ``Weighting.apply``."""

    def __call__(
        self, state: State, statistic: Any, *, values: Any = None, mask: Any = None
    ) -> tuple[jax.Array, State]:
        """One weight per task.

        Args:
          state: what ``init`` returned, or the call before.
          statistic: the Jacobian, as ``apply`` of the method takes it; or its Gramian ``[m, m]``, if this is
            ``gramian_weighting``.
          values: the losses, for the methods that read them: an array or a tree of names.
          mask: which tasks are present, booleans like ``values``; all by default.

        Returns:
          ``(weights, new_state)``: weights of shape ``[m]``, and the state for the next call.
        """
        ...


class EndEpoch(Protocol[State]):
    """The type of ``end_epoch``."""

    def __call__(self, state: State) -> State:
        """The state after an epoch: the same, unless the method has epochs (DWA).

        Args:
          state: what the last call returned.

        Returns:
          The new state.
        """
        ...


class Observe(Protocol[State]):
    """The type of ``observe``."""

    def __call__(self, state: State, values: Any, *, mask: Any = None) -> State:
        """The state after the optimizer's step: the same, unless the method looks at the losses again then (FAMO).

        Args:
          state: what the last call returned.
          values: the losses after the step, like those of ``apply``; or what else the method's docstring says.
          mask: which tasks are present, booleans like ``values``; all by default.

        Returns:
          The new state.
        """
        ...


Function = TypeVar("Function", bound=Callable[..., Any])


def documented(function: Function, like: type, name: str = "apply") -> Function:
    """The function with the name, the signature and the help of a type above."""
    function.__name__ = name  # not the qualified one, by which a factory is told from a method's function
    function.__doc__, function.__signature__ = _help_of(like)  # pyrefly: ignore[missing-attribute]
    return function


@cache
def _help_of(like: type) -> tuple[str | None, inspect.Signature]:
    _, *parameters = inspect.signature(like.__call__).parameters.values()
    bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return inspect.getdoc(like.__call__), inspect.Signature(bare)
