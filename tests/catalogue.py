"""One row for every public method, and for the wrappers around some: what the conformance checks run on."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtlbalance as mtl
from mtlbalance import aggregation, base, scalarization
from mtlbalance.names import Names, names_of, with_names

WEIGHTS = jnp.array([0.5, 2.0, 1.25, -0.5])
THREE = jnp.arange(3)
BOUNDS = jnp.array([jnp.inf, 0.5, 1.5, 0.0])
PREFERENCE = {"left": 1.0, "right": 1.0, "sum": 0.1}  # the sum's loss starts some forty times as large


class Case(NamedTuple):
    """A method and what the checks must know about it.

    Attributes:
      name: for the test's id.
      make: builds the method; takes the keywords of ``hyperparameters`` and, where ``sharded``, ``axis_name``.
      hyperparameters: those that may be traced, floats and ints that are compared with counts, and two or more values
        of each, to be mapped over; the second is the one that serves while another one is varied.
      draws: the weights are drawn at random, so that subsets of tasks agree in distribution only.
      sharded: takes ``axis_name``.
      per_task: ``make`` takes the indices of the ``tasks`` that it is for, an array or named as the losses are.
      own_names: the losses have names that go with the method, and can have no others; nor has each entry of the state
        a task.
      nonlinear: the scalar is not linear in the losses at a given state, its constants of differentiation held.
      needs_positive: a negative loss makes the scalar NaN, and its own weight.
      largest: the largest loss that must not overflow.
      fewest_tasks: the method refuses fewer.
      total: what the weights of the tasks present always add up to, 1 or their number m; ``None`` if free.
      reads_losses: an aggregator that refuses a call without ``values``.
      local_draws: under ``shard_map`` every device draws for its own part of the parameters.
      required: values of the public method's arguments that have no default, as JSON; the tasks are those of the
        examples, and another method goes by its name.
      names_task: the public method's argument that says which task is meant, whose default is an index: where losses
        have names, as in the examples, it must be one of these.
      trims: one gradient may be anything, NaN too, and does not show.
      amplifies_rounding: what two programs round differently grows in it: by steps far too large for long gradients, or
        by a system of equations that is near to none.
      variants: settings of the public method of this name whose properties hold on random Jacobians of up to 8 tasks.
    """

    name: str
    make: Callable[..., Any]
    hyperparameters: dict[str, tuple[float, ...]] = {}  # noqa: RUF012
    draws: bool = False
    sharded: bool = False
    per_task: bool = False
    own_names: bool = False
    nonlinear: bool = False
    needs_positive: bool = False
    largest: float = 1e30
    fewest_tasks: int = 1
    total: Literal["1", "m"] | None = None
    reads_losses: bool = False
    local_draws: bool = False
    required: dict[str, Any] = {}  # noqa: RUF012
    names_task: str | None = None
    trims: bool = False
    amplifies_rounding: bool = False
    variants: dict[str, dict[str, Any]] = {}  # noqa: RUF012


def following(rate=0.5):
    """A scalarizer with both hooks, as no public method has: it follows what it observes."""

    def init(shape, dtype):
        return FollowState(jnp.ones(shape, dtype))

    def apply(state, values, mask):
        return jnp.sum(state.level * values, where=mask), state

    def observe(state, values, mask):
        return FollowState(jnp.where(mask, state.level + rate * (values - state.level), state.level))

    def end_epoch(state):
        return FollowState(state.level / 2)

    return base.scalarizer(init, apply, observe=observe, end_epoch=end_epoch, needs=("observe",))


class FollowState(NamedTuple):
    level: Any


def _weights(tasks):
    return jax.tree.map(lambda i: WEIGHTS[i % len(WEIGHTS)], tasks)


def _preference(tasks):
    return jax.tree.map(jnp.abs, _weights(tasks))


def _first(tasks):
    """The first task, by its name if it has one."""
    return next(iter(names_of(tasks).entries), 0)


def bounded(factory, **fixed):
    """The method with a bound on each but the first task, which is an objective."""
    bounds = lambda tasks: jax.tree.map(lambda i: BOUNDS[i % len(BOUNDS)], tasks)
    return lambda tasks=THREE, **kwargs: factory(bounds(tasks), **fixed | kwargs)


def preferring(factory, **fixed):
    """The method with a preference for each task."""
    return lambda tasks=THREE, **kwargs: factory(pref_vector=_preference(tasks), **fixed, **kwargs)


def nested_pairs(outer, inner, tasks=THREE):
    """``nested`` over pairs of tasks; the losses have its names, whatever array they are given as."""
    entries = [f"{i // 2:02d}.{i}" for leaf in jax.tree.leaves(tasks) for i in np.ravel(leaf)]
    method = mtl.nested(outer, {entry.partition(".")[0]: inner for entry in entries})

    def named(function):
        def call(*args, **kwargs):
            with with_names(Names(tuple(entries), len(entries))):
                return function(*args, **kwargs)

        return call

    each = lambda part: named(part) if callable(part) else part and type(part)(*map(named, part))
    parts = {"init", "apply", "end_epoch", "observe", "weighting", "gramian_weighting"} & set(method._fields)
    nesting = method.nesting._replace(groups=named(method.nesting.groups))
    return method._replace(nesting=nesting, **{name: each(getattr(method, name)) for name in parts})


def averaging(beta=0.9, beta_sigma=0.5, axis_name=None):
    """DB-MTL with running averages."""
    return aggregation.db_mtl(beta, beta_sigma, axis_name=axis_name)


AVERAGE = optax.chain(optax.ema(0.5), mtl.weights.clip(0.1, 2.0), mtl.weights.normalize(2.0))
ADAM, SCALED_TRACE = optax.scale_by_adam(), optax.chain(optax.scale(0.5), optax.trace(0.3))
ADAM_BEARS = 1e18  # beyond it the squares in its state overflow

# The first case of each kind stands for all of them wherever kinds are told apart, see tests/conformance.
SCALARIZERS = [
    Case("test-only following", following),
    Case(
        "group_dro",
        scalarization.group_dro,
        {"robust_step_size": (0.01, 1.0), "smoothing": (0.0, 0.1), "reference": (0.0, 1.0)},
        total="1",
    ),
    Case("mean", scalarization.mean, total="1"),
    Case("sum", scalarization.sum, total="m"),
    Case("first_loss", scalarization.first_loss, largest=1e8),
    Case(
        "constant",
        lambda tasks=THREE: scalarization.constant(_weights(tasks)),
        per_task=True,
        required={"weights": PREFERENCE},
    ),
    Case("random", lambda: scalarization.random(key=3), draws=True, total="1", required={"key": 0}),
    Case("geometric_mean", scalarization.geometric_mean, nonlinear=True, needs_positive=True),
    Case(
        "scale_invariant", scalarization.scale_invariant, {"weights": (0.5, 1.0)}, nonlinear=True, needs_positive=True
    ),
    Case(
        "stch",
        lambda tasks=THREE, mu=0.5: scalarization.stch(mu, _weights(tasks), _weights(tasks)),
        {"mu": (0.01, 0.5, 10.0)},
        per_task=True,
        nonlinear=True,
        required={"mu": 0.1},
    ),
    Case("stch-uniform", lambda: scalarization.stch(0.5), nonlinear=True),
    Case(
        "stch-warmup",
        lambda mu=1.0, n_warmup_epochs=1, **kw: scalarization.stch(mu, n_warmup_epochs=n_warmup_epochs, **kw),
        {"mu": (0.1, 1.0, 10.0), "n_warmup_epochs": (0, 1), "steps_per_epoch": (1, 2)},
        nonlinear=True,
        needs_positive=True,
    ),
    Case(
        "cosmos",
        lambda tasks=THREE, lambda_=2.0: scalarization.cosmos(lambda_, _weights(tasks)),
        {"lambda_": (0.0, 2.0)},
        per_task=True,
        nonlinear=True,
        required={"lambda_": 1.0, "weights": PREFERENCE},
    ),
    Case(
        "pbi",
        lambda tasks=THREE, theta=5.0, reference=-0.5: scalarization.pbi(theta, _preference(tasks), reference),
        {"theta": (0.0, 5.0), "reference": (-0.5, 0.0)},
        per_task=True,
        nonlinear=True,
        required={"theta": 1.0, "weights": PREFERENCE},
    ),
    Case(
        "famo",
        scalarization.famo,
        {"lr": (0.0, 0.025, 0.5), "weight_decay": (0.0, 0.1), "min_losses": (-0.5, 0.01)},
        nonlinear=True,
        needs_positive=True,
        total="1",
    ),
    Case("famo-delayed", lambda: scalarization.famo(delayed=True), nonlinear=True, needs_positive=True, total="1"),
    Case("uw", scalarization.uw, {"initial_log_var": (-0.5, 0.0, 1.5), "max_weight": (0.1, 1e12)}),
    Case("revised_uw", scalarization.revised_uw, {"initial_sigma": (0.5, 1.0, 2.0), "max_weight": (0.1, 1e8)}),
    Case("uw_o", scalarization.uw_o, needs_positive=True),
    Case("uw_so", scalarization.uw_so, {"temperature": (0.1, 1.0, 5.0)}, total="1"),
    Case("imtl_l", scalarization.imtl_l, {"initial_log_scale": (-0.5, 0.0, 1.5), "max_weight": (0.1, 1e12)}),
    Case(
        "dwa-steps",
        partial(scalarization.dwa, steps_per_epoch=2),
        {"temperature": (0.3, 2.0, 10.0), "steps_per_epoch": (1, 2)},
        total="m",
    ),
    Case("dwa", scalarization.dwa, {"temperature": (0.3, 2.0, 10.0)}, total="m"),
    Case("lbtw", scalarization.lbtw, {"alpha": (0.0, 0.5, 1.0), "steps_per_epoch": (1, 2)}, total="m"),
    Case("cov_weighting", scalarization.cov_weighting, {"decay": (0.5, 0.9, 1.0)}, total="1"),
    Case("slaw", scalarization.slaw, {"decay": (0.5, 0.99, 1.0), "eps": (1.0, 1e-5)}, total="m"),
    # A window that is full after a few calls.
    Case(
        "coba",
        partial(scalarization.coba, window=4, n_warmup_steps=1),
        {"tau": (0.0, 5.0), "n_warmup_steps": (2, 1)},
        total="1",
    ),
    # A window that fills often.
    Case("softadapt", partial(scalarization.softadapt, window=2), {"beta": (-0.1, 0.1, 1.0)}, total="1"),
    Case("softadapt-normalized", partial(scalarization.softadapt, window=2, variant="normalized"), total="1"),
    Case("softadapt-loss_weighted", partial(scalarization.softadapt, window=2, variant="loss_weighted"), total="1"),
    Case(
        "relobralo",
        partial(scalarization.relobralo, rho=0.5, key=3),
        {"temperature": (0.1, 1.0), "alpha": (0.5, 0.999), "rho": (0.0, 0.5, 1.0)},
        total="m",
    ),
    Case("dtp", scalarization.dtp, {"gamma": (0.0, 0.5, 2.0), "alpha": (0.1, 1.0)}),
    Case("minmax", scalarization.minmax, {"initial_logits": (0.0, 1.0)}, total="m"),
    Case("self_adaptive", scalarization.self_adaptive, {"initial_multipliers": (0.5, 1.0), "max_weight": (0.1, 1e12)}),
    Case(
        "causal",
        lambda tol=1.0, **kw: scalarization.causal((tol, 100.0), n_chunks=2, **kw),
        {"tol": (0.0, 1.0, 10.0), "threshold": (0.0, 0.99)},
        needs_positive=True,
    ),
    Case(
        "residual_attention",
        scalarization.residual_attention,
        {"decay": (0.5, 0.999), "lr": (0.1, 0.01), "initial_multipliers": (1.0, 0.0)},
        needs_positive=True,
    ),
    Case(
        "vrba",
        scalarization.vrba,
        {
            "decay": (0.5, 0.999),
            "lr": (0.1, 0.01),
            "c_log": (0.2, 1.0),
            "phi": (0.5, 1.0),
            "initial_multipliers": (1.0, 0.1),
        },
        needs_positive=True,
    ),
    Case("brdr", scalarization.brdr, {"beta_c": (0.5, 0.999), "beta_w": (0.5, 0.999)}, needs_positive=True),
    Case(
        "lagrangian",
        bounded(scalarization.lagrangian, damping=0.3, kappa_p=0.5, nu=0.9),
        {
            "lr": (0.0, 0.1, 1.0),
            "damping": (0.0, 0.3),
            "kappa_p": (0.0, 0.5),
            "nu": (-0.5, 0.9),
            "initial_multipliers": (0.0, 2.0),
            "max_multiplier": (0.1, 1e12),
        },
        per_task=True,
        nonlinear=True,
        largest=1e18,
        required={"bounds": {"sum": 1.0}},
    ),
    Case(
        "geco",
        bounded(scalarization.geco),
        {
            "lr": (0.0, 0.1, 1.0),
            "alpha": (0.5, 0.99),
            "initial_multipliers": (0.5, 1.0),
            "min_multiplier": (1.1, 1e-10),
            "max_multiplier": (0.9, 1e10),
        },
        per_task=True,
        largest=1e18,
        required={"bounds": {"sum": 1.0}},
    ),
    Case(
        "capu",
        bounded(scalarization.capu, eta=1e-3, initial_multipliers=0.1, initial_penalties=0.01),  # what SGD can descend
        {
            "eta": (0.01, 1.0),
            "zeta": (0.5, 0.99),
            "omega": (0.999, 0.0),
            "initial_multipliers": (0.0, 1.0),
            "initial_penalties": (0.0, 1.0),
            "max_multiplier": (0.1, 1e12),
        },
        per_task=True,
        nonlinear=True,
        largest=1e12,
        required={"bounds": {"sum": 1.0}},
    ),
    Case(
        "learn-uw",
        lambda **kw: mtl.learn(scalarization.uw(**kw), optax.adam(0.1)),
        {"initial_log_var": (-1.0, 0.0)},
        largest=ADAM_BEARS,
    ),
    Case("learn-imtl_l", lambda: mtl.learn(scalarization.imtl_l(), optax.sgd(0.1, momentum=0.9))),
    Case("learn-minmax", lambda: mtl.learn(scalarization.minmax(), optax.adam(0.1)), largest=ADAM_BEARS, total="m"),
    Case("skip-dwa", lambda: mtl.skip_nonfinite(scalarization.dwa(steps_per_epoch=2)), total="m"),
    Case("skip-mean", lambda: mtl.skip_nonfinite(scalarization.mean()), total="1"),
    Case("skip-famo", lambda: mtl.skip_nonfinite(scalarization.famo()), nonlinear=True, needs_positive=True, total="1"),
    Case(
        "skip-learn-uw",
        lambda: mtl.skip_nonfinite(mtl.learn(scalarization.uw(), optax.adam(0.1))),
        largest=ADAM_BEARS,
    ),
    Case(
        "prioritize-stch",
        lambda tasks=THREE: mtl.prioritize(scalarization.stch(0.5), _preference(tasks)),
        per_task=True,
    ),
    Case(
        "regularize-learn-uw",
        lambda tasks=THREE: mtl.regularize(
            mtl.learn(scalarization.uw(), optax.adam(0.1)), {_first(tasks): optax.linear_schedule(0.5, 2.0, 3)}
        ),
        per_task=True,
        largest=ADAM_BEARS,
    ),
    Case(
        "nested-dwa",
        partial(nested_pairs, scalarization.dwa(steps_per_epoch=2), scalarization.uw_so()),
        per_task=True,
        own_names=True,
    ),
    Case("transform-dwa", lambda: mtl.transform_weights(scalarization.dwa(steps_per_epoch=2), AVERAGE)),
    Case(
        "switch-dwa",
        lambda **kw: mtl.switch((scalarization.uw_so(), scalarization.dwa(steps_per_epoch=2, **kw)))(1),
        {"temperature": (0.3, 2.0, 10.0)},
        total="m",
    ),
    Case("skip_zero-famo", lambda: mtl.skip_zero(scalarization.famo()), nonlinear=True, needs_positive=True, total="1"),
    Case(
        "amortize-dwa",
        lambda **kw: mtl.amortize(scalarization.dwa(steps_per_epoch=2, **kw)),
        {"temperature": (0.3, 2.0, 10.0)},
        total="m",
    ),
]

AGGREGATORS = [
    Case("mgda", aggregation.mgda, sharded=True, total="1", variants={"mgda": {}}),
    Case("mean", aggregation.mean, total="1", variants={"mean": {}}),
    Case("sum", aggregation.sum, total="m", variants={"sum": {}}),
    Case(
        "constant",
        lambda tasks=THREE: aggregation.constant(_weights(tasks)),
        per_task=True,
        variants={"constant": {"weights": np.linspace(0.5, 2.0, 8)}},
        required={"weights": PREFERENCE},
    ),
    Case(
        "epo",
        lambda tasks=THREE, **kwargs: aggregation.epo(_preference(tasks), **kwargs),
        {"eps": (2.0, 1e-4)},  # at 2 the losses always count as preferred
        sharded=True,
        per_task=True,
        total="1",
        reads_losses=True,
        required={"preference": PREFERENCE},
    ),
    Case("excess_mtl", aggregation.excess_mtl, {"robust_step_size": (0.01, 0.3, 1.0)}, sharded=True, total="1"),
    Case(
        "excess_mtl-warmup",
        partial(aggregation.excess_mtl, n_warmup_steps=2),
        {"n_warmup_steps": (0, 2)},
        sharded=True,
        total="1",
    ),
    Case("excess_mtl-raw", partial(aggregation.excess_mtl, 0.1, normalize_first_step=False), sharded=True, total="1"),
    Case("excess_mtl-every64", partial(aggregation.excess_mtl, accumulate=64), sharded=True, total="1"),
    Case("imtl_g", aggregation.imtl_g, sharded=True, total="1", variants={"imtl_g": {}}),
    Case("config", preferring(aggregation.config), sharded=True, per_task=True, variants={"config": {}}),
    Case(
        "aligned_mtl",
        aggregation.aligned_mtl,
        sharded=True,
        variants={
            "aligned_mtl min": {},
            "aligned_mtl median": {"scale_mode": "median"},
            "aligned_mtl rmse": {"scale_mode": "rmse"},
        },
    ),
    Case(
        "aligned_mtl-median",
        preferring(aggregation.aligned_mtl, scale_mode="median"),
        sharded=True,
        per_task=True,
        amplifies_rounding=True,
    ),
    Case(
        "krum",
        partial(aggregation.krum, n_byzantine=0, n_selected=2),
        sharded=True,
        fewest_tasks=3,
        total="1",
        variants={"krum": {"n_byzantine": 0, "n_selected": 2}},
        required={"n_byzantine": 0},
    ),
    Case("pcgrad", partial(aggregation.pcgrad, 3), draws=True, sharded=True, variants={"pcgrad": {}}),
    Case(
        "random",
        lambda: aggregation.random(key=3),
        draws=True,
        total="1",
        variants={"random": {"key": 0}},
        required={"key": 0},
    ),
    Case(
        "gradvac",
        partial(aggregation.gradvac, 3),
        {"beta": (0.1, 0.5), "eps": (1e-8, 1.0)},
        draws=True,
        sharded=True,
        variants={"gradvac": {}},
    ),
    Case(
        "upgrad",
        aggregation.upgrad,
        {"reg_eps": (0.0, 1e-4), "norm_eps": (1e3, 0.0)},
        sharded=True,
        variants={"upgrad": {}, "upgrad exact": {"reg_eps": 0.0}},
    ),
    Case(
        "dual_proj",
        preferring(aggregation.dual_proj),
        {"reg_eps": (0.0, 1e-4), "norm_eps": (1e3, 0.0)},
        sharded=True,
        per_task=True,
        variants={"dual_proj": {}, "dual_proj exact": {"reg_eps": 0.0}},
    ),
    Case(
        "cagrad",
        aggregation.cagrad,
        {"c": (0.0, 0.5, 2.0)},
        sharded=True,
        variants={"cagrad c=1/2": {}, "cagrad c=1": {"c": 1.0}, "cagrad c=2": {"c": 2.0}},
    ),
    Case(
        "nash_mtl",
        aggregation.nash_mtl,
        {"max_norm": (0.0, 1.0)},
        sharded=True,
        variants={"nash_mtl": {}, "nash_mtl unbounded": {"max_norm": 0.0}},
    ),
    Case(
        "fairgrad",
        aggregation.fairgrad,
        {"alpha": (0.5, 1.0, 2.0)},
        sharded=True,
        variants={"fairgrad": {}, "fairgrad alpha=2": {"alpha": 2.0}},
    ),
    Case(
        "pcd",
        lambda tasks=THREE, **kwargs: aggregation.pcd(main=_first(tasks), **kwargs),
        {"tau": (0.0, 0.02, 0.5), "beta": (0.0, 0.999), "eps": (0.0, 1.0)},
        sharded=True,
        per_task=True,
        variants={"pcd": {"tau": 0.3}},
        names_task="main",
    ),
    Case(
        "graddrop",
        partial(aggregation.graddrop, 3),
        {"leak": (0.0, 0.5, 1.0)},
        draws=True,
        sharded=True,
        local_draws=True,
        variants={"graddrop": {"leak": 0.3}},
    ),
    Case("trimmed_mean", partial(aggregation.trimmed_mean, 1), fewest_tasks=3, trims=True, required={"trim_number": 1}),
    Case(
        "gradnorm",
        aggregation.gradnorm,
        {"alpha": (0.0, 1.5)},
        sharded=True,
        total="m",
        reads_losses=True,
        variants={"gradnorm": {}},
    ),
    Case(
        "moco-libmtl",
        partial(aggregation.moco, normalize=True, softmax=True),
        sharded=True,
        largest=1e16,  # what it follows is as long, and squared
        reads_losses=True,
    ),
    Case(
        "db_mtl",
        aggregation.db_mtl,
        sharded=True,
        variants={"db_mtl": {}, "db_mtl averages": {"beta": 0.5, "beta_sigma": 0.5}},
    ),
    Case("db_mtl-averages", averaging, {"beta": (0.0, 0.5, 0.9), "beta_sigma": (0.0, 0.5)}, sharded=True),
    Case(
        "moco",
        aggregation.moco,
        {
            "beta": (0.5, 1.0),
            "beta_sigma": (0.0, 0.5),
            "lr": (1e-3, 0.1),
            "lr_sigma": (0.0, 0.5),
            "rho": (0.0, 0.3),
        },
        sharded=True,
        variants={"moco": {}},
    ),
    Case(
        "m_config",
        aggregation.m_config,
        {"beta_1": (0.0, 0.9), "beta_2": (0.0, 0.999)},
        sharded=True,
        amplifies_rounding=True,
    ),
    Case(
        "gradnorm-softmax",
        partial(aggregation.gradnorm, optimizer=optax.sgd(0.01), initial_losses=2.0, softmax=True),
        sharded=True,
        total="m",
        reads_losses=True,
    ),
    Case(
        "lr_annealing",
        lambda tasks=THREE, **kwargs: aggregation.lr_annealing(_first(tasks), **kwargs),
        {"alpha": (0.0, 0.1, 1.0)},
        sharded=True,
        per_task=True,
        variants={"lr_annealing": {"alpha": 0.5}},
        names_task="reference",
    ),
    Case(
        "inverse_dirichlet",
        aggregation.inverse_dirichlet,
        {"alpha": (0.0, 0.5, 1.0)},
        sharded=True,
        variants={"inverse_dirichlet": {"alpha": 0.5}},
    ),
    Case(
        "gradient_shares",
        lambda tasks=THREE, **kwargs: aggregation.gradient_shares(_preference(tasks), **kwargs),
        {"total": (0.5, 1.0), "decay": (0.0, 0.999, 1.0)},
        sharded=True,
        per_task=True,
        variants={"gradient_shares": {"shares": 1.0}},
        required={"shares": PREFERENCE},
    ),
    Case(
        "match_norm",
        lambda tasks=THREE, **kwargs: aggregation.match_norm(_first(tasks), **kwargs),
        {"relax": (0.0, 0.7), "decay": (0.0, 0.9), "clip": (0.5, 1e4), "eps": (0.0, 1e-4)},
        sharded=True,
        per_task=True,
        variants={"match_norm": {}},
        names_task="reference",
    ),
    Case(
        "bloop",
        lambda tasks=THREE, **kwargs: aggregation.bloop(_first(tasks), **kwargs),
        {"lambda_": (0.1, 1.0), "decay": (0.0, 0.9)},
        sharded=True,
        per_task=True,
        variants={"bloop": {}},
        names_task="main",
    ),
    Case(
        "cosine_gate",
        lambda tasks=THREE, **kwargs: aggregation.cosine_gate(_first(tasks), **kwargs),
        sharded=True,
        per_task=True,
        variants={"cosine_gate weighted": {"weighted": True}},
        names_task="main",
    ),
    Case(
        "grad_norm_weights",
        aggregation.grad_norm_weights,
        {"momentum": (0.0, 0.9)},
        sharded=True,
        variants={"grad_norm_weights": {"momentum": 0.5}},
    ),
    Case(
        "modo",
        aggregation.modo,
        {"lr": (0.001, 0.1), "rho": (0.0, 0.1)},
        sharded=True,
        total="1",
        amplifies_rounding=True,
        variants={"modo": {}},
    ),
    Case(
        "sdmgrad",
        partial(aggregation.sdmgrad, lr=0.1),  # at 10 its steps overshoot, and amplify rounding to 0.1
        {"lr": (10.0, 0.1), "momentum": (0.0, 0.5), "lambda_": (0.0, 0.3)},
        sharded=True,
        total="1",
        amplifies_rounding=True,
        variants={"sdmgrad": {"lr": 0.1}},
    ),
    Case(
        "cr_mogm",
        lambda alpha=0.9, axis_name=None: aggregation.cr_mogm(aggregation.db_mtl(axis_name=axis_name), alpha),
        {"alpha": (0.0, 0.5, 0.9)},
        sharded=True,
        variants={"cr_mogm": {"method": aggregation.mgda()}},
        required={"method": "upgrad"},
    ),
    Case(
        "cr_mogm-excess_mtl",
        lambda axis_name=None: aggregation.cr_mogm(aggregation.excess_mtl(axis_name=axis_name)),
        sharded=True,
    ),
    Case(
        "chain-imtl",
        lambda axis_name=None: mtl.chain(
            mtl.learn(scalarization.imtl_l(), optax.sgd(0.01)), aggregation.imtl_g(axis_name=axis_name)
        ),
        sharded=True,
        reads_losses=True,
    ),
    Case(
        "chain-log-db_mtl",
        lambda beta=0.9, axis_name=None: mtl.chain(scalarization.scale_invariant(), averaging(beta, 0.0, axis_name)),
        {"beta": (0.5, 0.9)},
        sharded=True,
        reads_losses=True,
    ),
    Case(
        "chain-dwa-excess_mtl",
        lambda axis_name=None: mtl.chain(
            scalarization.dwa(steps_per_epoch=2), aggregation.excess_mtl(axis_name=axis_name)
        ),
        sharded=True,
        reads_losses=True,
    ),
    Case(
        "skip-excess_mtl",
        lambda axis_name=None, **kw: mtl.skip_nonfinite(
            aggregation.excess_mtl(axis_name=axis_name, **kw), axis_name=axis_name
        ),
        {"robust_step_size": (0.01, 0.3, 1.0)},
        sharded=True,
    ),
    Case(
        "cr_mogm-amortize-mgda",
        lambda axis_name=None: aggregation.cr_mogm(mtl.amortize(aggregation.mgda(axis_name=axis_name))),
        sharded=True,
    ),
    Case(
        "amortize-chain-log-mgda",
        lambda axis_name=None: mtl.amortize(
            mtl.chain(scalarization.scale_invariant(), aggregation.mgda(axis_name=axis_name))
        ),
        sharded=True,
        reads_losses=True,
    ),
    Case(
        "skip-cr_mogm-amortize-excess_mtl",
        lambda axis_name=None: mtl.skip_nonfinite(
            aggregation.cr_mogm(mtl.amortize(aggregation.excess_mtl(axis_name=axis_name))), axis_name=axis_name
        ),
        sharded=True,
    ),
    Case(
        "skip-m_config",
        lambda axis_name=None: mtl.skip_nonfinite(aggregation.m_config(axis_name=axis_name), axis_name=axis_name),
        sharded=True,
    ),
    Case(
        "skip-db_mtl",
        lambda axis_name=None: mtl.skip_nonfinite(aggregation.db_mtl(axis_name=axis_name), axis_name=axis_name),
        sharded=True,
    ),
    Case(
        "regularize-upgrad",
        lambda tasks=THREE, axis_name=None: mtl.regularize(
            aggregation.upgrad(axis_name=axis_name), {_first(tasks): 0.1}
        ),
        sharded=True,
        per_task=True,
    ),
    Case(
        "prioritize-excess_mtl",
        lambda tasks=THREE, axis_name=None: mtl.prioritize(
            aggregation.excess_mtl(axis_name=axis_name), _preference(tasks)
        ),
        sharded=True,
        per_task=True,
    ),
    Case(
        "nested-mgda",
        lambda tasks=THREE, axis_name=None: nested_pairs(
            aggregation.mgda(axis_name=axis_name), scalarization.uw_so(), tasks
        ),
        sharded=True,
        per_task=True,
        own_names=True,
        reads_losses=True,
    ),
    Case(
        "transform-amortize-mgda",
        lambda axis_name=None: mtl.transform_weights(mtl.amortize(aggregation.mgda(axis_name=axis_name)), AVERAGE),
        sharded=True,
    ),
    Case(
        "switch-excess_mtl",
        lambda axis_name=None, **kw: mtl.switch(
            (aggregation.grad_norm_weights(axis_name=axis_name), aggregation.excess_mtl(axis_name=axis_name, **kw))
        )(1),
        {"robust_step_size": (0.01, 0.3, 1.0)},
        sharded=True,
        total="1",
    ),
    Case(
        "skip_zero-mgda",
        lambda axis_name=None: mtl.skip_zero(aggregation.mgda(axis_name=axis_name), axis_name=axis_name),
        sharded=True,
        total="1",
    ),
    Case(
        "skip_zero-excess_mtl",
        lambda axis_name=None: mtl.skip_zero(aggregation.excess_mtl(axis_name=axis_name), axis_name=axis_name),
        sharded=True,
        total="1",
    ),
    Case(
        "skip_zero-db_mtl-averages",
        lambda axis_name=None: mtl.skip_zero(averaging(axis_name=axis_name), axis_name=axis_name),
        sharded=True,
    ),
    Case("skip-random", lambda **kw: mtl.skip_nonfinite(aggregation.random(key=3), **kw), draws=True, sharded=True),
    Case("amortize-db_mtl", lambda axis_name=None: mtl.amortize(aggregation.db_mtl(axis_name=axis_name)), sharded=True),
    Case("transform_rows-sum", lambda: mtl.transform_rows(aggregation.sum(), ADAM)),
    Case(
        "transform_rows-db_mtl-averages",
        lambda beta=0.9, axis_name=None: mtl.transform_rows(averaging(beta, axis_name=axis_name), SCALED_TRACE),
        {"beta": (0.5, 0.9)},
        sharded=True,
    ),
    Case(
        "amortize-excess_mtl",
        lambda axis_name=None, **kw: mtl.amortize(aggregation.excess_mtl(axis_name=axis_name, **kw)),
        {"robust_step_size": (0.01, 0.3, 1.0)},
        sharded=True,
        total="1",
    ),
    Case(
        "skip-amortize-excess_mtl",
        lambda axis_name=None: mtl.skip_nonfinite(
            mtl.amortize(aggregation.excess_mtl(axis_name=axis_name)), axis_name=axis_name
        ),
        sharded=True,
    ),
]
