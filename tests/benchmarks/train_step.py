"""Training steps of this library and of TorchJD, side by side.

Run by hand: ``python tests/benchmarks/train_step.py``. The same work in both: an MLP 16-64-64-3 with one mean squared
error per output, batches of 64, Adam at 1e-3, two threads, the same initial weights and data. Needs the ``parity``
extra, and a machine with nothing else to do: under load TorchJD's threads wait for each other, and it looks ten times
slower than it is.
"""

import argparse
import collections
import os

# In programs as small as these XLA's scheduler for concurrency adds up to a quarter to the time: for the defaults, run
# with XLA_FLAGS set to anything else, such as "--xla_cpu_enable_concurrency_optimized_scheduler=true".
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_enable_concurrency_optimized_scheduler=false")

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchjd.aggregation
import torchjd.scalarization
from interleave import HEADER, compared, interleave, row
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from torch_model import torch_model
from torchjd.autojac import backward, jac_to_grad

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

jax.config.update("jax_num_cpu_devices", 2)

SCHEDULER = "" if "concurrency_optimized_scheduler=false" in os.environ["XLA_FLAGS"] else ", XLA's default scheduler"
SIZES = [16, 64, 64, 3]
BATCH = 64
LEARNING_RATE = 1e-3
TEMPERATURES = np.geomspace(0.5, 64, 8)
SEEDS = np.arange(8)


# The problem.


def make_batches(n_steps):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n_steps, BATCH, SIZES[0]))
    y = np.tanh(x @ rng.normal(size=(SIZES[0], SIZES[-1]))) * [0.3, 1.0, 3.0]
    return x.astype(np.float32), y.astype(np.float32)


def init_params(key):
    keys = jax.random.split(key, len(SIZES) - 1)
    return [
        {"w": jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in), "b": jnp.zeros(n_out)}
        for key, n_in, n_out in zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    ]


def task_losses(params, batch):
    x, y = batch
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2, axis=0)


def torch_task_losses(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean(dim=0)


# Ours: each returns what a training carries, and a step from that and a batch to that and the losses.


def our_uw(params):
    method, optimizer = scalarization.uw(), optax.adam(LEARNING_RATE)

    def loss_fn(variables, batch):
        params, state = variables
        losses = task_losses(params, batch)
        scalar, _ = method.apply(state, losses)
        return scalar, losses

    def step(carry, batch):
        variables, opt_state = carry
        grads, losses = jax.grad(loss_fn, has_aux=True)(variables, batch)
        updates, opt_state = optimizer.update(grads, opt_state, variables)
        return (optax.apply_updates(variables, updates), opt_state), losses

    variables = (params, method.init(SIZES[-1]))
    return (variables, optimizer.init(variables)), step


def our_excess_mtl(params):
    # As TorchJD counts its first step, so that both train alike.
    method = aggregation.excess_mtl(normalize_first_step=False)
    optimizer = optax.chain(mtl.aggregate(method, n_tasks=SIZES[-1]), optax.adam(LEARNING_RATE))

    def step(carry, batch):
        params, opt_state = carry
        losses, pull_back = jax.vjp(lambda params: task_losses(params, batch), params)
        # One row after the other: for few tasks XLA's CPU code is faster than that of `jax.jacrev`, which maps them.
        rows = [pull_back(one_hot)[0] for one_hot in jnp.eye(len(losses))]
        jacobian = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        updates, opt_state = optimizer.update(jacobian, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), losses

    return (params, optimizer.init(params)), step


def our_dwa(params, temperature, steps_per_epoch):
    method, optimizer = scalarization.dwa(temperature, steps_per_epoch), optax.adam(LEARNING_RATE)

    def loss_fn(params, state, batch):
        losses = task_losses(params, batch)
        scalar, state = method.apply(state, losses)
        return scalar, (state, losses)

    def step(carry, batch):
        params, state, opt_state = carry
        grads, (state, losses) = jax.grad(loss_fn, has_aux=True)(params, state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    return (params, method.init(SIZES[-1]), optimizer.init(params)), step


# Ours without balancing: what a step costs anyway. It is the floor of what balancing can cost.


def our_sum(params):
    optimizer = optax.adam(LEARNING_RATE)

    def loss_fn(params, batch):
        losses = task_losses(params, batch)
        return losses.sum(), losses

    def step(carry, batch):
        params, opt_state = carry
        grads, losses = jax.grad(loss_fn, has_aux=True)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), losses

    return (params, optimizer.init(params)), step


# TorchJD's: each returns a step from a batch to the losses.


def their_uw(model):
    method = torchjd.scalarization.UW(SIZES[-1])
    optimizer = torch.optim.Adam([*model.parameters(), *method.parameters()], lr=LEARNING_RATE)

    def step(batch):
        losses = torch_task_losses(model, batch)
        optimizer.zero_grad()
        method(losses).backward()
        optimizer.step()
        return losses.detach()

    return step


def their_excess_mtl(model):
    aggregator = torchjd.aggregation.ExcessMTL()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def step(batch):
        losses = torch_task_losses(model, batch)
        optimizer.zero_grad()
        backward(losses)
        jac_to_grad(model.parameters(), aggregator)
        optimizer.step()
        return losses.detach()

    return step


def their_dwa(model, temperature, steps_per_epoch):
    method = torchjd.scalarization.DWA(temperature)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    n_steps = 0

    def step(batch):
        nonlocal n_steps
        losses = torch_task_losses(model, batch)
        optimizer.zero_grad()
        method(losses).backward()
        optimizer.step()
        n_steps += 1
        if n_steps % steps_per_epoch == 0:
            method.step()
        return losses.detach()

    return step


# What is timed.


def compare_steps(name, ours, theirs, required, n_steps, rounds):
    """One method against TorchJD's loop: by one dispatched jitted step at a time, and inside one ``lax.scan``.

    The floor is the same scan on the sum of the losses.
    """
    batches = make_batches(n_steps)
    stacked = tuple(map(jnp.array, batches))
    our_batches, their_batches = each_batch(batches, jnp.array), each_batch(batches, torch.tensor)

    params = init_params(jax.random.key(0))
    _, step = ours(params)
    jitted_step = jax.jit(step, donate_argnums=0)
    jitted_scan = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)
    their_step = theirs(torch_model(params))
    # A donated carry is gone: each way to train has its own.
    carries = {how: jax.tree.map(jnp.copy, ours(params)[0]) for how in ("dispatched", "scan")}
    carries["floor"], floor_step = jax.tree.map(jnp.copy, our_sum(params)[0]), our_sum(params)[1]
    jitted_floor = jax.jit(lambda carry, batches: jax.lax.scan(floor_step, carry, batches), donate_argnums=0)

    def dispatched():
        losses = []
        for batch in our_batches:
            carries["dispatched"], batch_losses = jitted_step(carries["dispatched"], batch)
            losses.append(batch_losses)
        return jax.block_until_ready(losses)

    def scan():
        carries["scan"], losses = jitted_scan(carries["scan"], stacked)
        return jax.block_until_ready(losses)

    def floor():
        carries["floor"], losses = jitted_floor(carries["floor"], stacked)
        return jax.block_until_ready(losses)

    def torchjd_loop():
        return [their_step(batch) for batch in their_batches]

    expected = torch.stack(torchjd_loop())
    assert_same_training(dispatched(), expected)
    assert_same_training(scan(), expected)
    times = interleave({"dispatched": dispatched, "scan": scan, "floor": floor, "TorchJD": torchjd_loop}, rounds)
    for how in ("dispatched", "scan", "floor"):
        print(row(f"{name}, {how}: a step", times[how], times["TorchJD"], required[how], n_steps, n_steps), flush=True)
        if how != "floor":
            group = f"a training step, {'inside `lax.scan`' if how == 'scan' else 'dispatched'}, MLP 16-64-64-3"
            yield compared(group + SCHEDULER, name, "TorchJD", times[how], times["TorchJD"], n_steps, n_steps)


