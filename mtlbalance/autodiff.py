"""Losses with their Jacobian, with its Gramian, and one training step for every method."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtlbalance import base, inputs, pullbacks
from mtlbalance.gramian import combine, gramian

# Bytes of a Jacobian up to which all rows are computed at once, and up to which they may be kept for speed alone.
_SMALL, _LARGE = 4 * 2**20, 256 * 2**20

Mask = chex.ArrayTree | Callable[[chex.ArrayTree], chex.ArrayTree]


def value_and_jac(
    losses_fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    rows: int | Literal["vmap"] | None = None,
    task_axis: int | None = None,
    allow_int: bool = False,
) -> Callable[..., Any]:
    _check_rows(rows, "vmap", None)

    def jac_fn(*args, **kwargs):
        through, params = _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int)
        outcome, _ = through(_nothing)
        _check_per_task(outcome)
        way = rows or _cheapest(("vmap",), through, outcome, params)
        _, jacobian = through(lambda pull: pull.rows(_all, way))
        value = (outcome.losses, outcome.aux) if has_aux else outcome.losses
        return value, _with_float0(jacobian, params, (outcome.values.size,))

    return jac_fn


def value_and_gramian(
    losses_fn: Callable[..., Any],
    argnums: int | tuple[int, ...] = 0,
    *,
    has_aux: bool = False,
    rows: int | Literal["vmap", "two_pass"] | None = None,
    task_axis: int | None = None,
    allow_int: bool = False,
) -> Callable[..., Any]:
    ways = ("vmap", "two_pass") if task_axis is None else ("vmap",)
    _check_rows(rows, *ways, None)

    def gramian_fn(*args, **kwargs):
        through, params = _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int)
        outcome, _ = through(_nothing)
        _check_per_task(outcome)
        products = _gramian(through, _all, rows or _cheapest(ways, through, outcome, params), asked=rows)
        return (outcome.losses, outcome.aux) if has_aux else outcome.losses, products

    return gramian_fn


def value_and_grad(
    losses_fn: Callable[..., Any] | tuple[Callable[..., Any], chex.ArrayTree],
    method: base.Scalarizer | base.Aggregator,
    *,
    has_aux: bool = False,
    return_weights: bool = False,
    rows: int | Literal["vmap", "two_pass", "stream"] | None = None,
    shared: Mask | None = None,
    decide_on: Mask | None = None,
    at: Literal["parameters", "features"] = "parameters",
    task_axis: int | None = None,
    microbatches: int | None = None,
    allow_int: bool = False,
) -> Callable[..., Any]:
    has_features = isinstance(losses_fn, tuple)
    ways = _check_keywords(method, has_features, return_weights, rows, shared, decide_on, at, task_axis, microbatches)
    shared = (True, False) if has_features else shared

    def grad_fn(params, state, *args, mask=None, refresh=None, **kwargs):
        _check_params(params, allow_int)
        is_shared = None if shared is None else _read_subset("shared", shared, params)
        decides = is_shared if decide_on is None else _read_subset("decide_on", decide_on, params)
        keep = _all if decides is None else lambda gradient: _keep(gradient, decides)

        through = _open(losses_fn, params, args, kwargs, has_aux, task_axis, microbatches)
        outcome, _ = through(_nothing)
        _check_per_task(outcome, state)
        present = _read_present(mask, outcome)
        way = rows or _cheapest(ways, through, outcome, keep(params))
        decide = lambda: _decide(method, state, through, present, keep, way, rows)

        def plain(pull):  # the gradient of the sum, for what is not shared
            return pull.weighted(jnp.ones_like(outcome.values) if present is None else present)

        def balanced(pull):
            gradient = pull.weighted(weights)
            return gradient if is_shared is None else _join(is_shared, gradient, plain(pull))

        decision = decide() if refresh is None else _refresh(refresh, decide, state, present)
        _, new_state, weights, gradient = decision
        if gradient is not None and decide_on is None:
            outcome = decision.outcome
            if is_shared is not None:
                gradient = _join(is_shared, gradient, through(plain)[1])
        else:
            outcome, gradient = through(balanced)
            if microbatches and refresh is None and isinstance(method, base.Scalarizer):
                # The first pass over the micro-batches then serves the weights alone. Where they do not depend on the
                # losses, as UW's do not, it is dead code, which XLA removes.
                new_state = _weigh(method, state, outcome, present).state

        outputs = outcome.losses, new_state
        outputs += (inputs.like_losses(weights, outcome.losses),) if return_weights else ()
        outputs += (outcome.aux,) if has_aux else ()
        return outputs, _with_float0(gradient, params)

    return grad_fn


def subset(params: chex.ArrayTree, mask: Mask) -> chex.ArrayTree:
    return _keep(params, _read_subset("mask", mask, params))


# What a method decides.


class _Decision(NamedTuple):
    """Of one call: the weights, or the gradient of the parameters that the method sees, or both."""

    outcome: pullbacks.Outcome | None
    state: Any
    weights: chex.Array | None
    gradient: Any = None


def _decide(method, state, through, present, keep, way, asked):
    if isinstance(method, base.Scalarizer):
        return _weigh(method, state, through(_nothing)[0], present)
    mask = None if present is None else jnp.ravel(present)

    if way == "stream":
        outcome, _ = through(_nothing)
        state, statistic = _visit_rows(method.rowwise, state, through, keep, mask, outcome.values.size)
        weigh = method.rowwise.weigh
    elif way == "two_pass":
        outcome, _ = through(_nothing)
        statistic = _gramian(through, keep, way, asked)
        weigh = method.gramian_weighting.apply
    else:
        of_rows = lambda pull: pull.features[0] if way == "features" else pull.rows(keep, way)
        outcome, statistic = through(of_rows)
        weigh = method.weighting and method.weighting.apply

    given = {"values": jnp.ravel(outcome.values), "mask": mask}
    if weigh is not None:
        weights, state = weigh(state, statistic, **given)
        kept = way == "vmap" or isinstance(way, int)
        return _Decision(outcome, state, weights, combine(weights, statistic) if kept else None)
    gradient, state = method.apply(state, statistic, **given)
    if way == "features":
        _, gradient = through(lambda pull: keep(pull.features[1](gradient, jnp.ones_like(outcome.values))))
    return _Decision(outcome, state, None, gradient)


def _weigh(method, state, outcome, present):
    """A scalarizer's weights are the derivative of its scalar."""
    weigh = jax.grad(lambda values: method.apply(state, values, mask=present), has_aux=True)
    weights, state = weigh(outcome.values)
    return _Decision(outcome, state, weights)


