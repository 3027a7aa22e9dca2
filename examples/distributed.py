"""Training in two processes, as on two machines: each has its own half of the data, and both get one model.

What makes two processes give the numbers of one: a loss is over all examples, wherever they are. Here half of the
examples have no label for the left digit, nearly all of them in the data of one process. The mean of the two processes'
means would count those of the other one several times, so the loss is ``mtl.Counted``: a sum and how many labels it is
over. The method then sees the same losses in both processes, and its state stays the same in both.

The training step says nothing of processes. Under ``jax.jit`` the batch is one array, of which each process holds a
part, and XLA adds up what is over all of it. On a cluster each process is started by itself, and the part of this file
that starts them (``run_processes``) is not needed; nor is the address, which JAX finds there.

Run it with ``python examples/distributed.py``: about half a minute on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import argparse
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from digits import TASKS, draw_pairs, init_params, load_images, predict
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

METHODS = {"DWA": lambda: scalarization.dwa(steps_per_epoch=10), "ExcessMTL": aggregation.excess_mtl}
N_PARTS = 2
BATCH_SIZE = 128
N_BATCHES = 10
SHARE_LABELLED = (0.95, 0.05)  # of the left digits, in each part
ROUNDING = 1e-5


# The losses: sums and counts over the whole batch.


def task_losses(params, batch):
    outputs = predict(params, batch["image"])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    errors = {task: cross_entropy(outputs[task], batch[task]) for task in ("left", "right")}
    errors["sum"] = (outputs["sum"] - batch["sum"]) ** 2
    labelled = {task: batch["has_left"] if task == "left" else jnp.ones_like(batch["has_left"]) for task in TASKS}
    return {task: mtl.Counted(jnp.sum(errors[task], where=labelled[task]), jnp.sum(labelled[task])) for task in TASKS}


# The data: each process makes its part, and no process has all of it.


def load_part(i):
    """A part of every batch, as NumPy arrays ``[batch, example, ...]``."""
    digits, _ = load_images()
    data_key, label_key = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
    n_examples = BATCH_SIZE // N_PARTS
    pairs = draw_pairs(data_key, digits, N_BATCHES * n_examples)
    pairs["has_left"] = jax.random.bernoulli(label_key, SHARE_LABELLED[i], (N_BATCHES * n_examples,))
    return jax.tree.map(lambda x: np.reshape(x, (N_BATCHES, n_examples, *x.shape[1:])), pairs)


def load_data(mesh):
    """All batches, each spread over the devices of all processes."""
    mine = np.split(np.arange(N_PARTS), jax.process_count())[jax.process_index()]
    local = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *map(load_part, mine))
    spread = NamedSharding(mesh, PartitionSpec(None, "data"))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(spread, x), local)


# The training: a step as on one device.


def train(method, data, mesh, n_steps, progress):
    """The losses and weights of every step, and the parameters at the end."""
    optimizer = optax.adam(1e-3)
    grad_fn = mtl.value_and_grad(task_losses, method, return_weights=True)

    @jax.jit
    def step(params, opt_state, state, data, i):
        batch = jax.tree.map(lambda x: x[i % N_BATCHES], data)
        (losses, state, weights), grads = grad_fn(params, state, batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        losses = {task: loss.sum / loss.count for task, loss in losses.items()}
        return optax.apply_updates(params, updates), opt_state, state, (losses, weights)

    @partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))  # whole on every device
    def init(key):
        params = init_params(key)
        return params, optimizer.init(params)

    params, opt_state = init(jax.random.key(1))
    state = grad_fn.init(params, jax.eval_shape(lambda: jax.tree.map(lambda x: x[0], data)))
    logs = []
    for i in range(n_steps):
        params, opt_state, state, log = step(params, opt_state, state, data, i)
        logs.append(jax.device_get(log))
        progress.update()
    return logs, jax.device_get(params)


def train_all(n_steps):
    """Every method's losses, weights and parameters, from this process and those that it works with."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))
    data = load_data(mesh)
    n_processes, is_first = jax.process_count(), jax.process_index() == 0
    about = f"{n_processes} processes" if n_processes > 1 else "1 process"
    with tqdm(total=len(METHODS) * n_steps, desc=about, unit="step", disable=not is_first) as progress:
        return {name: train(make(), data, mesh, n_steps, progress) for name, make in METHODS.items()}


# Starting the processes.


def work(args):
    """One of several processes; the first one writes what was found."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(args.address, N_PARTS, args.process, initialization_timeout=args.timeout)
    found = train_all(args.steps)
    if jax.process_index() == 0:
        args.results.write_bytes(pickle.dumps(found))
    jax.distributed.shutdown()


def free_address():
    with socket.socket() as any_free:
        any_free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{any_free.getsockname()[1]}"


def run_processes(args):
    """Starts two processes, waits for both, and ends what is left of them if one fails or the time is up."""
    with tempfile.TemporaryDirectory() as folder:
        results, ends = Path(folder) / "results.pickle", time.monotonic() + args.timeout
        given = ["--steps", args.steps, "--timeout", args.timeout, "--address", free_address(), "--results", results]
        command = [sys.executable, __file__, *map(str, given), "--process"]
        children = [subprocess.Popen([*command, str(i)]) for i in range(N_PARTS)]
        try:
            while any(codes := [child.poll() for child in children]) or None in codes:
                if any(codes):
                    sys.exit(f"a process failed: exit codes {codes}")
                if time.monotonic() > ends:
                    sys.exit(f"not done after {args.timeout} seconds (--timeout): exit codes {codes}")
                time.sleep(0.05)
        finally:
            for child in children:
                child.kill()
                child.wait()
        return pickle.loads(results.read_bytes())


# The results.


def apart(found, expected):
    """How far two trees of numbers are from each other at most, relative to what is expected."""
    found, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (found, expected))
    return np.max(np.abs(found - expected) / np.maximum(np.abs(expected), 1e-2))


def print_results(together, alone):
    rows = []
    for name in METHODS:
        (many, _), (one, _) = together[name], alone[name]
        for task in TASKS:
            numbers = [f"{part[task]:.6f}" for logs in (many, one) for part in logs[-1]]
            rows.append([f"{name}, {task}", *numbers])
    columns = ["", "loss, 2 processes", "weight", "loss, 1 process", "weight"]
    show.print_table("The last step", columns, rows, caption=None, width=100)
    logs, params = (max(apart(together[name][i], alone[name][i]) for name in METHODS) for i in range(2))
    print(f"Relative distance at most: {logs:.1e} of losses and weights in all steps, {params:.1e} of parameters.")
    if max(logs, params) > ROUNDING:
        sys.exit(f"that is more than rounding ({ROUNDING})")


def main(argv=None):
    parser = show.arguments(__doc__, steps=30, timeout=300)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)  # and the others are for the processes only
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.process is not None:
        work(args)
    else:
        print_results(run_processes(args), train_all(args.steps))


if __name__ == "__main__":
    main()
