"""Accelerators by their vendors' public specifications: speed, memory and links of each."""

from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One device as jax counts them: a chip, or a GPU.

    By Cloud TPU's "system architecture" pages and NVIDIA's data sheets of the SXM modules, FLOPs
    without sparsity; where they give the bandwidth of links both ways, here is half of it.

    Attributes:
        name: what users call it.
        device_kinds: jax's `device_kind` of such a device.
        flops: dense bfloat16 FLOP/s.
        memory: bytes of HBM.
        memory_bandwidth: bytes/s to and from it.
        link_bandwidth: bytes/s one way over all links to other devices of a slice or node.
    """

    name: str
    device_kinds: tuple[str, ...]
    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float


ACCELERATORS = (
    Accelerator("v4", ("TPU v4",), 275e12, 32 * _GIB, 1228e9, 300e9),
    Accelerator("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB, 819e9, 200e9),
    Accelerator("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * _GIB, 2765e9, 600e9),
    Accelerator("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB, 1638e9, 400e9),
    Accelerator("A100 40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * _GIB, 1555e9, 300e9),
    Accelerator("A100 80GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * _GIB, 2039e9, 300e9),
    Accelerator("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * _GIB, 3350e9, 450e9),
    Accelerator("H200", ("NVIDIA H200",), 989e12, 141 * _GIB, 4800e9, 450e9),
)


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator that jax calls by this `device_kind`; None for one not in the table."""
    return next((known for known in ACCELERATORS if device_kind in known.device_kinds), None)
