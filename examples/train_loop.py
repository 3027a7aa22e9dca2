"""One training loop for every method of both families, saved after every epoch.

The tasks and the network are those of ``digits.py``. The method is an argument, by its name in
``mtlbalance.scalarization`` or ``mtlbalance.aggregation``::

    python examples/train_loop.py famo
    python examples/train_loop.py cagrad --set c=0.8 --checkpoints /tmp/cagrad
    python examples/train_loop.py cr_mogm --set method=upgrad
    python examples/train_loop.py lr_annealing --set reference=sum
    python examples/train_loop.py stch --set mu=0.1 --set 'weights={"left": 1, "right": 1, "sum": 0.1}'

The tasks are left, right and sum: what a method takes for each of them, or one of them, goes by these names.

Both families have ``mean``, ``sum``, ``constant`` and ``random``: ``aggregation.mean`` is the second one. With
``--checkpoints`` a run that was interrupted or killed goes on where it stopped when the same command is given again,
to the same numbers; with more ``--epochs`` a finished one is trained on. ``--seed`` is the network's and its batches';
a method that draws has its own: ``--set key=1``.

The loop knows three methods by name: MoDo and SDMGrad decide on two batches and train on a third, and DTP observes
accuracies where the others observe losses. It knows nothing of the network but its parameters and ``predict``. An
epoch of 100 steps is one compiled program.

Twenty epochs take about ten seconds on two CPU cores. It needs ``mtlbalance[examples]``.
"""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import show
from digits import TASKS, draw_pairs, init_params, load_data, losses_of, predict
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import scalarization

BATCH_SIZE = 128
DOUBLE_SAMPLED = ("aggregation.modo", "aggregation.sdmgrad")
OBSERVES_ACCURACIES = ("scalarization.dtp",)

BY_NAME = (
    'A task is given as in --set main=left, numbers by name as in --set \'weights={"left": 1, "right": 1, "sum": 0.1}\''
)

CAPTION = (
    "loss, correct: on the test images, before and after. weight: mean of the first and of the last epoch. "
    "raised: how often, in the last epoch, a step raised the loss of its own batch."
)


# The method.


def method_names():
    """All of them, with their family."""
    return [info.full_name for info in mtl.methods()]


def find_method(name, hyperparameters):
    """The name with the family, and the method."""
    found = [info for info in mtl.methods() if name in (info.full_name, info.name)]
    if not found:
        raise SystemExit(f"no method {name}; there are {', '.join(method_names())}")
    method = build(found[0], dict(hyperparameters))
    return found[0].full_name, mtl.learn(method, optax.adam(1e-2)) if method.learned else method


def build(info, hyperparameters):
    """The method, or a message that says what is wrong with its hyperparameters."""
    missing = [parameter for parameter in sorted(info.required) if parameter not in hyperparameters]
    if missing:
        raise SystemExit(f"{info.name} needs {' and '.join(f'--set {parameter}=VALUE' for parameter in missing)}")
    if "method" in info.required:  # of CR-MOGM: another one by its name, with its defaults
        hyperparameters["method"] = find_method(hyperparameters["method"], [])[1]
    try:
        return info.factory(**hyperparameters)
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{info.name}: {error}") from error


def check_fits_tasks(name, method):
    """Stops with the method's own message where its arguments do not fit the tasks' names; nothing is computed."""
    losses_fn = lambda params: dict.fromkeys(TASKS, jnp.sum(params))
    try:
        mtl.value_and_grad(losses_fn, method, hooks=True).init(jnp.zeros(2))
    except (TypeError, ValueError) as error:
        raise SystemExit(f"{name.partition('.')[-1]}: {error}. {BY_NAME}") from error


def losses_with(predict):
    """The losses of a model, by name."""
    return lambda params, batch: losses_of(predict(params, batch["image"]), batch)


def init_state(method, predict, params, digits):
    """A new state, for whatever method: it depends on the number of the losses, their names, and the parameters."""
    grad_fn = mtl.value_and_grad(losses_with(predict), method, hooks=True)
    return grad_fn.init(params, draw_pairs(jax.random.key(0), digits, 1))


def balanced_gradient(losses_fn, name, method):
    """``grad_fn(params, state, *batches) -> (losses, state[, weights]), gradient``, with weights if there are any."""
    if name in DOUBLE_SAMPLED:
        return partial(double_sampled_gradient, losses_fn, method)
    return mtl.value_and_grad(losses_fn, method, return_weights=mtl.has_weights(method), hooks=True)


