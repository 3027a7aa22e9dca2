"""What a balanced step keeps beside its arguments and results, as XLA reports it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtlbalance as mtl
from mtlbalance import aggregation
from tests.autodiff.models import normal_batch, normal_layers, squared_errors

# With tanh the plain gradient keeps half as much, and two passes the same: 3 to 5 times as much.
LOSSES = partial(squared_errors, activation=jax.nn.relu)
SIZES = {(2, 512, 256), (8, 512, 256), (32, 512, 256), (8, 1024, 64)}  # tasks, width, batch


def problem(m, width, batch_size):
    params = normal_layers(0, [64, width, width, width, m])
    return params, normal_batch(1, batch_size, n_in=64, n_out=m)


def like_state(method, m, params):
    return jax.eval_shape(lambda: method.init((m, params)))


def temporaries(step, *args, donate=(), **kwargs):
    compiled = jax.jit(step, donate_argnums=donate).lower(*args, **kwargs).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def plain_step(params, batch):
    return jax.grad(lambda params: jnp.sum(LOSSES(params, batch)))(params)


def two_pass_temporaries(m, width, batch_size):
    params, batch = problem(m, width, batch_size)
    method = aggregation.upgrad()
    step = mtl.value_and_grad(LOSSES, method, rows="two_pass")
    return temporaries(step, params, like_state(method, m, params), batch)


@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.slow
def test_two_passes_keep_three_plain_gradients_at_most(size):
    assert two_pass_temporaries(*size) <= 3 * temporaries(plain_step, *problem(*size))


def test_what_two_passes_keep_does_not_grow_with_the_tasks():
    kept = [two_pass_temporaries(m, 512, 256) for m in (2, 8, 32)]
    assert max(kept) <= 1.2 * min(kept)


@pytest.mark.parametrize("size", sorted(SIZES))
@pytest.mark.parametrize("wrap", [lambda method: method, mtl.skip_nonfinite], ids=["bare", "skip_nonfinite"])
@pytest.mark.by_default("skip_nonfinite-size1")
def test_streamed_rows_keep_three_times_the_parameters_at_most(size, wrap):
    """Beside the state, which is donated, and what the plain gradient keeps; also inside an outer scan."""
    params, batch = problem(*size)
    method = wrap(aggregation.excess_mtl())
    state = like_state(method, size[0], params)
    grad_fn = mtl.value_and_grad(LOSSES, method, rows="stream")
    allowed = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    kept = temporaries(grad_fn, params, state, batch, donate=1)
    assert kept <= temporaries(plain_step, params, batch) + allowed

    def descend(params, gradient):
        return jax.tree.map(lambda x, g: x - 0.1 * g, params, gradient)

    def train(params, state, batches):
        def step(carry, batch):
            (losses, state), gradient = grad_fn(*carry, batch)
            return (descend(carry[0], gradient), state), losses

        return jax.lax.scan(step, (params, state), batches)

    def train_plainly(params, batches):
        step = lambda params, batch: (descend(params, plain_step(params, batch)), None)
        return jax.lax.scan(step, params, batches)

    batches = jax.tree.map(lambda x: np.stack([x] * 3), batch)
    kept = temporaries(train, params, state, batches, donate=(0, 1))
    assert kept <= temporaries(train_plainly, params, batches, donate=0) + allowed


OTHERS = {
    "db_mtl": aggregation.db_mtl(beta=0.9),
    "gradnorm": aggregation.gradnorm(),
    "m_config": aggregation.m_config(),
    "moco": aggregation.moco(),
    "transform_rows": mtl.transform_rows(aggregation.db_mtl(beta=0.9), optax.trace(0.9)),
}


@pytest.mark.parametrize("method", OTHERS.values(), ids=OTHERS)
@pytest.mark.by_default("m_config", "transform_rows")
def test_others_that_stream_rows_keep_as_little(method):
    """As above, at one size: what is remembered is changed in place, also by a single visit."""
    params, batch = problem(8, 512, 256)
    step = mtl.value_and_grad(LOSSES, method, rows="stream")
    kept = temporaries(step, params, like_state(method, 8, params), batch, donate=1)
    allowed = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert kept <= temporaries(plain_step, params, batch) + allowed


@pytest.mark.slow
def test_a_single_visit_keeps_as_little_under_vmap():
    """Three seeds: the loop's condition is the same for all, or each would select between whole states."""
    params, batch = problem(8, 512, 256)
    repeated = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), tree)
    method = aggregation.m_config()
    params, state = jax.tree.map(lambda x: np.stack([x] * 3), params), repeated(like_state(method, 8, params))
    step = jax.vmap(mtl.value_and_grad(LOSSES, method), in_axes=(0, 0, None))
    kept = temporaries(step, params, state, batch, donate=1)
    allowed = 3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert kept <= temporaries(jax.vmap(plain_step, (0, None)), params, batch) + allowed


@pytest.mark.parametrize("of", ["excess_mtl", "mgda"])
@pytest.mark.by_default("excess_mtl")
def test_a_mask_or_a_guard_writes_out_no_rows(of):
    """Of a wide Jacobian: beside what the bare call keeps, a sum of its rows or two."""
    m, jacobian = 4, {"w": np.ones((4, 64, 1024), np.float32), "b": np.ones((4, 1024), np.float32)}
    params = jax.tree.map(lambda x: x[0], jacobian)
    bare = getattr(aggregation, of)()

    def kept(method, mask):
        values = np.ones(m, np.float32)
        return temporaries(
            partial(method.apply, values=values), like_state(method, m, params), jacobian, donate=0, mask=mask
        )

    allowed = kept(bare, None) + 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for method, mask in (bare, np.ones(m, bool)), (mtl.skip_nonfinite(bare), np.ones(m, bool)):
        assert kept(method, mask) <= allowed
