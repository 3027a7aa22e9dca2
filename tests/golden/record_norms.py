"""Records the official codes of methods by gradients' lengths and main tasks, in float64, into ``official_norms.json``.

``test_norms.py`` compares. Run by hand, with the ``parity`` extra: ``python -m tests.golden.record_norms FOLDER``,
where FOLDER contains clones of these GitHub repositories, each in a folder of its name:

* facebookresearch/encodec at 0e2d0aed2936: the balancer;
* facebookresearch/MetaBalance at 1c342a99e09e;
* CompVis/taming-transformers at 3ba01b241669: VQGAN's adaptive weight;
* apple/ml-bloop at c4626c6af489;
* AvivNavon/AuxiLearn at 17495d6c0647: the cosine gate, not by its authors.

The classes and functions themselves are run. They are given losses that are linear in a parameter that stays at zero,
so that the gradients are exactly those of a sequence.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import torch

from tests.golden.record import double, positive, short, to_lists
from tests.golden.record_official import load

FILE = Path(__file__).with_name("official_norms.json")
N_CALLS, N_EXAMPLES, N_FEATURES = 25, 4, 3
TASKS = ["main", "near", "far"]


def record(folder, seed=0):
    rng = np.random.default_rng(seed)
    torch.set_default_dtype(torch.float64)
    rows = sequence(rng)
    balancer = load(folder / "encodec", "encodec.balancer").Balancer
    bloop = load(folder / "ml-bloop" / "src", "bloop.optim")
    with jax.enable_x64(True):
        blooped = [bloop_calls(bloop, rows, ema, lbda, init) for ema, lbda, init in BLOOP]
    data = {
        "rows": rows,
        "encodec": [encodec(balancer, rows, **settings) for settings in ENCODEC],
        "metabalance": [metabalance(folder / "MetaBalance", rows, *settings) for settings in ((0.7, 0.9), (0.3, 0.5))],
        "vqgan": [vqgan(folder / "taming-transformers", rows, *settings) for settings in ((10, 0.8), (0, 1.0))],
        "bloop": blooped,
        "cosine_gate": cosine_gate(folder / "AuxiLearn", rows),
    }
    return to_lists(data)


ENCODEC = [
    {"shares": [1.0, 1.0, 1.0], "total": 1.0, "decay": 0.999, "per_example": True},
    {"shares": [1.0, 3.0, 0.5], "total": 2.0, "decay": 0.9, "per_example": True},
    {"shares": [1.0, 3.0, 0.5], "total": 2.0, "decay": 0.9, "per_example": False},
    {"shares": [1.0, 3.0, 0.5], "total": 0.1, "decay": 1.0, "per_example": False},  # the plain mean
]
BLOOP = [(0.1, 0.1, "zeros"), (0.01, 1.0, "zeros"), (0.5, 0.3, "grad")]


def sequence(rng):
    """Gradients at features, examples first: of lengths up to 100 times each other, and on both sides of each other."""
    rows = rng.normal(size=(N_CALLS, len(TASKS), N_EXAMPLES, N_FEATURES)) + rng.normal(size=(N_EXAMPLES, N_FEATURES))
    rows[:, 2] -= 1.5 * rows[:, 0]
    lengths = positive(rng, (len(TASKS), 1, 1), decades=2) * positive(rng, (N_CALLS, len(TASKS), 1, 1), decades=0.5)
    return short(lengths * rows)


def zero_features():
    return torch.zeros(N_EXAMPLES, N_FEATURES, requires_grad=True)


def linear(rows, features):
    return [torch.sum(double(row) * features) for row in rows]


def encodec(cls, rows, shares, total, decay, per_example):
    weights = dict(zip(TASKS, shares, strict=True))
    balancer = cls(weights, total_norm=total, ema_decay=decay, per_batch_item=per_example)
    gradients = []
    for call in rows:
        features = zero_features()
        balancer.backward(dict(zip(TASKS, linear(call, features), strict=True)), features)
        gradients.append(features.grad)
    settings = {"shares": shares, "total": total, "decay": decay, "per_example": per_example}
    return settings | {"gradients": gradients}


def metabalance(root, rows, relax, decay):
    """Of two tensors: the first example's part, and the others'."""
    cls, gradients = load(root, "metabalance").MetaBalance, []
    params = [torch.zeros(N_FEATURES, requires_grad=True), torch.zeros(N_EXAMPLES - 1, N_FEATURES, requires_grad=True)]
    with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        optimizer = cls(params, relax_factor=relax, beta=decay)
        for call in rows:
            optimizer.zero_grad()
            with torch.enable_grad():
                losses = linear(call, torch.cat([params[0][None], params[1]]))
            optimizer.step(losses)
            gradients.append(torch.cat([params[0].grad[None], params[1].grad]).clone())
    return {"relax": relax, "decay": decay, "gradients": gradients}


def vqgan(root, rows, start, weight):
    """Its loss's gradient: reconstruction, adversarial, codebook. What its file imports is not called here."""
    fakes = {"lpips": ["LPIPS"], "model": ["NLayerDiscriminator", "weights_init"]}
    parents = {"lpips": "taming.modules.losses.lpips", "model": "taming.modules.discriminator.model"}
    modules = {parents[name]: types.ModuleType(parents[name]) for name in fakes}
    for name, attributes in fakes.items():
        for attribute in attributes:
            setattr(modules[parents[name]], attribute, None)
    with mock.patch.dict(sys.modules, modules):
        spec = importlib.util.spec_from_file_location(
            "vqperceptual", root / "taming" / "modules" / "losses" / "vqperceptual.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    settings, gradients = types.SimpleNamespace(discriminator_weight=weight), []
    for step, call in enumerate(rows):
        features = zero_features()
        nll, generator, codebook = linear(call, features)
        adaptive = module.VQLPIPSWithDiscriminator.calculate_adaptive_weight(settings, nll, generator, features)
        factor = module.adopt_weight(1.0, step, threshold=start)
        (nll + adaptive * factor * generator + 0.5 * codebook).backward()
        gradients.append(features.grad)
    return {"start": start, "weight": weight, "codebook": 0.5, "gradients": gradients}


def bloop_calls(module, rows, ema, lbda, init):
    """The auxiliary gradients are added up. Given a first average, it is the first main gradient."""
    given = [tuple(np.asarray(x, float) for x in (call[0], call[1] + call[2].astype(float))) for call in rows]
    state = module.init_bloop(jax.random.key(0), jax.numpy.asarray(given[0][0]), ema=ema, lbda=lbda, init=init)
    gradients = []
    for main, auxiliary in given:
        gradient, state = module.bloop_direction(main, auxiliary, state)
        gradients.append(np.asarray(gradient))
    return {"ema": ema, "lambda": lbda, "init": init, "gradients": gradients}


def cosine_gate(root, rows):
    method, gradients = load(root, "experiments.weight_methods").GradCosine(main_task=0), []
    for call in rows:
        features = zero_features()
        (gradient,) = method.get_grad(linear(call, features), [features])
        gradients.append(gradient)
    return {"gradients": gradients}


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(record(Path(sys.argv[1])), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
