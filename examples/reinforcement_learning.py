"""Ten tasks with own data, an actor and a critic: PPO on rewards a hundred times apart, and where the bonus belongs.

A point is pushed to a goal, another one in each task; the networks are told the task one-hot. Environments, rollouts
and updates live in one ``scan``, seeds in a ``vmap``. With ``task_axis=0`` a loss is that of one task; the actor and
the critic have a method each. Advantages are normalised over the batch of all tasks, so that the scale of a task's
rewards comes through: the sum learns the tasks with large rewards. With ten tasks a sweep of fixed weights has one
parameter, the power of the scale that the weights take out. The learning rate is the best of three, the same one for
each method.

What is found: in percent of the best return, mean of the tasks, the sum has 62, UW 63, PCGrad and UPGrad 71, and the
best of four powers, one half, 72; with eight other seeds it was 63, 64, 68, 67 and 73. So PCGrad and UPGrad get most of
what the sweep gets, and no more. All learn the tasks with large rewards equally well; with small ones a seed succeeds
or fails, which makes the spread. UW looks at the losses, of which an actor's is about zero.

The entropy bonus is no task: nobody wants all of it, and its coefficient says how much. ``mtl.regularize`` holds it
outside of the method. Inside, as an eleventh task, it is not balanced away but grows: to the 4-fold weight of a task
with PCGrad, the 11-fold with UPGrad, whose gradient never lowers it, and the 300-fold with UW, whose weights grow where
a loss is negative. The entropy stays at 1.2 to 1.4 in place of 0.8 to 0.9, and returns are 71, 57 and 58.

Run it with ``python examples/reinforcement_learning.py``: about two minutes on two CPU cores. It needs
``mtlbalance[examples]``.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import show
from tqdm import tqdm

import mtlbalance as mtl
from mtlbalance import aggregation, scalarization

N_TASKS = 10
SCALES = np.geomspace(0.1, 10, N_TASKS)  # of the rewards
ANGLES = 2 * np.pi * 3 * np.arange(N_TASKS) / N_TASKS  # neighbours by scale are none in the plane
GOALS = 0.7 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
THRUSTS = 0.05 * np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
EPISODES, HORIZON, EPOCHS = 8, 24, 4  # of each task and update; steps on the data of an update
DISCOUNT, TRACE, CLIP, BONUS = 0.95, 0.95, 0.2, 0.03
RATES = 3e-3, 1e-3, 1e-2  # the first one is the best for each method
POWERS = 0.0, 0.25, 0.5, 1.0
BONUS_COLUMNS = "weight", "entropy", "return"


# The environments: a point in a box, that is pushed or not; the nearer to the task's goal, the more reward.


def observe(position, velocity):
    """With the task, one-hot: ``[..., tasks, episodes, 14]``."""
    task = jnp.broadcast_to(jnp.eye(N_TASKS)[:, None], (N_TASKS, EPISODES, N_TASKS))
    return jnp.concatenate([position, 4 * velocity, task], axis=-1)


def move(position, velocity, action):
    velocity = 0.8 * velocity + jnp.asarray(THRUSTS)[action]
    return jnp.clip(position + velocity, -1, 1), velocity


def closeness(position):
    """1 at the goal: the reward before it is scaled."""
    return jnp.exp(-jnp.sum((position - GOALS[:, None]) ** 2, axis=-1) / 0.5**2)


# The networks.


def init_params(key, n_outputs, gain):
    widths, keys = (4 + N_TASKS, 32, 32, n_outputs), jax.random.split(key, 3)
    draws = [jax.nn.initializers.orthogonal(scale) for scale in (np.sqrt(2), np.sqrt(2), gain)]
    shapes = itertools.pairwise(widths)
    return [(draw(key, shape), jnp.zeros(shape[1])) for draw, key, shape in zip(draws, keys, shapes, strict=True)]


def predict(params, observations):
    *hidden, (last, offset) = params
    x = observations
    for weight, bias in hidden:
        x = jnp.tanh(x @ weight + bias)
    return x @ last + offset


# The losses: each of one task, by its own data.


class Batch(NamedTuple):
    observations: Any
    actions: Any
    log_probs: Any
    advantages: Any
    targets: Any


def actor_loss(params, batch, is_bonus):
    """PPO's clipped loss of a task; or, in the last row, the entropy bonus of all of them."""
    log_probs = jax.nn.log_softmax(predict(params, batch.observations))
    ratio = jnp.exp(take(log_probs, batch.actions) - batch.log_probs)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    policy = -jnp.mean(jnp.minimum(ratio * batch.advantages, clipped * batch.advantages))
    return jnp.where(is_bonus, -N_TASKS * BONUS * jnp.mean(entropy_of(log_probs)), policy)


