"""Balanced training steps of this library and of TorchJD, and what the ways to compute rows cost.

Run by hand: ``python tests/benchmarks/autodiff.py``. Needs the ``parity`` extra, and a machine with nothing else to do.
An MLP 64-w-w-w-m with one mean squared error per output, UPGrad, two threads. "Over m plain steps" is the time of a
balanced step over that of the same library's step on the sum of the losses, divided by m.
"""

import argparse
import collections
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation
from interleave import compared, interleave, median_of_ratios
from torch_model import torch_model
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

ROWS = ["vmap", "stream"]
FEW = [("default", {}), ("rows='two_pass'", {"rows": "two_pass"})]  # by turns with TorchJD's
SIZES = [(2, 512, 256), (8, 512, 256), (32, 512, 256), (8, 1024, 64)]


# Models.


def init_layers(seed, sizes):
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    shapes = itertools.pairwise(sizes)
    return [
        {"w": jax.random.normal(key, (n_in, n_out)) / np.sqrt(n_in), "b": jnp.zeros(n_out)}
        for key, (n_in, n_out) in zip(keys, shapes, strict=False)
    ]


def network(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def task_losses(params, batch):
    x, y = batch
    return jnp.mean((network(params, x) - y) ** 2, axis=0)


def normal_batch(*shape, n_in, n_out):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(*shape, n)), jnp.float32) for n in (n_in, n_out))


# Steps: functions of no arguments, which return when their work is done.


def compiled(fun, *args):
    """A call of the compiled function, and the megabytes of its temporaries."""
    program = jax.jit(fun).lower(*args).compile()
    return lambda: jax.block_until_ready(program(*args)), program.memory_analysis().temp_size_in_bytes / 1e6


def plain(losses_fn, params, *args):
    return compiled(jax.value_and_grad(lambda params, *args: jnp.sum(losses_fn(params, *args))), params, *args)


def balanced(losses_fn, method, params, *args, state=None, m=None, **keywords):
    state = method.init((m, params)) if state is None else state
    return compiled(mtl.value_and_grad(losses_fn, method, **keywords), params, state, *args)


def donated(losses_fn, method, params, *args, m):
    """As in a training: every call takes the last one's state, and may change it in place."""
    carry = [method.init((m, params))]
    step = jax.jit(mtl.value_and_grad(losses_fn, method), donate_argnums=1)
    program = step.lower(params, carry[0], *args).compile()

    def call():
        (_, carry[0]), gradient = program(params, carry[0], *args)
        jax.block_until_ready(gradient)

    return call, program.memory_analysis().temp_size_in_bytes / 1e6


def torch_steps(params, batch):
    x, y = (torch.tensor(np.array(part)) for part in batch)
    model, watched_model = torch_model(params), torch_model(params)
    aggregator, weighting = torchjd.aggregation.UPGrad(), torchjd.aggregation.UPGradWeighting()
    engine = Engine(watched_model, batch_dim=None)

    def losses(model):
        for parameter in model.parameters():
            parameter.grad = None
        return ((model(x) - y) ** 2).mean(dim=0)

    def autojac(**keywords):
        backward(losses(model))
        jac_to_grad(list(model.parameters()), aggregator, **keywords)

    def autogram():
        values = losses(watched_model)
        values.backward(weighting(engine.compute_gramian(values)))

    return {
        "TorchJD, plain": lambda: losses(model).sum().backward(),
        "TorchJD, jac_to_grad": autojac,
        "TorchJD, its Gramian": lambda: autojac(optimize_gramian_computation=True),
        "TorchJD, autogram": autogram,
    }


# Tables.