def _visit_rows(rowwise, state, through, keep, mask, m):
    """The state after all visits, and the statistics: rows come and go, and the state is changed in place."""

    def visit(i, state):
        _, row = through(lambda pull: keep(pull.row(i)))
        return rowwise.visit(state, i, row, mask=mask)

    def step(i, carry):
        state, statistics = carry
        state, statistic = visit(i, state)
        return state, jax.tree.map(lambda all, one: all.at[i].set(one), statistics, statistic)

    _, statistic = jax.eval_shape(visit, 0, state)
    start = jax.tree.map(lambda x: jnp.zeros((m, *x.shape), x.dtype), statistic)
    return jax.lax.fori_loop(0, m, step, (state, start))


def _refresh(refresh, decide, state, present):
    weights = optax.tree.get(state, "last_weights")
    if weights is None:
        inputs.reject("refresh", "a method that keeps its last weights, mtl.amortize(method)", type(state).__name__)
    is_boolean = isinstance(refresh, bool) or (hasattr(refresh, "dtype") and jnp.issubdtype(refresh.dtype, jnp.bool_))
    if not is_boolean or jnp.shape(refresh):
        inputs.reject("refresh", "one boolean", f"{refresh!r}", TypeError)

    def anew():
        decision = decide()
        return decision.state, decision.weights.astype(weights.dtype)

    def again():
        return state, weights if present is None else jnp.where(jnp.reshape(present, weights.shape), weights, 0)

    if isinstance(refresh, bool | np.bool_):
        return _Decision(None, *(anew() if refresh else again()))
    return _Decision(None, *jax.lax.cond(refresh, anew, again))


# The Gramian.


def _gramian(through, keep, way, asked):
    """By one way; by rows if the backward pass forbids two passes that nobody has asked for."""
    if way == "two_pass":
        outcome, _ = through(_nothing)
        row = lambda weights: keep(through(lambda pull: pull.weighted(weights))[1])
        try:
            return _two_pass_gramian(row, outcome)
        except _NotTwoPass as error:
            if asked == way:
                raise ValueError(f"rows: expected 'vmap' or an int, found 'two_pass': {error}") from error.__cause__
            if error.__cause__ is not None:
                warnings.warn(f"{error}; rows=1 says that this is known", stacklevel=3)
            way = 1
    return gramian(through(lambda pull: pull.rows(keep, way))[1])


