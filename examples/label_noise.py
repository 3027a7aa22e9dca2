"""Noise in the training labels of one task: which methods chase it, which starve it, and does the clean task suffer?

Two digits lie on top of each other. A part of the labels of one, from none to 80%, is drawn at random; the other's are
right, and so are all in the tests. A thousand pairs are trained on: a trunk of two layers of 32 learns them by heart,
one of 12 cannot. He et al. 2024 say that methods that follow losses or gradients give a noisy task the weight, to the
harm of the others, and that ExcessMTL does not. It is compared with them here, at the step size of its official code
and at TorchJD's default, with and without the paper's warm-up of three epochs, and with fixed weights.

Found (means and standard errors of eight seeds, at 80% noise unless it says otherwise):

* GroupDRO and GradNorm do give the noisy task 89 to 100% of the weight. The clean one is then read by 74% and 83% at
  width 32 (92% with equal weights), by 48% and 70% at width 12 (89%).
* UW and IMTL-L leave the noisy task 0 to 3%, which helps the clean one: 94% at width 32. The noisy one is read by 24%
  in place of 34%.
* ExcessMTL at width 32 raises the noisy task's share to 60 ± 3%, after a warm-up to 91%, where the clean task is read
  by 88%; with step 1 it is read by 83 ± 4%, and by 72 ± 7% at 40% noise. At width 12 the share falls, as claimed, to
  43 ± 1% and 33 ± 5%. With step 1 it falls to nothing, and the clean task is read by 91.4 ± 0.6% in place of
  88.5 ± 0.4%; but the same step without any noise starves one of two like tasks, as the first batch will have it: what
  would be the noisy one is read by 47 ± 13% in place of 81 ± 2%.
* A fixed 10% for the noisy task: the clean one is read by 94.1 ± 0.3% and 90.7 ± 0.4%, and no method's is better by
  more than the errors of both, without noise, at 40% and at 80%. At width 32 it costs the noisy task three points
  without noise and at 80%, none at 40%.

What decides it: the excess of a call, g² over the root of the sum of all g² so far, adds up over the calls to about
twice that root. So the log-weight is about 2 η times the root over the baseline, the first batch's gradient: weight
goes to the task whose gradients have stayed larger, whatever it has left to learn. From a batch a noisy task's do not
vanish; the clean one's do, once it is learned. ``--search`` trains in 25 ways, most with one thing changed. At 80%
noise and step 0.01 the noisy task has more than half of the weight, by more than the standard error, in 15: as
compared, one or four layers, width 64, batches of 10 or 250, 200 pairs, more steps, SGD, labels that are new at every
look or the next digit's, noise in the pixels or normal noise in squared errors, a warm-up, TorchJD's first call. It has
about half in four: 10000 pairs, fewer steps, a lower learning rate, squared errors. It has less in six: width 12 (43 ±
1%) and weight decay (44 ± 1%), which leave no room to fit the noise; the same after a warm-up, which strengthens either
direction (33 ± 5%, 32 ± 1%, by SGD 14 ± 5%); and squared errors after a warm-up (45 ± 1%). There the clean task gains
at most 1.4 ± 0.4 points on equal weights. At 40% noise two of the six have less than half, width 12 by SGD (35 ± 9%;
the clean task gains 3.2 ± 1.4 points) and squared errors (47 ± 1%), both after a warm-up, and 16 have more.

He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024, https://arxiv.org/abs/2402.02009; the noise is
that of https://github.com/yifei-he/ExcessMTL, drawn once.

Run it with ``python examples/label_noise.py``: about two minutes on two CPU cores; ``--search`` takes five. It needs
``mtlbalance[examples]``.
"""

from functools import partial

import jax
import numpy as np
import optax
import show
from digits import draw_pairs, load_images
from noisy_digits import TASKS, Setting, add_normal, cover, draw_all, next_digit, train_all
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

LEVELS = 0.0, 0.2, 0.4, 0.6, 0.8
SHOWN = 0.0, 0.4, 0.8  # in the tables, and those of the search
WIDTHS = 32, 12
STEP_SIZES = 0.01, 1.0  # the official code's and TorchJD's default
FIXED = 0.1, 0.25, 0.5, 0.75, 0.9  # the noisy task's share


# The methods, given their knob; and the names of what comes out for each.


def fixed(share):
    return scalarization.constant({"clean": 1 - share, "noisy": share})


def warm_excess(setting, step_size):
    """With a baseline that is the mean of three epochs, as in appendix C.1 of the paper."""
    return aggregation.excess_mtl(step_size, 3 * setting.epoch)


