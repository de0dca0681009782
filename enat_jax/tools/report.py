"""Reports on compiled programs, as lines to read or as fields to write."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from enat_jax.parallel.accelerators import Accelerator
from enat_jax.tools.hlo import Collective
from enat_jax.tools.largest_batch import Fit
from enat_jax.tools.programs import Report

_GIB = 2**30
HEADER = (
    "program fits |  GiB: args    temp    peak | TFLOP: model  program |  GB: HBM   sent |"
    " ms: compute    HBM   links | MFU: best  least | compile s"
)


def lines(report: Report) -> list[str]:
    """A line below `HEADER`, and one on the exchanges between devices where there are any.

    Everything is of one device. The MFU is at best what one gets if products, memory and links
    all work side by side, and at least if each waits for the others.
    """
    fits = {True: "yes", False: "NO", None: "?"}[report.fits]
    start = f"{report.name:8}{fits:4} |"
    compile_seconds = f"{report.compile_seconds:9.1f}{' (kept)' if report.kept else ''}"
    if report.memory is None or report.counts is None:
        return [f"{start} {report.problem} | {compile_seconds}"]
    memory, counts, prediction = report.memory, report.counts, report.prediction
    sizes = [size / _GIB for size in (memory.arguments, memory.temporaries, memory.peak)]
    line = (
        f"{start}  {sizes[0]:9.2f} {sizes[1]:7.2f} {sizes[2]:7.2f} |"
        f" {report.model_flops / 1e12:12.4f} {counts.flops / 1e12:8.4f} |"
        f" {counts.hbm_bytes / 1e9:8.2f} {counts.collective_bytes / 1e9:6.2f} |"
    )
    if prediction is None:
        line += f" {'':27} | {'':16} |"
    else:
        widths = {"compute": 10, "memory": 5, "links": 6}
        times = " ".join(
            f"{1e3 * getattr(prediction, kind):{width}.2f}" + " *"[kind == prediction.bound]
            for kind, width in widths.items()
        )
        mfu = (prediction.mfu_overlapped, prediction.mfu_serial)
        line += f" {times} | {100 * mfu[0]:8.1f}% {100 * mfu[1]:5.1f}% |"
    result = [f"{line} {compile_seconds}"]
    if counts.collectives:
        kinds = [_exchange(kind, found) for kind, found in sorted(counts.collectives.items())]
        result.append(f"{'':12} |  sent: {'; '.join(kinds)}")
    if counts.unknown_loops:
        result.append(f"{'':12} |  {counts.unknown_loops} loops of unknown length counted once")
    return result


def _exchange(kind: str, found: Collective) -> str:
    types = ", ".join(f"{size / 1e9:.3f} {dtype}" for dtype, size in found.bytes_by_type.items())
    return f"{kind} {found.count:.0f}x {found.bytes / 1e9:.3f} GB ({types})"


def suggestion_lines(fits: Sequence[Fit]) -> list[str]:
    """What `largest_batch.suggest` found, the suggestion last."""
    result = []
    for fit in fits:
        found = f"at most {fit.images_per_device} images per device"
        if fit.report is None or not fit.images_per_device:
            found = "nothing fits"
        elif fit.report.prediction:
            found += f", {1e3 * fit.seconds_per_image:.2f} ms per image if nothing overlaps"
        result.append(f"remat {fit.remat}: {found}; {fit.compilations} compilations")
    best = fits[0]
    count = sum(fit.compilations for fit in fits)
    if best.images_per_device:
        result.append(
            f"suggested after {count} compilations: --config.model.remat={best.remat}"
            f" --config.train.batch_size={best.batch_size}"
        )
    else:
        result.append(f"nothing fits, after {count} compilations: more devices, or another mesh")
    return result


def as_fields(
    topology: str,
    devices: Sequence[Any],
    accelerator: Accelerator | None,
    config: Any,
    reports: Sequence[Report],
    fits: Sequence[Fit],
) -> dict[str, Any]:
    """Everything that was found, for JSON; sizes in bytes, times in seconds, of one device."""
    return {
        "topology": topology,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "accelerator": dataclasses.asdict(accelerator) if accelerator else None,
        "config": dataclasses.asdict(config),
        "programs": [_fields(report) for report in reports],
        "suggestions": [
            {**dataclasses.asdict(fit), "report": _fields(fit.report) if fit.report else None}
            for fit in fits
        ],
    }


def _fields(report: Report) -> dict[str, Any]:
    fields = dataclasses.asdict(report)
    if report.memory is not None:
        fields["memory"]["peak"] = report.memory.peak
    return fields
