"""What a method's factory asks of its arguments: bounds, one number per task, preferences, keys.

A factory checks what it can while it is called, and what depends on the number of tasks in ``init``, where an error
still comes before the training. Traced values pass: they are not known.
"""

import contextlib
import numbers
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

import chex
import jax
import jax.numpy as jnp
import numpy as np

from mtlbalance.meshes import with_whole_tasks

_asks_for_shapes: ContextVar[bool] = ContextVar("only what a state is like is asked for", default=False)


def reject(argument: str, expected: str, found: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raises ``error`` in the one form that all of the library's errors have."""
    raise error(f"{argument}: expected {expected}, found {found}")


class Bound(NamedTuple):
    """What a number must be.

    Attributes:
      text: what an error says was expected.
      holds: from a NumPy number or array to a boolean, or one for each entry. Not ``jnp``: a method may be built before
        there is a device.
    """

    text: str
    holds: Callable[[np.ndarray], Any]


FINITE = Bound("a finite number", np.isfinite)
NONNEGATIVE = Bound("a finite number of at least 0", lambda x: (x >= 0) & np.isfinite(x))
NONNEGATIVE_OR_INFINITE = Bound("a number of at least 0", lambda x: x >= 0)
POSITIVE = Bound("a finite number above 0", lambda x: (x > 0) & np.isfinite(x))
POSITIVE_OR_INFINITE = Bound("a number above 0", lambda x: x > 0)
NONZERO = Bound("a number other than 0", lambda x: x != 0)
FRACTION = Bound("a number from 0 to 1", lambda x: (x >= 0) & (x <= 1))
DECAY = Bound("a number of at least 0 and below 1", lambda x: (x >= 0) & (x < 1))
RATE = Bound("a number above 0 and at most 1", lambda x: (x > 0) & (x <= 1))


def check(name: str, value: Any, bound: Bound) -> None:
    """Raises unless a hyperparameter is a real scalar within its bound.

    Args:
      name: the argument's, for the error.
      value: what the user gave.
      bound: one of those above, or the method's own.

    Raises:
      ValueError: if it is out of bounds or not a scalar.
      TypeError: if it is not a real number.

    Example:
      >>> from mtlbalance import hyperparameters
      >>> hyperparameters.check("rate", 0.5, hyperparameters.FRACTION)
      >>> hyperparameters.check("rate", 2.0, hyperparameters.FRACTION)
      Traceback (most recent call last):
      ValueError: rate: expected a number from 0 to 1, found 2.0
    """
    if not is_number(value) or np.iscomplexobj(value):
        reject(name, bound.text, f"dtype {value.dtype}" if hasattr(value, "dtype") else type(value).__name__, TypeError)
    if jnp.ndim(value):
        reject(name, "a scalar", f"shape {jnp.shape(value)}")
    if not _holds(bound, [value]):
        reject(name, bound.text, f"{value}")


def check_int(name: str, value: Any, minimum: int) -> None:
    """Raises unless ``value`` is an int of at least ``minimum``: it shapes the program, so it cannot be traced."""
    if not is_int(value):
        is_array = hasattr(value, "dtype")
        hint = " known while tracing (optax.inject_hyperparams: name it in static_args)" if is_array else ""
        found = f"{value!r}" if isinstance(value, numbers.Number) else type(value).__name__
        reject(name, f"an int{hint}", found, TypeError)
    if value < minimum:
        reject(name, f"an int of at least {minimum}", f"{value}")


def check_count(name: str, value: Any, minimum: int, maximum: int = 2**31 - 1) -> None:
    """Raises unless ``value`` is an integer within its bounds: it is only compared with counts, and may be traced.

    Args:
      name: the argument's, for the error.
      value: what the user gave.
      minimum: the least that it may be.
      maximum: the largest that it may be, by default of int32, which counts are.

    Raises:
      ValueError: if it is out of bounds, where it is not traced, or not a scalar.
      TypeError: if it is not an integer.

    Example:
      >>> from mtlbalance import hyperparameters
      >>> hyperparameters.check_count("n_warmup_steps", 3, 1)
      >>> hyperparameters.check_count("n_warmup_steps", 0.5, 1)
      Traceback (most recent call last):
      TypeError: n_warmup_steps: expected an int, found 0.5
    """
    if not is_int(value):
        if not hasattr(value, "dtype"):
            reject(name, "an int", f"{value!r}" if isinstance(value, numbers.Number) else kind_of(value), TypeError)
        if not jnp.issubdtype(value.dtype, jnp.integer):
            reject(name, "an int", f"dtype {value.dtype}", TypeError)
        if jnp.ndim(value):
            reject(name, "one int", f"shape {jnp.shape(value)}")
        if isinstance(value, jax.core.Tracer):
            return
        if isinstance(value, jax.ShapeDtypeStruct):
            reject(name, "an int", kind_of(value), TypeError)
        value = int(value)  # while another function is traced, JAX would trace its comparison
    if not minimum <= value <= maximum:
        at_least = f"of at least {minimum}"
        reject(name, f"an int {at_least if value < minimum else f'from {minimum} to {maximum}'}", f"{value}")


@contextlib.contextmanager
def asking_for_shapes() -> Iterator[None]:
    """While it is entered ``init`` is only asked what a state is like, and no number of tasks is a wrong one."""
    token = _asks_for_shapes.set(True)
    try:
        yield
    finally:
        _asks_for_shapes.reset(token)


def is_asking_for_shapes() -> bool:
    """Whether :func:`asking_for_shapes` is entered."""
    return _asks_for_shapes.get()


def flatten(name: str, tree: chex.ArrayTree) -> jax.Array:
    """A single array as it is; any other tree as one vector, in the order of :func:`jax.tree.leaves`."""
    leaves, treedef = jax.tree.flatten(tree)
    if not leaves:
        reject(name, "at least one number", f"{tree!r}")
    if jax.tree_util.treedef_is_leaf(treedef):
        return with_whole_tasks(jnp.asarray(leaves[0]))
    return jnp.concatenate([jnp.ravel(with_whole_tasks(jnp.asarray(leaf))) for leaf in leaves])


def per_task(
    name: str,
    value: chex.ArrayTree,
    shape: tuple[int, ...],
    dtype: chex.ArrayDType,
    *,
    scalar: bool = True,
    bound: Bound | None = None,
) -> jax.Array:
    """A hyperparameter with one number per task as an array.

    Args:
      name: the argument's, for the error.
      value: an array, or a tree like the losses.
      shape: of the losses, ``(m,)`` for an aggregator.
      dtype: of what is returned.
      scalar: whether one number for all tasks will do.
      bound: of the numbers; any real ones by default.

    Raises:
      ValueError: if the shape is another one or a number is out of bounds.
      TypeError: if something is not a real number.
    """
    if is_asking_for_shapes():
        return jnp.zeros(shape, dtype)
    leaves = jax.tree.leaves(value)
    for leaf in leaves:
        if not is_number(leaf):
            reject(name, "numbers", type(leaf).__name__, TypeError)
        if np.iscomplexobj(leaf):
            reject(name, "real numbers", f"dtype {jnp.result_type(leaf)}", TypeError)
    array = flatten(name, value)
    if array.shape != shape and not (scalar and array.ndim == 0):
        one_for_all = "a scalar or " if scalar else ""
        reject(name, f"{one_for_all}one number per task, shape {shape}", f"shape {array.shape}")
    if bound is not None and not _holds(bound, leaves):
        reject(name, f"{bound.text} for each task", f"{value}")
    return jnp.broadcast_to(array, shape).astype(dtype)


def preference(value: chex.ArrayTree | None, mask: chex.Array, dtype: chex.ArrayDType) -> jax.Array:
    """An aggregator's ``pref_vector``: one number per task, equal ones of total 1 by default; 0 for absent tasks."""
    if value is None:
        return mask / jnp.maximum(jnp.sum(mask), 1).astype(dtype)
    return jnp.where(mask, per_task("pref_vector", value, mask.shape, dtype, scalar=False), 0)


def check_key(key: int | chex.Array) -> None:
    """Raises unless a factory's ``key`` is an int, which may be traced, or a key."""
    if not is_int(key) and not isinstance(key, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        reject("key", "an int or a key", type(key).__name__, TypeError)
    if jnp.ndim(key) > (0 if _is_typed(key) else 1):
        reject("key", "one key (seeds are swept by building the method inside vmap)", f"shape {jnp.shape(key)}")


def new_key_data(key: int | chex.Array) -> jax.Array:
    """The data of the key that a factory's ``key`` stands for: for ``init``, as making one takes a device."""
    if not _is_typed(key):
        key = jax.random.wrap_key_data(jnp.asarray(key)) if getattr(key, "ndim", 0) else jax.random.key(key)
    return jax.random.key_data(key)


def key_impl(key: int | chex.Array) -> Any:
    """How the key of :func:`new_key_data` generates random numbers; ``None`` is JAX's default."""
    return jax.random.key_impl(key) if _is_typed(key) else None


def kind_of(x: Any) -> str:
    """What was found, in a word for :func:`reject`: text and ``None`` as they are, else the type, with its fields."""
    if x is None or isinstance(x, str):
        return repr(x)
    fields = getattr(x, "_fields", None)
    return type(x).__name__ if fields is None else f"{type(x).__name__}({', '.join(fields)})"


def is_int(x: Any) -> bool:
    """Whether ``x`` is an int known to Python, and no boolean."""
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    """Whether ``x`` is a Python number or an array."""
    return isinstance(x, numbers.Number) or hasattr(x, "dtype")


def _is_typed(key):
    return hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _holds(bound, leaves):
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return True
    dtype = jnp.result_type(*leaves)  # what JAX would make of the numbers
    with np.errstate(over="ignore"):
        entries = [np.ravel(np.asarray(leaf, dtype)) for leaf in leaves]
    return np.all(bound.holds(np.concatenate(entries)))