def compare_sweeps(required, n_steps, rounds):
    """64 trainings with DWA in one program, 8 temperatures and 8 seeds, against one training by TorchJD."""
    steps_per_epoch = n_steps // 5
    batches = make_batches(n_steps)
    stacked = tuple(map(jnp.array, batches))
    their_batches = each_batch(batches, torch.tensor)

    def train(temperature, seed):
        carry, step = our_dwa(init_params(jax.random.key(seed)), temperature, steps_per_epoch)
        _, losses = jax.lax.scan(step, carry, stacked)
        return losses

    # One device for each of the two cores: the models are independent, so each trains half of them.
    split = NamedSharding(jax.make_mesh((2,), ("models",), (AxisType.Auto,)), PartitionSpec("models"))
    grid = np.meshgrid(TEMPERATURES.astype(np.float32), SEEDS, indexing="ij")
    models = tuple(jax.device_put(values.ravel(), split) for values in grid)
    sweep = jax.jit(jax.vmap(train))

    def ours():
        return jax.block_until_ready(sweep(*models))

    def one_torchjd_training(temperature=2.0, seed=0):
        step = their_dwa(torch_model(init_params(jax.random.key(seed))), temperature, steps_per_epoch)
        return lambda: [step(batch) for batch in their_batches]

    found = ours()
    for i, j in [(0, 0), (3, 5), (7, 7)]:
        theirs = one_torchjd_training(float(TEMPERATURES[i]), int(SEEDS[j]))
        assert_same_training(found[i * len(SEEDS) + j], torch.stack(theirs()))
    times = interleave({"ours": ours, "TorchJD": theirs}, rounds)
    n_models = len(TEMPERATURES) * len(SEEDS)
    name = f"DWA, sweep of {n_models}: a model"
    print(row(name, times["ours"], times["TorchJD"], required, ours_count=n_models), flush=True)
    group = "a training of one model in a sweep of 64, 32 on each core"
    yield compared(group + SCHEDULER, "DWA", "TorchJD", times["ours"], times["TorchJD"], ours_count=n_models)


def each_batch(batches, to_array):
    return [tuple(map(to_array, batch)) for batch in zip(*batches, strict=True)]


def assert_same_training(losses, expected):
    """That it is the same work: the first losses agree, and the first 200 as far as Adam lets roundings."""
    losses, expected = np.array(losses), expected.numpy()
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(losses[:200], expected[:200], rtol=1e-2)


def measure(rounds, quick=False, n_steps=1000):
    each = 200 if quick else n_steps, rounds
    required = {"dispatched": 5, "scan": 15, "floor": "-"}
    yield from compare_steps("UW", our_uw, their_uw, required, *each)
    yield from compare_steps("ExcessMTL", our_excess_mtl, their_excess_mtl, required | {"scan": 12}, *each)
    yield from compare_sweeps(15, *each)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2, help="TorchJD's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(HEADER)
    collections.deque(measure(arguments.rounds, n_steps=arguments.steps), maxlen=0)
