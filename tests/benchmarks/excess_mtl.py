"""One ExcessMTL call on a large Jacobian, against TorchJD's and against copying.

Run by hand: ``python tests/benchmarks/excess_mtl.py``. The call has to read the Jacobian and the squared gradients, to
write the squared gradients, and to read the Jacobian again once the weights are known. The floor is twice the time of a
jitted copy of both. Needs the ``parity`` extra, and a machine with nothing else to do.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchjd.aggregation
from interleave import interleave, median_of_ratios

import mtlbalance as mtl
from mtlbalance import aggregation

SHAPES = [(3, 10**6), (8, 10**6), (16, 10**5)]
OURS = ["plain", "skip_nonfinite", "all-true mask"]


def compare(m, n, rounds):
    # Small enough that TorchJD's first step, by the raw excess, does not saturate the weights.
    matrix = (1e-6 * np.random.default_rng(0).normal(size=(m, n))).astype(np.float32)
    jacobian, theirs = jnp.array(matrix), torch.tensor(matrix)
    plain = aggregation.excess_mtl(normalize_first_step=False)
    aggregator = torchjd.aggregation.ExcessMTL()
    both = jnp.stack([jacobian, jacobian])
    copy = jax.jit(jnp.copy)

    functions = {
        "plain": calls(plain, jacobian),
        "skip_nonfinite": calls(mtl.skip_nonfinite(plain), jacobian),
        "all-true mask": calls(plain, jacobian, mask=jnp.ones(m, bool)),
        "TorchJD": lambda: aggregator(theirs),
        "copy": lambda: jax.block_until_ready(copy(both)),
    }
    # The first two calls of each: the same work.
    for _ in range(2):
        expected = functions["TorchJD"]().numpy()
        for name in OURS:
            np.testing.assert_allclose(functions[name](), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    times = interleave(functions, rounds)
    floor = [2 * seconds for seconds in times["copy"]]
    for name in OURS:
        ours, theirs = times[name], times["TorchJD"]
        print(
            f"({m}, {n})".ljust(14) + name.ljust(16),
            f"{1e3 * min(ours):8.3f} {1e3 * min(theirs):9.3f}",
            f"{median_of_ratios(theirs, ours):13.2f}x {min(theirs) / min(ours):9.2f}x",
            f"{median_of_ratios(ours, floor):15.2f}x {min(ours) / min(floor):9.2f}x",
            flush=True,
        )


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
    torch.set_num_threads(arguments.threads)
    print(
        "Required: no slower than TorchJD. Shortest times in ms; ratios: the median of the rounds', that of the minima."
    )
    print(
        f"{'':30} {'ours':>8} {'TorchJD':>9} {'TorchJD / ours':>14} {'minima':>10} {'ours / floor':>16} {'minima':>10}"
    )
    for shape in SHAPES:
        compare(*shape, arguments.rounds)