def critic_loss(params, batch):
    return jnp.mean((predict(params, batch.observations)[:, 0] - batch.targets) ** 2)


def take(log_probs, actions):
    return jnp.take_along_axis(log_probs, actions[..., None], axis=-1)[..., 0]


def entropy_of(log_probs):
    return -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


def with_bonus(batch):
    """The rows of the actor: those of the tasks, and one with states of all of them for the entropy bonus."""
    mixed = jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:])[:, ::N_TASKS], batch)
    return jax.tree.map(lambda *x: jnp.concatenate(x), batch, mixed), jnp.arange(N_TASKS + 1) == N_TASKS


# The data.


def roll_out(actor, critic, key):
    """A batch with the task axis first, and what to log."""
    start_key, key = jax.random.split(key)
    start = jax.random.uniform(start_key, (N_TASKS, EPISODES, 2), minval=-1.0, maxval=1.0)

    def step(state, key):
        observations = observe(*state)
        log_probs = jax.nn.log_softmax(predict(actor, observations))
        actions = jax.random.categorical(key, log_probs)
        state = move(*state, actions)
        return state, (observations, actions, log_probs, closeness(state[0]))

    end, steps = jax.lax.scan(step, (start, jnp.zeros_like(start)), jax.random.split(key, HORIZON))
    observations, actions, log_probs, near = steps
    values = predict(critic, jnp.concatenate([observations, observe(*end)[None]]))[..., 0]
    advantages = advantages_of(near * SCALES[:, None], values)
    targets = advantages + values[:-1]
    # Over all tasks, as usual: so their scales come through.
    advantages = (advantages - jnp.mean(advantages)) / jnp.std(advantages)
    batch = Batch(observations, actions, take(log_probs, actions), advantages, targets)
    batch = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0).reshape(N_TASKS, HORIZON * EPISODES, *x.shape[3:]), batch)
    return batch, {"return": jnp.mean(near, axis=(0, 2)), "entropy": jnp.mean(entropy_of(log_probs))}


def advantages_of(rewards, values):
    """Generalized advantage estimation, of values per step: discounted means in place of sums."""

    def back(advantage, step):
        reward, value, next_value = step
        error = (1 - DISCOUNT) * reward + DISCOUNT * next_value - value
        advantage = error + DISCOUNT * TRACE * advantage
        return advantage, advantage

    steps = rewards, values[:-1], values[1:]
    return jax.lax.scan(back, jnp.zeros_like(values[0]), steps, reverse=True)[1]


# The methods: one for the actor, which has the bonus as its last row, and one for the critic.


def outside(method):
    """The method decides on the tasks; the bonus has its own weight, whatever they get."""
    return mtl.regularize(method, {N_TASKS: 1.0})


def upgrad(n_tasks):
    # Without conflicts its weights are equal, of total 1: as in the other methods they are to be 1 each.
    return mtl.transform_weights(aggregation.upgrad(), optax.scale(float(n_tasks)))


def uw(n_tasks):
    # Its weights grow without bound where a loss is not above zero, as an actor's: so their total is kept.
    return mtl.transform_weights(mtl.learn(scalarization.uw(), optax.adam(1e-2)), mtl.weights.normalize(float(n_tasks)))


def by_scale(power):
    """Weights that take this power of the rewards' scales out of the actor's losses, and out of the errors' squares."""

    def weights(power):
        weights = SCALES**-power
        return weights * jnp.sum(SCALES) / jnp.sum(weights * SCALES)

    return scalarization.constant(jnp.append(weights(power), 1.0)), scalarization.constant(weights(2 * power))