def double_sampled_gradient(losses_fn, method, params, state, batch_1, batch_2, batch_3):
    """Weights from the gradients of two batches, each with its own noise, for the losses of a third."""
    (_, jacobian_1), (_, jacobian_2) = (mtl.value_and_jac(losses_fn)(params, batch) for batch in (batch_1, batch_2))
    weights, state = method.gramian_weighting.apply(state, mtl.gramian.gramian(jacobian_1, jacobian_2))
    weighted_sum = scalarization.constant(dict(zip(TASKS, weights, strict=True)))
    grad_fn = mtl.value_and_grad(losses_fn, weighted_sum, return_weights=True)
    (losses, _, weights), gradient = grad_fn(params, weighted_sum.init(len(TASKS)), batch_3)
    return (losses, state, weights), gradient


def accuracies(outputs, batch):
    """How often each task is right; the sum where it is nearest to the true one."""
    return {
        "left": jnp.mean(jnp.argmax(outputs["left"], axis=1) == batch["left"]),
        "right": jnp.mean(jnp.argmax(outputs["right"], axis=1) == batch["right"]),
        "sum": jnp.mean(jnp.round(outputs["sum"]) == batch["sum"]),
    }


def draw_batches(name, key, digits):
    keys = jax.random.split(key, 3 if name in DOUBLE_SAMPLED else 1)
    return [draw_pairs(key, digits, BATCH_SIZE) for key in keys]


def observe(name, method, state, outputs, batch):
    """Shows the method what the step has done to its batch; for most this is the identity."""
    measure = accuracies if name in OBSERVES_ACCURACIES else losses_of
    return method.observe(state, measure(outputs, batch))


def keys_of_epoch(seed, i, steps):
    """They depend on the number of the epoch alone, and so do its batches, wherever a run goes on."""
    return jax.random.split(jax.random.fold_in(jax.random.key(seed), i), steps)


def record(losses, losses_after, weights):
    """What is kept of a step, by task: its loss, whether the step raised it, and its weight if it has one."""
    raised = jax.tree.map(jnp.greater, losses_after, losses)
    return {"loss": losses, "raised": raised} | ({"weight": weights[0]} if weights else {})


# The loop.


def make_epoch(name, method, optimizer, predict):
    """A function from (params, optimizer's state, method's state) to the next ones, and a record of every step."""
    grad_fn = balanced_gradient(losses_with(predict), name, method)

    def step(carry, key, digits):
        params, opt_state, state = carry
        *_, batch = batches = draw_batches(name, key, digits)
        (losses, state, *weights), gradient = grad_fn(params, state, *batches)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        outputs = predict(params, batch["image"])
        state = observe(name, method, state, outputs, batch)
        return (params, opt_state, state), record(losses, losses_of(outputs, batch), weights)

    @jax.jit
    def epoch(carry, digits, keys):
        carry, records = jax.lax.scan(partial(step, digits=digits), carry, keys)
        params, opt_state, state = carry
        return (params, opt_state, method.end_epoch(state)), jax.tree.map(lambda x: jnp.mean(x, axis=0), records)

    return epoch


def train(method, predict, params, digits, args):
    """The trained parameters, and the mean record of every epoch."""
    optimizer = optax.adam(args.learning_rate)
    epoch = make_epoch(args.method, method, optimizer, predict)
    carry, history = (params, optimizer.init(params), init_state(method, predict, params, digits)), []
    settings = {key: value for key, value in vars(args).items() if key not in ("epochs", "checkpoints", "output")}
    with open_checkpoints(args.checkpoints) as checkpoints:
        if checkpoints and checkpoints.latest_step() is not None:
            carry, history = restore(checkpoints, carry, settings)
            print(f"going on after epoch {len(history)}")
        with tqdm(total=args.epochs, initial=len(history), unit="epoch") as progress:
            for i in range(len(history), args.epochs):
                carry, means = epoch(carry, digits, keys_of_epoch(args.seed, i, args.steps))
                history.append(jax.tree.map(float, means))
                if checkpoints:
                    save(checkpoints, carry, history, settings)
                progress.set_postfix({task: f"{loss:.2f}" for task, loss in history[-1]["loss"].items()})
                progress.update()
    return carry[0], history


# Checkpoints.


