"""What weights from a Gramian keep beside it, as XLA reports it."""

import jax
import numpy as np
import pytest

from tests.catalogue import AGGREGATORS

M = 128  # tasks
METHODS = {case.name: case.make for case in AGGREGATORS if not case.per_task}
GRAMIAN_METHODS = {name: make for name, make in METHODS.items() if make().gramian_weighting is not None}


@pytest.mark.parametrize("name", GRAMIAN_METHODS)
@pytest.mark.by_default("upgrad")
def test_weights_keep_a_few_matrices_of_the_gramians_size(name):
    method = GRAMIAN_METHODS[name]()
    state = jax.eval_shape(lambda: method.init((M, np.zeros(2, np.float32))))
    gramian = np.zeros((M, M), np.float32)
    values = np.ones(M, np.float32)
    compiled = jax.jit(method.gramian_weighting.apply).lower(state, gramian, values=values).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 48 * gramian.nbytes  # M at once: 128