def make_kinds(setting):
    """Each is a function of a knob, and what comes out for some of its values has a name."""
    learned = lambda method: lambda _: mtl.learn(method, optax.adam(1e-2))
    single = lambda method: lambda _: method
    names = [f"noisy task {share:.0%}" if share != 0.5 else "equal weights" for share in FIXED]
    return [
        (fixed, FIXED, names),
        (aggregation.excess_mtl, STEP_SIZES, [f"ExcessMTL, step {size:g}" for size in STEP_SIZES]),
        (partial(warm_excess, setting), STEP_SIZES, [f"ExcessMTL, {size:g}, warm-up" for size in STEP_SIZES]),
        (single(scalarization.group_dro()), (0.0,), ["GroupDRO"]),
        (single(aggregation.gradnorm()), (0.0,), ["GradNorm"]),
        (learned(scalarization.uw(classification=True)), (0.0,), ["UW"]),
        (learned(scalarization.imtl_l()), (0.0,), ["IMTL-L"]),
        (single(scalarization.dwa(steps_per_epoch=setting.epoch)), (0.0,), ["DWA"]),
    ]


def compare(setting, data, seeds, progress):
    """All methods, one program for each kind: what came out by name, ``[level, seed]``."""
    digits, test_pairs = data
    found, drawn = {}, draw_all(setting, digits, LEVELS, seeds)
    for make_method, knobs, names in make_kinds(setting):
        of_kind = train_all(setting, make_method, test_pairs, drawn, knobs)
        del of_kind["state"]
        found |= {name: jax.tree.map(lambda x, i=i: x[i], of_kind) for i, name in enumerate(names)}
        progress.update()
    return found


# The search: what is changed, one at a time, from the training of the comparison; and some of it together.


