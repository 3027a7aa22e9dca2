"""What a type checker must find in a user's script: an error in each line that says so, and in no other."""

import jax.numpy as jnp
import optax

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

losses, rows = jnp.ones(2), jnp.ones((2, 3))

uw, upgrad = scalarization.uw(), aggregation.upgrad()
uw_state, upgrad_state = uw.init(2), upgrad.init((2, 3))
uw.apply(losses, uw_state)  # error: swapped
uw.apply(uw_state)  # error: no losses
uw.apply(uw_state, losses, losses)  # error: the mask goes by its name
uw.apply(upgrad_state, losses)  # error: another method's state
uw.observe(losses, uw_state)  # error: swapped
upgrad.apply(rows, upgrad_state)  # error: swapped
upgrad.apply(upgrad_state)  # error: no Jacobian
upgrad.init(2)  # error: the parameters are not there
print(upgrad_state.log_weights)  # error: no such field
scalarization.uw(initial_log_vars=0.0)  # error: no such hyperparameter
scalarization.constant(0.5)  # error: one number for all
scalarization.dwa(temperature="2.0")  # error: no number
mtl.learn(upgrad, optax.sgd(0.1))  # error: an aggregator
mtl.chain(upgrad, uw)  # error: swapped
mtl.value_and_grad(lambda params: params, scalarization.uw)  # error: the factory
mtl.value_and_grad(lambda params: params, upgrad, rows="all")  # error: no such way
mtl.value_and_grad(lambda params: params, upgrad)(jnp.ones(3), losses)  # error: no state
mtl.aggregate(uw, n_tasks=2)  # error: a scalarizer
mtl.switch((uw, upgrad))  # error: of both families
guarded = mtl.skip_nonfinite(upgrad)
guarded.apply(upgrad_state, rows)  # error: the state of the method inside
print(guarded.init((2, 3)).not_finite)  # error: no such field