# Of each the actor's and the critic's; those of the sweep are functions of the power.
METHODS = {
    "fixed": by_scale,
    "PCGrad": lambda _: (outside(aggregation.pcgrad()), aggregation.pcgrad()),
    "UPGrad": lambda _: (outside(upgrad(N_TASKS)), upgrad(N_TASKS)),
    "UW": lambda _: (outside(uw(N_TASKS)), uw(N_TASKS)),
    "PCGrad, inside": lambda _: (aggregation.pcgrad(), aggregation.pcgrad()),
    "UPGrad, inside": lambda _: (upgrad(N_TASKS + 1), upgrad(N_TASKS)),
    "UW, inside": lambda _: (uw(N_TASKS + 1), uw(N_TASKS)),
}
BALANCED = "PCGrad", "UPGrad", "UW"


# The training.


class Learner(NamedTuple):
    params: Any
    opt_state: Any
    state: Any


def descend(grad_fn, optimizer, learner, *batch):
    (_, state, weights), gradient = grad_fn(learner.params, learner.state, *batch)
    updates, opt_state = optimizer.update(gradient, learner.opt_state)
    return Learner(optax.apply_updates(learner.params, updates), opt_state, state), weights


def train(methods, n_updates, rate, start, key):
    """A whole training: what to log, ``[updates, ...]``."""
    optimizer = optax.adam(optax.linear_schedule(rate, 0.0, n_updates * EPOCHS))
    losses = actor_loss, critic_loss
    actor_grad, critic_grad = (
        mtl.value_and_grad(loss, method, task_axis=0, return_weights=True)
        for loss, method in zip(losses, methods, strict=True)
    )

    def epoch(batch, learners, _):
        actor, weights = descend(actor_grad, optimizer, learners[0], *with_bonus(batch))
        critic, _ = descend(critic_grad, optimizer, learners[1], batch)
        return (actor, critic), weights[-1] / jnp.mean(weights[:-1])

    def update(learners, key):
        batch, log = roll_out(learners[0].params, learners[1].params, key)
        learners, bonus = jax.lax.scan(partial(epoch, batch), learners, length=EPOCHS)
        return learners, log | {"bonus": jnp.mean(bonus)}

    batch, _ = jax.eval_shape(roll_out, *start, key)
    states = actor_grad.init(start[0], *jax.eval_shape(with_bonus, batch)), critic_grad.init(start[1], batch)
    learners = tuple(Learner(*of) for of in zip(start, map(optimizer.init, start), states, strict=True))
    return jax.lax.scan(update, learners, jax.random.split(key, n_updates))[1]


def draw_start(key):
    actor_key, critic_key = jax.random.split(key)
    return init_params(actor_key, len(THRUSTS), 0.01), init_params(critic_key, 1, 1.0)


def train_all(args):
    """The logs of all trainings, ``[seeds, updates, ...]``; each method's of all seeds are made by one program."""
    keys, start_keys = jax.random.split(jax.random.key(args.seed), (2, args.seeds))
    starts = jax.jit(jax.vmap(draw_start))(start_keys)
    rates, by_power, found = RATES if args.full else RATES[:1], {}, {}
    with tqdm(total=len(POWERS) + len(METHODS) - 1, unit="training") as progress:
        for name, build in METHODS.items():

            def train_one(power, rate, start, key, build=build):
                return train(build(power), args.updates, rate, start, key)

            progress.set_description(f"{name:14}")
            program = jax.jit(jax.vmap(train_one, in_axes=(None, None, 0, 0)))
            for power in POWERS if name == "fixed" else (0.0,):
                log = max((jax.device_get(program(power, rate, starts, keys)) for rate in rates), key=mean_return)
                if name == "fixed":
                    by_power[power] = log
                else:
                    found[name] = log
                progress.update()
    return by_power, found


# The results.


