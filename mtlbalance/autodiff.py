"""Losses with their Jacobian, with its Gramian, and one training step for every method."""

import numbers
import operator
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
    r"""The losses and their Jacobian: for several losses what :func:`jax.value_and_grad` is for one.

    Args:
      losses_fn: returns one loss per task: an array of any shape with m entries, or a tree of named losses of m entries
        together (in the order of :func:`jax.tree.leaves`); they may be :class:`Counted`. With ``task_axis=`` it returns
        the loss of one task.
      argnums: which positional arguments to differentiate with respect to, as in :func:`jax.grad`.
      has_aux: ``losses_fn`` returns a pair ``(losses, aux)``.
      rows: how many rows are computed at a time, or ``"vmap"`` for all at once, which takes memory for m backward
        passes. The default is ``"vmap"`` for a Jacobian of up to 4 MiB and 1 beyond, see :func:`value_and_grad`.
      task_axis: every task has its own data, on this axis of every other positional argument; see
        :func:`value_and_grad`.
      allow_int: integer parameters get "gradients" of dtype ``float0``, as in :func:`jax.grad`; without it they raise.

    Returns:
      A function of the arguments of ``losses_fn``. It returns ``(losses, jacobian)``, or ``((losses, aux), jacobian)``.
      The Jacobian has the structure of the parameters and leaves ``[m, *param.shape]``.

    Raises:
      TypeError: if a parameter is not floating point, or a loss is not.
      ValueError: if the losses are a scalar, or an option is out of bounds.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> losses_fn = lambda params, x: {"a": jnp.sum(params["w"] * x), "b": jnp.sum(params["w"] ** 2)}
      >>> losses, jacobian = mtl.value_and_jac(losses_fn)({"w": jnp.array([1.0, 2.0])}, 3.0)
      >>> print(losses["a"], losses["b"])
      9.0 5.0
      >>> print(jacobian["w"])
      [[3. 3.]
       [2. 4.]]
    """
    _check_rows(rows, "vmap", None)

    def jac_fn(*args, **kwargs):
        through, params = _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int)
        outcome, _ = through(_nothing)
        _check_per_task(outcome)
        way = rows or _cheapest(("vmap",), task_axis, through, outcome, params)
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
    r"""The losses and the Gramian :math:`J J^\top` of their Jacobian: the inner products of the tasks' gradients.

    Two passes never store the Jacobian: row i is the pull-back of task i's gradient through the *transposed* pull-back
    (:func:`jax.linear_transpose`), which needs no forward-mode rule. What they keep does not grow with m. They need a
    backward pass that can be transposed: none that clips gradients, or has a ``while_loop`` or a Pallas kernel inside a
    ``custom_vjp``. Where two passes would be the default, rows are then computed and one warning says so. A backward
    pass that is not linear in a way that JAX does not see, as one that adds a constant, needs rows too. Losses or
    parameters narrower than float32 are given rows, whose products are summed in float32; a model of float32
    parameters that computes in bfloat16 inside may have two passes. One that computes in float16 with a loss scale in
    its backward pass needs rows: two passes divide by the scale first, and small gradients underflow.

    Args:
      losses_fn: as in :func:`value_and_jac`.
      argnums: as in :func:`value_and_jac`.
      has_aux: ``losses_fn`` returns a pair ``(losses, aux)``.
      rows: how many rows of the Jacobian are computed at a time; ``"vmap"`` for all at once, ``"two_pass"`` for two
        passes. The default is the cheapest, see :func:`value_and_grad`.
      task_axis: as in :func:`value_and_jac`; there are no two passes with it.
      allow_int: integer parameters do not raise, and count as zero.

    Returns:
      A function of the arguments of ``losses_fn``. It returns ``(losses, gramian)``, or ``((losses, aux), gramian)``;
      the Gramian of shape ``[m, m]`` is in float32 or wider.

    Raises:
      TypeError: as :func:`value_and_jac`.
      ValueError: as :func:`value_and_jac`; and if ``"two_pass"`` is asked for where it is not possible.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> losses_fn = lambda params, x: jnp.stack([jnp.sum(params * x), jnp.sum(params**2)])
      >>> losses, products = mtl.value_and_gramian(losses_fn)(jnp.array([1.0, 2.0]), 3.0)
      >>> print(products)
      [[18. 18.]
       [18. 20.]]
    """
    ways = ("vmap", "two_pass") if task_axis is None else ("vmap",)
    _check_rows(rows, *ways, None)

    def gramian_fn(*args, **kwargs):
        through, params = _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int)
        outcome, _ = through(_nothing)
        _check_per_task(outcome)
        way = rows or _cheapest(ways, task_axis, through, outcome, params)
        products, _ = _gramian(through, outcome, _all, way, requested=rows)
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
    r"""One training step's losses and balanced gradient, whatever the method.

    Reads as :func:`jax.value_and_grad`, and as that it is not jitted: call it inside your jitted step. ::

        grad_fn = mtl.value_and_grad(losses_fn, method)
        (losses, state), grads = grad_fn(params, state, batch)

    The gradient is :math:`\sum_i w_i \nabla L_i`: for a scalarizer :math:`w` is the derivative of its scalar with
    respect to the losses, one backward pass in all; for an aggregator it is what its weighting makes of the Jacobian
    or Gramian. An aggregator without weights combines the rows as it likes.

    **Shared parameters.** ``shared`` says which parameters the tasks share: a tree of booleans in the structure of the
    parameters or a prefix of it, or a function from the parameters to one, as in :func:`optax.masked`. Only they are
    balanced, in either family, and only they are in the Jacobian; all others get the plain gradient of the sum of the
    losses. The state is then made for the shared part: ``method.init((m, mtl.subset(params, shared)))``.

    **Trunk and heads.** A pair ``(trunk, heads)`` in place of ``losses_fn``: ``trunk(trunk_params, *args)`` returns the
    features, and ``heads`` is a tree of functions, each ``head(head_params, features, *args)`` the loss of one task.
    ``params`` is a pair too: the trunk's, which are the shared ones, and a tree with those of each head. Heads are
    differentiated once each, for their own loss. ``at="features"`` gives the method the Jacobian of the features in
    place of the trunk's: one backward pass through the trunk in all. That is an approximation (MGDA-UB, Sener and
    Koltun 2018; LibMTL's ``rep_grad``), and needs tasks that share their inputs. The state is then made for the
    features: ``method.init((m, jax.eval_shape(trunk, trunk_params, *args)))``.

    **Own data.** With ``task_axis`` ``losses_fn`` is the loss of *one* task, called with each task's part of every
    positional argument after the state; keyword arguments are passed whole, auxiliary outputs are stacked. All rows
    together cost little more than one step. A task whose loss is not finite leaves the others' rows alone; if it is
    absent, and the gradient is made of kept rows, without ``shared`` and ``decide_on``, the gradient too.

    **Micro-batches.** With ``microbatches=k`` every positional argument after the state is cut in k along its first
    axis, or the second if the first is the task axis: micro-batch i has the examples i, i + k, i + 2k and so on, so
    that a batch that is split over devices stays where it is. Sums and counts of :class:`Counted` losses are added up
    over all of them, other losses and all gradients averaged, and the method decides once. Where the weights depend on
    this step's losses the model runs twice over each micro-batch, else once; the README's table of methods says which.
    Rows are kept by default; ``"two_pass"`` and ``"stream"`` run the model again for every row. Auxiliary outputs are
    stacked. Keyword arguments are passed whole: give random keys as a batch of them.

    **Fewer decisions.** With a method wrapped in :func:`amortize`, ``grad_fn(..., refresh=False)`` takes the last
    weights again, at the cost of one backward pass. ``decide_on``, a mask like ``shared``, decides the weights on some
    parameters (the last layer, norms, LoRA's) and applies them to all; the state is made for these:
    ``method.init((m, mtl.subset(params, decide_on)))``. Scalarizers decide on losses: nothing changes for them.

    **Rows.** ``rows`` says how an aggregator's rows of the Jacobian are computed: ``"vmap"``, all at once, or so many
    at a time, and kept until the gradient is made; ``"two_pass"``, never kept (the methods with ``gramian_weighting``;
    see :func:`value_and_gramian` for what that needs); ``"stream"``, one at a time, each used and dropped (the methods
    with ``rowwise``). All give the same numbers, if the backward pass is linear in the cotangent; if it clips, kept
    rows and weights that are pulled back give different gradients. Milliseconds and megabytes of temporaries of one
    step on two CPU cores, MLP 64-w-w-w-m, relu, float32 (not measured on a GPU):

    ===================== ============= ============= ============= =============
    m, w, batch           2, 512, 256   8, 512, 256   32, 512, 256  8, 1024, 64
    ===================== ============= ============= ============= =============
    gradient of the sum   4.2, 2.6      4.6, 2.6      4.5, 2.6      4.9, 1.0
    UPGrad, "vmap"        9.1, 6.8      32, 30        173, 120      119, 101
    UPGrad, 1             8.3, 6.8      29, 20        134, 77       67, 69
    UPGrad, "two_pass"    15, 5.6       47, 5.7       182, 5.7      49, 2.8
    ExcessMTL, "vmap"     10, 11        47, 42        216, 172      199, 137
    ExcessMTL, 1          8.6, 8.8      37, 35        158, 147      97, 137
    ExcessMTL, "stream"   11, 6.6       34, 6.6       135, 6.7      76, 10
    ===================== ============= ============= ============= =============

    The default is ``"vmap"`` for a Jacobian of up to 4 MiB. Beyond, ``"stream"`` where the method can; else rows one at
    a time, or two passes for the methods that need the Gramian, if the Jacobian is over 256 MiB or what the backward
    pass keeps is less than one and a half times the parameters: there a row is computed faster than it is stored. A
    method that takes in one row at a call, as M-ConFIG does, has ``"stream"`` at any size: one backward pass a step.

    Args:
      losses_fn: ``(params, *args, **kwargs) -> losses``, see :func:`value_and_jac`; or a pair of trunk and heads.
      method: a :class:`~mtlbalance.Scalarizer` without learned fields (:func:`learn` trains those), or an
        :class:`~mtlbalance.Aggregator`.
      has_aux: ``losses_fn`` returns a pair ``(losses, aux)``; so do the trunk and every head.
      return_weights: also return one weight per task, in the structure of the losses.
      rows: how an aggregator's rows are computed; the cheapest way by default.
      shared: the parameters to balance; all by default.
      decide_on: the parameters on which weights are decided; the balanced ones by default.
      at: whether a method for a trunk and heads sees the gradients of its ``"parameters"`` or its ``"features"``.
      task_axis: the axis of all positional arguments after the state along which each task has its own data; none by
        default.
      microbatches: how many to cut the batch in, at least 1; none by default.
      allow_int: integer parameters get "gradients" of dtype ``float0``, as in :func:`jax.grad`; without it they raise.

    Returns:
      ``grad_fn(params, state, *args, mask=None, refresh=None, **kwargs)``. It returns ``(losses, new_state), grads``,
      the first with the weights and the auxiliary output appended where asked for. ``losses`` are as ``losses_fn``
      returned them. ``mask`` says which tasks are present and ``refresh``, one boolean, whether to decide anew; neither
      is passed to ``losses_fn``.

    Raises:
      TypeError: if a parameter or a loss is not floating point, or an option of the wrong type.
      ValueError: if the method has learned fields or cannot do what is asked, a mask is of another structure, or the
        losses are a scalar where one per task is expected.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> def losses_fn(params, x):
      ...     return {"small": jnp.mean((params - x) ** 2), "large": 100 * jnp.mean((params + x) ** 2)}
      >>> method = aggregation.imtl_g()
      >>> grad_fn = jax.jit(mtl.value_and_grad(losses_fn, method, return_weights=True))
      >>> params = jnp.array([0.5, 0.0])
      >>> (losses, state, weights), grads = grad_fn(params, method.init((2, params)), jnp.array([1.0, 2.0]))
      >>> print({name: f"{weight:.3f}" for name, weight in weights.items()})
      {'large': '0.008', 'small': '0.992'}

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_,
      NeurIPS 2018, for ``at="features"``; Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024, section 6, for descent by the Gramian.
    """
    has_features = isinstance(losses_fn, tuple)
    _check_losses_fn(losses_fn, shared, task_axis)
    _check_method(method, return_weights, decide_on)
    _check_at(at, has_features, rows, decide_on, microbatches)
    ways = _ways(method, rows, task_axis, microbatches)

    def grad_fn(params, state, /, *args, mask=None, refresh=None, **kwargs):
        if not jax.tree.leaves(state):
            inputs.reject("state", "what the method's init returned", f"{state!r}", TypeError)
        _check_params(params, allow_int)
        mask_of_shared = pullbacks.pair_of(params).unflatten((True, False)) if has_features else shared
        is_shared = None if mask_of_shared is None else _read_subset("shared", mask_of_shared, params)
        decides = is_shared if decide_on is None else _read_subset("decide_on", decide_on, params)
        keep = _all if decides is None else lambda gradient: _keep(gradient, decides)

        through = _open(losses_fn, params, args, kwargs, has_aux, task_axis, microbatches)
        outcome, _ = through(_nothing)
        _check_per_task(outcome, state)
        present = _read_present(mask, outcome)
        way = "features" if at == "features" else rows or _cheapest(ways, task_axis, through, outcome, keep(params))
        decide = lambda: _decide(method, state, through, present, keep, way, rows)

        def plain(pull):  # the gradient of the sum, for what is not shared
            return pull.weighted(_ones(outcome, present), present)

        def balanced(pull):
            gradient = pull.weighted(weights, present)
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
    """The parameters that a mask selects, with :class:`optax.MaskedNode` in the place of the others.

    For the state of a method that sees some of the parameters: ``method.init((m, mtl.subset(params, shared)))``.

    Args:
      params: any tree.
      mask: a tree of booleans in the structure of ``params`` or a prefix of it, or a function from ``params`` to one.

    Returns:
      A tree with the selected leaves of ``params``.

    Raises:
      ValueError: if the mask has another structure.
      TypeError: if it has anything but booleans that are known while tracing.

    Example:
      >>> import mtlbalance as mtl
      >>> print(mtl.subset({"trunk": 1.0, "heads": {"a": 2.0, "b": 3.0}}, {"trunk": True, "heads": False}))
      {'heads': {'a': MaskedNode(), 'b': MaskedNode()}, 'trunk': 1.0}
    """
    return _keep(params, _read_subset("mask", mask, params))