def make_search(steps):
    base = Setting(steps=steps)
    change = lambda **changes: (base._replace(**changes), aggregation.excess_mtl)
    warm = lambda **changes: (base._replace(**changes), partial(warm_excess, base._replace(**changes)))
    first = lambda step_size: aggregation.excess_mtl(step_size, normalize_first_step=False)
    decay = lambda lr: optax.adamw(lr, weight_decay=1.0)
    sgd = {"optimizer": optax.sgd, "lr": 0.1}
    return {
        "as compared": change(),
        "warm-up of 3 epochs": warm(),
        "first call by the raw excess": (base, first),
        "1/5 of the steps": change(steps=steps // 5),
        "4 times the steps": change(steps=4 * steps),
        "1 layer": change(depth=1),
        "4 layers": change(depth=4),
        "width 64": change(width=64),
        "batches of 10": change(batch=10),
        "batches of 250": change(batch=250),
        "200 pairs": change(pairs=200),
        "10000 pairs": change(pairs=10_000),
        "learning rate / 10": change(lr=3e-4),
        "SGD": change(**sgd),
        "other labels at every look": change(again=True),
        "the next digit's label": change(noise=next_digit),
        "pixels, no wrong label": change(noise=cover),
        "squared errors": change(squared=True),
        "the same, normal noise": change(squared=True, noise=add_normal),
        "weight decay 1": change(optimizer=decay),
        "width 12": change(width=12),
        "weight decay 1, warm-up": warm(optimizer=decay),
        "squared errors, warm-up": warm(squared=True),
        "width 12, warm-up": warm(width=12),
        "width 12, warm-up, SGD": warm(width=12, **sgd),
    }


def search(setting, make_method, data, seeds):
    """Equal weights and both step sizes in one program."""
    digits, test_pairs = data
    drawn = draw_all(setting, digits, SHOWN, seeds)
    found = train_all(setting, make_method, test_pairs, drawn, (0.0, *STEP_SIZES))
    state = found.pop("state")
    roots = [np.sqrt(x).reshape(*x.shape[:4], -1).sum(-1) for x in jax.tree.leaves(state.squared_gradients)]
    found["gradients"] = (sum(roots) / state.baseline / np.sqrt(setting.steps))[0]
    return found


# The results.


def plus_minus(x, factor=100, digits=1, sign=""):
    """Mean of the seeds, and its standard error."""
    x = factor * np.asarray(x)
    error = np.std(x, ddof=min(1, x.size - 1)) / np.sqrt(x.size)
    return f"{np.mean(x):{sign}.{digits}f} ± {error:.{digits}f}"


def is_lost(found, task):
    """In which trainings a task is read less than half as well as with equal weights."""
    return {name: np.sum(x["test"][task] < 0.5 * found["equal weights"]["test"][task]) for name, x in found.items()}


def print_comparison(found, setting):
    levels = [LEVELS.index(level) for level in SHOWN]
    lost = {task: is_lost(found, task) for task in TASKS}
    rows = []
    for name, x in found.items():
        cells = [plus_minus(x["test"][task][i]) for task in TASKS for i in levels]
        share = plus_minus(x["share"][levels[-1], :, -1], digits=0)
        rows.append((name, *cells, share, f"{lost['clean'][name]}, {lost['noisy'][name]}"))
    columns = [f"{task} {level:.0%}" for task in TASKS for level in SHOWN]
    n_runs = x["share"].shape[0] * x["share"].shape[1]
    about = "Accuracy on clean test pairs in percent, by the part of the noisy task's training labels drawn at random; "
    about += f"share: of the weight, the noisy task's at the end, at {SHOWN[-1]:.0%}. Means and standard errors of the "
    about += f"seeds. lost: of {n_runs} trainings, those in which the clean and the noisy task are read less than half "
    about += "as well as with equal weights."
    read = np.mean(found["equal weights"]["training"]["clean"][0])
    title = f"Width {setting.width}, where equal weights read {read:.0%} of the clean training digits"
    show.print_table(title, ("weights", *columns, "share", "lost"), rows, about, width=132)


def print_search(found, level):
    i, rows = SHOWN.index(level), []
    for name, x in found.items():
        test, gradients = x["test"], x["gradients"][i].mean(axis=0)
        row = [f"{x['training']['clean'][0, i].mean():.0%}", *(f"{g:.2f}" for g in gradients)]
        for k in range(1, 1 + len(STEP_SIZES)):
            row.append(plus_minus(x["share"][k, i, :, -1], digits=0))
            row += [plus_minus(test[task][k, i] - test[task][0, i], sign="+") for task in TASKS]
        rows.append((name, *row))
    columns = [f"{of} {size:g}" for size in STEP_SIZES for of in ("share", "clean", "noisy")]
    about = "fit: of the clean task's training digits, those read with equal weights. gradients: the root of the mean "
    about += (
        "square of those of the clean and the noisy task over the training, over the baseline. Then, for both step "
    )
    about += (
        "sizes: the noisy task's share of the weight at the end, and in points of accuracy on clean test pairs how "
    )
    about += "much better each task is read than with equal weights of the same seed. Means and standard errors."
    title = f"ExcessMTL with {level:.0%} noise in one task"
    show.print_table(title, ("changed", "fit", "gradients", "", *columns), rows, about, width=132, padding=(0, 0))


def styles():
    """By name, of what is drawn: with a warm-up the same colour, dashed."""
    names = [f"noisy task {FIXED[0]:.0%}", "equal weights", "GroupDRO", "GradNorm", "UW", "IMTL-L", "DWA"]
    drawn = dict(zip(names, ("0.6", "0.2", "C1", "C2", "C4", "C9", "C8"), strict=True))
    drawn = {name: {"color": color} for name, color in drawn.items()}
    for size, color in zip(STEP_SIZES, ("C0", "C3"), strict=True):
        drawn[f"ExcessMTL, step {size:g}"] = {"color": color, "linewidth": 2}
        drawn[f"ExcessMTL, {size:g}, warm-up"] = {"color": color, "linewidth": 2, "linestyle": "--"}
    return drawn


def draw(found, steps, output):
    """For each width: the noisy task's share of the weight over the training, and how well the clean task is read."""
    size = {"figsize": (8.6, 1.2 + 2.8 * len(found)), "sharex": "col", "squeeze": False}
    with show.picture(output, "Shares and accuracies", len(found), 2, **size) as (fig, axes):
        for (left, right), (width, of_width) in zip(axes, found.items(), strict=True):
            for name, style in styles().items():
                shares = of_width[name]["share"][-1]
                middles = steps * (np.arange(shares.shape[1]) + 0.5) / shares.shape[1]
                left.plot(middles, shares.mean(axis=0), label=name, **style)
                right.plot(LEVELS, of_width[name]["test"]["clean"].mean(axis=1), marker="o", markersize=3, **style)
            left.set(title=f"width {width}, {LEVELS[-1]:.0%} noise", ylabel="noisy task's share of the weight")
            right.set(title=f"width {width}", ylabel="accuracy of the clean task")
            left.set_ylim(-0.03, 1.03)
        axes[-1, 0].set_xlabel("step (mean of the seeds)")
        axes[-1, 1].set_xlabel("noise: part of the labels drawn at random")
        fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def main(argv=None):
    parser = show.arguments(__doc__, __file__, steps=1000, seeds=8)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the trunk")
    parser.add_argument("--search", action="store_true", help="other trainings, with ExcessMTL alone")
    args = parser.parse_args(argv)
    train_digits, test_digits = load_images()
    data = train_digits, draw_pairs(jax.random.key(0), test_digits, 2000)

    if args.search:
        settings = make_search(args.steps).items()
        found = {name: search(*how, data, args.seeds) for name, how in tqdm(settings, unit="training")}
        for level in SHOWN:
            print_search(found, level)
        return
    settings = [Setting(width=width, steps=args.steps) for width in args.widths]
    with tqdm(total=len(settings) * len(make_kinds(settings[0])), unit="method") as progress:
        found = {setting.width: compare(setting, data, args.seeds, progress) for setting in settings}
    for setting in settings:
        print_comparison(found[setting.width], setting)
    draw(found, args.steps, args.output)


if __name__ == "__main__":
    main()
