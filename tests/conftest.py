"""Eight simulated devices and no silent broadcasting for every test; compiled programs are kept for the next run.

Scripts that need torch are run by hand, not collected.
"""

import collections
import fnmatch
import functools
import gc
import hashlib
import itertools
import os
import platform
import re
from pathlib import Path

# The matrices here are so small that threads wait for each other: NumPy's `eigh` of 40 rows takes thirty times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import jaxlib
import pytest

# Without XLA's newer emitters of fused loops compiling takes half the time. Users have them, so `.ci/run` runs what
# depends on how operations are fused once more, with them. XLA stops at flags that it does not know any more.
EMITTERS = "xla_cpu_use_fusion_emitters"
QUICK = f"--{EMITTERS}=false --xla_cpu_parallel_codegen_split_count=1"
if EMITTERS not in os.environ.get("XLA_FLAGS", "") and jaxlib.version.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"

# Tracing makes many short-lived objects: looking for cycles, and noting for each operation which line made it, are a
# sixth of the suite's time. To leave its own lines out of an error JAX looks up the file of each, a thousand at times.
gc.set_threshold(50_000, 10, 10)
jax.config.update("jax_traceback_in_locations_limit", 0)
jax.config.update("jax_traceback_filtering", "off")

# JAX before 0.12 makes an MLIR context for each program, which is half the time of a small one that is compiled already
# (3.8 of 7.4 ms). One serves for all.
if jax.__version_info__ < (0, 12):
    from jax._src.interpreters import mlir

    mlir.make_ir_context = functools.cache(mlir.make_ir_context)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")  # as some users have it: axes are added where they are meant

# Each run repeats the last one; `--hypothesis-profile=explore` draws others, by `--hypothesis-seed`.
hypothesis.settings.register_profile("explore", derandomize=False)
hypothesis.settings.register_profile("repeat", derandomize=True)
hypothesis.settings.load_profile("repeat")

collect_ignore_glob = ["benchmarks/*", "golden/record*.py", "typing/*"]
finished = itertools.count(1)
MOST_MAPS = 40_000  # of the 65530 pieces of memory that Linux lets a process map: each program takes a few


def pytest_addoption(parser):
    parser.addoption("--catalogue", help="file with lists SCALARIZERS, AGGREGATORS of tests.catalogue.Case to check")


def pytest_configure(config):
    """Keeps every program, the small ones too, also of the scripts that tests run: compiling is what costs time."""
    settings = {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and hasattr(config, "cache"):
        settings["jax_compilation_cache_dir"] = str(config.cache.mkdir(f"jax-{machine()}"))
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def machine():
    """Programs are for one type of processor and one release of XLA: elsewhere they could crash."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = [x for x in cpuinfo.read_text().splitlines() if x.startswith("flags")] if cpuinfo.exists() else []
    name = [jaxlib.__version__, platform.machine(), platform.processor(), *flags[:1]]
    return hashlib.sha256("\n".join(name).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def users_broadcast():
    """Code that stands for users' own, as the examples, adds a bias to every row without saying so."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under xdist a file's tests, and in conformance a method's, share a process and with it what they compile."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            if "test_long_runs" in nodeid:  # with all optimizations: no other check has a use for its programs
                return nodeid
            method = re.match(
                r"tests/conformance/.*\b((scalarization|aggregation)-((skip|amortize|chain)-)*\w+)", nodeid
            )
            return method[1] if method else nodeid.split("::")[0]

    config.option.loadscopereorder = False  # the small groups last, so that the processes end together
    return Scheduler(config, log)


def pytest_collection_modifyitems(config, items):
    """Marks as slow what ``by_default`` leaves out."""
    marked = collections.defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("by_default"):
            marked[mark.args].append(item)
    for patterns, cases in marked.items():
        others = [case for case in cases if not runs_by_default(case, patterns)]
        chosen = config.getoption("catalogue") or any("::" in argument for argument in config.args)
        if len(others) == len(cases) and not chosen:
            raise pytest.UsageError(f"{cases[0].nodeid}: nothing matches by_default{patterns}")
        for item in others:
            item.add_marker(pytest.mark.slow)


def runs_by_default(item, patterns):
    names = item.name, item.callspec.id if hasattr(item, "callspec") else ""
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


@pytest.fixture(autouse=True)
def forget_compiled_programs():
    """Before there are so many that the process may not map any more memory."""
    yield
    if next(finished) % 20 == 0 and n_maps() > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def optimized_unless_marked(request):
    """``unoptimized`` marks what tests equations, and not what fusing makes of them: half as long to compile.

    Not where programs are compiled as users' are.
    """
    as_users = f"{EMITTERS}=true" in os.environ.get("XLA_FLAGS", "")
    unoptimized = not as_users and request.node.get_closest_marker("unoptimized") is not None
    if unoptimized != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", unoptimized)


def n_maps():
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0