def open_checkpoints(folder):
    if folder is None:
        return nullcontext()
    # A checkpoint is written beside its place and renamed: of a run that was killed there may be part of one beside.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(checkpoints, carry, history, settings):
    run = {"history": list(history), "settings": settings}  # it is written later, when there may be more of the list
    args = ocp.args.Composite(carry=ocp.args.StandardSave(carry), run=ocp.args.JsonSave(run))
    checkpoints.save(len(history), args=args)


def restore(checkpoints, carry, settings):
    last = checkpoints.latest_step()
    # First alone: the states of another method would not fit, and the message would not say why.
    run = checkpoints.restore(last, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
    if run["settings"] != settings:
        raise SystemExit(f"{checkpoints.directory} has a run with {run['settings']}, not with {settings}")
    found = checkpoints.restore(last, args=ocp.args.Composite(carry=ocp.args.StandardRestore(carry)))
    return found.carry, run["history"]


# The results.


def evaluate(outputs, pairs):
    return {"loss": losses_of(outputs, pairs), "accuracy": accuracies(outputs, pairs)}


def print_table(name, before, after, history):
    """What the training changed, task by task."""
    first, last = history[0], history[-1]
    has_weights = "weight" in last
    columns = ["\ntask", "loss\nbefore", "loss\nafter", "correct\nbefore", "correct\nafter"]
    rows = []
    for task in TASKS:
        row = [task, *(f"{found['loss'][task]:.3g}" for found in (before, after))]
        row += [f"{found['accuracy'][task]:.1%}" for found in (before, after)]
        row += [f"{means['weight'][task]:.2g}" for means in (first, last) if has_weights]
        rows.append([*row, f"{last['raised'][task]:.0%}"])
    columns += ["weight\nfirst", "weight\nlast"] * has_weights + ["\nraised"]
    show.print_table(f"{name}: what changed in epochs 1 to {len(history)}", columns, rows, CAPTION)


def draw_history(title, history, output):
    """Each task's loss, weight if there is one, and how often a step raised its loss, over the epochs."""
    panels = {"loss": "training loss", "weight": "weight", "raised": "loss raised by a step"}
    panels = {key: label for key, label in panels.items() if key in history[0]}
    size = 2.9 * len(panels) + 0.9, 3
    with show.picture(output, "The training", 1, len(panels), figsize=size) as (fig, axes):
        for ax, (key, label) in zip(axes, panels.items(), strict=True):
            curves = {task: [means[key][task] for means in history] for task in TASKS}
            show.draw_curves(ax, range(1, len(history) + 1), curves, title=label)
        axes[0].set_yscale("log")
        axes[-1].yaxis.set_major_formatter("{x:.0%}")
        fig.legend(*axes[0].get_legend_handles_labels(), title="task", loc="outside right center")
        fig.suptitle(title)


def hyperparameter(text):
    """``c=0.8``, ``pref_vector={"left":1,"right":2,"sum":3}`` or ``main=left`` as a pair."""
    name, value = text.split("=")
    try:
        return [name, json.loads(value)]
    except json.JSONDecodeError:
        return [name, value]


def read_arguments(argv, doc, script):
    parser = show.arguments(doc, script, seed=0, epochs=20)
    parser.add_argument("--steps", type=show.at_least_one, default=100, help="of an epoch; 100 by default")
    parser.add_argument("method", nargs="?", default="upgrad", help="of either family; upgrad by default")
    given = {"action": "append", "type": hyperparameter, "default": [], "metavar": "NAME=VALUE"}
    by_name = "a number, a task's name, or numbers by the tasks' names in JSON"
    parser.add_argument("--set", **given, help=f"a hyperparameter of the method: {by_name}; may be repeated")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="1e-3 by default")
    parser.add_argument("--checkpoints", type=Path, help="a folder: save there, and go on from what is there")
    return parser.parse_args(argv)


def run(init_network, argv, doc, script):
    """Trains a network of any framework; ``init_network`` makes ``predict`` and its parameters of a key."""
    args = read_arguments(argv, doc, script)
    args.method, method = find_method(args.method, args.set)
    check_fits_tasks(args.method, method)
    digits, test_pairs = load_data()
    predict, start = init_network(jax.random.key(args.seed))
    params, history = train(method, predict, start, digits, args)

    before, after = (evaluate(predict(params, test_pairs["image"]), test_pairs) for params in (start, params))
    print_table(args.method, before, after, history)
    draw_history(args.method, history, args.output)


def main(argv=None):
    run(lambda key: (predict, init_params(key)), argv, __doc__, __file__)


if __name__ == "__main__":
    main()
