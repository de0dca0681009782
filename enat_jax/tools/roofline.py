"""What a program's counts let one expect of an accelerator."""

from dataclasses import dataclass

from enat_jax.parallel.accelerators import Accelerator
from enat_jax.tools.hlo import ProgramCounts


@dataclass(frozen=True)
class Prediction:
    """Seconds that a device is busy with each kind of work at its full rate; never measured.

    Attributes:
        compute: of matrix products.
        memory: of traffic to and from its memory.
        links: of what it sends to other devices.
        mfu_overlapped: model FLOPs per second over the peak if all three run side by side.
        mfu_serial: the same if each waits for the others.
        bound: which takes longest.
    """

    compute: float
    memory: float
    links: float
    mfu_overlapped: float
    mfu_serial: float
    bound: str

    @property
    def serial(self) -> float:
        """Seconds of the program if nothing overlaps."""
        return self.compute + self.memory + self.links


def predict(counts: ProgramCounts, model_flops: float, accelerator: Accelerator) -> Prediction:
    """Predicts a program's seconds and MFU.

    Args:
        counts: what one device does.
        model_flops: what the model's formula asks of one device, without anything done twice.
        accelerator: its public figures.
    """
    seconds = {
        "compute": counts.flops / accelerator.flops,
        "memory": counts.hbm_bytes / accelerator.memory_bandwidth,
        "links": counts.collective_bytes / accelerator.link_bandwidth,
    }
    ideal = model_flops / accelerator.flops
    longest = max(seconds, key=lambda kind: seconds[kind])
    total = sum(seconds.values())
    return Prediction(
        **seconds,
        mfu_overlapped=ideal / seconds[longest] if total else 0.0,
        mfu_serial=ideal / total if total else 0.0,
        bound=longest,
    )