# What a method decides.


class _Decision(NamedTuple):
    """Of one call: the weights, or the gradient of the parameters that the method sees, or both."""

    outcome: pullbacks.Outcome | None
    state: Any
    weights: chex.Array | None
    gradient: Any = None


def _decide(method, state, through, present, keep, way, requested):
    if isinstance(method, base.Scalarizer):
        return _weigh(method, state, through(_nothing)[0], present)

    mask, jacobian = None if present is None else jnp.ravel(present), None
    weigh = method.weighting and method.weighting.apply
    if way in ("stream", "two_pass"):
        outcome, _ = through(_nothing)
        if way == "stream":
            state, statistic, row = _visit_rows(method.rowwise, state, through, keep, mask, outcome.values)
            weigh = method.rowwise.weigh
        else:
            statistic, jacobian = _gramian(through, outcome, keep, way, requested)
            weigh = method.gramian_weighting.apply
    elif way == "features":
        outcome, statistic = through(lambda pull: pull.features[0])
    else:
        outcome, jacobian = through(lambda pull: pull.rows(keep, way))
        statistic = jacobian

    given = {"values": jnp.ravel(outcome.values), "mask": mask}
    if way == "stream" and weigh is None:
        gradient, state = method.rowwise.finish(state, statistic, **given)
        gradient = jax.tree.map(lambda g, x: g.astype(x.dtype), gradient, row)
        return _Decision(outcome, state, None, gradient)
    if weigh is not None:
        weights, state = weigh(state, statistic, **given)
        if jacobian is None:
            return _Decision(outcome, state, weights)
        rows = jacobian if mask is None else inputs.present_rows(jacobian, mask)
        return _Decision(outcome, state, weights, combine(weights, rows))
    gradient, state = method.apply(state, statistic, **given)
    if way == "features":
        _, gradient = through(lambda pull: keep(pull.features[1](gradient, _ones(outcome, present), present)))
    return _Decision(outcome, state, None, gradient)


