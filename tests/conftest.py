"""Eight simulated devices for every test; scripts that need torch are run by hand, not collected."""

import itertools

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

collect_ignore_glob = ["benchmarks/*", "golden/record*.py"]
finished = itertools.count(1)


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    """Each maps some memory, of which Linux gives a process 65530 pieces: a few thousand programs would crash it."""
    yield
    if next(finished) % 200 == 0:
        jax.clear_caches()