class _NotTwoPass(Exception):
    """Why the Gramian must be made of rows."""


def _two_pass_gramian(gradient_of, outcome):
    r"""Row i is :math:`J J^\top e_i`: a gradient pulled back, and that through the transposed pull-back."""
    values = outcome.values
    one_hot = lambda i: jnp.reshape(jnp.arange(values.size) == i, values.shape).astype(values.dtype)
    row = jax.eval_shape(gradient_of, values)
    narrow = {str(x.dtype) for x in jax.tree.leaves((row, inputs.sums(outcome.losses))) if jnp.finfo(x.dtype).bits < 32}
    if narrow:
        raise _NotTwoPass(f"products of {', '.join(sorted(narrow))} gradients would be as coarse as these")

    def products(row):
        # What a weight depends on is not left to the default of GPU and TPU, TF32 or bfloat16.
        with jax.default_matmul_precision("highest"):
            return jnp.ravel(jax.linear_transpose(gradient_of, values)(row)[0])

    try:
        jax.eval_shape(products, row)
    except Exception as error:  # whatever the operation without a transpose raises
        raise _NotTwoPass("a backward pass that cannot be transposed needs the rows of the Jacobian") from error
    half = jax.lax.map(lambda i: products(gradient_of(one_hot(i))), jnp.arange(values.size))
    return (half + half.T) / 2


# Reading what is given.


def _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int):
    """The pull-backs with respect to some arguments, and those arguments."""
    indices = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if not all(isinstance(i, int) and -len(args) <= i < len(args) for i in indices):
        inputs.reject("argnums", f"positions among {len(args)} positional arguments", f"{argnums}")
    indices = [i % len(args) for i in indices]
    params = args[indices[0]] if isinstance(argnums, int) else tuple(args[i] for i in indices)
    _check_params(params, allow_int)
    others = [x for i, x in enumerate(args) if i not in indices]

    def of_params(params, *others, **kwargs):
        given = list(others)
        chosen = (params,) if isinstance(argnums, int) else params
        for i, x in sorted(zip(indices, chosen, strict=True), key=lambda pair: pair[0]):
            given.insert(i, x)
        return losses_fn(*given, **kwargs)

    return _open(of_params, params, others, kwargs, has_aux, task_axis, None), params


def _open(losses_fn, params, args, kwargs, has_aux, task_axis, microbatches):
    if isinstance(losses_fn, tuple):
        of_args = lambda args, totals: pullbacks.of_features(
            *losses_fn, params, args, kwargs, has_aux=has_aux, totals=totals
        )
    elif task_axis is not None:
        args = pullbacks.move_axis(args, task_axis)
        of_args = lambda args, totals: pullbacks.of_own_data(
            losses_fn, params, args, kwargs, has_aux=has_aux, totals=totals
        )
    else:
        of_args = lambda args, totals: pullbacks.of_losses(
            losses_fn, params, args, kwargs, has_aux=has_aux, totals=totals
        )
    if microbatches is None:
        return of_args(args, None)
    return pullbacks.of_microbatches(of_args, args, microbatches, axis=0 if task_axis is None else 1)


def _cheapest(ways, through, outcome, params):
    """The way that was fastest where that was measured, of those that take no more memory than may matter."""
    if ways == ("features",):
        return "features"
    one = pullbacks.n_bytes(params)
    whole = outcome.values.size * one
    if whole <= _SMALL:
        return "vmap"
    if "stream" in ways:
        return "stream"
    if "two_pass" in ways:
        # What two passes save is writing and reading the rows. That takes long where they are large for what is
        # computed to make them: where the parameters are large beside the activations.
        _, kept = through(lambda pull: pull.kept)
        return 1 if kept >= 1.5 * one and whole <= _LARGE else "two_pass"
    return 1


