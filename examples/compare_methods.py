"""Which hyperparameter of which method ``compare.py`` tunes, and from which values on. No script: it imports them.

Every public method of both families has a row, and so have two chains and Auto-Lambda. What decides:

* One number is tuned beside the learning rate, the one that the method's source tunes, or without which it cannot be
  called. Methods that have none are tuned by the learning rate alone.
* Preferences are equal where a method can do without. What cannot (EPO, PBI, COSMOS, gradient shares) gets 1 for all
  tasks but one, whose number is tuned from the values on that the fixed weights are tuned from.
* Learned weights are trained by an Adam of their own, whose learning rate is what is tuned.
* CoBa and Auto-Lambda get a second batch of the data to train on for their validation losses, MoDo and SDMGrad two
  batches to decide on and a third to train on. M-ConFIG goes without Adam: its gradient is scaled as Adam's step is.
* CR-MOGM smooths the weights of CAGrad.
* Methods of the points of one loss (causal, residual attention, vRBA, BRDR) get the tasks' losses, which they are not
  made for.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import optax
from compare_jobs import STEPS_PER_EPOCH

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
MEMORIES = (3.0, 10.0, 30.0, 100.0, 300.0)  # calls, of a running average
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Entry(NamedTuple):
    """A row.

    Attributes:
      name: with the family.
      make: ``(value, key) -> method``; the value is traced.
      knob: what the value is, and that alone where nothing is tuned.
      values: the first ones to try, one or at least two.
      limits: beyond which there are none.
      kind: which program it belongs to: the methods of a kind share one.
      observes: of an observer, what.
      plain: without Adam.
      fewest_tasks: of which it can be called.
    """

    name: str
    make: Callable
    knob: str = ""
    values: tuple[float, ...] = (0.0,)
    limits: tuple[float, float] = (0.0, float("inf"))
    kind: str = "scalarizer"
    observes: str = ""
    plain: bool = False
    fewest_tasks: int = 1


def geometric(middle, ratio):
    return tuple(float(f"{middle * ratio**i:.3g}") for i in range(-2, 3))


def memory(n):
    """The decay of a running average over some n calls."""
    return 1 - 1 / n


def learned(name):
    factory = getattr(scalarization, name)
    return Entry(name, lambda rate, key: mtl.learn(factory(), optax.adam(rate)), "their learning rate", RATES)


def scalarizers(job):
    prefer, swept = job.preferring, f"weight of {job.swept}"
    stch = partial(scalarization.stch, n_warmup_epochs=1, steps_per_epoch=STEPS_PER_EPOCH)
    return [
        Entry("brdr", lambda n, key: scalarization.brdr(memory(n), memory(n)), "memory", MEMORIES, (1, 1e6)),
        Entry("capu", lambda eta, key: scalarization.capu(job.bounds, eta), "eta", geometric(1e-2, 10)),
        Entry("causal", lambda tol, key: scalarization.causal(tol, len(job.tasks)), "tol", geometric(1.0, 10)),
        Entry(
            "coba", lambda tau, key: scalarization.coba(tau, 50, 25), "tau", geometric(5.0, 3), observes="validation"
        ),
        Entry("constant", lambda weight, key: scalarization.constant(prefer(weight)), swept, job.sweep),
        Entry("cosmos", lambda weight, key: scalarization.cosmos(1.0, prefer(weight)), swept, job.sweep),
        Entry("cov_weighting", lambda n, key: scalarization.cov_weighting(memory(n)), "memory", MEMORIES, (1, 1e6)),
        Entry("dtp", lambda gamma, key: scalarization.dtp(gamma), "gamma", geometric(2.0, 2), observes="indicators"),
        Entry("dwa", lambda t, key: scalarization.dwa(t, STEPS_PER_EPOCH), "temperature", geometric(0.5, 3)),
        Entry("famo", lambda rate, key: scalarization.famo(lr=rate), "lr", geometric(0.025, 4), observes="losses"),
        Entry("first_loss", lambda _, key: scalarization.first_loss()),
        Entry("geco", lambda rate, key: scalarization.geco(job.bounds, rate), "lr", geometric(1e-2, 10)),
        Entry("geometric_mean", lambda _, key: scalarization.geometric_mean()),
        Entry("group_dro", lambda step, key: scalarization.group_dro(step), "robust_step_size", geometric(1e-2, 10)),
        learned("imtl_l"),
        Entry("lagrangian", lambda rate, key: scalarization.lagrangian(job.bounds, rate), "lr", geometric(1e-1, 10)),
        Entry("lbtw", lambda alpha, key: scalarization.lbtw(alpha, STEPS_PER_EPOCH), "alpha", geometric(0.5, 2)),
        Entry("mean", lambda _, key: scalarization.mean()),
        learned("minmax"),
        Entry("pbi", lambda weight, key: scalarization.pbi(1.0, prefer(weight)), swept, job.sweep),
        Entry("random", lambda _, key: scalarization.random(key)),
        Entry("relobralo", lambda t, key: scalarization.relobralo(t, key=key), "temperature", geometric(0.1, 10)),
        Entry("residual_attention", lambda r, key: scalarization.residual_attention(lr=r), "lr", geometric(1e-3, 10)),
        learned("revised_uw"),
        Entry("scale_invariant", lambda _, key: scalarization.scale_invariant()),
        learned("self_adaptive"),
        Entry("slaw", lambda n, key: scalarization.slaw(memory(n)), "memory", MEMORIES, (1, 1e6)),
        Entry("softadapt", lambda beta, key: scalarization.softadapt(beta), "beta", geometric(1e-1, 10)),
        Entry("stch", lambda mu, key: stch(mu), "mu", geometric(1e-1, 10)),
        Entry("sum", lambda _, key: scalarization.sum()),
        learned("uw"),
        Entry("uw_o", lambda _, key: scalarization.uw_o()),
        Entry("uw_so", lambda t, key: scalarization.uw_so(t), "temperature", geometric(1.0, 10)),
        Entry("vrba", lambda rate, key: scalarization.vrba(lr=rate), "lr", geometric(1e-2, 10)),
    ]


def aggregators(job):
    prefer, swept = job.preferring, f"weight of {job.swept}"
    cr_mogm = lambda n, key: aggregation.cr_mogm(aggregation.cagrad(), memory(n))
    gradnorm, shares = aggregation.gradnorm, aggregation.gradient_shares
    return [
        Entry("aligned_mtl", lambda _, key: aggregation.aligned_mtl()),
        Entry(
            "bloop", lambda x, key: aggregation.bloop(job.main, x), "lambda_", geometric(1.0, 10), kind="remembering"
        ),
        Entry("cagrad", lambda c, key: aggregation.cagrad(c), "c", geometric(0.4, 2)),
        Entry("config", lambda _, key: aggregation.config()),
        Entry("constant", lambda weight, key: aggregation.constant(prefer(weight)), swept, job.sweep),
        Entry("cosine_gate", lambda _, key: aggregation.cosine_gate(job.main)),
        Entry("cr_mogm", cr_mogm, "memory", MEMORIES, (1, 1e6)),
        Entry("db_mtl", lambda n, key: aggregation.db_mtl(memory(n)), "memory", MEMORIES, (1, 1e6), "remembering"),
        Entry("dual_proj", lambda eps, key: aggregation.dual_proj(reg_eps=eps), "reg_eps", geometric(1e-4, 10)),
        Entry("epo", lambda weight, key: aggregation.epo(prefer(weight)), swept, job.sweep),
        Entry("excess_mtl", aggregation_of("excess_mtl"), "robust_step_size", geometric(1e-1, 10), kind="remembering"),
        Entry("fairgrad", lambda alpha, key: aggregation.fairgrad(alpha), "alpha", geometric(1.0, 2)),
        Entry("grad_norm_weights", aggregation_of("grad_norm_weights", memory), "memory", MEMORIES, (1, 1e6)),
        Entry("graddrop", lambda leak, key: aggregation.graddrop(key, leak), "leak", FRACTIONS, (0, 1)),
        Entry("gradient_shares", lambda share, key: shares(prefer(share)), swept.replace("weight", "share"), job.sweep),
        Entry("gradnorm", lambda rate, key: gradnorm(optimizer=optax.adam(rate)), "their learning rate", RATES),
        Entry("gradvac", lambda beta, key: aggregation.gradvac(key, beta), "beta", geometric(1e-1, 3), (0, 1)),
        Entry("imtl_g", lambda _, key: aggregation.imtl_g()),
        Entry("inverse_dirichlet", aggregation_of("inverse_dirichlet", lambda n: 1 / n), "memory", MEMORIES, (1, 1e6)),
        Entry("krum", lambda _, key: aggregation.krum(0, n_selected=2), fewest_tasks=3),
        Entry("lr_annealing", lambda n, key: aggregation.lr_annealing(job.main, 1 / n), "memory", MEMORIES, (1, 1e6)),
        Entry(
            "m_config", aggregation_of("m_config", memory), "memory", MEMORIES, (1, 1e6), kind="remembering", plain=True
        ),
        Entry("match_norm", lambda x, key: aggregation.match_norm(job.main, x), "relax", FRACTIONS, (0, 1)),
        Entry("mean", lambda _, key: aggregation.mean()),
        Entry("mgda", lambda _, key: aggregation.mgda()),
        Entry("moco", lambda x, key: aggregation.moco(lr=x), "lr", geometric(1e-1, 10), kind="remembering"),
        Entry("modo", lambda x, key: aggregation.modo(x), "lr", geometric(1e-2, 10), kind="two-sampled"),
        Entry("nash_mtl", lambda norm, key: aggregation.nash_mtl(norm), "max_norm", geometric(1.0, 10)),
        Entry("pcd", lambda tau, key: aggregation.pcd(tau, main=job.main), "tau", geometric(1e-2, 5), (0, 1)),
        Entry("pcgrad", lambda _, key: aggregation.pcgrad(key)),
        Entry("random", lambda _, key: aggregation.random(key)),
        Entry(
            "sdmgrad", lambda x, key: aggregation.sdmgrad(lambda_=x), "lambda_", geometric(0.3, 3), kind="two-sampled"
        ),
        Entry("sum", lambda _, key: aggregation.sum()),
        Entry("trimmed_mean", lambda _, key: aggregation.trimmed_mean(1), fewest_tasks=3),
        Entry("upgrad", lambda eps, key: aggregation.upgrad(reg_eps=eps), "reg_eps", geometric(1e-4, 10)),
    ]


def aggregation_of(name, convert=lambda value: value):
    """Where the value is the method's first argument."""
    return lambda value, key: getattr(aggregation, name)(convert(value))


