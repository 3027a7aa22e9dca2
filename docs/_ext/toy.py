"""Each method's paths on the toy problem of ``examples/toy_pareto.py``: recorded once, drawn when the site is built.

``python docs/_ext/toy.py`` records them again, some four minutes of one core, a sixth of that for CAGrad; names of
methods after it record these alone.
"""

import argparse
import ast
import hashlib
import importlib
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE, RECORDED = ROOT / "examples" / "toy_pareto.py", ROOT / "docs" / "methods" / "toy_paths.npz"
PICTURES = ROOT / "docs" / "methods" / "toy"
N_STEPS, EVERY = 50_000, 4  # of the example's points, one in four is kept
ARRIVED = ", arrived"  # after a run's name: which of its paths ended on the front
FAMILIES = ("scalarization", "aggregation", "mtl")


def example():
    """The example as a module; it imports what stands beside it."""
    if str(EXAMPLE.parent) not in sys.path:
        sys.path.insert(0, str(EXAMPLE.parent))
    import toy_pareto

    return toy_pareto


def runs():
    """The example's names of the runs of each method, read from its table: ``{"scalarization.sum": ["sum"], ...}``."""
    tree = ast.parse(EXAMPLE.read_text())
    (table,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "METHODS")
    found = {}
    for key, run in zip(table.keys, table.values, strict=True):
        found.setdefault(_outermost(run), []).append(key.value)
    return found


def _outermost(run):
    """The method of a table's entry: what is named first, but for ``learned``."""
    attributes = (
        node for node in ast.walk(run) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    )
    return next(f"{node.value.id}.{node.attr}" for node in attributes if node.value.id in FAMILIES)


def record(names):
    """Traces the paths and keeps them beside the pages: half precision, as a picture needs."""
    toy = example()
    recorded = dict(np.load(RECORDED)) if RECORDED.exists() else {}
    for name in names or toy.METHODS:
        paths = toy.trace_paths(toy.METHODS[name], N_STEPS)
        recorded[name] = paths[:, ::EVERY].clip(-50, 50).astype(np.float16)
        recorded[name + ARRIVED] = toy.on_front(paths[:, -1])
        print(f"{name}: {recorded[name + ARRIVED].sum()} of {len(paths)}", flush=True)
        np.savez_compressed(RECORDED, **recorded)


def picture(name):
    """The picture of a method's paths, drawn unless it is there; ``None`` if the example does not run the method."""
    found = runs()
    names = found.get(name) or found.get(name.replace("aggregation.", "scalarization."), [])
    recorded = dict(np.load(RECORDED))
    if not names:
        return None
    parts = [EXAMPLE.read_bytes(), *(recorded[key].tobytes() for key in names), pathlib.Path(__file__).read_bytes()]
    path = PICTURES / f"{name}-{hashlib.sha256(b''.join(parts)).hexdigest()[:8]}.png"
    if not path.exists():
        for old in PICTURES.glob(f"{name}-*.png"):
            old.unlink()
        draw({key: (recorded[key], recorded[key + ARRIVED]) for key in names}, path)
    return path


def draw(paths, output):
    """A panel for each run."""
    toy, plt = example(), importlib.import_module("matplotlib.pyplot")
    fig, axes = plt.subplots(1, len(paths), figsize=(3.4 * len(paths), 3.5), squeeze=False, layout="constrained")
    for ax, (name, (of_starts, arrived)) in zip(axes.flat, paths.items(), strict=True):
        toy.draw_ground(ax)
        for path, there, start in zip(of_starts.astype(float), arrived, toy.STARTS, strict=True):
            toy.draw_path(ax, path, there, start)
        ax.set_title(f"{name}: {arrived.sum()} of {len(arrived)}", fontsize="medium")
        ax.set(xlabel="x1", ylabel="x2")
    output.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(output, dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*")
    record(parser.parse_args().methods)