def _ones(outcome, present):
    """The weights of the sum."""
    return jnp.ones_like(outcome.values) if present is None else present.astype(outcome.values.dtype)


def _weigh(method, state, outcome, present):
    """A scalarizer's weights are the derivative of its scalar."""
    weigh = jax.grad(lambda values: method.apply(state, values, mask=present), has_aux=True)
    weights, state = weigh(outcome.values)
    return _Decision(outcome, state, weights)


def _visit_rows(rowwise, state, through, keep, mask, values):
    """The state after the visits, the statistics, and what a row looks like.

    Rows come and go, and the state is changed in place.
    """
    values = jnp.ravel(values)
    indices, n_visits = jnp.arange(values.size), values.size
    if rowwise.visits is not None:
        indices = rowwise.visits(state, mask=mask)
        # Hidden from XLA, which would unroll a loop of one visit and then copy the state. Not read from the state:
        # under vmap the loop would select between whole states.
        n_visits = jax.lax.optimization_barrier(jnp.asarray(indices.size))

    def row(i):
        return through(lambda pull: keep(pull.row(i)))[1]

    def visit(i, state):
        return rowwise.visit(state, i, row(i), values=values, mask=mask)

    def step(n, carry):
        state, statistics = carry
        state, statistic = visit(indices[n], state)
        return state, jax.tree.map(lambda all, one: all.at[indices[n]].set(one), statistics, statistic)

    _, statistic = jax.eval_shape(visit, 0, state)
    start = jax.tree.map(lambda x: jnp.zeros((values.size, *x.shape), x.dtype), statistic)
    state, statistics = jax.lax.fori_loop(0, n_visits, step, (state, start))
    return state, statistics, jax.eval_shape(row, 0)


