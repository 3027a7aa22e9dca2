"""The two jobs of ``compare.py``, and how one model is trained by one method. No script: it imports them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from digits import draw_pairs, evaluate, init_params, load_images, predict, task_losses
from pinn_problems import helmholtz
from pinn_problems import init_params as init_network
from sklearn.model_selection import train_test_split

import mtlbalance as mtl
from mtlbalance import scalarization

STEPS_PER_EPOCH = 50  # for methods with epochs


class Job(NamedTuple):
    """What is trained, and how well it does.

    Attributes:
      title: what to call it.
      n_steps: of a training in the full form.
      tasks: their names.
      draw: ``(key) -> batch``, new data to train on.
      task_losses: ``(params, batch) -> losses``.
      indicators: ``(params, batch)`` to how well each task is done, from 0 to 1: for DTP.
      init_params: ``(key) -> params``.
      measure: ``(params) -> [2, n_metrics]``, on the data for validation and for the test.
      metrics: the names of those, and the signs of their improvement.
      score: ``(metrics, of the single tasks) -> score`` over the last axis; the less, the better.
      smallest: the least difference of scores that a table shows.
      ignorant: the metrics of a model that has learnt nothing: a diverged training counts as that.
      single: the tasks that are trained alone, for ``score`` to compare with.
      swept: the task whose weight is tuned where a method wants weights, preferences or shares; the others have 1.
      sweep: the first weights that are tried.
      main: the task that others are to help, or are measured by.
      bounds: for methods that want a bound on some loss.
    """

    title: str
    n_steps: int
    tasks: tuple[str, ...]
    draw: Callable
    task_losses: Callable
    indicators: Callable
    init_params: Callable
    measure: Callable
    metrics: Mapping[str, int]
    score: Callable
    smallest: float
    ignorant: tuple[float, ...]
    single: tuple[str, ...]
    swept: str
    sweep: tuple[float, ...]
    main: str
    bounds: dict[str, float]

    def preferring(self, weight):
        """A number for each task: ``weight`` for the one that is swept, and 1."""
        return {task: weight if task == self.swept else 1.0 for task in self.tasks}


# Two digits and their sum.


def delta_m(metrics, single, signs):
    """The field's measure: the relative change against single tasks, averaged; worse is positive, in percent."""
    return 100 * np.mean(-np.asarray(signs) * (metrics / single - 1), axis=-1)


def read_digits(width=32, batch_size=64, n_pairs=2000):
    """The overlaid digits of ``digits.py``; those for validation are of digits that no training shows."""
    (images, labels), test_digits = load_images()
    rest, held_out = train_test_split(np.arange(len(images)), test_size=0.25, stratify=labels, random_state=1)
    train_digits, validation_digits = (images[rest], labels[rest]), (images[held_out], labels[held_out])
    held_out = [draw_pairs(jax.random.key(i), x, n_pairs) for i, x in enumerate((validation_digits, test_digits))]
    metrics = {"left": 1, "right": 1, "sum": -1}

    def indicators(params, batch):
        outputs = predict(params, batch["image"])
        right = {task: jnp.argmax(outputs[task], axis=1) == batch[task] for task in ("left", "right")}
        right["sum"] = jnp.round(outputs["sum"]) == batch["sum"]
        return jax.tree.map(jnp.mean, right)

    def measure(params):
        found = [evaluate(params, pairs) for pairs in held_out]
        return jnp.array([[of_one[name] for name in metrics] for of_one in found])

    return Job(
        title="Two overlaid digits",
        n_steps=500,
        tasks=tuple(metrics),
        draw=lambda key: draw_pairs(key, train_digits, batch_size),
        task_losses=task_losses,
        indicators=indicators,
        init_params=partial(init_params, width=width),
        measure=measure,
        metrics=metrics,
        score=partial(delta_m, signs=tuple(metrics.values())),
        smallest=0.05,
        ignorant=(0.1, 0.1, float(jnp.mean(jnp.abs(held_out[0]["sum"] - 9)))),  # chance, and always the mean
        single=tuple(metrics),
        swept="sum",
        sweep=(1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        main="sum",
        bounds={"sum": 1.0},
    )


# An equation and its boundary.


def solve_helmholtz(widths=(2, 16, 16, 1), n_points=64):
    """Helmholtz's equation of ``pinn_problems.py``, at half its second frequency, by a smaller network."""
    problem = helmholtz(a=2)
    points = np.random.default_rng(0).uniform(-1, 1, (2000, 2))
    inputs = [jnp.asarray(x, jnp.float32) for x in (points, problem.grid.reshape(-1, 2))]
    solutions = [np.sin(np.pi * x[:, 0]) * np.sin(2 * np.pi * x[:, 1]) for x in inputs]

    def losses(params, batch):
        return jax.tree.map(lambda residual: jnp.mean(residual**2), problem.residuals(params, batch))

    def measure(params):
        """The norm of what the network is off by, relative to that of the solution: at random points, and on a grid."""
        error = lambda x, u: jnp.linalg.norm(problem.predict(params, x) - u) / np.linalg.norm(u)
        return jnp.array([[error(x, u)] for x, u in zip(inputs, solutions, strict=True)])

    return Job(
        title="Helmholtz by a network",
        n_steps=2000,
        tasks=("boundary", "equation"),
        draw=lambda key: problem.draw(key, n_points, jnp.float32),
        task_losses=losses,
        indicators=lambda params, batch: jax.tree.map(lambda loss: 1 / (1 + loss), losses(params, batch)),
        init_params=partial(init_network, widths),
        measure=measure,
        metrics={"error": -1},
        score=lambda metrics, single: np.log10(metrics[..., 0]),
        smallest=np.log10(1.005),
        ignorant=(1.0,),  # u = 0
        single=(),
        swept="equation",
        sweep=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        main="equation",
        bounds={"boundary": 1e-4},
    )


JOBS = {"digits": read_digits, "pinn": solve_helmholtz}


# The training, by any of several methods.


def training(job, entries, n_steps):
    """``train(index, rate, value, seed) -> params``: by which entry, its learning rate, its own hyperparameter."""
    without_adam = np.array([entry.plain for entry in entries])

    def train(index, rate, value, seed):
        init_key, first_key, data_key, method_key = jax.random.split(jax.random.key(seed), 4)
        schedule = optax.cosine_decay_schedule(rate, n_steps)
        adam = optax.scale_by_adam()
        if without_adam.any():
            adam = optax.conditionally_transform(adam, lambda step, **_: ~jnp.asarray(without_adam)[index])
        optimizer = optax.chain(adam, optax.scale_by_learning_rate(schedule))
        params, first_batch = job.init_params(init_key), job.draw(first_key)
        init, decide = STEPS[entries[0].kind](job, entries, index, value, method_key, optimizer)

        def step(carry, key):
            params, opt_state, state = carry
            gradient, observe = decide(params, state, opt_state, key)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state, observe(params)), None

        carry = params, optimizer.init(params), init(params, first_batch)
        (params, _, _), _ = jax.lax.scan(step, carry, jax.random.split(data_key, n_steps))
        return params

    return train