def final(values):
    """The mean of the last tenth of the updates, for each seed."""
    return np.mean(values[:, -max(values.shape[1] // 10, 1) :], axis=1)


def mean_return(log):
    return np.mean(final(log["return"]))


def spread(returns):
    """In percent."""
    return show.spread(100 * returns, 0)


def print_returns(compared, by_power):
    returns = [final(log["return"]) for log in compared.values()]
    rows = [(f"{scale:.2g}", *(spread(x[:, task]) for x in returns)) for task, scale in enumerate(SCALES)]
    rows.append(("mean", *(spread(np.mean(x, axis=1)) for x in returns)))
    swept = ", ".join(f"{power:g}: {spread(final(log['return']).mean(axis=1))}" for power, log in by_power.items())
    at_first = 100 * np.mean([log["return"][:, 0] for log in compared.values()])
    about = "In percent of standing on the goal all the time; mean and standard deviation over the seeds. Thrusts at "
    about += f"random get {at_first:.0f}. Fixed: the weight of a task is the scale of its rewards to the power -p, for "
    about += f"the critic -2p. Means by p: {swept}; the column is the best one by these."
    show.print_table("Returns by the scale of the task's rewards", ("scale", *compared), rows, about)


def print_bonus(found):
    rows = []
    for name in (f"{name}{where}" for name in BALANCED for where in ("", ", inside")):
        log = {key: final(values) for key, values in found[name].items()}
        means = f"{np.mean(log['bonus']):.1f}", f"{np.mean(log['entropy']):.2f}"
        rows.append((name, *means, spread(np.mean(log["return"], axis=1))))
    about = "weight: that of the bonus over the mean weight of the tasks. entropy: at most log 5 = 1.61. return: the "
    about += "mean of the tasks. Outside the bonus has weight 1, and the tasks what the method gives them."
    show.print_table("The entropy bonus outside and inside of the method", ("", *BONUS_COLUMNS), rows, about)


def draw_band(ax, curves, style="-", **options):
    """The mean of the seeds and their standard deviation."""
    x, mean, deviation = 1 + np.arange(curves.shape[1]), curves.mean(axis=0), curves.std(axis=0)
    ax.plot(x, mean, style, **options)
    ax.fill_between(x, mean - deviation, mean + deviation, color=options["color"], alpha=0.15, linewidth=0)


def draw(compared, found, output):
    with show.picture(output, "Returns and entropies", 1, 3, figsize=(9.6, 3.8)) as (fig, (learning, tasks, entropy)):
        for i, (name, log) in enumerate(compared.items()):
            color = ("0.2", "0.6", "C0", "C1", "C2")[i]
            width = np.linspace(4, 1.2, len(compared))[i]  # thick below thin, where they coincide
            draw_band(learning, 100 * log["return"].mean(axis=-1), color=color, label=name, linewidth=width)
            percents = 100 * final(log["return"])
            tasks.plot(SCALES, percents.mean(axis=0), "o-", color=color, markersize=3, linewidth=width)
            for where, line in (("", "-"), (", inside", "--")) if name in BALANCED else ():
                draw_band(entropy, found[f"{name}{where}"]["entropy"], line, color=color)
        for where, line in (("bonus outside", "-"), ("inside", "--")):
            entropy.plot([], [], line, color="0.2", label=where)
        learning.set(title="return, mean of the tasks", xlabel="update", ylabel="percent of the best", ylim=(0, 85))
        tasks.set(title="return of each task", xlabel="scale of its rewards", xscale="log", ylim=(0, 85))
        entropy.set(title="entropy of the policy", xlabel="update", ylim=(0, 1.65))
        entropy.legend(loc="lower left")
        fig.legend(*learning.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


def main(argv=None):
    parser = show.arguments(__doc__, __file__, seed=0, updates=120, seeds=8)
    parser.add_argument("--full", action="store_true", help="three learning rates, and of each method the best one")
    args = parser.parse_args(argv)
    by_power, found = train_all(args)
    best = max(by_power, key=lambda power: mean_return(by_power[power]))
    compared = {"sum": by_power[0.0], f"fixed, p = {best:g}": by_power[best]}
    compared |= {name: found[name] for name in BALANCED}
    print_returns(compared, by_power)
    print_bonus(found)
    draw(compared, found, args.output)


if __name__ == "__main__":
    main()
