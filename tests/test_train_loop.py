"""The training loop of the examples: every method, interrupted and resumed, and in other frameworks."""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
from functools import partial

import chex
import equinox as eqx
import equinox_mlp
import flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import train_loop
from digits import TASKS, draw_pairs, init_params, load_data, load_images, predict, task_losses
from flax import nnx

import mtlbalance as mtl
from tests.catalogue import AGGREGATORS, PREFERENCE, SCALARIZERS

pytestmark = [pytest.mark.slow, pytest.mark.unoptimized, pytest.mark.usefixtures("users_broadcast")]

EXAMPLES = pathlib.Path(train_loop.__file__).parent

NAMES = train_loop.method_names()
CASES = {"scalarization": SCALARIZERS, "aggregation": AGGREGATORS}
ROWS = {f"{family}.{case.name}": case for family, cases in CASES.items() for case in cases}
REQUIRED = {name: row.required for name, row in ROWS.items()}
NAMES_TASK = {name: row.names_task for name, row in ROWS.items() if row.names_task}


def given(name):
    """``--set`` for each argument without a default, and for one that goes by a task's name."""
    texts = {argument: json.dumps(value) for argument, value in REQUIRED[name].items()}
    texts |= {NAMES_TASK[name]: "left"} if name in NAMES_TASK else {}
    return [word for item in texts.items() for word in ("--set", "=".join(item))]


draw_history = train_loop.draw_history


@pytest.fixture(autouse=True)
def given_to_draw(monkeypatch):
    """What the loop draws: a picture takes as long as all the rest of a run, and sees of the method its history."""
    given = []
    monkeypatch.setattr(train_loop, "draw_history", lambda *arguments: given.append(arguments))
    return given


def tiny(folder, *arguments, epochs=2):
    return [*arguments, "--epochs", f"{epochs}", "--steps", "2", "--output", f"{folder / 'picture.png'}"]


def test_there_are_all_methods():
    assert len(NAMES) > 50
    assert {"scalarization.mean", "aggregation.mean"} < set(NAMES)


def test_methods_are_built_before_a_device_is_there():
    """As optimizers are, so that a module may hold one and ``jax.distributed.initialize`` come later."""
    script = f"""
import jax, train_loop
for name, required in { ({name: REQUIRED[name] for name in NAMES}) }.items():
    train_loop.find_method(name, required)
jax.config.update("jax_num_cpu_devices", 2)  # raises once there is a device
assert len(jax.devices()) == 2
"""
    subprocess.run([sys.executable, "-c", script], cwd=EXAMPLES, check=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_method(name, tmp_path, capsys, given_to_draw):
    train_loop.main(tiny(tmp_path, name, *given(name)))
    printed = capsys.readouterr().out
    rows = re.findall(r"^│ (\w+) +│(.*)│$", printed, re.MULTILINE)
    assert [task for task, _ in rows] == list(TASKS)
    _, method = train_loop.find_method(name, REQUIRED[name])
    for _, row in rows:
        cells = [float(cell.strip().rstrip("%")) for cell in row.split("│")]
        assert len(cells) == (7 if mtl.has_weights(method) else 5)
        assert np.all(np.isfinite(cells))
    ((title, history, output),) = given_to_draw
    assert (title, len(history), output) == (name, 2, tmp_path / "picture.png")
    keys = {"loss", "raised", "weight"} if mtl.has_weights(method) else {"loss", "raised"}
    for means in history:
        assert means.keys() == keys and all(means[key].keys() == {*TASKS} for key in keys)
        assert np.all(np.isfinite(jax.tree.leaves(means)))


@pytest.mark.parametrize(("name", "n_panels"), [("upgrad", 3), ("graddrop", 2)])
def test_the_picture(name, n_panels, tmp_path, given_to_draw, monkeypatch):
    """Of a method with weights, and of one without."""
    train_loop.main(tiny(tmp_path, name))
    panels, draw_curves = [], train_loop.show.draw_curves
    record = lambda ax, *given, **labels: (panels.append(labels["title"]), draw_curves(ax, *given, **labels))
    monkeypatch.setattr(train_loop.show, "draw_curves", record)
    draw_history(*given_to_draw[0])
    assert len(panels) == n_panels
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_table_says_what_changed(tmp_path, capsys):
    train_loop.main(tiny(tmp_path, "famo", "--checkpoints", f"{tmp_path / 'run'}"))
    _, pairs = load_data()
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


def test_what_is_saved_is_of_one_epoch():
    """Orbax writes while training goes on: of a history that grows meanwhile a run would skip an epoch."""

    class Checkpoints:
        def save(self, step, args):
            self.to_be_written = args

    checkpoints, history = Checkpoints(), [{"loss": 1.0}]
    train_loop.save(checkpoints, {"x": np.ones(3)}, history, {})
    history.append({"loss": 2.0})
    assert checkpoints.to_be_written["run"].item["history"] == history[:1]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_numbers():
    """At random times; by default the script kills fifty times."""
    script = EXAMPLES.parent / "tests" / "benchmarks" / "kill_and_resume.py"
    command = [sys.executable, script, "--kills", "3", "--epochs", "12"]
    quickly = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=quickly)
    assert done.returncode == 0, done.stderr
    assert re.match(r"3 kills; [1-9]\d* runs came to their end, to the same table and numbers\n", done.stdout)


