"""The largest batch and the remat policy that fit, found by compiling."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from enat_jax.config import Config
from enat_jax.parallel.accelerators import Accelerator
from enat_jax.parallel.placement import Placement
from enat_jax.tools.programs import Report, compile_program, programs


@dataclass(frozen=True)
class Fit:
    """The largest batch that fits under a remat policy.

    Attributes:
        remat: the policy.
        images_per_device: of the largest batch that fits; 0 where none does.
        batch_size: the same over all devices.
        report: of that batch's program.
        compilations: how many it took to find it.
    """

    remat: str
    images_per_device: int
    batch_size: int
    report: Report | None
    compilations: int

    @property
    def seconds_per_image(self) -> float:
        """Predicted, of one device; infinite where nothing fits or nothing is known."""
        prediction = self.report.prediction if self.report else None
        return prediction.serial / self.images_per_device if prediction else float("inf")


def suggest(
    config: Config,
    devices: Sequence[Any],
    accelerator: Accelerator,
    *,
    most: int = 12,
    folder: pathlib.Path | None = None,
    say: Callable[[str], object] = print,
) -> list[Fit]:
    """Looks for the largest batch that fits, for each remat policy; the fastest policy first.

    It compiles the training program that does most, with 1, 2, 4 ... rows per device.

    Args:
        config: the experiment; its own batch size does not count.
        devices: as `topologies.describe` gives them.
        accelerator: what they are.
        most: compilations at most, over all policies.
        folder: where the compiler's answers are kept, see `compiler_answers.ask_compiler`.
        say: called with a line per compilation.
    """
    placement = Placement.of(config.mesh, devices)
    train = config.train
    unit = placement.batch_shards * train.images_per_row * train.accumulation
    per_row = unit / placement.mesh.devices.size
    fits = []
    for left, remat in zip((3, 2, 1), ("none", "dots", "block"), strict=True):
        reports: dict[int, Report] = {}

        def measure(rows: int, remat: str = remat, reports: Any = reports) -> int:
            model = dataclasses.replace(config.model, remat=remat)
            train = dataclasses.replace(config.train, batch_size=unit * rows)
            cfg = dataclasses.replace(config, model=model, train=train)
            program = max(programs(cfg, placement, ("train",)), key=lambda p: p.model_flops)
            report = reports[rows] = compile_program(program, accelerator, folder)
            needed = report.needed or accelerator.memory + 1
            say(f"remat {remat}, {rows * per_row:g} images per device:"
                f" {needed / 2**30:.2f} GiB in {report.compile_seconds:.0f} s")  # fmt: skip
            return needed if report.fits else max(needed, accelerator.memory + 1)

        rows = largest_fitting(measure, accelerator.memory, most // left)
        most -= len(reports)
        images = round(rows * per_row)
        fits.append(Fit(remat, images, rows * unit, reports.get(rows), len(reports)))
    return sorted(fits, key=lambda fit: fit.seconds_per_image)


def largest_fitting(measure: Callable[[int], int], limit: int, most: int) -> int:
    """The largest power of two whose measure is within a limit, 0 for none.

    The measure is taken to grow about linearly, so that two of them say where to look; what is
    returned was measured.

    Args:
        measure: of 1, 2, 4 ...; called once for each.
        limit: what fits.
        most: calls at most; with too few the answer can be smaller than it need be.
    """
    known = {1: measure(1)}
    if known[1] > limit:
        return 0
    while len(known) < most:
        best = max(n for n, needed in known.items() if needed <= limit)
        above = min((n for n, needed in known.items() if needed > limit), default=None)
        if above == 2 * best:
            break
        guess = 2 * best
        if above is not None:  # halfway there, in powers of two
            guess = best * 2 ** max((above // best).bit_length() // 2, 1)
        elif len(known) > 1:
            slope = max((known[best] - known[1]) / (best - 1), 1e-9)
            while known[best] + slope * (2 * guess - best) <= limit:
                guess *= 2
        known[guess] = measure(guess)
    return max(n for n, needed in known.items() if needed <= limit)
