"""What ``device.py`` times: calls against memory, whole steps, solvers and a sweep."""

import importlib.util
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from interleave import interleave, median_of_ratios

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization, solvers
from tests.autodiff.models import layers, network

# (b) Memory: how near a call is to reading and writing what it must.


def roofline(size):
    columns = "Jacobian", "call", "ms", "GB moved at least", "GB/s", "of a copy's"
    jobs = [(f"{m} x {n:.0e}", lambda m=m, n=n, name=name: moved(name, m, n, size)) for m, n, name in calls(size)]
    return columns, jobs


# Name to what makes the method, and how often it must pass over numbers as many as the Jacobian's.
STREAMED = {
    "mean": (aggregation.mean, 1),
    "gradient_shares": (lambda: aggregation.gradient_shares(1.0), 2),
    "excess_mtl": (aggregation.excess_mtl, 4),
    "db_mtl, averages": (lambda: aggregation.db_mtl(beta=0.9), 4),
    "moco": (aggregation.moco, 4),
    "upgrad": (aggregation.upgrad, 2),
}


def calls(size):
    names = ["copy", "Gramian", *size.some(STREAMED)]
    return [(m, n, name) for m, n in size.shapes for name in names]


def moved(name, m, n, size):
    needed = {"copy": 2, "Gramian": 1}.get(name) or STREAMED[name][1]
    n_bytes = 4 * m * n * needed
    if (limit := memory()) and 4 * m * n * 4 > 0.9 * limit:
        return name, "does not fit", "", "", ""
    rows = jax.jit(lambda key: jax.random.normal(key, (m, n)))(jax.random.key(0))
    milliseconds = 1e3 * fastest(caller(name, rows), size.rounds)
    speed = n_bytes / milliseconds / 1e6
    if name == "copy":
        COPIED[m, n] = speed
    return name, f"{milliseconds:.3g}", f"{n_bytes / 1e9:.3g}", f"{speed:.3g}", f"{speed / COPIED[m, n]:.2f}"


COPIED = {}


