"""Records what the official codes of pointwise weights make of residuals, in float64, into ``official_pointwise.json``.

``test_pointwise.py`` compares. Run by hand, with the ``parity`` extra: ``python -m tests.golden.record_pointwise
FOLDER``, where FOLDER contains clones of these GitHub repositories, each in a folder of its name:

* PredictiveIntelligenceLab/jaxpi at e85b694: causal weights of one equation and of four;
* soanagno/rba-pinns at fb86f2d: residual-based attention, and self-adaptive weights of points;
* jdtoscano94/vRBA_variational_residual_based_attention_PINNs_Operator_learning at 7f07a7f: vRBA.

Their functions themselves are run, taken out of training scripts and notebooks. Two things are stated here anew: when
the causality parameter rises, after the algorithm of arXiv 2203.07404, and BRDR, after arXiv 2407.01613, whose official
code is a part of a training framework.
"""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.golden.record import double, short, to_lists

FILE = Path(__file__).with_name("official_pointwise.json")
VRBA = "vRBA_variational_residual_based_attention_PINNs_Operator_learning"
N_CALLS, N_POINTS = 20, 12


def record(folder, seed=0):
    rng = np.random.default_rng(seed)
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True):
        data = {
            "causal": [
                causal(rng, folder / "jaxpi", *setting) for setting in [((1.0,), 4), ((0.01, 0.1, 1.0, 10.0), 3)]
            ],
            "causal_components": [causal_components(rng, folder / "jaxpi", 2.0, 3)],
            "residual_attention": [
                residual_attention(rng, folder / "rba-pinns", *setting) for setting in [(0.999, 0.001), (0.9, 0.1)]
            ],
            "self_adaptive": [self_adaptive(rng, folder / "rba-pinns")],
            "vrba": [
                vrba(rng, folder / VRBA, *setting)
                for setting in [
                    ("exponential", 0.999, 0.01, 1.0, 1.0),
                    ("exponential", 0.9, 0.1, 0.3, 0.7),
                    ("quadratic", 0.9, 0.1, 1.0, 1.0),
                ]
            ],
            "brdr": [brdr(rng, *setting) for setting in [(0.999, 0.999), (0.9, 0.5)]],
        }
    return to_lists(data)


def residuals(rng, *shape, fall=0.1):
    """Of both signs, falling from call to call, by other rates at other points."""
    calls = np.arange(N_CALLS).reshape(-1, *[1] * len(shape))
    return short(rng.normal(size=(N_CALLS, *shape)) * np.exp(-calls * fall * rng.uniform(size=shape)))


def function_of(source, name, **namespace):
    """A function of some code, without its decorators and without what stands around it."""
    found = [node for node in ast.walk(ast.parse(source)) if getattr(node, "name", None) == name]
    found[0].decorator_list = []
    exec(compile(ast.Module(found[:1], []), name, "exec"), namespace)
    return namespace[name]


def code_of_notebook(path):
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return "\n".join(
        "".join(cell["source"]) for cell in cells if not cell["source"][:1] or "%%" not in cell["source"][0]
    )


def jaxpi_weights(folder, example):
    source = (folder / "examples" / example / "models.py").read_text()
    return function_of(source, "res_and_w", jnp=jnp, lax=jax.lax, vmap=jax.vmap)


def causal(rng, folder, tols, n_chunks):
    """Points in the order of their times; the next ``tol`` once all weights are above 0.99."""
    res_and_w = jaxpi_weights(folder, "allen_cahn")
    below = jnp.triu(jnp.ones((n_chunks, n_chunks)), k=1).T  # as jaxpi.models.ForwardIVP sets it
    calls, stage, weights, stages = residuals(rng, N_POINTS, fall=2.0), 0, [], []
    for r in calls:
        model = SimpleNamespace(num_chunks=n_chunks, tol=tols[stage], M=below, r_net=lambda params, t, x: x)
        times = jnp.arange(N_POINTS, dtype=float)
        _, w = res_and_w(model, None, jnp.stack([times, jnp.asarray(r, float)], axis=1))
        weights.append(np.asarray(w))
        stages.append(stage)
        stage += bool(w.min() > 0.99 and stage < len(tols) - 1)
    return {"tol": list(tols), "n_chunks": n_chunks, "residuals": calls, "weights": weights, "stages": stages}


