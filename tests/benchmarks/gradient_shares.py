"""A generator's gradient with EnCodec's balancer in PyTorch, and with gradient shares here.

Run by hand: ``python tests/benchmarks/gradient_shares.py FOLDER``, where FOLDER is a clone of
github.com/facebookresearch/encodec. Needs the ``parity`` extra, and a machine with nothing else to do. A decoder from
128 numbers over 512 to ``--samples`` ones, and four losses of what it makes: two distances, one of spectra, and a
critic's verdict. Beside it the plain sum of the losses in either library: what balancing costs.
"""

import argparse
import collections
import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import torch
from interleave import compared, interleave, median_of_ratios

import mtlbalance as mtl
from mtlbalance import aggregation

SHARES = {"l1": 0.1, "l2": 1.0, "spectrum": 2.0, "critic": 3.0}


def balancer_of(folder):
    package = types.ModuleType("encodec")
    package.__path__ = [f"{folder}/encodec"]
    sys.modules["encodec"] = package
    return importlib.import_module("encodec.balancer").Balancer


def numbers(batch, samples):
    rng = np.random.default_rng(0)
    shapes = {"latent": (batch, 128), "target": (batch, samples), "hidden": (128, 512), "out": (512, samples)}
    shapes |= {"critic": (samples, 64), "verdict": (64,)}
    return {name: rng.normal(size=shape).astype(np.float32) / shape[0] ** 0.5 for name, shape in shapes.items()}


def ours(given):
    x = {name: jnp.array(given[name]) for name in ("latent", "target", "critic", "verdict")}
    decode = lambda params, x: jnp.tanh(x["latent"] @ params["hidden"]) @ params["out"]
    spectrum = lambda signal: jnp.abs(jnp.fft.rfft(signal, norm="ortho"))
    heads = {
        "l1": lambda _, output, x: jnp.mean(jnp.abs(output - x["target"])),
        "l2": lambda _, output, x: jnp.mean((output - x["target"]) ** 2),
        "spectrum": lambda _, output, x: jnp.mean(jnp.abs(spectrum(output) - spectrum(x["target"]))),
        "critic": lambda _, output, x: -jnp.mean(jnp.tanh(output @ x["critic"]) @ x["verdict"]),
    }
    params = {name: jnp.array(given[name]) for name in ("hidden", "out")}, dict.fromkeys(heads, ())
    method = aggregation.gradient_shares(SHARES, per_example=True)
    balanced = jax.jit(mtl.value_and_grad((decode, heads), method, at="features"), donate_argnums=1)
    states = [balanced.init(params, x)]
    of_output = lambda output, x: sum(head((), output, x) for head in heads.values())
    plain = jax.jit(jax.value_and_grad(lambda decoder, x: of_output(decode(decoder, x), x)))

    def step():
        (_, state), grads = balanced(params, states.pop(), x)
        states.append(state)
        jax.block_until_ready(grads)

    return step, lambda: jax.block_until_ready(plain(params[0], x))


def theirs(given, cls):
    x = {name: torch.tensor(array) for name, array in given.items()}
    params = [x["hidden"].requires_grad_(), x["out"].requires_grad_()]
    spectrum = lambda signal: torch.fft.rfft(signal, norm="ortho").abs()
    balancer = cls(SHARES)

    def losses():
        output = torch.tanh(x["latent"] @ params[0]) @ params[1]
        return output, {
            "l1": torch.mean(torch.abs(output - x["target"])),
            "l2": torch.mean((output - x["target"]) ** 2),
            "spectrum": torch.mean(torch.abs(spectrum(output) - spectrum(x["target"]))),
            "critic": -torch.mean(torch.tanh(output @ x["critic"]) @ x["verdict"]),
        }

    def clear():
        for param in params:
            param.grad = None

    def step():
        clear()
        output, found = losses()
        balancer.backward(found, output)

    def plain():
        clear()
        sum(losses()[1].values()).backward()

    return step, plain


def measure(rounds, quick=False, *, folder, all_samples=(1024, 8192), batch=16):
    cls = balancer_of(folder)
    for samples in all_samples[:1] if quick else all_samples:
        given = numbers(batch, samples)
        names = "ours", "our sum", "EnCodec", "its sum"
        times = interleave(dict(zip(names, (*ours(given), *theirs(given, cls)), strict=True)), rounds)
        print(f"{samples} samples:", *(f"{name} {1e3 * min(times[name]):.2f} ms" for name in names), sep="  ")
        ratios = ("EnCodec", "ours"), ("ours", "our sum"), ("EnCodec", "its sum")
        for one, other in ratios:
            ratio, minima = median_of_ratios(times[one], times[other]), min(times[one]) / min(times[other])
            print(f"  {one} / {other}: median of ratios {ratio:.2f}, of minima {minima:.2f}", flush=True)
        group = "a generator's gradient, four shares"
        yield compared(group, f"{samples} samples", "EnCodec", times["ours"], times["EnCodec"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--samples", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {"folder": arguments.folder, "all_samples": arguments.samples, "batch": arguments.batch}
    collections.deque(measure(arguments.rounds, **given), maxlen=0)