def table(title, steps, plain_of, m, rounds):
    """Medians, and the medians of ratios to the plain step; ``steps`` are pairs with megabytes, or functions."""
    calls = {name: step[0] if isinstance(step, tuple) else step for name, step in steps.items()}
    times = interleave(calls, rounds)
    print(f"\n{title}\n{'':28} {'median':>10} {'least':>10} {'over plain':>10} {'over m plain':>12} {'temporary':>10}")
    for name, step in steps.items():
        over = median_of_ratios(times[name], times[plain_of(name)])
        megabytes = f"{step[1]:7.2f} MB" if isinstance(step, tuple) else ""
        median, least = 1e3 * float(np.median(times[name])), 1e3 * min(times[name])
        print(f"{name:28} {median:7.2f} ms {least:7.2f} ms {over:10.2f} {over / m:12.2f} {megabytes:>10}", flush=True)
    return times


def measure(rounds, quick=False):
    for size in SIZES[:1] if quick else SIZES:
        yield from by_turns(size, rounds)


def by_turns(size, rounds):
    """Our default against each of TorchJD's ways."""
    m, width, batch_size = size
    params = init_layers(0, [64, width, width, width, m])
    batch = normal_batch(batch_size, n_in=64, n_out=m)
    steps = {"plain": plain(task_losses, params, batch)}
    steps |= {
        name: balanced(task_losses, aggregation.upgrad(), params, batch, m=m, **keywords) for name, keywords in FEW
    }
    steps |= torch_steps(params, batch)
    plain_of = lambda name: "TorchJD, plain" if name.startswith("TorchJD") else "plain"
    times = table(f"m, width, batch = {size}, by turns", steps, plain_of, m, rounds)
    for name in steps:
        here = "plain" if name == "TorchJD, plain" else "default"
        if name.startswith("TorchJD"):
            group = "a step on the sum of the losses" if here == "plain" else "a step balanced by UPGrad"
            what = f"{m} tasks, width {width}, batch {batch_size}, {name.removeprefix('TorchJD, ')}"
            yield compared(f"{group}, MLP 64-w-w-w-m", what, "TorchJD", times[here], times[name])


def against_torchjd(size, rounds):
    m, width, batch_size = size
    params = init_layers(0, [64, width, width, width, m])
    batch = normal_batch(batch_size, n_in=64, n_out=m)
    upgrad, excess = aggregation.upgrad(), aggregation.excess_mtl()
    step = partial(balanced, task_losses)
    steps = {"plain": plain(task_losses, params, batch), "default": step(upgrad, params, batch, m=m)}
    steps |= {f"rows={rows!r}": step(upgrad, params, batch, m=m, rows=rows) for rows in ("vmap", 1, "two_pass")}
    steps |= {f"ExcessMTL, {rows!r}": step(excess, params, batch, m=m, rows=rows) for rows in ("vmap", 1, "stream")}
    # Torch's threads spin for a while after their work, and slow down what runs next: so each library by itself too.
    table(f"m, width, batch = {size}, one library", steps, lambda name: "plain", m, rounds)
    table(
        f"m, width, batch = {size}, TorchJD alone", torch_steps(params, batch), lambda name: "TorchJD, plain", m, rounds
    )
    collections.deque(by_turns(size, rounds), maxlen=0)


def own_data(rounds):
    m = 10
    params = init_layers(0, [39, 400, 400, 400, 8])
    batch = normal_batch(m, 128, n_in=39, n_out=8)
    one = lambda params, batch: jnp.mean(task_losses(params, batch))
    every = lambda params, batch: jax.vmap(one, (None, 0))(params, batch)
    method = aggregation.upgrad()
    steps = {"plain": plain(every, params, batch), "one-hot rows": balanced(every, method, params, batch, m=m)}
    for rows in None, "vmap", 1:
        steps[f"task_axis=0, rows={rows!r}"] = balanced(one, method, params, batch, m=m, task_axis=0, rows=rows)
    table("Own data: 10 tasks of (128, 39), MLP 400 x 3", steps, lambda name: "plain", m, rounds)


