"""One training step for every method."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from mtlbalance.annotations import ArrayTree, State
from mtlbalance.autodiff.apart import heads_apart, rows_apart
from mtlbalance.autodiff.decide import balanced, decide_by, decide_or_repeat, ones, read_present
from mtlbalance.autodiff.groups import over_groups
from mtlbalance.autodiff.options import (
    check_at,
    check_is_possible,
    check_losses_fn,
    check_nonfinite,
    check_per_task,
    check_state,
    possible_rows,
)
from mtlbalance.autodiff.start import GradFn, Problem, with_init
from mtlbalance.autodiff.subsets import Subset, join_subsets, with_float0
from mtlbalance.contract import Aggregator, Scalarizer, weights_of
from mtlbalance.losses import like_losses
from mtlbalance.names import names_of, with_names
from mtlbalance.numerics import all_finite


def value_and_grad(
    losses_fn: Callable[..., Any] | tuple[Callable[..., Any], ArrayTree],
    method: Scalarizer[State] | Aggregator[State],
    *,
    has_aux: bool = False,
    return_weights: bool = False,
    rows: int | Literal["vmap", "two_pass", "stream"] | None = None,
    shared: Subset | None = None,
    decide_on: Subset | None = None,
    at: Literal["parameters", "features"] = "parameters",
    task_axis: int | None = None,
    microbatches: int | None = None,
    allow_int: bool = False,
    nonfinite: Literal["drop_task"] | None = None,
    hooks: bool = False,
) -> GradFn[State]:
    r"""One training step's losses and balanced gradient, whatever the method.

    Reads as :func:`jax.value_and_grad`, and as that it is not jitted: call it inside your jitted step. ::

        grad_fn = mtl.value_and_grad(losses_fn, method)
        state = grad_fn.init(params, batch)
        (losses, state), grads = grad_fn(params, state, batch)

    The gradient is :math:`\sum_i w_i \nabla L_i`: for a scalarizer :math:`w` is the derivative of its scalar with
    respect to the losses, one backward pass in all; for an aggregator it is what its weighting makes of the Jacobian
    or Gramian. An aggregator without weights combines the rows as it likes.

    Of complex parameters it is, as :func:`jax.grad` has it, the conjugate of the steepest ascent; methods see pairs of
    reals.

    Args:
      losses_fn: ``(params, *args, **kwargs) -> losses``, one per task, an array or a tree of names, see
        :func:`value_and_jac`; or a dict or list of functions, one for each task and its own data; or a pair of trunk
        and heads; below.
      method: a :class:`~mtlbalance.Scalarizer` without learned fields (:func:`learn` trains those), or an
        :class:`~mtlbalance.Aggregator`.
      has_aux: ``losses_fn`` returns a pair ``(losses, aux)``; so do the trunk and every head.
      return_weights: also return one weight per task, in the structure of the losses.
      rows: how an aggregator's rows of the Jacobian are computed; the cheapest way by default.
      shared: the parameters to balance, booleans as in :func:`optax.masked`; all by default.
      decide_on: the parameters on which weights are decided; the balanced ones by default.
      at: whether a method for a trunk and heads sees the gradients of its ``"parameters"`` or its ``"features"``.
      task_axis: the axis of all positional arguments after the state along which each task has its own data; none by
        default.
      microbatches: how many to cut the batch in, at least 1; none by default.
      allow_int: integer parameters get "gradients" of dtype ``float0``, as in :func:`jax.grad`; without it they raise.
      nonfinite: ``"drop_task"`` goes on without a task whose loss or gradient is not finite; none does by default.
      hooks: whether your loop calls the hooks of the method that it needs (``method.needs``), such as ``state =
        method.end_epoch(state)`` for ``dwa()``; a method that does nothing without them is refused otherwise.

    Returns:
      ``grad_fn(params, state, *args, mask=None, refresh=None, **kwargs)``. It returns ``(losses, new_state), grads``,
      the first with the weights and the auxiliary output appended where asked for. ``losses`` are as ``losses_fn``
      returned them. ``mask`` says which tasks are present and ``refresh``, one boolean, whether to decide anew; neither
      is passed to ``losses_fn``, nor reaches its ``**kwargs``.

      ``grad_fn.init(params, *args, **kwargs)`` is the method's first state, for these losses and what the method sees
      of the parameters, placed as these are. Arguments may be :class:`jax.ShapeDtypeStruct`: nothing is computed,
      except where the losses' Python code branches on numbers. ``jax.jit(grad_fn)`` has it too, where a type
      checker does not see it.

    Raises:
      TypeError: if a parameter or a loss is not floating point, an option of the wrong type, or the state none of the
        method's.
      ValueError: if the method has learned fields, needs ``hooks``, or cannot do what is asked, a mask is of another
        structure, the losses are a scalar where one per task is expected, or ``losses_fn`` has a parameter ``mask`` or
        ``refresh``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtlbalance as mtl
      >>> from mtlbalance import aggregation
      >>> def losses_fn(params, x):
      ...     return {"small": jnp.mean((params - x) ** 2), "large": 100 * jnp.mean((params + x) ** 2)}
      >>> method = aggregation.imtl_g()
      >>> grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True)
      >>> params, x = jnp.array([0.5, 0.0]), jnp.array([1.0, 2.0])
      >>> (losses, state, weights), grads = jax.jit(grad_fn)(params, grad_fn.init(params, x), x)
      >>> print({name: f"{weight:.3f}" for name, weight in weights.items()})
      {'large': '0.008', 'small': '0.992'}

    Notes:
      **Shared parameters.** ``shared`` says which parameters the tasks share: a tree of booleans in the structure of
      the parameters or a prefix of it, or a function from the parameters to one. Only they are balanced, in either
      family, and only they are in the Jacobian; all others get the plain gradient of the sum of the losses. A state
      made by hand is for the shared part: ``method.init((m, mtl.subset(params, shared)))``.

      **Trunk and heads.** A pair ``(trunk, heads)`` in place of ``losses_fn``: ``trunk(trunk_params, *args)`` returns
      the features, and ``heads`` is a tree of functions, each ``head(head_params, features, *args)`` the loss of one
      task. ``params`` is a pair too: the trunk's, which are the shared ones, and a tree with those of each head. Heads
      are differentiated once each, for their own loss. ``at="features"`` gives the method the Jacobian of the features
      in place of the trunk's: one backward pass through the trunk in all. That is an approximation (MGDA-UB, Sener and
      Koltun 2018; LibMTL's ``rep_grad``), and needs tasks that share their inputs. A state made by hand is for the
      features: ``method.init((m, jax.eval_shape(trunk, trunk_params, *args)))``.

      **Own data.** With a dict or list of functions in place of ``losses_fn``, which may be nested, every positional
      argument after the state is a tree with the same top: ``{"cls": cls_batch, "reg": reg_batch}`` for ``{"cls":
      cls_loss, "reg": reg_loss}``. Each function returns the loss of its task, one number; batches may differ in size
      and shape. Keyword arguments are passed whole to each, auxiliary outputs come by task. A step costs one gradient
      of each task, whatever the method; what is not finite in an absent task's loss or gradient leaves all else alone.

      With ``task_axis`` ``losses_fn`` is the loss of *one* task, called with each task's part of every positional
      argument after the state, all of one shape; keyword arguments are passed whole, auxiliary outputs are stacked. All
      rows together cost little more than one step. A task whose loss is not finite leaves the others' rows alone; if it
      is absent, and the gradient is made of kept rows, without ``shared`` and ``decide_on``, the gradient too.

      **A bad task alone.** To the backward pass that tasks share one loss that is not finite brings NaN for all: zero
      times infinity. With ``nonfinite="drop_task"`` each task's gradient is computed alone, and a task whose loss or
      gradient is not finite is absent from this step, as if masked: its weight is 0 and the gradient is that of the
      others. The ``losses`` show what it had. :func:`skip_nonfinite` around the method counts it in ``nonfinite``;
      without it nothing counts. If all are bad the gradient is zero and the state stays. Losses must come in a dict or
      list, one number each: of one array the backward pass is one. A row for each task is kept in memory, and costs a
      backward pass, for scalarizers and with ``refresh=False`` too; functions and ``task_axis`` compute them anyway,
      and with trunk and heads only a method that needs rows does. What tasks share cannot be told apart: NaN in the
      parameters, in the features or in their backward pass is in every row. Nor can what a task does to itself, as a
      0/0 behind ``where``.

      **Micro-batches.** With ``microbatches=k`` every positional argument after the state is cut in k along its first
      axis, or the second if the first is the task axis (each task's batch by itself where each has a function):
      micro-batch i has the examples i, i + k, i + 2k and so on, so that a batch that is split over devices stays where
      it is. Sums and counts of :class:`Counted` losses are added up over all of them, other losses and all gradients
      averaged, and the method decides once. Where the weights depend on this step's losses the model runs twice over
      each micro-batch, else once; the table of methods in ``docs/methods`` says which. Rows are kept by default;
      ``"two_pass"`` and ``"stream"`` run the model again for every row. Auxiliary outputs are stacked. Keyword
      arguments are passed whole: give random keys as a batch of them.

      **Fewer decisions.** With a method wrapped in :func:`amortize`, ``grad_fn(..., refresh=False)`` takes the last
      weights again, at the cost of one backward pass. ``decide_on``, booleans like ``shared``, decides the weights on
      some parameters (the last layer, norms, LoRA's) and applies them to all; a state made by hand is for these:
      ``method.init((m, mtl.subset(params, decide_on)))``. Scalarizers decide on losses: nothing changes for them.

      **Rows.** ``"vmap"`` computes all rows at once, an int so many at a time, and keeps them until the gradient is
      made; ``"two_pass"`` never keeps them (the methods with ``gramian_weighting``; :func:`value_and_gramian` says what
      that needs); ``"stream"`` takes one at a time, used and dropped (the methods with ``rowwise``). Equal numbers if
      the backward pass is linear. If it clips, kept rows and pulled-back weights differ. The default is ``"vmap"`` for
      a Jacobian of up to 4 MiB, or 256 MiB with a function for each task, whose rows would be computed twice. Beyond,
      ``"stream"`` where the method can; else rows one at a time, or two passes for the methods that need the Gramian,
      if the Jacobian is over 256 MiB or what the backward pass keeps is less than one and a half times the parameters:
      there a row is computed faster than it is stored. A method that takes in one row at a call, as M-ConFIG does, has
      ``"stream"`` at any size: one backward pass a step. Milliseconds and megabytes of each way stand in
      ``tests/benchmarks/autodiff.md``.

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization <https://arxiv.org/abs/1810.04650>`_,
      NeurIPS 2018, for ``at="features"``; Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024, section 6, for descent by the Gramian.
    """
    check_losses_fn(losses_fn, shared, task_axis)
    check_is_possible(method, return_weights, decide_on, hooks)
    check_at(at, isinstance(losses_fn, tuple), decide_on, rows, microbatches)
    check_nonfinite(nonfinite, rows, method)
    drops = nonfinite is not None
    problem = Problem(losses_fn, shared, decide_on, at, has_aux, task_axis, microbatches, allow_int, apart=drops)
    decider = method if method.nesting is None else method.nesting.outer
    possible = possible_rows(decider, rows, problem.own_data, microbatches)
    possible = ("vmap",) if drops and "vmap" in possible else possible  # they have been kept to look at them

    def grad_fn(params, state, /, *args, mask=None, refresh=None, **kwargs):
        check_state(state)
        is_shared, restrict = problem.subsets(params)
        point = problem.evaluate(params, args, kwargs)
        check_per_task(point.evaluated, state)
        present, dropped = read_present(mask, point.evaluated), None
        if drops:
            point, finite = _without_nonfinite(problem, method, rows, params, restrict, point)
            present = jnp.ones_like(finite) if present is None else present
            present, dropped = present & finite, present & ~finite
        keeps_rows = drops or problem.own_data or at == "features"
        deciding, of_losses = over_groups(method, state, point, present, keeps_rows=keeps_rows)
        chosen = at if at == "features" else rows or problem.cheapest_rows(possible, deciding.point, restrict(params))
        decide = partial(decide_by, *deciding, restrict, chosen, rows)
        decision = of_losses(decide() if refresh is None else decide_or_repeat(*deciding, refresh, decide))

        evaluated, new_state, weights, gradient = decision
        if gradient is None or decide_on is not None:
            evaluated, gradient = point.evaluate_and_pull(
                lambda pullback: balanced(pullback, weights, present, is_shared)
            )
            if microbatches and refresh is None and isinstance(method, Scalarizer):
                # The first pass over the micro-batches then serves the weights alone. Where they do not depend on the
                # losses, as UW's do not, it is dead code, which XLA removes.
                _, new_state = weights_of(method, state, evaluated.named, present)
        elif is_shared is not None:
            plain = point.pull(lambda pullback: pullback.weighted(ones(evaluated.values, present), present))
            gradient = join_subsets(is_shared, gradient, plain)

        if method.after_gradient is not None:
            with with_names(names_of(evaluated.named)):
                new_state = method.after_gradient(state, new_state, all_finite(gradient), dropped)
        outputs = evaluated.losses, new_state
        outputs += (like_losses(weights, evaluated.losses),) if return_weights else ()
        outputs += (evaluated.aux,) if has_aux else ()
        return outputs, with_float0(gradient, params)

    return with_init(grad_fn, problem, method)


def _without_nonfinite(problem, method, rows, params, restrict, point):
    """The point with rows that can be left out one by one; and the tasks whose loss and gradient are finite."""
    n = rows if isinstance(rows, int) else problem.cheapest_rows(("vmap",), point, params)
    if not isinstance(problem.losses_fn, tuple) or problem.microbatches is not None:
        return rows_apart(point, n)
    needs_rows = isinstance(method, Aggregator) and problem.at == "parameters"
    return heads_apart(point, restrict, n if needs_rows else None)