def _refresh(refresh, decide, state, present):
    amortized = state
    while not hasattr(amortized, "last_weights") and hasattr(amortized, "inner"):
        amortized = amortized.inner  # wrappers such as skip_nonfinite keep the state of amortize there
    weights = getattr(amortized, "last_weights", None)
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


def _gramian(through, outcome, keep, way, requested):
    """The Gramian; and the rows where they were kept, if only because two passes turned out impossible."""
    if way == "two_pass":
        gradient_of = lambda weights: keep(through(lambda pull: pull.weighted(weights))[1])
        obstacle, by_design = _obstacle_to_two_passes(gradient_of, outcome)
        if obstacle is None:
            return _two_pass_gramian(gradient_of, outcome.values), None
        if requested == way:
            inputs.reject("rows", "'vmap' or an int", f"'two_pass': {obstacle}")
        if not by_design:
            found = f"{obstacle}, so its rows are computed one at a time"
            warnings.warn(f"the Jacobian: {found}; rows=1 asks for that without this warning", stacklevel=2)
        way = 1
    _, jacobian = through(lambda pull: pull.rows(keep, way))
    return gramian(jacobian), jacobian


def _two_pass_gramian(gradient_of, values):
    r"""Row i is :math:`J J^\top e_i`: a gradient pulled back, and that through the transposed pull-back."""
    row = lambda i: gradient_of(pullbacks.one_hot(i, values))
    half = jax.lax.map(lambda i: _products(gradient_of, row(i), values), jnp.arange(values.size))
    return (half + half.T) / 2


