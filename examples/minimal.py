"""From plain optax training to balanced training: what changes is marked. Run ``python examples/minimal.py``."""

import jax
import optax
from digits import draw_pairs, evaluate, init_params, load_data, task_losses
from tqdm import tqdm

import mtlbalance as mtl

digits, test_pairs = load_data()
params = init_params(jax.random.key(0))
optimizer = optax.adam(1e-3)
opt_state = optimizer.init(params)
method = mtl.aggregation.upgrad()  # new
grad_fn = mtl.value_and_grad(task_losses, method)  # was: jax.value_and_grad of the sum of the losses
state = grad_fn.init(params, test_pairs)  # new: for any batch, of which it reads the shapes


@jax.jit
def step(params, opt_state, state, key):  # new: the state, in and out
    batch = draw_pairs(key, digits, 128)
    (_, state), grads = grad_fn(params, state, batch)  # was: loss, grads = grad_fn(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, state


for key in tqdm(jax.random.split(jax.random.key(1), 2000)):
    params, opt_state, state = step(params, opt_state, state, key)
found = evaluate(params, test_pairs)
print(f"On other images: left {found['left']:.1%}, right {found['right']:.1%}, the sum off by {found['sum']:.2f}.")