def choose(entries, index, value, key):
    """The entry's method; a switch where there are several."""
    methods = [entry.make(value, key) for entry in entries]
    return mtl.switch(methods)(index) if len(methods) > 1 else methods[0]


def more_data(job, key, i):
    """Besides the batch that is trained on, which is ``job.draw(key)`` for every method: seeds are paired."""
    return job.draw(jax.random.fold_in(key, i))


def by_one_batch(job, entries, index, value, key, optimizer):
    del optimizer
    grad_fn = mtl.value_and_grad(job.task_losses, choose(entries, index, value, key))

    def decide(params, state, opt_state, key):
        (_, state), gradient = grad_fn(params, state, job.draw(key))
        return gradient, lambda params: state

    return grad_fn.init, decide


def by_observation(job, entries, index, value, key, optimizer):
    """FAMO looks at its batch's losses once more after the step, DTP at accuracies, CoBa at other data's losses."""
    del optimizer
    method = choose(entries, index, value, key)
    grad_fn = mtl.value_and_grad(job.task_losses, method, hooks=True)
    observed = np.array([("losses", "indicators", "validation").index(entry.observes) for entry in entries])

    def decide(params, state, opt_state, key):
        batch = job.draw(key)
        (_, state), gradient = grad_fn(params, state, batch)

        def observe(params):
            views = (
                lambda: job.task_losses(params, batch),
                lambda: job.indicators(params, batch),
                lambda: job.task_losses(params, more_data(job, key, 1)),
            )
            return method.observe(state, jax.lax.switch(jnp.asarray(observed)[index], views))

        return gradient, observe

    return grad_fn.init, decide


def by_three_batches(job, entries, index, value, key, optimizer):
    """Weights from the gradients of two batches, each with its own noise, for the losses of a third."""
    del optimizer
    method, jacobian_fn = choose(entries, index, value, key), mtl.value_and_jac(job.task_losses)

    def decide(params, state, opt_state, key):
        first, second, third = more_data(job, key, 1), more_data(job, key, 2), job.draw(key)
        (_, rows), (_, other_rows) = jacobian_fn(params, first), jacobian_fn(params, second)
        weights, state = method.gramian_weighting.apply(state, mtl.gramian.gramian(rows, other_rows))
        weighted = scalarization.constant(dict(zip(sorted(job.tasks), weights, strict=True)))
        grad_fn = mtl.value_and_grad(job.task_losses, weighted)
        _, gradient = grad_fn(params, grad_fn.init(params, third), third)
        return gradient, lambda params: state

    return mtl.value_and_grad(job.task_losses, method).init, decide


def by_hypergradient(job, entries, index, value, key, optimizer):
    """Weights that lower the losses of other data after the step: a step of its own, and no method of a family."""
    del index, key
    (entry,) = entries
    grad_fn = entry.make(value, job.task_losses, optimizer)

    def decide(params, state, opt_state, key):
        batch, other = job.draw(key), more_data(job, key, 1)
        (_, state), gradient = grad_fn(params, state, batch, validation=(other,), opt_state=opt_state)
        return gradient, lambda params: state

    return grad_fn.init, decide


STEPS = {
    "scalarizer": by_one_batch,
    "observer": by_observation,
    "aggregator": by_one_batch,
    "remembering": by_one_batch,
    "two-sampled": by_three_batches,
    "hypergradient": by_hypergradient,
}
