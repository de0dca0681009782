"""FLOPs of one matrix product or convolution, from its line of HLO text."""

import math
import re
from collections.abc import Iterator

from enat_jax.tools.hlo_text import Computation, Instruction


def product_flops(instruction: Instruction, where: Computation) -> float:
    """FLOPs of a `dot`, a `convolution`, or a custom call of cuBLAS; 0 of any other custom call."""
    result = instruction.shapes[0]
    if instruction.opcode == "custom-call":
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
        if not instruction.custom_target.startswith("__cublas$") or not found:
            return 0.0
        contracting = [int(n) for n in re.findall(r"\d+", found[1])]
    elif instruction.opcode == "convolution":
        return _convolution_flops(instruction, where)
    else:
        found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        contracting = [int(n) for n in found[1].split(",") if n] if found else []
    (left,) = where.shapes(instruction.operands[0])
    return 2.0 * math.prod(result.dims) * math.prod(left.dims[axis] for axis in contracting)


def _convolution_flops(instruction: Instruction, where: Computation) -> float:
    """Two per multiply-add that meets data: neither padding nor the holes of dilation count.

    TPU programs hold every matrix product as a convolution, batched ones with a dilated window.
    """
    (left,), (right,) = (where.shapes(name) for name in instruction.operands[:2])
    result = instruction.shapes[0]
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest)
    if labels is None:
        raise ValueError(f"no dim_labels in {instruction.name}")
    lhs, rhs, out = labels.groups()
    spatial = sorted(label for label in out if label.isdigit())
    window = _window(instruction.rest, len(spatial))
    total = 2.0 * result.dims[out.index("b")] * result.dims[out.index("f")]
    total *= right.dims[rhs.index("i")]  # already one group's, where there are several
    groups = re.search(r"batch_group_count=(\d+)", instruction.rest)
    total /= int(groups[1]) if groups else 1
    for axis, (stride, low, lhs_dilate, rhs_dilate) in zip(spatial, window, strict=True):
        total *= _meetings(
            left.dims[lhs.index(axis)], right.dims[rhs.index(axis)], result.dims[out.index(axis)],
            stride, low, lhs_dilate, rhs_dilate,
        )  # fmt: skip
    return total


def _window(attributes: str, axes: int) -> Iterator[tuple[int, int, int, int]]:
    """Stride, padding before, and both dilations of each axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def numbers(name: str, default: int) -> list[int]:
        text = fields.get(name)
        return [int(n.split("_")[0]) for n in text.split("x")] if text else [default] * axes

    return zip(numbers("stride", 1), numbers("pad", 0), numbers("lhs_dilate", 1),
               numbers("rhs_dilate", 1), strict=True)  # fmt: skip


def _meetings(
    data: int, kernel: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Pairs of output and kernel positions along one axis that read an element that is there."""
    extent = (data - 1) * lhs_dilate
    count = 0
    for k in range(kernel):
        first = k * rhs_dilate - low  # position read by output 0
        for position in range(first, first + out * stride, stride):
            count += 0 <= position <= extent and position % lhs_dilate == 0
    return count