@pytest.fixture(scope="module")
def run_of_dual_proj(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_loop.main(tiny(folder, "dual_proj", "--checkpoints", f"{folder}", epochs=1))
    return folder


@pytest.mark.parametrize("other", ["--seed=1", "--steps=3", "--learning-rate=0.1", "--set=norm_eps=1", "--method"])
def test_checkpoints_of_another_run_are_refused(other, run_of_dual_proj):
    changed = ["upgrad"] if other == "--method" else ["dual_proj", other]
    command = tiny(run_of_dual_proj, "--checkpoints", f"{run_of_dual_proj}", epochs=1)
    with pytest.raises(SystemExit, match=r"has a run with .*aggregation.dual_proj.*, not with "):
        train_loop.main([*command, *changed])


def test_hyperparameters(tmp_path):
    folder = tmp_path / "run"
    given = ["aligned_mtl", "--set", "scale_mode=median", "--set", f"pref_vector={json.dumps(PREFERENCE)}"]
    train_loop.main(tiny(tmp_path, *given, "--checkpoints", f"{folder}", epochs=1))
    _, run = saved(folder, 1)
    assert run["settings"]["set"] == [["scale_mode", "median"], ["pref_vector", PREFERENCE]]


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


@pytest.mark.parametrize("name", [name for name in NAMES if REQUIRED[name]])
def test_a_missing_argument_is_named(name):
    with pytest.raises(SystemExit) as raised:
        train_loop.main([name])
    needed = " and ".join(f"--set {argument}=VALUE" for argument in sorted(REQUIRED[name]))
    assert str(raised.value) == f"{name.partition('.')[-1]} needs {needed}"


def refused(name, *given):
    with pytest.raises(SystemExit) as raised:
        train_loop.main([name, *given])
    message, found, how = str(raised.value).partition(f". {train_loop.BY_NAME}")
    assert found and not how
    return message


@pytest.mark.parametrize("name", NAMES_TASK)
def test_a_task_goes_by_its_name(name):
    argument, short = NAMES_TASK[name], name.partition(".")[-1]
    names = "one of the losses' names ['left', 'right', 'sum']"
    index = f"{short}: {argument}: expected {names}, found the index {{}}, which is a sorted position"
    assert refused(name) == index.format(0)
    assert refused(name, "--set", f"{argument}=1") == index.format(1)
    assert refused(name, "--set", f"{argument}=middle") == f"{short}: {argument}: expected {names}, found 'middle'"


def test_numbers_for_each_task_go_by_its_name():
    due = "a number for each of the losses' names, {'left': ..., 'right': ..., 'sum': ...}"
    for name, argument in {"aggregation.constant": "weights", "constant": "weights", "config": "pref_vector"}.items():
        message = refused(name, "--set", f"{argument}=[1, 2, 3]")
        found = "numbers without names, whose order would be the sorted one"
        assert message == f"{name.partition('.')[-1] or name}: {argument}: expected {due}, found {found}"
    message = refused("stch", "--set", "mu=0.1", "--set", 'weights={"left": 1, "middle": 1, "sum": 1}')
    assert "expected the losses' names ['left', 'right', 'sum'], found ['left', 'middle', 'sum']" in message
    with pytest.raises(SystemExit, match=r"cr_mogm: reference: expected one of the losses' names"):
        train_loop.main(["cr_mogm", "--set", "method=lr_annealing"])


def test_a_method_may_be_an_argument():
    with pytest.raises(SystemExit, match="no method adam; there are"):
        train_loop.main(["cr_mogm", "--set", "method=adam"])
    with pytest.raises(SystemExit, match="cr_mogm: method: expected an Aggregator"):
        train_loop.main(["cr_mogm", "--set", "method=dwa"])
    with pytest.raises(SystemExit, match="cr_mogm: method: expected an aggregator that makes weights"):
        train_loop.main(["cr_mogm", "--set", "method=graddrop"])  # which has no weights


@pytest.mark.parametrize("name", ["adam", "aggregation.uw", "UWState", "aggregation.upgrad.", ""])
def test_an_unknown_method_is_refused(name):
    with pytest.raises(SystemExit, match=rf"no method {re.escape(name)}; there are .*aggregation.upgrad.*"):
        train_loop.main([name])


def test_a_name_in_both_families():
    assert train_loop.find_method("mean", [])[0] == "scalarization.mean"
    assert train_loop.find_method("aggregation.mean", [])[0] == "aggregation.mean"


# The loop by hand, with the rules of four papers in NumPy.


class MoDo:
    n_batches = 3

    def __init__(self):
        self.weights = np.full(3, 1 / 3)

    def weigh(self, losses, jacobian, batches):
        products = jacobian(batches[0]) @ jacobian(batches[1]).T
        v = self.weights - 0.1 * (products @ self.weights + 0.1 * self.weights)
        thresholds = (np.cumsum(np.sort(v)[::-1]) - 1) / [1, 2, 3]
        self.weights = np.maximum(v - thresholds[np.sum(np.sort(v)[::-1] > thresholds) - 1], 0)
        return self.weights


class FAMO:
    n_batches = 1

    def __init__(self):
        self.logits, self.mu, self.nu, self.count = np.zeros(3), np.zeros(3), np.zeros(3), 0

    def weigh(self, losses, jacobian, batches):
        self.shares = np.exp(self.logits) / np.sum(np.exp(self.logits))
        return self.shares / losses / np.sum(self.shares / losses)

    def observe(self, before, after, accuracies):
        decrease = np.log(before + 1e-8) - np.log(after + 1e-8)
        gradient = self.shares * (decrease - self.shares @ decrease) + 1e-3 * self.logits
        self.count += 1
        self.mu, self.nu = 0.9 * self.mu + 0.1 * gradient, 0.999 * self.nu + 0.001 * gradient**2
        step = self.mu / (1 - 0.9**self.count) / (np.sqrt(self.nu / (1 - 0.999**self.count)) + 1e-8)
        self.logits = self.logits - 0.025 * step


class DTP:
    n_batches = 1
    indicators = None

    def weigh(self, losses, jacobian, batches):
        if self.indicators is None:
            return np.ones(3)
        return -((1 - self.indicators) ** 2) * np.log(np.maximum(self.indicators, np.finfo(np.float32).tiny))

    def observe(self, before, after, accuracies):
        new = self.indicators is None
        self.indicators = accuracies if new else 0.1 * accuracies + 0.9 * self.indicators


class DWA:
    n_batches = 1

    def __init__(self):
        self.epochs, self.losses = [], []

    def weigh(self, losses, jacobian, batches):
        self.losses.append(losses)
        if len(self.epochs) < 2:
            return np.ones(3)
        rates = np.exp(self.epochs[-1] / self.epochs[-2] / 2.0)
        return 3 * rates / rates.sum()

    def end_epoch(self):
        self.epochs.append(np.mean(self.losses, axis=0))
        self.losses = []


RULES = {"aggregation.modo": MoDo, "scalarization.famo": FAMO, "scalarization.dtp": DTP, "scalarization.dwa": DWA}
LEARNING_RATE = 1e-2
optimizer = optax.adam(LEARNING_RATE)
losses_of = jax.jit(lambda params, batch: jnp.stack([task_losses(params, batch)[task] for task in TASKS]))
jacobian_tree_of = jax.jit(jax.jacrev(losses_of))
outputs_of = jax.jit(predict)
distance = jax.jit(lambda x, y: optax.tree.norm(optax.tree.sub(x, y)))
draw = jax.jit(draw_pairs, static_argnames="n_pairs")


@jax.jit
def descend(params, opt_state, batch, weights):
    gradient = jax.grad(lambda params: weights @ losses_of(params, batch))(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state


def jacobian_of(params, batch):
    return np.hstack([np.reshape(leaf, (3, -1)) for leaf in jax.tree.leaves(jacobian_tree_of(params, batch))])


def accuracies_of(params, batch):
    outputs, batch = jax.device_get((outputs_of(params, batch["image"]), batch))
    right = [outputs[task].argmax(axis=1) == batch[task] for task in ("left", "right")]
    return np.mean([*right, np.abs(outputs["sum"] - batch["sum"]) < 0.5], axis=1)


def train_by_hand(rule, params, digits, args):
    history, opt_state = [], optimizer.init(params)
    for epoch in range(args.epochs):
        records = []
        for key in jax.random.split(jax.random.fold_in(jax.random.key(args.seed), epoch), args.steps):
            batches = [draw(key, digits, n_pairs=128) for key in jax.random.split(key, rule.n_batches)]
            before = np.asarray(losses_of(params, batches[-1]), float)
            weights = rule.weigh(before, partial(jacobian_of, params), batches)
            params, opt_state = descend(params, opt_state, batches[-1], np.asarray(weights, np.float32))
            after = np.asarray(losses_of(params, batches[-1]), float)
            if hasattr(rule, "observe"):
                rule.observe(before, after, accuracies_of(params, batches[-1]))
            records.append([before, weights, after > before])
        if hasattr(rule, "end_epoch"):
            rule.end_epoch()
        history.append(np.mean(records, axis=0))
    return params, history


@pytest.mark.parametrize("name", RULES)
def test_the_loop_does_what_one_by_hand_does(name):
    given = {"epochs": 4, "steps": 2, "learning_rate": LEARNING_RATE, "seed": 5, "checkpoints": None}
    args = argparse.Namespace(method=name, set=[], **given)
    digits, _ = load_data()
    start = init_params(jax.random.key(3))
    expected, expected_history = train_by_hand(RULES[name](), start, digits, args)
    params, history = train_loop.train(train_loop.find_method(name, [])[1], predict, start, digits, args)
    found = [[[means[key][task] for task in TASKS] for key in ("loss", "weight", "raised")] for means in history]
    np.testing.assert_allclose(found, expected_history, rtol=1e-4, atol=1e-6)
    # Adam magnifies the roundings of gradients near zero.
    assert distance(params, expected) < 1e-3 * distance(params, start)
    assert any(means["raised"][task] for means in history for task in TASKS)


def test_no_image_is_in_both_the_training_and_the_test_pairs():
    (images, _), pairs = jax.device_get(load_data())
    _, (test_images, _) = jax.device_get(load_images())
    seen = {image.tobytes() for image in images}
    corners = pairs["image"][:, :4, :8]  # where nothing of the lower right digit is
    assert not any(image.tobytes() in seen for image in test_images)
    tops = {image[:4].tobytes() for image in test_images}
    assert all(corner.tobytes() in tops for corner in corners)


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
    digits, _ = load_data()
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
