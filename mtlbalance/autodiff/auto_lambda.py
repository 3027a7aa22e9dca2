"""Auto-Lambda: weights that lower the validation losses after one step with them.

Liu, James, Davison and Johns, "Auto-Lambda: Disentangling Dynamic Task Relationships", TMLR 2022,
https://arxiv.org/abs/2202.03091
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtlbalance import base, numerics
from mtlbalance.annotations import ArrayTree
from mtlbalance.autodiff.decide import read_present
from mtlbalance.autodiff.options import check_losses_fn, check_per_task, check_state
from mtlbalance.autodiff.start import GradFn, Problem, with_init
from mtlbalance.contract import Aggregator, check_is_method
from mtlbalance.hyperparameters import per_task, reject
from mtlbalance.losses import like_losses, read_labelled, read_losses
from mtlbalance.names import Names, check_task, index_of, known_names, names_of, with_names
from mtlbalance.states import count_seen, read_optimizer, select, updated, zero_counts

_RAW = "raw_weights"


class AutoLambdaState(NamedTuple):
    """State of :func:`auto_lambda`.

    Attributes:
      raw_weights: one per task: the weights, or with ``softmax`` their logarithms up to a summand.
      seen: int32, one per task: the calls in which it was present.
      opt_state: the state of the optimizer of the weights.
      inner: the state of the aggregator; ``()`` without one.
    """

    raw_weights: jax.Array
    seen: jax.Array
    opt_state: Any
    inner: Any


def auto_lambda(
    losses_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    primary: int | str | Sequence[int | str] | None = None,
    meta_optimizer: optax.GradientTransformation | None = None,
    initial_weights: ArrayTree | float | None = None,
    softmax: bool = False,
    aggregator: Aggregator | None = None,
    *,
    has_aux: bool = False,
    return_weights: bool = False,
) -> GradFn:
    r"""One training step whose weights are learned by what they do to other data: the exact hypergradient.

    .. math:: \lambda \leftarrow \lambda - \text{meta}\Big( \nabla_\lambda \sum_{k \in \text{primary}}
              L_k^{\text{val}} \big( \theta + u(\textstyle\sum_i \lambda_i \nabla L_i(\theta)) \big) \Big), \qquad
              g = \sum_i \lambda_i \nabla L_i(\theta)

    where u is the update that ``optimizer`` makes of a gradient, and of the weighted losses if it reads them. The step
    is only tried; what comes back is the gradient with the new weights, for the real one. A parameter whose gradient is
    exactly zero counts for nothing where u has no derivative, as Adam's first one. Used like :func:`value_and_grad`,
    with two more things to give::

        grad_fn = mtl.auto_lambda(losses_fn, optimizer, primary="seg")
        state = grad_fn.init(params, batch)
        (losses, state), grads = grad_fn(params, state, batch, validation=(other_batch,), opt_state=opt_state)

    Through one step the hypergradient is exact at first-order cost: one more gradient, on the validation data, pulled
    back through the optimizer's update, and its inner products with the tasks' gradients, all at once by the
    transposed pull-back (:func:`value_and_gramian` says what that needs). The second derivatives of the optimizer's
    update count, as Adam's normalization; those of the model do not occur. A step takes some three to four of the plain
    sum, and keeps no gradient of a single task.

    The weights have no fixed total and may become negative, which says that a task harms the primary ones: where that
    must not be, ``optax.chain(optax.adam(1e-4), optax.keep_params_nonnegative())``, or ``softmax``. A validation loss
    that is not finite makes them NaN for good: ``optax.apply_if_finite(optax.adam(1e-4), 10)`` leaves such calls out.

    Note:
      The official code takes the hypergradient of an SGD step by finite differences along the validation gradient, of
      length 0.01, in two more passes over the training data: in the recorded trainings 4e-6 to 9e-5 of its length off.
      Here it is exact, and of any optimizer's step. LibMTL's has ``softmax=True``, a learning rate of 1e-3, all tasks
      primary, and a plain SGD step in the place of the model's Adam. Its MOML is that with
      ``aggregator=aggregation.mgda()``, on hypergradients of unit length. FORUM does not stand on this function: its
      update of the parameters is no weighted sum of training gradients but one of validation gradients and of that of
      :math:`f(\lambda, \theta) - \min_\theta f(\lambda, \theta)`, after several inner steps, with a quadratic program
      of m + 1 weights. It needs a step of its own, which returns the weights' and the parameters' gradient together.

    Args:
      losses_fn: ``(params, *args, **kwargs) -> losses``, one per task, an array or a tree of names.
      optimizer: of the parameters, any of optax that can be differentiated through, learning rate included.
      primary: the tasks whose validation losses count, by name, or by index where losses have no names: one or several;
        all by default.
      meta_optimizer: of the weights; ``optax.adam(1e-4)`` by default.
      initial_weights: one number for all tasks or one for each (an array or a tree of the same names); 0.1 by default,
        with ``softmax`` the logits, 0.
      softmax: whether the weights are a softmax over the tasks present, of total 1.
      aggregator: makes one hypergradient of those of the single primary tasks, whose names it goes by, or whose order
        in ``primary`` where they have none; their sum by default.
      has_aux: ``losses_fn`` returns a pair ``(losses, aux)``; that of the training data is returned.
      return_weights: also return the new weights, in the structure of the losses.

    Returns:
      ``grad_fn(params, state, *args, validation, opt_state=None, mask=None, **kwargs)``. It returns ``(losses,
      new_state), grads``, the first with the weights and the auxiliary output appended where asked for, and the losses
      those of the training data. ``validation`` is a tuple of what stands in the place of ``args`` there; keyword
      arguments are the same for both. ``opt_state`` is the state of ``optimizer``, which may be left out where that
      has none. ``mask`` says which tasks are present in both. ``grad_fn.init(params, *args, **kwargs)`` is the first
      state, an :class:`AutoLambdaState`.

    Raises:
      TypeError: if a loss or parameter is not floating point, an optimizer none of optax, ``aggregator`` none of
        ours; at a call, if ``validation`` is not a tuple of as many as ``args``, or ``opt_state`` is missing.
      ValueError: if ``primary`` is empty; at ``init``, if it names no task or one twice, or ``initial_weights`` are not
        one per task; at a call, if the validation data have another number of losses.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtlbalance as mtl
      >>> def losses_fn(params, x):
      ...     error = lambda target: jnp.mean((params - target) ** 2)
      ...     return {"main": error(x), "help": error(1.0), "harm": error(-0.5)}
      >>> grad_fn = mtl.auto_lambda(losses_fn, optax.sgd(0.1), "main", optax.sgd(0.1), return_weights=True)
      >>> params, x = jnp.zeros(2), jnp.array([1.0, 2.0])
      >>> (losses, state, weights), grads = grad_fn(params, grad_fn.init(params, x), x, validation=(x,))
      >>> print({name: f"{weight:.3f}" for name, weight in weights.items()})
      {'harm': '0.085', 'help': '0.130', 'main': '0.149'}

    References:
      Liu et al., `Auto-Lambda <https://arxiv.org/abs/2202.03091>`_, TMLR 2022, eqs. 3 and 4;
      https://github.com/lorenmt/auto-lambda.

      Ye et al., `Multi-Objective Meta Learning <https://arxiv.org/abs/2102.07121>`_, NeurIPS 2021, for ``aggregator``.
    """
    check_losses_fn(losses_fn, None, None)
    if not callable(losses_fn):
        reject(
            "losses_fn", "one function that returns the losses", f"a {type(losses_fn).__name__} of functions", TypeError
        )
    if aggregator is not None:
        check_is_method("aggregator", aggregator, "an aggregator", Aggregator)
    meta_optimizer = read_optimizer(optax.adam(1e-4) if meta_optimizer is None else meta_optimizer, "meta_optimizer")
    tasks = _read_primary(primary)
    method, to_weights = _weights(initial_weights, softmax, tasks, meta_optimizer, aggregator)
    problem = Problem(losses_fn, None, None, "parameters", has_aux, None, None, False)
    tried = _Tried(losses_fn, read_optimizer(optimizer), tasks, has_aux)

    def grad_fn(params, state, /, *args, validation, opt_state=None, mask=None, **kwargs):
        check_state(state)
        _check_validation(validation, args)
        opt_state = tried.read_opt_state(opt_state, params)
        problem.subsets(params)  # checks them
        point = problem.evaluate(params, args, kwargs)
        evaluated = point.evaluated
        check_per_task(evaluated, state)
        mask = read_present(mask, evaluated)
        _, new_state = method.apply(state, evaluated.named, mask=mask)
        present = jnp.ones(evaluated.values.shape, bool) if mask is None else mask

        def descended(raw):
            weights = to_weights(raw, present)
            value = jnp.sum(weights * jnp.where(present, evaluated.values, 0))
            return (value, point.pull(lambda pullback: pullback.weighted(weights, mask))), weights

        def losses_after(value, gradient):
            stepped = tried.step(gradient, opt_state, params, value)
            return tried.losses(stepped, validation, kwargs, present)

        with with_names(names_of(evaluated.losses)):
            combine = partial(_combine, aggregator, state.inner, tasks) if aggregator is not None else None
            hypergradient, inner, is_any = _hypergradient(descended, losses_after, state, combine)
        raw, meta_state = _descend(meta_optimizer, hypergradient, state, present)
        learned = new_state._replace(raw_weights=raw, opt_state=meta_state, inner=inner)
        new_state = select(is_any & jnp.any(present), learned, new_state)
        (_, gradient), weights = descended(new_state.raw_weights)
        outputs = evaluated.losses, new_state
        outputs += (like_losses(weights, evaluated.losses),) if return_weights else ()
        outputs += (evaluated.aux,) if has_aux else ()
        return outputs, gradient

    return with_init(grad_fn, problem, method)


def _read_primary(primary: int | str | Sequence[int | str] | None) -> tuple[int | str, ...] | None:
    if primary is None:
        return None
    tasks = tuple(primary) if isinstance(primary, Sequence) and not isinstance(primary, str) else (primary,)
    if not tasks:
        reject("primary", "at least one task, or None for all", "none")
    for task in tasks:
        check_task("primary", task)
    if len(set(tasks)) != len(tasks):
        reject("primary", "each task once", f"{tasks}")
    return tasks


def _names_of_primary(primary: Sequence[int | str] | None) -> Names | None:
    """The names that the aggregator goes by."""
    names = known_names()
    if primary is None or names is None or not names.entries:
        return names
    entries = tuple(entry for entry in names.entries if entry in primary)
    return Names(entries, len(entries))


def _weights(initial_weights, softmax, primary, meta_optimizer, aggregator):
    """The weights at some state as a method, which checks states, names and masks; and how they are made."""

    def init(shape, dtype):
        start = (0.0 if softmax else 0.1) if initial_weights is None else initial_weights
        raw = per_task("initial_weights", start, shape, dtype)
        for task in primary or ():
            check_task("primary", task, raw.size)
        with with_names(_names_of_primary(primary)):
            inner = () if aggregator is None else aggregator.init((len(primary or range(raw.size)), raw.size))
        return AutoLambdaState(raw, zero_counts(shape), meta_optimizer.init({_RAW: raw}), inner)

    def to_weights(raw, present):
        return jnp.where(present, numerics.softmax(raw, present) if softmax else raw, 0)

    def apply(state, values, mask):
        return numerics.weighted_sum(to_weights(state.raw_weights, mask), values, mask), count_seen(state, mask)

    return base.scalarizer(init, apply, per_task={"initial_weights": initial_weights}), to_weights


class _Tried(NamedTuple):
    """The step that is tried, and the losses after it."""

    losses_fn: Callable[..., Any]
    optimizer: optax.GradientTransformationExtraArgs
    primary: Sequence[int | str] | None
    has_aux: bool

    def read_opt_state(self, opt_state, params):
        """The optimizer's state, which only an optimizer without numbers in it can do without."""
        if opt_state is not None:
            return opt_state
        if jax.tree.leaves(jax.eval_shape(self.optimizer.init, params)):
            reject("opt_state", "the state of the parameters' optimizer, as in opt_state=opt_state", "None", TypeError)
        return self.optimizer.init(params)

    def step(self, gradient, opt_state, params, value):
        """The parameters after one step."""
        updates, _ = self.optimizer.update(gradient, opt_state, params, value=value, grad=gradient)
        return optax.apply_updates(params, updates)

    def losses(self, params, args, kwargs, present):
        """The losses of the primary tasks, zero for those that are absent; and which of them are there."""
        losses = self.losses_fn(params, *args, **kwargs)
        losses = losses[0] if self.has_aux else losses
        values, labelled = read_losses("losses_fn", losses), read_labelled(losses)
        if values.shape != present.shape:
            reject("validation", f"data of losses of shape {present.shape}", f"shape {values.shape}")
        there = jnp.ravel(present if labelled is None else present & labelled)
        values = jnp.where(there, jnp.ravel(values), 0)
        if self.primary is None:
            return values, there
        at = [index_of("primary", task) for task in self.primary]
        # Names have their order, and the aggregator's hyperparameters go by them.
        at = jnp.array(sorted(at) if names_of(losses).entries else at)
        return values[at], there[at]


