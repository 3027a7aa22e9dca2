"""Loops over tasks and micro-batches: one operation of a compiled program where something is traced, else Python's.

Outside of :func:`jax.jit` a loop of :mod:`jax.lax` is compiled at every call, as its body is a new function each time;
operations called one by one are compiled once.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def is_traced(*trees: Any) -> bool:
    """Whether any of these is known to a transformation only, and not a number yet."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def map_rows(fun: Callable[..., Any], xs: chex.ArrayTree, batch_size: int, *, given: Any) -> chex.ArrayTree:
    """As :func:`jax.lax.map`.

    Args:
      fun: of one entry of ``xs``.
      xs: arrays with one leading axis.
      batch_size: how many entries at a time.
      given: what ``fun`` depends on besides.
    """
    if is_traced(xs, given):
        return jax.lax.map(fun, xs, batch_size=None if batch_size == 1 else batch_size)
    if batch_size == 1:
        return _stack([fun(x) for x in _entries(xs)])
    n = _length(xs)
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    slices = lambda i, size: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * batch_size, size), xs)
    parts = [jax.vmap(fun)(slices(i, size)) for i, size in enumerate(sizes)]
    return jax.tree.map(lambda *rows: jnp.concatenate(rows), *parts)


def fold(step: Callable[..., Any], n: chex.Numeric, carry: Any, *, given: Any) -> Any:
    """As :func:`jax.lax.fori_loop` from 0 to ``n``; ``given`` is what ``step`` depends on besides."""
    if is_traced(carry, given):
        return jax.lax.fori_loop(0, n, step, carry)
    for i in range(int(n)):
        carry = step(i, carry)
    return carry


def scan(step: Callable[..., Any], carry: Any, xs: chex.ArrayTree) -> tuple[Any, chex.ArrayTree]:
    """As :func:`jax.lax.scan`."""
    if is_traced(carry, xs):
        return jax.lax.scan(step, carry, xs)
    outputs = []
    for x in _entries(xs):
        carry, output = step(carry, x)
        outputs.append(output)
    return carry, _stack(outputs)


def _entries(xs: chex.ArrayTree) -> list[chex.ArrayTree]:
    """The entries along the leading axis."""
    entry = lambda i: jax.tree.map(lambda x: x[i], xs)
    return [entry(i) for i in range(_length(xs))]


def _stack(trees: list[chex.ArrayTree]) -> chex.ArrayTree:
    """One tree of many, with a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _length(xs):
    return len(jax.tree.leaves(xs)[0])
