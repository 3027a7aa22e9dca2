"""The training loop of the examples: every method, interrupted and resumed, and in other frameworks."""

import argparse
import pathlib
import re
import subprocess
import sys

import chex
import equinox as eqx
import equinox_mlp
import flax_nnx
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import train_loop
from flax import nnx
from quickstart import TASKS, init_params, predict

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(train_loop.__file__).parent

NAMES = train_loop.method_names()
WITHOUT_WEIGHTS = {"graddrop", "trimmed_mean", "moco", "m_config"}


def tiny(folder, *arguments, epochs=2):
    return [*arguments, "--epochs", f"{epochs}", "--steps", "2", "--output", f"{folder / 'picture.png'}"]


def test_there_are_all_methods():
    assert len(NAMES) > 50
    assert {"scalarization.mean", "aggregation.mean"} < set(NAMES)


def test_methods_are_built_before_a_device_is_there():
    """As optimizers are, so that a module may hold one and ``jax.distributed.initialize`` come later."""
    script = f"""
import jax, train_loop
for name in {NAMES}:
    train_loop.find_method(name, [])
jax.config.update("jax_num_cpu_devices", 2)  # raises once there is a device
assert len(jax.devices()) == 2
"""
    subprocess.run([sys.executable, "-c", script], cwd=EXAMPLES, check=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_method(name, tmp_path, capsys):
    train_loop.main(tiny(tmp_path, name))
    printed = capsys.readouterr().out
    rows = re.findall(r"^│ (\w+) +│(.*)│$", printed, re.MULTILINE)
    assert [task for task, _ in rows] == list(TASKS)
    has_weights = name.rpartition(".")[-1] not in WITHOUT_WEIGHTS
    for _, row in rows:
        cells = [float(cell.strip().rstrip("%")) for cell in row.split("│")]
        assert len(cells) == (7 if has_weights else 5)
        assert np.all(np.isfinite(cells))
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_table_says_what_changed(tmp_path, capsys):
    train_loop.main(tiny(tmp_path, "famo", "--checkpoints", f"{tmp_path / 'run'}"))
    _, pairs = train_loop.load_data()
    start = init_params(jax.random.key(0))
    (params, _, _), run = saved(tmp_path / "run", 2)
    before, after = (train_loop.evaluate(predict(p, pairs["image"]), pairs) for p in (start, params))
    printed = capsys.readouterr().out
    for task in TASKS:
        found = re.search(rf"^│ {task} +│(.*)│$", printed, re.MULTILINE)[1].split("│")
        expected = [f"{before['loss'][task]:.3g}", f"{after['loss'][task]:.3g}"]
        expected += [f"{before['accuracy'][task]:.1%}", f"{after['accuracy'][task]:.1%}"]
        expected += [f"{means['weight'][task]:.2g}" for means in run["history"]]
        expected += [f"{run['history'][-1]['raised'][task]:.0%}"]
        assert [cell.strip() for cell in found] == expected
    assert after["loss"]["sum"] < before["loss"]["sum"]


def saved(folder, epoch):
    """What a run has saved: parameters, the two states, the history and the settings."""
    with ocp.CheckpointManager(folder) as checkpoints:
        assert checkpoints.latest_step() == epoch
        args = ocp.args.Composite(carry=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
        found = checkpoints.restore(epoch, args=args)
    return found.carry, found.run


class Interrupted(train_loop.tqdm):
    """Somebody presses Ctrl-C after the second epoch."""

    def update(self, *args):
        super().update(*args)
        if self.n == 2:
            raise KeyboardInterrupt


# With a key, learned, with epochs, with a second look, with turns and a state shaped like the Jacobian.
@pytest.mark.parametrize("name", ["pcgrad", "uw", "dwa", "famo", "m_config"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(name, tmp_path, monkeypatch, capsys):
    straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
    train_loop.main(tiny(tmp_path, name, "--checkpoints", f"{straight}", epochs=4))
    expected = capsys.readouterr().out

    command = tiny(tmp_path, name, "--checkpoints", f"{interrupted}", epochs=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_loop, "tqdm", Interrupted)
        train_loop.main(command)
    assert saved(interrupted, 2)
    train_loop.main(command)
    going_on, printed = capsys.readouterr().out.split("\n", 1)
    assert going_on == "going on after epoch 2"
    assert printed == expected
    chex.assert_trees_all_equal(*(saved(folder, 4) for folder in (straight, interrupted)))


def test_checkpoints_of_another_run_are_refused(tmp_path):
    folder = f"{tmp_path / 'run'}"
    train_loop.main(tiny(tmp_path, "mgda", "--checkpoints", folder, epochs=1))
    with pytest.raises(SystemExit, match=r"has a run with .*aggregation.mgda.*, not with .*aggregation.upgrad"):
        train_loop.main(tiny(tmp_path, "upgrad", "--checkpoints", folder))


def test_hyperparameters(tmp_path):
    folder = tmp_path / "run"
    arguments = [
        "aligned_mtl",
        "--set",
        "scale_mode=median",
        "--set",
        "pref_vector=[1,2,3]",
        "--checkpoints",
        f"{folder}",
    ]
    train_loop.main(tiny(tmp_path, *arguments, epochs=1))
    _, run = saved(folder, 1)
    assert run["settings"]["set"] == [["scale_mode", "median"], ["pref_vector", [1, 2, 3]]]


def test_wrong_hyperparameters_are_refused(capsys):
    with pytest.raises(SystemExit, match="cagrad: c: expected a finite number of at least 0, found -1"):
        train_loop.main(["cagrad", "--set", "c=-1"])
    with pytest.raises(SystemExit, match=r"cagrad: .* unexpected keyword argument 'd'"):
        train_loop.main(["cagrad", "--set", "d=1"])
    with pytest.raises(SystemExit):
        train_loop.main(["cagrad", "--set", "c"])
    assert "invalid hyperparameter value: 'c'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_loop.main(["cagrad", "--epochs", "0"])
    assert "invalid at_least_one value: '0'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adam", "aggregation.uw", "UWState", "aggregation.upgrad.", ""])
def test_an_unknown_method_is_refused(name):
    with pytest.raises(SystemExit, match=rf"no method {re.escape(name)}; there are .*aggregation.upgrad.*"):
        train_loop.main([name])


def test_a_name_in_both_families():
    assert train_loop.find_method("mean", [])[0] == "scalarization.mean"
    assert train_loop.find_method("aggregation.mean", [])[0] == "aggregation.mean"


# Other frameworks.


def flax_model(params):
    model = flax_nnx.Reader(rngs=nnx.Rngs(0))
    for name, layer in params.items():
        linear = getattr(model, name)
        linear.kernel[...], linear.bias[...] = layer["w"], layer["b"]
    return model


def equinox_model(params):
    def arrays(model):
        layers = [*model.trunk.layers, *(model.heads[task] for task in TASKS)]
        return [array for layer in layers for array in (layer.weight, layer.bias)]

    ordered = [params[name] for name in ("trunk_1", "trunk_2", *TASKS)]
    values = [array for layer in ordered for array in (layer["w"].T, layer["b"])]
    return eqx.tree_at(arrays, equinox_mlp.Reader(key=jax.random.key(0)), values)


@pytest.mark.parametrize("name", ["upgrad", "famo", "modo"])
def test_another_framework_has_the_same_losses(name):
    """To 1e-5: the same sums, which XLA may order in another way, over ten steps."""
    full_name, method = train_loop.find_method(name, [])
    args = argparse.Namespace(method=full_name, epochs=2, steps=5, learning_rate=1e-3, seed=0, checkpoints=None)
    digits, _ = train_loop.load_data()
    params = init_params(jax.random.key(1))
    models = {
        "plain": (predict, params),
        "flax": flax_nnx.to_function(flax_model(params)),
        "equinox": equinox_mlp.to_function(equinox_model(params)),
    }
    losses = {}
    for framework, (function, start) in models.items():
        _, history = train_loop.train(method, function, start, digits, args)
        losses[framework] = [[means["loss"][task] for task in TASKS] for means in history]
    assert np.shape(losses["plain"]) == (2, 3)
    np.testing.assert_allclose(losses["flax"], losses["plain"], rtol=1e-5)
    np.testing.assert_allclose(losses["equinox"], losses["plain"], rtol=1e-5)