def _check_keywords(method, has_features, return_weights, rows, shared, decide_on, at, task_axis, microbatches):
    """The ways to compute rows among which the method leaves the choice."""
    if not isinstance(method, base.Scalarizer | base.Aggregator):
        inputs.reject("method", "a Scalarizer or an Aggregator", type(method).__name__, TypeError)
    if getattr(method, "learned", ()):
        reason = "a method with nothing left to learn: mtl.learn(method, optimizer) trains its fields"
        inputs.reject("method", reason, f"learned={method.learned}")
    if at not in ("parameters", "features"):
        inputs.reject("at", "'parameters' or 'features'", f"{at!r}")
    if has_features and (shared is not None or task_axis is not None):
        inputs.reject("losses_fn", "one function with shared= or task_axis=", "a pair of trunk and heads")
    if at == "features" and not (has_features and decide_on is rows is microbatches is None):
        expected = "'features' only with a pair of trunk and heads, and without rows=, decide_on= and microbatches="
        inputs.reject("at", expected, f"{at!r}")
    if microbatches is not None:
        inputs.check_int("microbatches", microbatches, 1)
    if isinstance(method, base.Scalarizer):
        _check_rows(rows, "vmap", "two_pass", "stream", None)
        return ("vmap",)  # it has no rows
    for name, given in {"return_weights": return_weights, "decide_on": decide_on is not None}.items():
        if given and method.weighting is None:
            inputs.reject(name, "a method that makes weights (method.weighting)", "one that makes none")
    if at == "features":
        return ("features",)
    by_default = ["two_pass"] * (method.gramian_weighting is not None) + ["stream"] * (method.rowwise is not None)
    if task_axis is not None and "two_pass" in by_default:
        by_default.remove("two_pass")  # a row would cost two passes over all tasks' data; all rows together cost one
    _check_rows(rows, "vmap", *by_default, None)
    # With micro-batches every further pass computes the model again.
    return ("vmap",) if microbatches else ("vmap", *by_default)


def _check_rows(rows, *names):
    if isinstance(rows, int) and not isinstance(rows, bool):
        inputs.check_int("rows", rows, 1)
    elif rows not in names:
        inputs.reject("rows", f"an int or one of {', '.join(map(repr, names))}", f"{rows!r}")


def _check_params(params, allow_int):
    for path, leaf in jax.tree.leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if not (jnp.issubdtype(dtype, jnp.floating) or (allow_int and not jnp.issubdtype(dtype, jnp.complexfloating))):
            expected = "floating point numbers (or allow_int=True, for gradients of type float0)"
            inputs.reject(f"params{jax.tree_util.keystr(path)}", expected, f"dtype {dtype}", TypeError)


def _check_per_task(outcome, state=None):
    of_no_task = state is not None and jnp.shape(jax.tree.leaves(state)[0]) == ()
    if outcome.values.ndim == 0 and jax.tree.structure(outcome.losses).num_leaves == 1 and not of_no_task:
        expected = "one loss for each task, as in jnp.stack([...]) or a dict"
        inputs.reject("losses_fn", expected, "a scalar: do not add the losses up")


def _read_present(mask, outcome):
    if mask is None:
        return outcome.present
    mask = inputs.read_mask(mask, outcome.losses, outcome.values.shape)
    return mask if outcome.present is None else mask & outcome.present


def _read_subset(name, mask, params):
    """A boolean for every leaf of the params."""
    mask = mask(params) if callable(mask) else mask
    try:
        full = jax.tree.broadcast(mask, params)
    except ValueError as error:
        expected = f"booleans in the params' structure, or in a prefix of it: {jax.tree.structure(params)}"
        raise ValueError(f"{name}: expected {expected}, found {jax.tree.structure(mask)}") from error
    for leaf in jax.tree.leaves(full):
        if not isinstance(leaf, bool | np.bool_):
            inputs.reject(name, "booleans, known while tracing", type(leaf).__name__, TypeError)
    return full


def _keep(tree, mask):
    return jax.tree.map(lambda keep, x: x if keep else optax.MaskedNode(), mask, tree)


def _join(mask, kept, others):
    """``kept`` where the mask is true, which may have nothing elsewhere."""
    return jax.tree.map(lambda keep, x, y: x if keep else y, mask, kept, others)


def _with_float0(gradient, params, lead=()):
    def leaf(g, p):
        if jnp.issubdtype(jnp.result_type(p), jnp.floating):
            return g
        return np.zeros((*lead, *jnp.shape(p)), jax.dtypes.float0)

    return jax.tree.map(leaf, gradient, params)


def _all(gradient):
    return gradient


def _nothing(pull):
    del pull
    return ()