def _products(gradient_of, row, values):
    """One gradient's inner products with all."""
    # What a weight depends on is not left to the default of GPU and TPU, TF32 or bfloat16.
    with jax.default_matmul_precision("highest"):
        return jnp.ravel(jax.linear_transpose(gradient_of, values)(row)[0])


def _obstacle_to_two_passes(gradient_of, outcome):
    """Why there can be none, and whether that is so by design; or ``None``."""
    row = jax.eval_shape(gradient_of, outcome.values)
    narrow = {str(x.dtype) for x in jax.tree.leaves((row, inputs.sums(outcome.losses))) if jnp.finfo(x.dtype).bits < 32}
    if narrow:
        return f"the products of {', '.join(sorted(narrow))} gradients would be as coarse as these", True
    try:
        jax.eval_shape(lambda row: _products(gradient_of, row, outcome.values), row)
    except Exception as error:  # whatever the operation without a transpose raises
        first_line, *_ = f"{error}".splitlines() or [""]
        return f"the backward pass cannot be transposed ({type(error).__name__}: {first_line})", False
    return None, False


# Reading what is given.


def _of_argnums(losses_fn, argnums, args, kwargs, has_aux, task_axis, allow_int):
    """The pull-backs with respect to some arguments, and those arguments."""
    single = not isinstance(argnums, tuple | list)
    indices = [operator.index(i) for i in ((argnums,) if single else argnums)]
    if not all(-len(args) <= i < len(args) for i in indices) or len({i % len(args) for i in indices}) < len(indices):
        inputs.reject("argnums", f"different positions among {len(args)} positional arguments", f"{argnums}")
    indices = [i % len(args) for i in indices]
    params = args[indices[0]] if single else tuple(args[i] for i in indices)
    _check_params(params, allow_int)
    others = [x for i, x in enumerate(args) if i not in indices]

    def of_params(params, /, *others, **kwargs):
        given = list(others)
        for i, x in sorted(zip(indices, (params,) if single else params, strict=True), key=lambda pair: pair[0]):
            given.insert(i, x)
        return losses_fn(*given, **kwargs)

    return _open(of_params, params, others, kwargs, has_aux, task_axis, None), params


