"""The losses of a large language model, at a tiny scale: next token, z-loss, experts' balance, multi-token prediction.

One block of a transformer, with a mixture of four experts, reads the manual that Python carries for ``help()``, symbol
by symbol, in padded sequences of up to 48. Beside the main loss there are the z-loss, the balance of the experts, and
multi-token prediction (MTP): a head for the symbol after the next one.

**Micro-batches.** As ``mtl.Counted`` losses they have the whole batch's gradients, to rounding; the mean of
micro-batches' means is a tenth or more off for the main loss, as sequences differ in length. MaxText, in its snapshot
of August 2026 (``utils/gradient_accumulation.py``, ``trainers/pre_train/train.py``), adds the means of MTP and balance
to the sum of cross entropies, z-loss included, and divides the gradients by all tokens. The first two come out too
short, by the tokens of one micro-batch: some 160 times here, 32,768 times with 8 sequences of 4096. The loss that it
logs is right; with ``use_tunix_gradient_accumulation`` it divides by the micro-batches. The balance is that of each
sequence, as there: that of Switch, of all tokens of a batch, is no sum over its micro-batches.

**Weights.** With the manual of Python 3.11 all sensible ones end within 0.03 nats per character of each other, where
rounding alone moves an end by 0.01, and none is clearly better than the main loss alone; the best of eight by hand is
chosen by these very ends. The plain sum is 0.46 worse than the usual weights, as its z-loss holds the logits back; UW,
which raises the weight of what gets small, 0.73; UW with z-loss and balance beside it 0.09. UPGrad, bloop and MTP
warmed up, all with the usual weights, move the main loss by less than the seeds do. What the auxiliary losses bring is
what they are for: a head of 2.88 nats for the symbol after the next, and experts of which the busiest gets 30% of the
tokens. With the lengths of MaxText these are 3.21 and 37%, and the main loss does not show it. The learning rate is one
for all: of 0.01, 0.02 and 0.04 the best for the main loss alone, the sum and the usual weights; UW, at its best with
0.04, stays last.

z-loss: https://arxiv.org/abs/2204.02311. Balance: https://arxiv.org/abs/2101.03961. MTP:
https://arxiv.org/abs/2412.19437. A closed attempt to mend it: https://github.com/AI-Hypercomputer/maxtext/pull/3311.

Run it with ``python examples/language_model.py``: two and a half minutes on two CPU cores. It needs
``mtlbalance[examples]``.
"""

import itertools
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

LENGTH, N_SYMBOLS = 48, 96
WIDTH, HEADS, EXPERTS, HIDDEN = 32, 2, 4, 64
BATCH_SIZE, MICROBATCHES = 16, 4
LEARNING_RATE = 2e-2

USUAL = {"lm": 1.0, "z": 1e-4, "balance": 1e-2, "mtp": 0.3}
TASKS = sorted(USUAL)  # the order of the methods' weights


# The text: paragraphs of the manual that Python carries for `help()`, every tenth of its chapters held out.


def load_text():
    """Rows of symbols, with 0 before the first and after the last character: for training, and held out."""
    rows = [], []
    for i, chapter in enumerate(sorted(topics)):
        for paragraph in topics[chapter].encode("ascii", "ignore").split(b"\n\n"):
            symbols = np.frombuffer(b" ".join(paragraph.split()), np.uint8).astype(np.int32) - 31
            for start in range(0, len(symbols), LENGTH):
                piece = symbols[start : start + LENGTH]
                rows[i % 10 == 0].append(np.pad(piece, (1, LENGTH + 1 - len(piece))))
    return jnp.array(rows[0]), jnp.array(rows[1][::4])


# The model: one block of a transformer whose feed-forward part is a mixture of experts, and two heads.


SHAPES = {
    **dict.fromkeys(("symbols", "before"), (N_SYMBOLS, WIDTH)),
    "places": (LENGTH, WIDTH),
    "attend": (WIDTH, 3 * WIDTH),
    **dict.fromkeys(("mix", "mtp"), (WIDTH, WIDTH)),
    "router": (WIDTH, EXPERTS),
    "widen": (EXPERTS, WIDTH, HIDDEN),
    "narrow": (EXPERTS, HIDDEN, WIDTH),
    "read": (WIDTH, N_SYMBOLS),
}