def _check_validation(validation, args):
    if not isinstance(validation, tuple) or len(validation) != len(args):
        expected = f"a tuple of {len(args)}, what stands in the place of the arguments after the state"
        found = f"a tuple of {len(validation)}" if isinstance(validation, tuple) else type(validation).__name__
        reject("validation", f"{expected}, as in validation=(batch,)", found, TypeError)


def _hypergradient(descended, losses_after, state, combine):
    """What descends the losses after the step; the aggregator's state; and whether any of these losses is there."""
    (value, gradient), to_raw, _ = jax.vjp(descended, state.raw_weights, has_aux=True)
    values, to_descended, there = jax.vjp(losses_after, value, gradient, has_aux=True)

    def of_sum(cotangent):
        by_value, by_gradient = to_descended(cotangent)
        # Adam has no derivative by a number that was never other than zero, as of a dead unit: there the tasks'
        # gradients are zero too, and so is the product.
        moot = lambda after, gradient: jnp.where((gradient == 0) & ~jnp.isfinite(after), 0, after)
        by_gradient = jax.tree.map(moot, by_gradient, gradient)
        # What a weight depends on is not left to the default of GPU and TPU, TF32 or bfloat16.
        with jax.default_matmul_precision("highest"):
            return to_raw((by_value, by_gradient))[0]

    if combine is None:
        return of_sum(jnp.ones_like(values)), (), jnp.any(there)
    rows = jnp.reshape(jax.vmap(of_sum)(jnp.eye(values.size, dtype=values.dtype)), (values.size, -1))
    combined, inner = combine(rows, values=values, mask=there)
    return jnp.reshape(combined, state.raw_weights.shape), inner, jnp.any(there)


def _combine(aggregator, inner, primary, rows, **call):
    """One hypergradient of those of the primary tasks, which the aggregator knows by name."""
    with with_names(_names_of_primary(primary)):
        return aggregator.apply(inner, rows, **call)


def _descend(optimizer, hypergradient, state, present):
    """The weights after one step of their optimizer, and its state; entries of absent tasks stay in both."""
    fields = {_RAW: state.raw_weights}
    updates, opt_state = updated(optimizer, {_RAW: hypergradient}, state.opt_state, fields, present)
    raw = optax.apply_updates(fields, updates)[_RAW]
    return jnp.where(present, raw, state.raw_weights), opt_state