def _open(losses_fn, params, args, kwargs, has_aux, task_axis, microbatches):
    make, functions = pullbacks.of_losses, (losses_fn,)
    if isinstance(losses_fn, tuple):
        make, functions = pullbacks.of_features, losses_fn
    elif task_axis is not None:
        make, args = pullbacks.of_own_data, pullbacks.move_axis(args, task_axis)
    of_args = lambda args, totals: make(*functions, params, args, kwargs, has_aux=has_aux, totals=totals)
    if microbatches is None:
        return of_args(args, None)
    return pullbacks.of_microbatches(of_args, args, microbatches, axis=0 if task_axis is None else 1)


def _cheapest(ways, task_axis, through, outcome, params):
    """The way that was fastest where that was measured, of those that take no more memory than may matter."""
    one = pullbacks.n_bytes(params)
    whole = outcome.values.size * one
    if whole <= _SMALL and "vmap" in ways:
        return "vmap"
    if "stream" in ways:
        return "stream"
    if task_axis is not None:
        return "vmap"  # each row has its own part of the batch: all at once take no more memory
    if "two_pass" in ways:
        # What two passes save is writing and reading the rows. That takes long where they are large for what is
        # computed to make them: where the parameters are large beside the activations.
        _, kept = through(lambda pull: pull.kept)
        return 1 if kept >= 1.5 * one and whole <= _LARGE else "two_pass"
    return 1


def _check_losses_fn(losses_fn, shared, task_axis):
    is_pair = isinstance(losses_fn, tuple) and len(losses_fn) == 2 and callable(losses_fn[0])
    if not is_pair and not callable(losses_fn):
        inputs.reject(
            "losses_fn", "a function, or a pair of a trunk and heads", f"{type(losses_fn).__name__}", TypeError
        )
    if is_pair and (shared is not None or task_axis is not None):
        inputs.reject("losses_fn", "one function with shared= or task_axis=", "a pair of trunk and heads")


