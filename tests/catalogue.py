"""One row for every public method, and for the wrappers around some: what the conformance checks run on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import mtlbalance as mtl
from mtlbalance import aggregation, base, scalarization
from mtlbalance.baselines import SeenState, count_seen

WEIGHTS = jnp.array([0.5, 2.0, 1.25, -0.5])
THREE = jnp.arange(3)


class Case(NamedTuple):
    """A method and what the checks must know about it.

    Attributes:
      name: for the test's id.
      make: builds the method; takes the keywords of ``hyperparameters`` and, where ``sharded``, ``axis_name``.
      hyperparameters: float hyperparameters and three values of each, to be mapped over.
      draws: the weights are drawn at random, so that subsets of tasks agree in distribution only.
      sharded: takes ``axis_name``.
      per_task: ``make`` takes the indices of the ``tasks`` that it is for.
    """

    name: str
    make: Callable[..., Any]
    hyperparameters: dict[str, tuple[float, ...]] = {}  # noqa: RUF012
    draws: bool = False
    sharded: bool = False
    per_task: bool = False


def inverse_norm(axis_name=None):
    """Weights that do read the Gramian, as no public method does yet: one over each gradient's norm."""

    def init(m, params, dtype):
        return SeenState(jnp.zeros(m, jnp.int32))

    def weigh(state, gramian, values, mask):
        squares = jnp.diagonal(gramian)
        return jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0), count_seen(state, mask)

    return base.aggregator(init, gramian_weighting=weigh, axis_name=axis_name)


def following(rate=0.5):
    """A scalarizer with both hooks, as no public method has yet: it follows what it observes."""

    def init(shape, dtype):
        return FollowState(jnp.ones(shape, dtype))

    def apply(state, values, mask):
        return jnp.sum(state.level * values, where=mask), state

    def observe(state, values, mask):
        return FollowState(jnp.where(mask, state.level + rate * (values - state.level), state.level))

    def end_epoch(state):
        return FollowState(state.level / 2)

    return base.scalarizer(init, apply, observe=observe, end_epoch=end_epoch)


class FollowState(NamedTuple):
    level: Any


def _weights(tasks):
    return WEIGHTS[tasks % len(WEIGHTS)]


SCALARIZERS = [
    Case("test-only following", following),
    Case("mean", scalarization.mean),
    Case("sum", scalarization.sum),
    Case("constant", lambda tasks=THREE: scalarization.constant(_weights(tasks)), per_task=True),
    Case("random", lambda: scalarization.random(key=3), draws=True),
    Case("uw", scalarization.uw, {"initial_log_var": (-0.5, 0.0, 1.5)}),
    Case("imtl_l", scalarization.imtl_l, {"initial_log_scale": (-0.5, 0.0, 1.5)}),
    Case("dwa", scalarization.dwa, {"temperature": (0.3, 2.0, 10.0)}),
    Case("dwa-steps", lambda **kw: scalarization.dwa(steps_per_epoch=2, **kw), {"temperature": (0.3, 2.0, 10.0)}),
    Case("learn-uw", lambda **kw: mtl.learn(scalarization.uw(**kw), optax.adam(0.1)), {"initial_log_var": (-1.0, 0.0)}),
    Case("learn-imtl_l", lambda: mtl.learn(scalarization.imtl_l(), optax.sgd(0.1, momentum=0.9))),
    Case("skip-mean", lambda: mtl.skip_nonfinite(scalarization.mean())),
    Case("skip-dwa", lambda: mtl.skip_nonfinite(scalarization.dwa(steps_per_epoch=2))),
    Case("skip-learn-uw", lambda: mtl.skip_nonfinite(mtl.learn(scalarization.uw(), optax.adam(0.1)))),
]

AGGREGATORS = [
    Case("mean", aggregation.mean),
    Case("sum", aggregation.sum),
    Case("constant", lambda tasks=THREE: aggregation.constant(_weights(tasks)), per_task=True),
    Case("random", lambda: aggregation.random(key=3), draws=True),
    Case("excess_mtl", aggregation.excess_mtl, {"robust_step_size": (0.01, 0.3, 1.0)}, sharded=True),
    Case("excess_mtl-warmup", lambda **kw: aggregation.excess_mtl(n_warmup_steps=2, **kw), sharded=True),
    Case("excess_mtl-raw", lambda **kw: aggregation.excess_mtl(0.1, normalize_first_step=False, **kw), sharded=True),
    Case("test-only inverse_norm", inverse_norm, sharded=True),
    Case(
        "test-only skip-inverse_norm",
        lambda axis_name=None: mtl.skip_nonfinite(inverse_norm(axis_name), axis_name=axis_name),
        sharded=True,
    ),
    Case("skip-random", lambda **kw: mtl.skip_nonfinite(aggregation.random(key=3), **kw), draws=True, sharded=True),
    Case(
        "skip-excess_mtl",
        lambda axis_name=None, **kw: mtl.skip_nonfinite(
            aggregation.excess_mtl(axis_name=axis_name, **kw), axis_name=axis_name
        ),
        {"robust_step_size": (0.01, 0.3, 1.0)},
        sharded=True,
    ),
]
