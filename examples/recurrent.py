"""A recurrent network with one objective per time step.

A GRU reads a handwritten digit row by row, from the top, and names it anew after each of the eight rows. Each time
step has its own loss, so there are eight: after the first row one can only guess, after the last one all is seen.

Equal weights and UPGrad train from the same starts on the same batches, with five seeds. UPGrad gives the first rows
the largest weights. The test losses after one and two rows end lower than with equal weights in every seed, by two or
three percent on average; those after five rows and more end up to two percent higher on average, not in every seed.

Run it with ``python examples/recurrent.py``: about forty seconds on two CPU cores. It needs ``mtlbalance[examples]``.
"""

from functools import partial

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import show
from digits import init_layers, load_images
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

N_ROWS = 8
N_SEEDS = 5
BATCH_SIZE = 128
STEPS_PER_EPOCH = 50


# The model: a gated recurrent unit, and a linear layer that names the digit after every row.


def init_params(key, width=32):
    shapes = {"gates": (8 + width, 2 * width), "candidate": (8 + width, width), "head": (width, 10)}
    return init_layers(key, shapes, jax.nn.initializers.glorot_normal())


def predict(params, images):
    """The logits after each row: [row, image, class]."""

    def layer(name, *inputs):
        return jnp.concatenate(inputs, axis=1) @ params[name]["w"] + params[name]["b"]

    def read_row(memory, row):
        forget, reset = jnp.split(jax.nn.sigmoid(layer("gates", row, memory)), 2, axis=1)
        candidate = jnp.tanh(layer("candidate", row, reset * memory))
        memory = forget * candidate + (1 - forget) * memory
        return memory, layer("head", memory)

    memory = jnp.zeros((len(images), len(params["head"]["w"])))
    _, logits = jax.lax.scan(read_row, memory, jnp.moveaxis(images, 1, 0))
    return logits


def losses_fn(params, images, labels):
    """One loss per row read."""
    logits = predict(params, images)
    labels = jnp.broadcast_to(labels, logits.shape[:2])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), axis=1)


def evaluate(params, digits):
    images, labels = digits
    correct = jnp.argmax(predict(params, images), axis=2) == labels
    return {"loss": losses_fn(params, images, labels), "accuracy": jnp.mean(correct, axis=1)}


# The training: a few models at once, which differ in their start and their batches.


def train(method, keys, digits, epochs, progress):
    """Trains one model per key; returns their parameters, and the weights [model, epoch, step, row]."""
    images, labels = digits
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, epochs * STEPS_PER_EPOCH))
    # A GRU under `jax.vmap` is no special case, so all rows of the Jacobian can come at once. Where they would
    # take too much memory, as with long sequences, `rows=1` computes one time step's gradient after the other.
    grad_fn = mtl.value_and_grad(losses_fn, method, return_weights=True)

    def start(key):
        params = init_params(key)
        return params, optimizer.init(params), grad_fn.init(params, images[:1], labels[:1])

    def step(carry, key):
        params, opt_state, state = carry
        chosen = jax.random.randint(key, (BATCH_SIZE,), 0, len(images))
        (_, state, weights), gradient = grad_fn(params, state, images[chosen], labels[chosen])
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), weights

    @partial(jax.jit, donate_argnames="carry")
    @partial(jax.vmap, in_axes=(0, 0, None))
    def run_epoch(carry, key, epoch):
        return jax.lax.scan(step, carry, jax.random.split(jax.random.fold_in(key, epoch), STEPS_PER_EPOCH))

    carry, history = jax.vmap(start)(keys), []
    for epoch in range(epochs):
        # The same keys for both methods, so the same start and the same batches.
        carry, weights = run_epoch(carry, keys, epoch)
        history.append(weights)
        progress.update()
    return carry[0], np.stack(history, axis=1)


# The results.


def loss_change(metrics):
    """In percent, of UPGrad against equal weights: [model, row]."""
    return 100 * (metrics["UPGrad"]["loss"] / metrics["equal"]["loss"] - 1)


def print_table(metrics):
    accuracy = [found["accuracy"].mean(axis=0) for found in metrics.values()]
    loss = [found["loss"].mean(axis=0) for found in metrics.values()]
    change = loss_change(metrics)
    rows = []
    for row in range(N_ROWS):
        cells = [f"{x[row]:.1%}" for x in accuracy] + [f"{x[row]:.3f}" for x in loss]
        rows.append([f"{row + 1}", *cells, f"{change[:, row].mean():+.1f} ± {change[:, row].std():.1f}%"])
    columns = ["rows", *(f"{kind}, {name}" for kind in ("accuracy", "loss") for name in metrics), "change"]
    caption = f"equal: equal weights. Averages over {N_SEEDS} seeds. change: of the loss by UPGrad, "
    caption += "and its standard deviation over the seeds."
    show.print_table("On the test images, by rows read", columns, rows, caption, width=100)


def draw(metrics, weights, output):
    """What UPGrad changes in each row's loss, and the weights by which it does."""
    subject, rows = "The change in the losses, and UPGrad's weights", np.arange(1, N_ROWS + 1)
    with show.picture(output, subject, 1, 2, figsize=(9.6, 3.6)) as (_, (left, right)):
        labels = {"title": "test loss: UPGrad against equal weights", "ylabel": "change (%)", "xticks": rows}
        show.draw_seeds(left, rows, loss_change(metrics).T, xlabel="rows read", **labels)
        left.legend()
        by_epoch = dict(zip(rows, N_ROWS * weights.mean(axis=(0, 2)).T, strict=True))
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.95, N_ROWS))
        labels = {"title": "UPGrad's weights (equal weights: 1)", "ylabel": "weight times 8"}
        show.draw_curves(right, np.arange(1, weights.shape[1] + 1), by_epoch, colors, **labels)
        right.legend(title="rows read", loc="center left", bbox_to_anchor=(1, 0.5))
        for ax, equal in (left, 0), (right, 1):
            ax.axhline(equal, color="black", linewidth=0.8)


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, epochs=20).parse_args(argv)

    train_digits, test_digits = load_images()
    keys = jax.random.split(jax.random.key(args.seed), N_SEEDS)
    methods = {"equal": scalarization.mean(), "UPGrad": aggregation.upgrad()}
    metrics, weights = {}, {}
    with tqdm(total=len(methods) * args.epochs, unit="epoch") as progress:
        for name, method in methods.items():
            progress.set_description(f"{name:6}")
            params, weights[name] = train(method, keys, train_digits, args.epochs, progress)
            metrics[name] = jax.device_get(jax.vmap(evaluate, in_axes=(0, None))(params, test_digits))

    print_table(metrics)
    draw(metrics, weights["UPGrad"], args.output)


if __name__ == "__main__":
    main()
