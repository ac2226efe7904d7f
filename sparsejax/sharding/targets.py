"""Hardware that need not be there: described meshes to compile for."""

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from jax.experimental import topologies

from sparsejax.config import ConfigError, near

GIB = 2**30


class Target(NamedTuple):
    """Devices to compile for, and what one of them can hold."""

    platform: str
    devices: list[Any]
    memory: int  # bytes of one chip


TPU_MEMORY = {"v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "tpu7x": 192 * GIB}
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
GPUS = {"h200": (H200, 141 * 10**9)}


def describe(text: str) -> Target:
    """Turn ``tpu:v5p:8x8x8``, ``tpu:v5e:16x16`` or ``gpu:h200`` into devices.

    Raises:
        ConfigError: if there is no such target, or its compiler is not installed.
    """
    platform, _, rest = text.partition(":")
    if platform == "tpu":
        return _tpu(text, *rest.partition(":")[::2])
    if platform == "gpu":
        return _gpu(text, *rest.partition(":")[::2])
    raise ConfigError(
        f"--aot={text}: no such platform{near(platform, ('tpu', 'gpu'))};"
        " write tpu:v5p:8x8x8 or gpu:h200"
    )


def _installed(text: str, package: str) -> None:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"--aot={text}: needs the compiler in {package}; pip install"
            " 'sparsejax[aot]'"
        ) from None


def _tpu(text: str, generation: str, shape: str) -> Target:
    if generation not in TPU_MEMORY:
        raise ConfigError(f"--aot={text}: no such TPU{near(generation, TPU_MEMORY)}")
    _installed(text, "libtpu")
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{generation}:{shape}"
        )
    except Exception as error:  # libtpu's own type, with its own wording
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--aot={text}: no such topology; {reason}") from None
    return Target("tpu", list(described.devices), TPU_MEMORY[generation])


def _gpu(text: str, name: str, count: str) -> Target:
    if name not in GPUS:
        raise ConfigError(f"--aot={text}: no such GPU{near(name, GPUS)}")
    _installed(text, "jax-cuda13-plugin")
    _add_ptxas(text)
    config, memory = GPUS[name]
    described = topologies.get_topology_desc(
        name, platform="cuda", target_config=config, topology=f"1x1x{count or 1}"
    )
    return Target("cuda", list(described.devices), memory)


def _add_ptxas(text: str) -> None:
    """Put the assembler on the PATH; the CUDA wheels leave it in their own folder."""
    if shutil.which("ptxas"):
        return
    _installed(text, "nvidia-cuda-nvcc")
    for file in metadata.files("nvidia-cuda-nvcc") or ():
        if file.name == "ptxas":
            folder = Path(str(file.locate())).parent
            os.environ["PATH"] += os.pathsep + str(folder)
