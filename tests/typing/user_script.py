"""What a user writes, for type checkers: none finds an error here. It runs, too."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtlbalance as mtl
from mtlbalance import aggregation, base, scalarization, states

# A scalarizer by hand.
losses = {"depth": jnp.array(4.0), "pose": jnp.array(1.5)}
uw = scalarization.uw(initial_log_var={"depth": 0.0, "pose": 0.5}, max_weight=100.0)
state = uw.init(losses)
scalar, state = uw.apply(state, losses, mask={"depth": True, "pose": False})
print(scalar.shape, float(state.log_var[0]), state.log_var.at[0].set(0.0))
grads, state = jax.grad(lambda losses: uw.apply(uw.init(losses), losses), has_aux=True)(losses)

dwa = scalarization.dwa(temperature=np.float32(2.0))
dwa_state = dwa.observe(dwa.end_epoch(dwa.init(2)), np.ones(2))
dwa_state = dwa.apply(dwa_state, [1.0, 2.0])[1]._replace(count=dwa_state.count)
fixed = scalarization.constant({"a": 1.0, "b": [2, jnp.ones(())]}), scalarization.constant([1.0, 2.0])
print(uw, fixed, [info.full_name for info in mtl.methods() if "learn" in info.needs])

# An aggregator by hand.
excess: mtl.Aggregator[aggregation.ExcessMTLState] = aggregation.excess_mtl(robust_step_size=0.1)
rows = {"w": jnp.ones((2, 3))}
gradient, excess_state = excess.apply(excess.init((2, {"w": jnp.ones(3)})), rows, values=jnp.ones(2))
print(gradient["w"].sum(), jnp.exp(excess_state.log_weights))
upgrad = aggregation.upgrad(pref_vector=[0.3, 0.7], reg_eps=0.0)
if upgrad.gramian_weighting is not None:
    weights, seen_state = upgrad.gramian_weighting.apply(upgrad.init((2, 3)), jnp.eye(2))
    print(weights.sum(), seen_state.seen.sum())

# A training step, with learned weights and a guard.
learned = mtl.learn(scalarization.uw(), optax.sgd(0.1))
print(learned.init(2).inner.log_var.mean())
method = mtl.skip_nonfinite(mtl.transform_weights(learned, optax.ema(0.9)), axis_name=None)


def losses_fn(params, x):
    return {"fit": jnp.mean((x @ params["w"]) ** 2), "size": jnp.sum(params["w"] ** 2)}


params, x = {"w": jnp.ones(3)}, jnp.ones((4, 3))
grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True, rows=None, shared={"w": True})
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
opt_state, method_state = optimizer.init(params), grad_fn.init(params, x)


@jax.jit
def step(params, state, opt_state, x):
    (losses, state, weights), grads = grad_fn(params, state, x)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state, (losses, weights)


params, method_state, opt_state, (values, weights) = step(params, method_state, opt_state, x)
print({name: float(value) for name, value in values.items()}, method_state.nonfinite)

# The same in an optax chain; several methods in one program; wrappers in each other; a method of one's own.
chained = optax.chain(mtl.aggregate(upgrad, n_tasks=2), optax.adam(1e-3))
_, jacobian = mtl.value_and_jac(losses_fn)(params, x)
updates, _ = chained.update(jacobian, chained.init(params), params)
choose = mtl.switch((scalarization.mean(), scalarization.dwa(steps_per_epoch=10)))
print(choose(1).apply(choose(1).init(2), jnp.ones(2))[1].states, mtl.has_weights(choose(0)))
twice = mtl.chain(scalarization.geometric_mean(), mtl.amortize(aggregation.mgda()))
grouped = mtl.nested(
    mtl.prioritize(aggregation.mean(), [1.0, 2.0]), {"a": mtl.learn(uw, optax.sgd(0.1)), "b": scalarization.sum()}
)
several: dict[str, mtl.Scalarizer] = {"uw": scalarization.uw_o(), "dwa": scalarization.dwa(steps_per_epoch=2)}
print([each.apply(each.init(2), jnp.ones(2))[0] for each in several.values()])
frozen = mtl.freeze(uw, state, losses).init(losses).seen


class LargestState(NamedTuple):
    seen: jax.Array


def largest(margin: float = 0.0) -> mtl.Scalarizer[LargestState]:
    def init(shape, dtype):
        return LargestState(states.zero_counts(shape))

    def apply(state, values, mask):
        return jnp.max(values - margin, where=mask, initial=-jnp.inf), states.count_seen(state, mask)

    return base.scalarizer(init, apply)


print(largest(), largest().init(3).seen)
