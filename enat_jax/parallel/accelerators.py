"""Accelerators by their vendors' public specifications: speed and memory of each."""

from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """One device as jax counts them: a chip, or a GPU.

    TPU figures are Cloud TPU's "system architecture" page of each version; GPU figures are NVIDIA's
    data sheets of the SXM modules, FLOPs without sparsity.

    Attributes:
        name: what users call it.
        device_kinds: jax's `device_kind` of such a device.
        flops: dense bfloat16 FLOP/s.
        memory: bytes of HBM.
    """

    name: str
    device_kinds: tuple[str, ...]
    flops: float
    memory: int


ACCELERATORS = (
    Accelerator("v4", ("TPU v4",), 275e12, 32 * _GIB),
    Accelerator("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * _GIB),
    Accelerator("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * _GIB),
    Accelerator("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * _GIB),
    Accelerator("A100 40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * _GIB),
    Accelerator("A100 80GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * _GIB),
    Accelerator("H100", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * _GIB),
    Accelerator("H200", ("NVIDIA H200",), 989e12, 141 * _GIB),
)


def accelerator_of(device_kind: str) -> Accelerator | None:
    """The accelerator that jax calls by this `device_kind`; None for one not in the table."""
    return next((known for known in ACCELERATORS if device_kind in known.device_kinds), None)
