"""For every test: 32 virtual CPU devices, random inputs that differ from run to run, skips without the accelerator.

There are two tiers: `make test` leaves out what is marked slow, and of the cases of a test those that its mark `quick`
does not name; `make test-all` leaves out nothing.

Random inputs come from the fixture `rng`, seeded by MOEJAX_TEST_SEED and the test's name. The seed is drawn anew for
each run unless the environment sets it, and a failing run names it.
"""

import fnmatch
import gc
import importlib.util
import os
import pathlib
import shutil
import zlib

import jax
import numpy as np
import pytest

SEED = "MOEJAX_TEST_SEED"
PROGRAMS = pathlib.Path(__file__).parent.parent / ".jax_cache"
MOST_PROGRAMS = 2e9
"""Bytes of programs with which a run begins; more are thrown away."""

MAPS = pathlib.Path("/proc/self/maps")
MOST_MAPS = 16_000
"""Maps of a process with which a module of tests may begin."""

# Traces make millions of objects and hardly a cycle that holds much; each full collection looks at all of them.
gc.set_threshold(100_000, 20, 100)

if os.environ.get("JAX_PLATFORMS", "") in ("", "cpu"):
    jax.config.update("jax_num_cpu_devices", 32)
    # Callbacks, of which interpret mode is made, can hang a CPU that dispatches asynchronously (jax issue 25861).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # What workers, modules and runs have in common is compiled once.
    jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
# Tests compile many programs and run each on little data.
_QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_prefer_vector_width=128",
    "--xla_gpu_autotune_level=0",
)
os.environ.setdefault("XLA_FLAGS", " ".join(_QUICK_TO_COMPILE))


def pytest_configure(config):
    if importlib.util.find_spec("hypothesis"):  # a GPU machine's own Python may lack it
        import hypothesis

        examples = 8 if config.option.markexpr == "not slow" else 25
        hypothesis.settings.register_profile("moejax", deadline=None, max_examples=examples, print_blob=True)
        hypothesis.settings.load_profile("moejax")
    # The workers of pytest-xdist inherit the controller's environment, and so its seed.
    os.environ.setdefault(SEED, str(int.from_bytes(os.urandom(4))))
    is_controller = "PYTEST_XDIST_WORKER" not in os.environ
    if is_controller and sum(path.stat().st_size for path in PROGRAMS.glob("*")) > MOST_PROGRAMS:
        shutil.rmtree(PROGRAMS)


@pytest.hookimpl(tryfirst=True)  # before those marked slow are left out
def pytest_collection_modifyitems(config, items):
    """Marks as slow what `quick` leaves out: of a test's cases, all that none of its patterns names; and sorts."""
    unused = {}
    for item in items:
        for mark in item.iter_markers("quick"):
            if not hasattr(item, "callspec"):
                raise pytest.UsageError(f"{item.nodeid}: quick is for tests with parameters")
            named = [pattern for pattern in mark.args if fnmatch.fnmatchcase(item.callspec.id, pattern)]
            unused.setdefault((item.location[0], item.originalname, mark.args), set(mark.args)).difference_update(named)
            if not named:
                item.add_marker(pytest.mark.slow)
    missing = [f"{file}::{name}: {sorted(patterns)}" for (file, name, _), patterns in unused.items() if patterns]
    if missing and not config.getoption("lf") and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"quick names cases that there are not: {'; '.join(missing)}")
    # Whole programs, which lie highest and take longest, begin first, so that no worker waits for one at the end.
    items.sort(key=lambda item: len(item.path.parts))


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay as they are


def pytest_report_header(config):
    return f"{SEED}={os.environ[SEED]}"


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.stats.get("failed") or terminalreporter.stats.get("error"):
        terminalreporter.write_line(f"To repeat these random inputs: {SEED}={os.environ[SEED]}")


def pytest_runtest_setup(item):
    for platform in ("gpu", "tpu"):
        if item.get_closest_marker(platform) and jax.default_backend() != platform:
            pytest.skip(f"needs a {platform.upper()}, and jax runs on {jax.default_backend()}")


@pytest.fixture(autouse=True, scope="module")
def _few_programs_left():
    """Forgets compiled programs when a CPU has many: each is mapped into memory, and Linux grants a process 65530 maps.

    Modules share what is small and common; on a GPU, whose memory programs take too, they share nothing.
    """
    yield
    if jax.default_backend() != "cpu" or (MAPS.exists() and MAPS.read_text().count("\n") > MOST_MAPS):
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers of this run's seed and this test."""
    return np.random.default_rng([int(os.environ[SEED]), zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(scope="module")
def own_transports():
    """The tests' own transports are among those there are."""
    from sharding.exchange.pick import TRANSPORTS
    from tests.sharding.exchange import gathered
    from tests.sharding.exchange.routed import AsOnGpus

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRANSPORTS, "gathered", gathered)
        patch.setitem(TRANSPORTS, "routed", AsOnGpus("auto"))
        yield