def unequal_data(rounds):
    """A dict of functions, one for each task, against one function on batches that are padded to the largest."""
    sizes = [16, 32, 64, 128, 256, 512]
    params, m = init_layers(0, [39, 400, 400, 400, 8]), len(sizes)
    batches = {f"task {n}": normal_batch(n, n_in=39, n_out=8) for n in sizes}
    there = jnp.arange(max(sizes))[None] < jnp.array(sizes)[:, None]
    pad = lambda *xs: jnp.stack([jnp.pad(x, ((0, max(sizes) - len(x)), (0, 0))) for x in xs])
    padded = (*jax.tree.map(pad, *batches.values()), there)
    one = lambda params, batch: jnp.mean(task_losses(params, batch))

    def one_padded(params, batch):
        x, y, there = batch
        return mtl.Counted(jnp.sum(jnp.mean((network(params, x) - y) ** 2, axis=-1), where=there), jnp.sum(there))

    def every(params, batches):
        return jnp.stack([one(params, batch) for batch in batches.values()])

    steps = {"plain": plain(every, params, batches)}
    functions, excess = dict.fromkeys(batches, one), aggregation.excess_mtl()
    methods = {"UPGrad": aggregation.upgrad(), "ExcessMTL": excess, "DWA": scalarization.dwa(steps_per_epoch=100)}
    for name, method in methods.items():
        of_tasks = partial(balanced, functions, method, params, batches)
        state = method.init(m) if name == "DWA" else None
        steps[f"{name}, a dict of functions"] = of_tasks(m=m, state=state)
        steps[f"{name}, nonfinite="] = of_tasks(m=m, state=state, nonfinite="drop_task")
        step = balanced(one_padded, method, params, padded, m=m, state=state, task_axis=0)
        steps[f"{name}, padded, task_axis=0"] = step
    steps |= {f"ExcessMTL, {rows!r}": balanced(functions, excess, params, batches, m=m, rows=rows) for rows in ROWS}
    table(f"Own data: 6 tasks of {sizes} examples, MLP 400 x 3", steps, lambda name: "plain", m, rounds)


def bad_task(rounds):
    """What it costs to compute each named loss's gradient alone, against a backward pass for all."""
    for m, width, batch_size in [(3, 64, 64), *SIZES[1:2], *SIZES[3:]]:
        params, batch = init_layers(0, [64, width, width, width, m]), normal_batch(batch_size, n_in=64, n_out=m)
        named = lambda params, batch: dict(enumerate(task_losses(params, batch)))
        steps = {"plain": plain(task_losses, params, batch)}
        for name, method in {"DWA": scalarization.dwa(steps_per_epoch=100), "UPGrad": aggregation.upgrad()}.items():
            state = method.init(m) if name == "DWA" else None
            for nonfinite in None, "drop_task":
                step = balanced(named, method, params, batch, m=m, state=state, nonfinite=nonfinite)
                steps[f"{name}, nonfinite={nonfinite!r}"] = step
        title = f"A bad task alone: m, width, batch = {m, width, batch_size}"
        table(title, steps, lambda name: "plain", m, rounds)


def remembering(rounds):
    """Methods whose state is as large as the Jacobian, and ConFIG for comparison."""
    m, width, batch_size = 8, 512, 256
    params = init_layers(0, [64, width, width, width, m])
    batch = normal_batch(batch_size, n_in=64, n_out=m)
    methods = {
        "ConFIG": aggregation.config(),
        "M-ConFIG": aggregation.m_config(),
        "DB-MTL": aggregation.db_mtl(beta=0.9),
        "MoCo": aggregation.moco(),
        "ExcessMTL": aggregation.excess_mtl(),
    }
    steps = {"plain": plain(task_losses, params, batch)}
    steps |= {name: donated(task_losses, method, params, batch, m=m) for name, method in methods.items()}
    table(f"State as large as the Jacobian: {m} losses, MLP {width} x 3", steps, lambda name: "plain", m, rounds)


