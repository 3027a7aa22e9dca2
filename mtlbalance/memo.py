"""The same factory with equal arguments gives the same method, with what JAX has compiled for it."""

import functools
import inspect
import numbers
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

from mtlbalance.calls import Call, named
from mtlbalance.contract import Aggregator, Scalarizer

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # jax 0.8
    from jax.core import get_opaque_trace_state

P = ParamSpec("P")
R = TypeVar("R")

_N_KEPT = 64  # methods of each factory, and with them their compiled programs
_OUTSIDE = get_opaque_trace_state(convention="any")


@dataclass(frozen=True)
class _Compared:
    """The arguments of a call, which are compared by their key alone."""

    key: Hashable
    arguments: inspect.BoundArguments = field(compare=False)


def memoized(factory: Callable[P, R]) -> Callable[P, R]:
    """Lets a factory return the method that it returned before for equal arguments, given by position or by name.

    The method is printed as the call that made it.

    A method is built of functions that JAX compiles at their first call. One built in every step of a Python loop would
    be compiled in every step; a memoized factory builds it once.

    Arguments are equal if their types are too: not 1, 1.0 and True, nor 0.0 and -0.0. Numbers, strings, ``None``,
    functions, and tuples of these are compared, methods and optimizers among them. With other arguments, such as
    arrays, lists and dicts, the method is built anew; so it is with functions inside a transformation, as these may
    hold traced values.

    Args:
      factory: a function of hyperparameters that returns a method, and does nothing else.

    Returns:
      The factory, with its signature and docstring.

    Example:
      >>> from mtlbalance import scalarization
      >>> scalarization.dwa(temperature=2.0) is scalarization.dwa(2.0)
      True
    """
    signature = inspect.signature(factory)

    def build(arguments):
        made = factory(*arguments.args, **arguments.kwargs)
        return named(made, Call(public, arguments)) if isinstance(made, Scalarizer | Aggregator) else made

    @functools.lru_cache(maxsize=_N_KEPT)
    def build_once(compared):
        return build(compared.arguments)

    @functools.wraps(factory)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            arguments = signature.bind(*args, **kwargs)
        except TypeError:  # no arguments of this factory, which says so itself
            return factory(*args, **kwargs)
        arguments.apply_defaults()
        try:
            # In 64-bit mode the bounds of a number are others.
            key = jnp.result_type(float), *map(_key, arguments.arguments.values())
            hash(key)
        except TypeError:  # not to be compared
            key = None
        return build(arguments) if key is None else build_once(_Compared(key, arguments))

    return public


def _key(argument: Any) -> Hashable:
    """What an argument shares with equal ones and with no other."""
    if isinstance(argument, tuple):
        return type(argument), *map(_key, argument)
    if isinstance(argument, numbers.Number):
        return type(argument), argument, repr(argument)  # 0.0 == -0.0
    if argument is None or isinstance(argument, str):
        return type(argument), argument
    # Not what may change after it was compared, as the object of a bound method, or is equal and not the same.
    is_itself = type(argument).__eq__ is object.__eq__ and jax.tree_util.all_leaves([argument])
    if callable(argument) and is_itself and get_opaque_trace_state("any") == _OUTSIDE:
        return argument
    raise TypeError(f"{type(argument).__name__} is not compared")
