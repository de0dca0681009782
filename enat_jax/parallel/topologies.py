"""Devices that are not here: those of a TPU slice or GPU node, described by name."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from enat_jax.errors import UserError

# TPU versions: axes of a slice's torus, chips along each at most, what libtpu must be told besides
_TPUS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "v4": (3, 16, {"chip_config_name": "megacore"}),
    "v5e": (2, 16, {}),
    "v5p": (3, 24, {}),
    "v6e": (2, 16, {}),
}

# Fields of XLA's `GpuDeviceInfoProto`: alike for all modules, and of each as its driver reports it
_ANY_GPU = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
    "shared_memory_per_block": 49152, "registers_per_core_limit": 65536,
    "registers_per_block_limit": 65536, "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
}  # fmt: skip
_AMPERE = _ANY_GPU | {
    "core_count": 108, "fpus_per_core": 64, "clock_rate_ghz": 1.41, "l2_cache_size": 41943040,
    "shared_memory_per_core": 167936, "shared_memory_per_block_optin": 166912,
}  # fmt: skip
_HOPPER = _ANY_GPU | {
    "core_count": 132, "fpus_per_core": 128, "clock_rate_ghz": 1.98, "l2_cache_size": 52428800,
    "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448,
}  # fmt: skip
# name, major compute capability, fields, bytes of memory, bytes/s to and from it
_GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", 8, _AMPERE, 85100068864, 2039040000000),
    "h100": ("NVIDIA H100 80GB HBM3", 9, _HOPPER, 84942979072, 3352320000000),
    "h200": ("NVIDIA H200", 9, _HOPPER, 151397597184, 4800000000000),
}
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

    `v5e:16x16` is a TPU slice by its sides, `h100x8` a node by its GPUs; `2x` before either makes
    two slices or nodes of it. `cpux8` is 8 of this process's own.

    Raises:
        UserError: an unknown topology, or one whose compiler is not installed.
    """
    pattern = r"(?:(\d+)x)?(?:(v\d\w*):(\d+(?:x\d+)*)|([a-z]\w*?)x(\d+))"
    if match := re.fullmatch(pattern, topology):
        copies, tpu, sides, other, count = match.groups()
        if tpu in _TPUS:
            return _tpu_slices(topology, tpu, [int(n) for n in sides.split("x")], int(copies or 1))
        if other in _GPUS and int(count) > 0 and copies != "0":
            return _gpu_nodes(topology, other, int(copies or 1), int(count))
        if other == "cpu" and copies is None and int(count) > 0:
            own = jax.devices("cpu")
            if int(count) <= len(own):
                return own[: int(count)]
            raise UserError(
                f"topology {topology!r}: this process has {len(own)} CPU devices; XLA_FLAGS="
                f"--xla_force_host_platform_device_count={count} gives it {count}"
            )
    raise UserError(f"topology {topology!r} is unknown; known are {KNOWN}")


def _tpu_slices(topology: str, version: str, sides: list[int], slices: int) -> Sequence[Any]:
    axes, longest, options = _TPUS[version]
    if len(sides) != axes or not all(1 <= side <= longest for side in sides) or not slices:
        raise UserError(
            f"topology {topology!r}: a slice of {version} has {axes} sides of 1 to {longest}"
            f" chips; known are {KNOWN}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"topology {topology!r} needs libtpu, TPUs' compiler, which is not installed:"
            ' pip install -e ".[tpu]"'
        )
    for name, value in _ONLY_COMPILE.items():
        os.environ.setdefault(name, value)
    host = [min(side, most) for side, most in zip(sides, (2, 2, 1), strict=False)]
    options = {"chips_per_host_bounds": (*host, 1)[:3], **options}
    if slices > 1:
        options["num_slices"] = slices
    return _devices(topology, "tpu", f"{version}:{'x'.join(map(str, sides))}", options)


def _gpu_nodes(topology: str, gpu: str, nodes: int, per_node: int) -> Sequence[Any]:
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise UserError(
            f"topology {topology!r} needs jax's CUDA plugin, GPUs' compiler, which is not"
            ' installed: pip install -e ".[gpu]"'
        )
    name, capability, device, memory, bandwidth = _GPUS[gpu]
    device = device | {"device_memory_size": memory, "memory_bandwidth": bandwidth}
    fields = " ".join(f"{field}: {value}" for field, value in device.items())
    target = (  # XLA's `GpuTargetConfigProto` as text
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {capability} }} }}"
        f' platform_name: "CUDA" device_description_str: "{name}"'
        " dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }"
    )
    options = {"target_config": target, "topology": f"{nodes}x1x{per_node}"}
    return _devices(topology, "cuda", "", options)


def _devices(topology: str, platform: str, name: str, options: Any) -> Sequence[Any]:
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (RuntimeError, ValueError) as error:  # what the compiler says to a shape it has not
        message = " ".join(str(error).split())
        raise UserError(f"topology {topology!r}: {message}") from error