def others():
    """What stands in no family: two published chains, and a step of its own."""
    imtl = lambda rate, key: mtl.chain(mtl.learn(scalarization.imtl_l(), optax.adam(rate)), aggregation.imtl_g())
    db_mtl = lambda n, key: mtl.chain(scalarization.scale_invariant(), aggregation.db_mtl(memory(n)))

    def auto_lambda(rate, losses_fn, optimizer):
        return mtl.auto_lambda(losses_fn, optimizer, meta_optimizer=optax.adam(rate), softmax=True)

    return [
        Entry("chain: imtl", imtl, "their learning rate", RATES, kind="aggregator"),
        Entry("chain: db_mtl", db_mtl, "memory", MEMORIES, (1, 1e6), "remembering"),
        Entry("auto_lambda", auto_lambda, "their learning rate", RATES, kind="hypergradient"),
    ]


def entries_for(job):
    """All rows of the job's table: by name, those of a kind to be compiled together."""
    found = [entry._replace(name=f"scalarization.{entry.name}") for entry in scalarizers(job)]
    found = [entry._replace(kind="observer") if entry.observes else entry for entry in found]
    kind = lambda entry: "aggregator" if entry.kind == "scalarizer" else entry.kind
    found += [entry._replace(name=f"aggregation.{entry.name}", kind=kind(entry)) for entry in aggregators(job)]
    return {entry.name: entry for entry in found + others()}


def alone(job, task):
    """A task alone: what the others are compared with."""
    weights = {other: float(other == task) for other in job.tasks}
    return Entry(f"{task} alone", lambda _, key: scalarization.constant(weights))