def _check_method(method, return_weights, decide_on):
    if not isinstance(method, base.Scalarizer | base.Aggregator):
        inputs.reject("method", "a Scalarizer or an Aggregator", type(method).__name__, TypeError)
    if getattr(method, "learned", ()):
        reason = "a method with nothing left to learn: mtl.learn(method, optimizer) trains its fields"
        inputs.reject("method", reason, f"learned={method.learned}")
    makes_weights = isinstance(method, base.Scalarizer) or method.weighting is not None
    for name, given in {"return_weights": return_weights, "decide_on": decide_on is not None}.items():
        if given and not makes_weights:
            inputs.reject(name, "a method that makes weights (method.weighting)", "one that makes none")


def _check_at(at, has_features, rows, decide_on, microbatches):
    if at not in ("parameters", "features"):
        inputs.reject("at", "'parameters' or 'features'", f"{at!r}")
    if at == "features" and not (has_features and decide_on is rows is microbatches is None):
        expected = "'features' only with a pair of trunk and heads, and without rows=, decide_on= and microbatches="
        inputs.reject("at", expected, f"{at!r}")


def _ways(method, rows, task_axis, microbatches):
    """The ways to compute rows among which the choice is ours; those that may be asked for are more."""
    if microbatches is not None:
        inputs.check_int("microbatches", microbatches, 1)
    ways = ["vmap"]
    is_scalarizer = isinstance(method, base.Scalarizer)  # which has no rows, and takes any
    # With own data a row of the Gramian costs two passes over all data, and all rows of the Jacobian together cost one.
    if is_scalarizer or (method.gramian_weighting is not None and task_axis is None):
        ways.append("two_pass")
    if is_scalarizer or method.rowwise is not None:
        ways.append("stream")
    _check_rows(rows, *ways, None)
    if not is_scalarizer and method.rowwise is not None and method.rowwise.visits is not None:
        return ["stream"]  # some rows of the many
    # With micro-batches every further pass computes the model again.
    return ["vmap"] if is_scalarizer or microbatches is not None else ways


def _check_rows(rows, *names):
    if isinstance(rows, numbers.Integral) and not isinstance(rows, bool):
        inputs.check_int("rows", rows, 1)
    elif rows not in names:
        inputs.reject("rows", f"an int or one of {', '.join(map(repr, names))}", f"{rows!r}")


def _check_params(params, allow_int):
    for path, leaf in jax.tree.leaves_with_path(params):
        is_array = hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)
        dtype = jnp.result_type(leaf) if is_array else type(leaf).__name__
        may_be = (jnp.floating, jnp.integer, jnp.bool_) if allow_int else (jnp.floating,)
        if not is_array or not any(jnp.issubdtype(dtype, kind) for kind in may_be):
            expected = "floating point numbers (or allow_int=True, for gradients of integers of type float0)"
            inputs.reject(f"params{jax.tree_util.keystr(path)}", expected, f"dtype {dtype}", TypeError)


def _check_per_task(outcome, state=None):
    of_no_task = state is not None and jnp.shape(jax.tree.leaves(state)[0]) == ()
    if outcome.values.ndim == 0 and not of_no_task:
        expected = "one loss for each task, as in jnp.stack([...]) or a dict"
        inputs.reject("losses_fn", expected, "a scalar: do not add the losses up")


def _read_present(mask, outcome):
    if mask is None:
        return outcome.present
    mask = inputs.read_mask(mask, outcome.losses, outcome.values.shape)
    return mask if outcome.present is None else mask & outcome.present


def _read_subset(name, mask, params):
    """A boolean for every leaf of the params."""
    is_function = callable(mask) and jax.tree_util.all_leaves([mask])  # a module of booleans may be callable too
    mask = mask(params) if is_function else mask
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
