"""The names, shapes and dtypes of every state, as ``states.json`` pins them for three tasks and the checks' parameters.

``python -m tests.states`` writes the file anew.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import mtlbalance as mtl
from tests.checkpoints import cases, flat_names

FILE = Path(__file__).with_name("states.json")


def learned_on_other_data():
    """The state of the one step that is no method."""
    grad_fn = mtl.auto_lambda(lambda params: params * jnp.ones(3), optax.sgd(0.1))
    return grad_fn.init(jnp.zeros(()))


def found():
    """By the rows of the catalogue and in the order of the fields, as ``"float32[3,4]"``."""
    inits = {name: built.init for name, built in cases().items()} | {"auto_lambda": learned_on_other_data}
    states = {name: jax.eval_shape(init) for name, init in inits.items()}
    return {name: {field: described(x) for field, x in flat_names(state).items()} for name, state in states.items()}


def described(x):
    return f"{x.dtype}[{','.join(map(str, x.shape))}]"


def pinned():
    return json.loads(FILE.read_text())


def write(states):
    """A line for each state, so that a difference shows which."""
    lines = [f"{json.dumps(name)}: {json.dumps(fields)}" for name, fields in states.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write(found())