def init_params(key):
    keys = jax.random.split(key, len(SHAPES))
    draw = lambda key, shape: jax.random.normal(key, shape) * shape[-2] ** -0.5
    return {name: draw(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attention(params, x):
    heads = (normalize(x) @ params["attend"]).reshape(*x.shape[:2], 3 * HEADS, -1)
    mixed = jax.nn.dot_product_attention(*jnp.split(heads, 3, axis=2), is_causal=True)
    return mixed.reshape(x.shape) @ params["mix"]


def mixture(params, x):
    """What the expert says that the router likes best, though all are computed; which one it is; how each is liked."""
    x = normalize(x)
    probs = jax.nn.softmax(x @ params["router"])
    chosen = jax.nn.one_hot(jnp.argmax(probs, axis=-1), EXPERTS)
    hidden = jax.nn.gelu(jnp.einsum("btd,edh->bteh", x, params["widen"]))
    return jnp.einsum("bteh,ehd,bte->btd", hidden, params["narrow"], chosen * probs), chosen, probs


def forward(params, symbols):
    before = jnp.pad(symbols, ((0, 0), (1, 0)))[:, :-1]  # attention this small is slow to find the symbol before
    x = WIDTH**0.5 * (params["symbols"][symbols] + params["before"][before]) + params["places"]
    x += attention(params, x)
    said, chosen, probs = mixture(params, x)
    x += said
    after = x + jax.nn.gelu(normalize(x) @ params["mtp"])
    return normalize(x) @ params["read"], normalize(after) @ params["read"], chosen, probs


def cross_entropy(logits, targets):
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.sum(logits * jax.nn.one_hot(targets, N_SYMBOLS), axis=-1), log_z


def task_losses(params, text):
    """Sums, and what they are over: tokens with a next one, tokens with one after that, and sequences."""
    following, after = text[:, 1:-1], text[:, 2:]
    logits, logits_after, chosen, probs = forward(params, text[:, :-2])
    (main, log_z), (mtp, _) = cross_entropy(logits, following), cross_entropy(logits_after, after)
    mean = lambda x: jnp.mean(x, axis=1, where=following[..., None] > 0)
    balance = EXPERTS * jnp.sum(mean(chosen) * mean(probs), axis=-1)
    counted = lambda x, present: mtl.Counted(jnp.sum(x, where=present), jnp.sum(present))
    return {
        "lm": counted(main, following > 0),
        "z": counted(log_z**2, following > 0),
        "balance": counted(balance, jnp.ones(len(text), bool)),
        "mtp": counted(mtp, after > 0),
    }


def task_means(params, text):
    return {name: loss.sum / loss.count for name, loss in task_losses(params, text).items()}


@jax.jit
@partial(jax.vmap, in_axes=(0, None))
def evaluate(params, text):
    present = text[:, 1:-1] > 0
    logits, _, chosen, _ = forward(params, text[:, :-2])
    _, log_z = cross_entropy(logits, text[:, 1:-1])
    return task_means(params, text) | {
        "load": jnp.mean(chosen, axis=(0, 1), where=present[..., None]),
        "|log Z|": jnp.mean(jnp.abs(log_z), where=present),
    }


# Gradients over micro-batches.


def gradients(losses_fn, params, text, microbatches=None):
    """A row for each loss, which alone has a weight then."""

    def row(weights):
        method = scalarization.constant(weights)
        return mtl.value_and_grad(losses_fn, method, microbatches=microbatches)(params, method.init(weights), text)[1]

    rows = jax.vmap(row)(dict(zip(TASKS, jnp.eye(len(TASKS)), strict=True)))
    return jnp.concatenate([jnp.reshape(leaf, (len(TASKS), -1)) for leaf in jax.tree.leaves(rows)], axis=1)


def compare_gradients(params, text):
    """For each way the relative error of each loss's gradient, and its length along that of the whole batch."""

    def sums_and_means(params, text):
        losses = task_losses(params, text)
        return task_means(params, text) | {name: losses[name].sum for name in ("lm", "z")}

    whole, n_tokens = gradients(task_losses, params, text), jnp.sum(text[:, 1:-1] > 0)
    split = lambda losses_fn: gradients(losses_fn, params, text, MICROBATCHES)
    ways = {
        "Counted": split(task_losses),
        "mean of means": split(task_means),
        # Where we divide by the number of micro-batches, MaxText divides by the tokens of all of them.
        "as in MaxText": split(sums_and_means) * MICROBATCHES / n_tokens,
    }
    length = lambda rows: jnp.linalg.norm(rows, axis=1)
    error = lambda rows: length(rows - whole) / length(whole)
    return {way: (error(rows), jnp.sum(rows * whole, axis=1) / length(whole) ** 2) for way, rows in ways.items()}


def tokens_per_microbatch(text):
    return BATCH_SIZE // MICROBATCHES * float(jnp.mean(jnp.sum(text[:, 1:-1] > 0, axis=1)))


def print_gradients(params, text, seed):
    rows = np.random.default_rng(seed).integers(len(text), size=(50, BATCH_SIZE))
    on_batches = jax.jit(lambda params, batches: jax.lax.map(partial(compare_gradients, params), batches))
    found = jax.tree.map(lambda x: np.mean(x, axis=0), on_batches(params, text[rows]))
    shrinks = lambda i: f"{1 / found['as in MaxText'][1][i]:.0f} x"
    lines = [(task, *(f"{way[0][i]:.2g}" for way in found.values()), shrinks(i)) for i, task in enumerate(TASKS)]
    about = f"Relative errors, against whole batches: the mean of {len(rows)}. A micro-batch has "
    about += f"{tokens_per_microbatch(text):.0f} tokens in the mean. shrinks: as in MaxText."
    show.print_table("Gradients over micro-batches", ("gradient of", *found, "shrinks"), lines, about)


# The trainings: those with weights by hand are one program, and the seeds with a method are one each.


def weights_by_hand(text):
    shrunk = {name: USUAL[name] / tokens_per_microbatch(text) for name in ("balance", "mtp")}
    sweep = itertools.product((1e-4, 1e-2), (1e-2, 1e-1), (0.03, 0.3))
    return {
        "main loss alone": {"lm": 1.0, "z": 0.0, "balance": 0.0, "mtp": 0.0},
        "plain sum": dict.fromkeys(USUAL, 1.0),
        "usual": USUAL,
        "as in MaxText": USUAL | shrunk,
        **{(z, balance, mtp): {"lm": 1.0, "z": z, "balance": balance, "mtp": mtp} for z, balance, mtp in sweep},
    }


def warm_up_mtp(n_steps):
    ramp = optax.linear_schedule(0.0, 1.0, n_steps)
    return optax.scale_by_schedule(lambda step: jnp.where(np.array(TASKS) == "mtp", ramp(step), 1.0))


def make_methods(n_steps):
    """Functions of the weights by hand, which `vmap` gives them, and what the step needs besides."""
    constant, log = scalarization.constant, {"return_weights": True}
    uw = mtl.learn(scalarization.uw(), optax.adam(1e-2))
    beside = lambda weights: mtl.regularize(uw, {name: weights[name] for name in ("z", "balance")})
    # The last parameters on which all four losses act: the balance is that of the router, which comes next.
    last = {"decide_on": {name: name == "mix" for name in SHAPES}}
    return {
        "by hand": (constant, log),
        "MTP warmed up": (lambda weights: mtl.transform_weights(constant(weights), warm_up_mtp(n_steps // 2)), log),
        "UW": (lambda _: uw, log),
        "UW, two beside": (beside, log),
        "UPGrad": (lambda weights: mtl.chain(constant(weights), aggregation.upgrad()), log | last),
        "bloop": (lambda weights: mtl.chain(constant(weights), aggregation.bloop("lm", 1.0)), {}),
    }


def make_training(make_method, options, optimizer, weights):
    """How to start a model's training, and how to go on."""
    grad_fn = mtl.value_and_grad(task_losses, make_method(weights), microbatches=MICROBATCHES, **options)

    def start(params, text):
        return params, optimizer.init(params), grad_fn.init(params, text[:BATCH_SIZE])

    def step(text, carry, rows):
        params, opt_state, state = carry
        (_, state, *weights), gradient = grad_fn(params, state, text[rows])
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state, state), weights

    return start, lambda carry, text, rows: jax.lax.scan(partial(step, text), carry, rows)


def train(maker, weights, params, rows, text, held_out, progress):
    """Trains a model for each entry of ``weights`` and ``params``; ``rows`` are ``[parts, models, steps, batch]``."""
    n_steps = rows.shape[0] * rows.shape[2]
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, n_steps // 10, n_steps))
    training = partial(make_training, *maker, optimizer)
    start = jax.vmap(lambda weights, *args: training(weights)[0](*args), in_axes=(0, 0, None))
    go_on = jax.vmap(lambda weights, *args: training(weights)[1](*args), in_axes=(0, 0, None, 0))
    start, go_on = jax.jit(start), jax.jit(go_on, donate_argnums=1)

    carry, found, log = start(weights, params, text), [], []
    for part in rows:
        carry, used = go_on(weights, carry, text, part)
        found.append(jax.device_get(evaluate(carry[0], held_out)))
        log.append(jax.device_get(used))
        progress.update()
    join = lambda parts, how: jax.tree.map(lambda *x: how(x, axis=1), *parts)
    return carry[0], join(found, np.stack), join(log, np.concatenate)


def train_all(args, text, held_out):
    """For each name, with an axis of seeds: parameters, what they do on held-out text on the way, and the weights."""
    n_seeds, n_steps = args.seeds, -(-args.steps // args.parts)  # in each part
    starts = jax.jit(jax.vmap(init_params))(jax.random.split(jax.random.key(args.seed), n_seeds))
    rows = np.random.default_rng(args.seed).integers(len(text), size=(args.parts, n_seeds, n_steps, BATCH_SIZE))
    results, makers = {}, make_methods(args.parts * n_steps)
    with tqdm(total=args.parts * len(makers), unit="part") as progress:
        for name, maker in makers.items():
            progress.set_description(f"{name:15}")
            chosen = weights_by_hand(text) if name == "by hand" else {name: USUAL}
            weights = {task: np.repeat([one[task] for one in chosen.values()], n_seeds) for task in TASKS}
            params = {key: jnp.concatenate([x] * len(chosen)) for key, x in starts.items()}
            trained = train(maker, weights, params, np.tile(rows, (1, len(chosen), 1, 1)), text, held_out, progress)
            for i, one in enumerate(chosen):
                results[one] = jax.tree.map(lambda x, i=i: x[i * n_seeds : (i + 1) * n_seeds], trained)
    return keep_best(results)


def keep_best(results):
    """Of the sweep what is best on the held-out text itself."""
    sweep = {name: found["lm"][:, -1].mean() for name, (_, found, _) in results.items() if isinstance(name, tuple)}
    best = min(sweep, key=sweep.get)
    rename = {best: "by hand: {:g}, {:g}, {:g}".format(*best)}
    return {rename.get(name, name): x for name, x in results.items() if name == best or name not in sweep}


def print_results(results):
    last = {name: {key: x[:, -1] for key, x in found.items()} for name, (_, found, _) in results.items()}
    usual = last["usual"]["lm"]
    lines = []
    for name, x in last.items():
        others = f"{x['mtp'].mean():.2f}", f"{x['load'].max(axis=-1).mean():.0%}", f"{x['|log Z|'].mean():.1f}"
        lines.append((name, show.spread(x["lm"], 3), show.spread(x["lm"] - usual, 3, "+"), *others))
    about = f"Held-out text, nats per character: mean ± standard deviation of {len(usual)} seeds. busy: the share of "
    about += f"tokens of the busiest of {EXPERTS} experts. by hand: weights of z, balance and MTP, of 8 the best here."
    columns = "weights", "main loss", "minus usual", "MTP", "busy", "log Z"
    show.print_table("What the auxiliary losses cost and bring", columns, lines, about, padding=(0, 0))


def draw(results, output):
    """The main loss; the weight of MTP over that of the main loss; and how the experts share the tokens."""
    with show.picture(output, "Losses, weights and experts", 1, 3, figsize=(9.6, 3.6)) as (_, axes):
        n_steps = results["usual"][2][0]["lm"].shape[1]
        widths = np.linspace(4.5, 1, len(results))  # thick below thin, where they coincide
        for i, (_, found, log) in enumerate(results.values()):
            curve = found["lm"].mean(axis=0)
            style = {"color": f"C{i}", "linewidth": widths[i]}
            axes[0].plot(np.arange(1, len(curve) + 1) * n_steps / len(curve), curve, **style)
            if log:  # bloop has no weights
                axes[1].plot(np.mean(log[0]["mtp"] / log[0]["lm"], axis=0), **style)
            shares = np.sort(found["load"][:, -1], axis=-1)[:, ::-1].mean(axis=0)
            for j, share in enumerate(shares):
                axes[2].barh(i, share, left=shares[:j].sum(), color=f"C{i}", alpha=1 - 0.22 * j)
        axes[0].set(title="main loss, held-out text", xlabel="step", ylabel="nats per character")
        axes[1].set(title="MTP's weight / main's", xlabel="step")
        axes[2].set(title=f"shares of the {EXPERTS} experts, sorted", xlim=(0, 1), xticks=np.arange(5) / 4)
        axes[2].set_yticks(range(len(results)), ["best by hand" if x.startswith("by hand") else x for x in results])
        axes[2].yaxis.tick_right()
        axes[2].xaxis.set_major_formatter("{x:.0%}")
        axes[2].invert_yaxis()
        for share in (0.25, 0.5, 0.75):
            axes[2].axvline(share, color="black", linewidth=1, linestyle="--")


def main(argv=None):
    args = show.arguments(__doc__, __file__, seed=0, steps=400, seeds=3, parts=10).parse_args(argv)
    text, held_out = load_text()
    results = train_all(args, text, held_out)
    print_gradients(jax.tree.map(lambda x: x[0], results["usual"][0]), text, args.seed)
    print_results(results)
    draw(results, args.output)


if __name__ == "__main__":
    main()