def refresh(rounds, n_steps=1000):
    m = 8
    params = init_layers(0, [64, 128, 128, 128, m])
    batch = normal_batch(64, n_in=64, n_out=m)
    method = mtl.amortize(aggregation.upgrad())
    grad_fn = mtl.value_and_grad(task_losses, method)

    def descend(params, gradient):
        return jax.tree.map(lambda x, g: x - 1e-3 * g, params, gradient)

    def train(params, every):
        def step(carry, i):
            (_, state), gradient = grad_fn(*carry, batch, refresh=i % every == 0)
            return (descend(carry[0], gradient), state), None

        return jax.lax.scan(step, (params, method.init((m, params))), jnp.arange(n_steps))[0]

    def train_plainly(params):
        of_sum = jax.grad(lambda params: jnp.sum(task_losses(params, batch)))
        return jax.lax.scan(lambda params, _: (descend(params, of_sum(params)), None), params, length=n_steps)[0]

    steps = {"plain": compiled(train_plainly, params)}
    steps |= {f"refreshed every {k}": compiled(partial(train, every=k), params) for k in (1, 10, 1000)}
    seeds = jax.tree.map(lambda x: jnp.stack([x] * 4), params)
    steps["4 seeds, plain"] = compiled(jax.vmap(train_plainly), seeds)
    steps["4 seeds, every 1000"] = compiled(jax.vmap(partial(train, every=1000)), seeds)
    of_seeds = lambda name: "4 seeds, plain" if name.startswith("4") else "plain"
    table(f"refresh=: {n_steps} steps, 8 losses, MLP 128 x 3", steps, of_seeds, m, rounds)


def many_heads(rounds, head_width):
    m = 8
    trunk_params = init_layers(0, [64, 512, 512, 512, 512])
    heads = {str(i): init_layers(i, [512, *head_width, 1]) for i in range(m)}
    params, batch = (trunk_params, heads), normal_batch(256, n_in=64, n_out=m)
    trunk = lambda params, batch: jax.nn.relu(network(params, batch[0]))
    loss = lambda i, params, z, batch: jnp.mean((network(params, z)[:, 0] - batch[1][:, i]) ** 2)
    head_fns = {str(i): partial(loss, i) for i in range(m)}

    def losses(params, batch):
        z = trunk(params[0], batch)
        return jnp.stack([head_fns[name](params[1][name], z, batch) for name in head_fns])

    method, mask = aggregation.upgrad(), (True, False)
    shared_state = method.init((m, mtl.subset(params, mask)))
    of_features = method.init((m, trunk(trunk_params, batch)))
    step = partial(balanced, (trunk, head_fns), method, params, batch)
    steps = {"plain": plain(losses, params, batch), "trunk and heads": step(state=shared_state)}
    steps |= {f"the same, rows={rows!r}": step(state=shared_state, rows=rows) for rows in ("vmap", 1, "two_pass")}
    steps["at='features'"] = step(state=of_features, at="features")
    steps["one function, shared="] = balanced(losses, method, params, batch, state=shared_state, shared=mask)
    steps["one function, all balanced"] = balanced(losses, method, params, batch, m=m)
    last = ([False, False, False, True], False)
    last_state = method.init((m, mtl.subset(params, last)))
    steps["decide_on= the last layer"] = balanced(losses, method, params, batch, state=last_state, decide_on=last)
    heads = "x".join(map(str, (512, *head_width, 1)))
    table(f"8 heads {heads} on a trunk 64x512x512x512x512, batch 256", steps, lambda name: "plain", m, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["torchjd", "own", "bad", "refresh", "heads", "remembering"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.only in (None, "own"):
        own_data(arguments.rounds)
        unequal_data(arguments.rounds)
    if arguments.only in (None, "bad"):
        bad_task(arguments.rounds)
    if arguments.only in (None, "heads"):
        many_heads(arguments.rounds, [512])
        many_heads(arguments.rounds, [])
    if arguments.only in (None, "remembering"):
        remembering(arguments.rounds)
    if arguments.only in (None, "refresh"):
        refresh(max(5, arguments.rounds // 3))
    if arguments.only in (None, "torchjd"):
        for size in SIZES:
            against_torchjd(size, arguments.rounds)
