"""One ExcessMTL call on a large Jacobian, bare, masked and guarded, against TorchJD's and against copying.

Run by hand: ``python tests/benchmarks/excess_mtl.py``. The call has to read the Jacobian and the squared gradients, to
write the squared gradients, and to read the Jacobian again once the weights are known. The floor is twice the time of a
jitted copy of both. A guard has to read the Jacobian once more: 5/4 of the bare call. Then a training step that streams
its rows, bare and guarded. Without TorchJD (the ``parity`` extra) ours alone. On a machine with nothing else to do.
"""

import argparse
import collections

import jax
import jax.numpy as jnp
import numpy as np
from interleave import REST, compared, interleave, median_of_ratios

import mtlbalance as mtl
from mtlbalance import aggregation

try:
    import torch
    import torchjd.aggregation
except ImportError:
    torch = None

SHAPES = [(3, 10**6), (8, 10**6), (16, 10**5)]
BARE = "plain"
OURS = [BARE, "all-true mask", "skip_nonfinite", "both"]
STEPS = [(3, 1024, 256), (8, 1024, 256)]  # tasks, width, batch: two layers of 1024 x 1024 numbers


def measure(rounds, quick=False):
    for m, n in SHAPES[-1:] if quick else SHAPES:
        times = compare(m, n, rounds)
        if torch is not None:
            yield compared("ExcessMTL, one call", f"{m} x {n:,}", "TorchJD", times[BARE], times["TorchJD"])


def compare(m, n, rounds):
    # Small enough that TorchJD's first step, by the raw excess, does not saturate the weights.
    matrix = (1e-6 * np.random.default_rng(0).normal(size=(m, n))).astype(np.float32)
    jacobian, mask = jnp.array(matrix), jnp.ones(m, bool)
    plain = aggregation.excess_mtl(normalize_first_step=False)
    both = jnp.stack([jacobian, jacobian])
    copy = jax.jit(jnp.copy)

    functions = {
        BARE: calls(plain, jacobian),
        "all-true mask": calls(plain, jacobian, mask),
        "skip_nonfinite": calls(mtl.skip_nonfinite(plain), jacobian),
        "both": calls(mtl.skip_nonfinite(plain), jacobian, mask),
        "copy": lambda: jax.block_until_ready(copy(both)),
    }
    if torch is not None:
        aggregator, theirs = torchjd.aggregation.ExcessMTL(), torch.tensor(matrix)
        functions["TorchJD"] = lambda: aggregator(theirs)
    # The first two calls of each: the same work.
    for _ in range(2):
        outputs = {name: np.asarray(functions[name]()) for name in functions if name != "copy"}
        for output in outputs.values():
            expected = outputs[BARE]
            np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    times = interleave(functions, rounds, REST)
    times["floor"] = [2 * seconds for seconds in times["copy"]]
    for name in OURS:
        report(f"({m}, {n})", name, times)
    return times


def report(problem, name, times):
    """The shortest time; by pairs, over the bare one's, TorchJD's over ours, and over the floor."""
    pairs = (name, BARE), ("TorchJD", name), (name, "floor")
    ratios = [
        f"{median_of_ratios(times[x], times[y]):8.2f}x {min(times[x]) / min(times[y]):6.2f}x"
        if x in times and y in times
        else " " * 16
        for x, y in pairs
    ]
    print(f"{problem:20} {name:16} {1e3 * min(times[name]):8.2f}", *ratios, flush=True)


def compare_steps(m, width, batch, rounds):
    keys = jax.random.split(jax.random.key(0), 5)
    sizes = {"in": (64, width), "a": (width, width), "b": (width, width), "out": (width, m)}
    params = {name: jax.random.normal(key, sizes[name]) / 32 for key, name in zip(keys, sizes, strict=False)}
    x = jax.random.normal(keys[-1], (batch, 64))

    def losses_fn(params, x):
        for name in "in", "a", "b":
            x = jnp.tanh(x @ params[name])
        return jnp.mean(jnp.square(x @ params["out"] - 1), axis=0)

    def steps(method):
        grad_fn = mtl.value_and_grad(losses_fn, method, rows="stream")
        state, step = grad_fn.init(params, x), jax.jit(grad_fn, donate_argnums=1)

        def call():
            nonlocal state
            (_, state), gradient = step(params, state, x)
            jax.block_until_ready((gradient, state))

        return call

    plain = aggregation.excess_mtl()
    times = interleave({BARE: steps(plain), "skip_nonfinite": steps(mtl.skip_nonfinite(plain))}, rounds)
    for name in times:
        report(f"step ({m}, {width})", name, times)


def calls(method, jacobian, mask=None):
    """A function that makes the next call of a training, with the state donated."""
    state = method.init(jacobian.shape)
    apply = jax.jit(method.apply, donate_argnums=0)

    def call():
        nonlocal state
        gradient, state = apply(state, jacobian, mask=mask)
        return jax.block_until_ready((gradient, state))[0]

    return call


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2, help="TorchJD's threads")
    arguments = parser.parse_args()
    if torch is not None:
        torch.set_num_threads(arguments.threads)
    print("Required: no slower than TorchJD, and 1.4 times the bare call.")
    print("Shortest times in ms; ratios: the median of the rounds', that of the minima.")
    print(f"{'':37} {'ms':>8} {'ours / bare':>17} {'TorchJD / ours':>16} {'ours / floor':>16}")
    collections.deque(measure(arguments.rounds), maxlen=0)
    for step in STEPS:
        compare_steps(*step, arguments.rounds)
