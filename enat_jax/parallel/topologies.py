"""Devices that are not here: those of a TPU slice or GPU node, described by name."""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from enat_jax.errors import UserError


class TopologyError(UserError):
    """A topology that is unknown or that cannot be described here; one line."""


@dataclass(frozen=True)
class _Tpu:
    """A TPU version: axes of its torus, and how long they are at most."""

    axes: int
    longest: int
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class _Gpu:
    """What XLA's compiler asks of a GPU; the module's figures as its driver reports them."""

    name: str
    major: int
    cores: int
    units_per_core: int
    shared_memory: int
    l2_cache: int
    clock_ghz: float
    memory: int
    bandwidth: int


_TPUS = {
    "v4": _Tpu(3, 16, (("chip_config_name", "megacore"),)),
    "v5e": _Tpu(2, 16),
    "v5p": _Tpu(3, 24),
    "v6e": _Tpu(2, 16),
}
_GPUS = {
    "a100": _Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 41943040, 1.41, 85100068864,
                 2039040000000),
    "h100": _Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 52428800, 1.98, 84942979072,
                 3352320000000),
    "h200": _Gpu("NVIDIA H200", 9, 132, 128, 233472, 52428800, 1.98, 151397597184,
                 4800000000000),
}  # fmt: skip
KNOWN = (
    "v5e:16x16 and v6e:8x8 (sides of a TPU slice), v4:2x2x4 and v5p:4x4x8, 2xv5e:16x16 (slices),"
    " h100x8, h200x8 and a100x8 (GPUs of a node), 4xh100x8 (nodes), cpux8 (this machine's)"
)

# libtpu as a compiler alone: it is to ask no metadata server, take no chip, and write no log files
_ONLY_COMPILE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "4",
    "TPU_STDERR_LOG_LEVEL": "4",
}


def describe(topology: str) -> Sequence[Any]:
    """The devices of a topology, to lower and compile for; they hold no arrays and run nothing.

    Args:
        topology: `v5e:16x16` is a TPU slice by its sides, `h100x8` a node by its GPUs; `2x` before
            either makes two slices or nodes of it. `cpux8` is 8 of this process's own.

    Raises:
        TopologyError: an unknown topology, or one whose compiler is not installed.
    """
    found = re.fullmatch(r"(?:(\d+)x)?(?:(v\d\w*):(\d+(?:x\d+)*)|([a-z]\w*?)x(\d+))", topology)
    if found is None:
        raise _unknown(topology)
    copies, tpu, sides, other, count = found.groups()
    if tpu in _TPUS:
        return _describe_tpu(topology, tpu, [int(n) for n in sides.split("x")], int(copies or 1))
    if other in _GPUS and int(count) > 0 and copies != "0":
        return _describe_gpu(topology, _GPUS[other], int(copies or 1), int(count))
    if other == "cpu" and copies is None and int(count) > 0:
        return _own_devices(topology, int(count))
    raise _unknown(topology)


def _unknown(topology: str) -> TopologyError:
    return TopologyError(f"topology {topology!r} is unknown; known are {KNOWN}")


def _describe_tpu(topology: str, version: str, sides: list[int], slices: int) -> Sequence[Any]:
    tpu = _TPUS[version]
    if len(sides) != tpu.axes or not all(1 <= side <= tpu.longest for side in sides) or not slices:
        raise TopologyError(
            f"topology {topology!r}: a slice of {version} has {tpu.axes} sides of 1 to"
            f" {tpu.longest} chips; known are {KNOWN}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(
            f"topology {topology!r} needs libtpu, TPUs' compiler, which is not installed:"
            ' pip install "enat_jax[tpu]"'
        )
    for name, value in _ONLY_COMPILE.items():
        os.environ.setdefault(name, value)
    host = [min(side, most) for side, most in zip(sides, (2, 2, 1), strict=False)]
    options = {"chips_per_host_bounds": (*host, 1)[:3], **dict(tpu.options)}
    name = f"{version}:{'x'.join(map(str, sides))}"
    if slices > 1:
        options["num_slices"] = slices
    return _devices(topology, "tpu", name, options)


def _describe_gpu(topology: str, gpu: _Gpu, nodes: int, per_node: int) -> Sequence[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise TopologyError(
            f"topology {topology!r} needs jax's CUDA plugin, GPUs' compiler, which is not"
            ' installed: pip install "enat_jax[gpu]"'
        )
    options = {"target_config": _target_config(gpu), "topology": f"{nodes}x1x{per_node}"}
    return _devices(topology, "cuda", "", options)


def _devices(topology: str, platform: str, name: str, options: Any) -> Sequence[Any]:
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (RuntimeError, ValueError) as error:  # what the compiler says to a shape it has not
        message = " ".join(str(error).split())
        raise TopologyError(f"topology {topology!r}: {message}") from error


def _own_devices(topology: str, count: int) -> Sequence[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise TopologyError(
            f"topology {topology!r}: this process has {len(devices)} CPU devices; XLA_FLAGS="
            f"--xla_force_host_platform_device_count={count} gives it {count}"
        )
    return devices[:count]


def _target_config(gpu: _Gpu) -> str:
    """XLA's `GpuTargetConfigProto` as text."""
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block_optin": gpu.shared_memory - 1024,
        "threads_per_core_limit": 2048,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.units_per_core,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": gpu.bandwidth,
        "l2_cache_size": gpu.l2_cache,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    fields = " ".join(f"{name}: {value}" for name, value in device.items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {gpu.major} }} }}"
        f' platform_name: "CUDA" device_description_str: "{gpu.name}"'
        " dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }"
    )
