"""The world of the tests is strict: no silent promotion, no warning, eight devices."""

import gc
import os
import sys
import zlib
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Two threads on a busy machine wait for each other longer than a small matrix takes.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Programs here run for milliseconds: the time goes into compiling, and optimised code
# takes twice as long to make.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
)

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
# No test reads where an operation was written; telling it takes a tenth of a compile.
jax.config.update("jax_traceback_in_locations_limit", 0)
if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# Traces are millions of objects, few of them garbage.
gc.set_threshold(100_000, 20, 20)

hypothesis.settings.register_profile(
    "tests", derandomize=True, deadline=None, max_examples=20, database=None
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="module", autouse=True)
def few_maps():
    """Drop what a file has compiled before Linux refuses a process more memory maps.

    A program takes some thirty of the 65530 that a process may have; at the limit the
    compiler dies of a segmentation fault.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def clean_interpreter():
    """Forget, after a test, what the interpreter of GPU kernels keeps."""
    yield
    module = sys.modules.get("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    if hasattr(module, "reset_gpu_interpret_mode_state"):  # not before JAX 0.12
        module.reset_gpu_interpret_mode_state()


@pytest.fixture
def key(request):
    """A random key of the test's own, the same in every run."""
    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Leave all but ``few(n)`` of a test's cases, evenly chosen, to the slow run."""
    groups = {}
    for item in items:
        if item.get_closest_marker("few"):
            groups.setdefault((item.path, item.originalname), []).append(item)
    for group in groups.values():
        n = group[0].get_closest_marker("few").args[0]
        kept = {round(i * (len(group) - 1) / max(n - 1, 1)) for i in range(n)}
        for index, item in enumerate(group):
            if index not in kept:
                item.add_marker(pytest.mark.slow)
