"""Training in float16, with a method that sees the true losses and the true gradients.

In float16 a number below 3e-8 is rounded to zero, and much of a backward pass may be. The usual cure multiplies the
loss before that pass and divides the gradient after it: a balancing method in between would see neither as it is.
Here the factor acts on the backward pass alone. It comes in at the losses and goes out at the float32 parameters, so
that nothing changes for the method, of whichever family it is.

The tasks are those of ``digits.py``, but the error of the sum is measured in thousands, so that its square is a
million times smaller. The method, UPGrad in log space, ignores units. In plain float16 most of the sum's gradient is
still lost, and its error ends a fifth to a third larger. With the factor it is as in float32, and so it is in bfloat16,
which has the range of float32, without one.

Run it with ``python examples/mixed_precision.py``: about half a minute on two CPU cores. It needs
``mtlbalance[examples]``.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import show
from digits import TASKS, draw_pairs, evaluate, init_params, load_data, losses_of, predict
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

PRECISIONS = {  # dtype of the network, and whether there is a loss scale
    "float32": (jnp.float32, False),
    "bfloat16": (jnp.bfloat16, False),
    "float16": (jnp.float16, False),
    "float16, scaled": (jnp.float16, True),
}
UNIT_OF_SUM = 1000.0
BATCH_SIZE = 128
STEPS_PER_EPOCH = 100
PATIENCE = 200


# The loss scale: a factor that exists in the backward pass only.


@jax.custom_vjp
def scale_gradient(tree, scale):
    """The identity, whose backward pass multiplies by ``scale``."""
    del scale
    return tree


def _forward(tree, scale):
    return tree, scale


def _backward(scale, gradient):
    # Counts, as in `mtl.Counted` losses, have no gradient: JAX says so by a dtype of its own.
    has_none = lambda g: g.dtype == jax.dtypes.float0
    return jax.tree.map(lambda g: g if has_none(g) else scale * g, gradient), jnp.zeros_like(scale)


scale_gradient.defvjp(_forward, _backward)


class LossScale(NamedTuple):
    factor: jax.Array
    good_steps: jax.Array  # since the factor last changed


def update_scale(state, finite):
    """Half of it after a gradient that is not finite, twice of it after many that are."""
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    grow = good_steps == PATIENCE
    factor = state.factor * jnp.where(finite, jnp.where(grow, 2.0, 1.0), 0.5)
    return LossScale(factor, jnp.where(grow, 0, good_steps))


# The model and the losses.


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def task_losses(params, batch, *, scale, dtype):
    """The losses in float32, of a network that computes in ``dtype``."""
    params = scale_gradient(params, 1 / scale)  # before the cast: backward, gradients are in float32 again there
    outputs = predict(cast(params, dtype), batch["image"].astype(dtype))
    outputs = cast(outputs, jnp.float32)  # the losses and their means need float32
    losses = losses_of(outputs, batch)
    return scale_gradient(losses | {"sum": losses["sum"] / UNIT_OF_SUM**2}, scale)


# The training, the same for every precision.


def train(dtype, scaled, params, digits, epochs, key, progress):
    """Trains one model; returns its parameters, the factor at the end, and how many steps were skipped."""
    # A step whose gradient is not finite leaves no trace: `skip_nonfinite` keeps the state of an aggregator, and
    # `apply_if_finite` the optimizer's and the parameters. (A scalarizer's state moves on: its losses are finite.)
    method = mtl.skip_nonfinite(mtl.chain(scalarization.scale_invariant(), aggregation.upgrad()))
    adam = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * STEPS_PER_EPOCH))
    optimizer = optax.apply_if_finite(adam, max_consecutive_errors=100)
    # Not `rows="two_pass"`, which may be the default for a large model: it makes the Gramian by the transpose of the
    # backward pass, where numbers are divided by the scale first and multiplied last. Those of the sum become zero.
    grad_fn = mtl.value_and_grad(partial(task_losses, dtype=dtype), method, rows="vmap")

    @partial(jax.jit, donate_argnames="carry")
    def run_epoch(carry, digits, key):
        def step(carry, key):
            params, opt_state, state, loss_scale = carry
            batch = draw_pairs(key, digits, BATCH_SIZE)
            # By keyword: positional arguments are the batch, which `microbatches=` and `task_axis=` would cut.
            (_, state), gradient = grad_fn(params, state, batch, scale=loss_scale.factor)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            if scaled:
                loss_scale = update_scale(loss_scale, opt_state.last_finite)
            return (optax.apply_updates(params, updates), opt_state, state, loss_scale), None

        return jax.lax.scan(step, carry, jax.random.split(key, STEPS_PER_EPOCH))[0]

    params = jax.tree.map(jnp.copy, params)  # donated below, and the next precision starts from the same ones
    loss_scale = LossScale(jnp.float32(2**16 if scaled else 1), jnp.int32(0))
    carry = params, optimizer.init(params), method.init((len(TASKS), params)), loss_scale
    for epoch in range(epochs):
        carry = run_epoch(carry, digits, jax.random.fold_in(key, epoch))
        progress.update()
    params, opt_state, _, loss_scale = carry
    return params, loss_scale.factor, opt_state.total_notfinite


# The results.


@partial(jax.jit, static_argnames="dtype")
def lost_entries(params, batch, scale, dtype):
    """By task: the share of the gradient's entries that are zero in ``dtype``, of those that are not in float32."""

    def is_zero(dtype, scale):
        losses_fn = partial(task_losses, scale=scale, dtype=dtype)
        _, jacobian = mtl.value_and_jac(losses_fn)(params, batch)
        return jnp.concatenate([x.reshape(len(TASKS), -1) == 0 for x in jax.tree.leaves(jacobian)], axis=1)

    in_float32 = is_zero(jnp.float32, jnp.array(1.0))
    lost = is_zero(dtype, scale) & ~in_float32
    return dict(zip(TASKS, jnp.sum(lost, axis=1) / jnp.sum(~in_float32, axis=1), strict=True))


def print_table(rows):
    columns = "network in", *show.SCORES, *(f"lost: {task}" for task in TASKS), "factor", "skipped"
    caption = f"{show.ABOUT_SCORES} lost: after training, the share of the entries of a task's gradient that are zero, "
    caption += "but not in float32. factor: of the loss scale, at the end."
    cells = []
    for name, (metrics, lost, factor, skipped) in rows.items():
        shares = [f"{lost[task]:.1%}" for task in TASKS]
        cells.append([name, *show.format_scores(metrics), *shares, f"2^{jnp.log2(factor):.0f}", f"{skipped}"])
    show.print_table("On the test images, and in the gradients", columns, cells, caption, width=110)


def main(argv=None):
    args = show.arguments(__doc__, seed=0, epochs=12).parse_args(argv)

    train_digits, test_pairs = load_data()
    init_key, data_key, batch_key = jax.random.split(jax.random.key(args.seed), 3)
    start = init_params(init_key, width=64)
    batch = draw_pairs(batch_key, train_digits, BATCH_SIZE)
    rows = {}
    with tqdm(total=len(PRECISIONS) * args.epochs, unit="epoch") as progress:
        for name, (dtype, scaled) in PRECISIONS.items():
            progress.set_description(f"{name:15}")
            params, factor, skipped = train(dtype, scaled, start, train_digits, args.epochs, data_key, progress)
            # The parameters are float32 in every case, and so is the evaluation.
            rows[name] = evaluate(params, test_pairs), lost_entries(params, batch, factor, dtype), factor, skipped
    print_table(rows)


if __name__ == "__main__":
    main()