def memory():
    """Bytes of the device, if it says."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def caller(name, rows):
    """A function that makes the next call, without waiting for it."""
    if name in ("copy", "Gramian"):
        function = jax.jit(jnp.negative if name == "copy" else mtl.gramian.gramian)
        return lambda: function(rows)
    method = STREAMED[name][0]()
    apply, carry = jax.jit(method.apply, donate_argnums=0), [method.init(rows.shape)]

    def call():
        gradient, carry[0] = apply(carry[0], rows)
        return gradient, carry[0]

    return call


def fastest(call, rounds, in_a_row=5):
    """Seconds of one of some calls in a row, the fewest of all rounds."""
    jax.block_until_ready(call())
    times = []
    for _ in range(rounds):
        before = time.perf_counter()
        for _ in range(in_a_row):
            last = call()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - before) / in_a_row)
    return min(times)


# (c) Whole steps.

WAYS, PEER = ("dispatched", "scan"), "times as long by TorchJD's loop"
METHODS = {
    "excess_mtl": aggregation.excess_mtl,
    "upgrad": aggregation.upgrad,
    "mgda": aggregation.mgda,
    "dwa": scalarization.dwa,
    "famo, delayed": lambda: scalarization.famo(delayed=True),
}
PEERS = {
    "excess_mtl": lambda peer: peer.aggregation.ExcessMTL(),
    "upgrad": lambda peer: peer.aggregation.UPGrad(),
    "mgda": lambda peer: peer.aggregation.MGDA(),
    "dwa": lambda peer: peer.scalarization.DWA(2.0),
}


def steps(size):
    columns = "step", "dispatched: ms", "of the plain gradient's", "in `scan`: ms", "of the plain gradient's", PEER
    return columns, [(f"`{name}`", lambda name=name: step_times(name, size)) for name in size.some(METHODS)]


def losses_fn(params, batch):
    x, y = batch
    return jnp.mean((network(params, x, jax.nn.relu) - y) ** 2, axis=0)


def data(size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size.n_steps, size.batch, size.layers[0]))
    y = np.tanh(x @ rng.normal(size=(size.layers[0], size.layers[-1])) / np.sqrt(size.layers[0]))
    return x.astype(np.float32), y.astype(np.float32)


def training(method, params, batch):
    """What a training carries, and its step."""
    optimizer, grad_fn = optax.adam(1e-3), mtl.value_and_grad(losses_fn, method, hooks=True)

    def step(carry, batch):
        params, state, opt_state = carry
        (losses, state), grads = grad_fn(params, state, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), state, opt_state), losses

    return (params, grad_fn.init(params, batch), optimizer.init(params)), step


def step_times(name, size):
    """Shortest times of a step, and medians of the rounds' ratios: TorchJD's is how many times longer it takes."""
    stacked = jax.device_put(data(size))
    batches = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(size.n_steps)]
    functions = {}
    for which, method in {"ours": METHODS[name](), "plain": scalarization.sum()}.items():
        functions |= ways(
            which, *training(method, layers(jax.random.key(0), size.layers), batches[0]), batches, stacked
        )
    theirs = torchjd_steps(name, size)
    times = interleave(functions | (theirs if isinstance(theirs, dict) else {}), size.rounds)
    cells = []
    for way in WAYS:
        ours, plain = times["ours", way], times["plain", way]
        cells += [f"{1e3 * min(ours) / size.n_steps:.3g}", f"{median_of_ratios(ours, plain):.2f}"]
    if isinstance(theirs, str):
        return *cells, theirs
    return *cells, " and ".join(f"{median_of_ratios(times['TorchJD'], times['ours', way]):.2f}" for way in WAYS)


def ways(which, carry, step, batches, stacked):
    """Functions that train on with one call for each step, and with one call for all."""
    dispatched = jax.jit(step, donate_argnums=0)
    scanned = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)
    carries = {way: jax.tree.map(jnp.copy, carry) for way in WAYS}

    def one_by_one():
        for batch in batches:
            carries["dispatched"], losses = dispatched(carries["dispatched"], batch)
        return jax.block_until_ready(losses)

    def at_once():
        carries["scan"], losses = scanned(carries["scan"], stacked)
        return jax.block_until_ready(losses)

    return {(which, "dispatched"): one_by_one, (which, "scan"): at_once}


def torchjd_steps(name, size):
    """The same training by TorchJD on the same device, under its name, or why there is none."""
    if not all(importlib.util.find_spec(module) for module in ("torch", "torchjd")):
        return "not installed"
    if name not in PEERS:
        return "has none"
    import torch
    import torchjd.aggregation
    import torchjd.scalarization
    from torch_model import torch_model
    from torchjd.autojac import backward, jac_to_grad

    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        return "torch sees no GPU"
    device = "cuda" if on_gpu else "cpu"
    model = torch_model(layers(jax.random.key(0), size.layers)).to(device)
    try:
        method = PEERS[name](torchjd)
    except ImportError:  # some of its methods need solvers of their own
        return "not installed"
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [
        (torch.tensor(x, device=device), torch.tensor(y, device=device)) for x, y in zip(*data(size), strict=True)
    ]

    def train():
        for x, y in batches:
            optimizer.zero_grad()
            losses = ((model(x) - y) ** 2).mean(dim=0)
            if hasattr(scalarization, name):
                method(losses).backward()
            else:
                backward(losses)
                jac_to_grad(model.parameters(), method)
            optimizer.step()
        return losses.tolist()  # waits for the device

    return {"TorchJD": train}


# (d) Solvers.

SOLVED = {
    "solvers.simplex_qp": solvers.simplex_qp,
    "solvers.dual_cone": lambda gramian: solvers.dual_cone(gramian, jnp.ones(len(gramian))),
    "solvers.cagrad_dual": lambda gramian: solvers.cagrad_dual(gramian, 0.5),
    "solvers.nash_bargaining": solvers.nash_bargaining,
    "solvers.alpha_fair": lambda gramian: solvers.alpha_fair(gramian, 2.0),
    "upgrad": lambda gramian: gramian_weights(aggregation.upgrad(), gramian),
    "aligned_mtl": lambda gramian: gramian_weights(aggregation.aligned_mtl(), gramian),
}


def gramian_weights(method, gramian):
    m = len(gramian)
    return method.gramian_weighting.apply(method.init((m, jax.ShapeDtypeStruct((m,), gramian.dtype))), gramian)[0]


def solver_times(size):
    def row(name):
        return [f"{1e3 * fastest(solving(name, m), size.rounds, in_a_row=1):.3g}" for m in size.tasks]

    columns = "ms, by number of tasks", *map(str, size.tasks)
    return columns, [(f"`{name}`", lambda name=name: row(name)) for name in size.some(SOLVED)]


def solving(name, m):
    """One Gramian of gradients that conflict, as in ``solvers.py``."""
    mixtures = np.random.default_rng(m).normal(size=(m, m)).astype(np.float32)
    gramian, solve = jnp.asarray(mixtures @ mixtures.T), jax.jit(SOLVED[name])
    return lambda: solve(gramian)


# (e) A sweep.


def sweep(size):
    columns = "trainings in one program", "s", "ms each", "of one alone"
    return columns, [(f"{size.models} by DWA, of as many temperatures and seeds", lambda: sweep_times(size))]


def sweep_times(size):
    sizes = min(size.layers, (16, 64, 64, 3))  # a network of which many fit
    batches = jax.device_put(data(size._replace(layers=sizes, batch=64)))

    def train(temperature, seed):
        first = jax.tree.map(lambda x: x[0], batches)
        method = scalarization.dwa(temperature, steps_per_epoch=max(size.n_steps // 5, 1))
        carry, step = training(method, layers(jax.random.key(seed), sizes), first)
        return jax.lax.scan(step, carry, batches)[1]

    settings = jnp.geomspace(0.5, 64, size.models), jnp.arange(size.models)
    all_of_them, alone = jax.jit(jax.vmap(train)), jax.jit(train)
    functions = {
        "all": lambda: jax.block_until_ready(all_of_them(*settings)),
        "alone": lambda: jax.block_until_ready(alone(settings[0][0], settings[1][0])),
    }
    times = interleave(functions, min(size.rounds, 5))
    seconds, one = min(times["all"]), min(times["alone"])
    return f"{seconds:.3g}", f"{1e3 * seconds / size.models:.3g}", f"{seconds / size.models / one:.3g}"