def causal_components(rng, folder, tol, n_chunks):
    """The chunks' losses of four equations, and the weights that all have."""
    res_and_w = jaxpi_weights(folder, "euler_tori")
    below = jnp.triu(jnp.ones((n_chunks, n_chunks)), k=1).T
    calls, losses, weights = residuals(rng, 4, N_POINTS), [], []
    for r in calls:
        model = SimpleNamespace(num_chunks=n_chunks, tol=tol, M=below, r_pred_fn=lambda params, t, x, y: params)
        *of_chunks, w = res_and_w(model, tuple(jnp.asarray(r, float)), jnp.zeros((N_POINTS, 3)))
        losses.append(np.stack(of_chunks))
        weights.append(np.asarray(w))
    return {"tol": tol, "n_chunks": n_chunks, "residuals": calls, "losses": losses, "weights": weights}


def notebook_step(folder, r, **fields):
    """One call of the loss of its class, of nothing but these residuals."""
    source = code_of_notebook(folder / "Code" / "Pytorch" / "allen-cahn_rba-sa.ipynb")
    loss_func = function_of(source, "loss_func", torch=torch)
    zero = double(np.zeros((1, 1)))
    nothing = dict.fromkeys(["x_u", "t_u", "x_r", "t_r", "it", "l2", "linf"])
    model = SimpleNamespace(
        **nothing, u=zero, dimx=1, neum=0, iter=0, init=1, print_step=10**9, losses=[], optimizer=mock.MagicMock()
    )
    model.net_u = lambda x, t: zero.clone().requires_grad_()
    model.net_r = lambda x, t: (double(r)[:, None].requires_grad_(), None)
    model.__dict__.update(fields)
    loss_func(model)
    return model


def residual_attention(rng, folder, decay, lr):
    calls, sums, losses, multipliers = residuals(rng, N_POINTS), 0, [], []
    for r in calls:
        model = notebook_step(folder, r, rba=1, sa=0, eta=lr, gamma=decay, rsum=sums)
        sums = model.rsum
        losses.append(model.loss)
        multipliers.append(sums[:, 0])
    return {"decay": decay, "lr": lr, "residuals": calls, "losses": losses, "multipliers": multipliers}


def self_adaptive(rng, folder):
    """Random multipliers, whose Adam climbs the mean over the points."""
    calls, start, losses, multipliers = residuals(rng, N_POINTS), short(rng.uniform(size=N_POINTS)), [], []
    climbing = torch.nn.Parameter(double(start)[:, None])
    others = torch.nn.Parameter(double(np.ones((1, 1))))
    optimizer = torch.optim.Adam([climbing, others], lr=0.005, maximize=True)
    for r in calls:
        model = notebook_step(folder, r, rba=0, sa=1, lamr=climbing, lamu=others, optimizer2=optimizer)
        losses.append(model.loss)
        multipliers.append(climbing.detach()[:, 0].clone())
    return {"start": start, "residuals": calls, "losses": losses, "multipliers": multipliers}


def vrba(rng, folder, potential, decay, lr, c_log, phi):
    """Its steps count from 1, and its multipliers start at 0.1."""
    source = (folder / "PINN" / "Potential_analysis" / "AC" / "AC_SNR.py").read_text()
    update = function_of(source, "update_vRBA", jnp=jnp)
    calls, current, losses, multipliers = residuals(rng, N_POINTS), jnp.full(N_POINTS, 0.1), [], []
    for it, r in enumerate(calls, start=1):
        options = {"c_log": c_log, "gamma": decay, "eta": lr, "phi": phi, "potential_type": potential}
        current = update(jnp.abs(jnp.asarray(r, float)), current, it, **options)
        losses.append(np.asarray(jnp.mean((current * r.astype(float)) ** 2)))
        multipliers.append(np.asarray(current))
    settings = {"potential": potential, "decay": decay, "lr": lr, "c_log": c_log, "phi": phi}
    return settings | {"residuals": calls, "losses": losses, "multipliers": multipliers}


def brdr(rng, beta_c, beta_w):
    """Stated anew: all points in every call, and no factor of the whole loss."""
    calls = residuals(rng, N_POINTS)
    average, current, weights = np.zeros(N_POINTS), np.ones(N_POINTS), []
    for t, r in enumerate(calls.astype(float), start=1):
        average = beta_c * average + (1 - beta_c) * r**4
        rates = r**2 / np.sqrt(average / (1 - beta_c**t))
        current = beta_w * current + (1 - beta_w) * rates / np.mean(rates)
        weights.append(current)
    return {"beta_c": beta_c, "beta_w": beta_w, "residuals": calls, "weights": weights}


if __name__ == "__main__":
    with FILE.open("w") as file:
        json.dump(record(Path(sys.argv[1])), file, separators=(",", ":"))
        file.write("\n")
    print(f"{FILE}: {FILE.stat().st_size / 1e3:.0f} kB")
