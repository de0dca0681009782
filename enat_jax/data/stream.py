"""The one endless stream of examples that all hosts of a run walk along together."""

import sys
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Share:
    """Which of the stream's examples a host takes.

    Step `s` takes examples `first + s * batch_size` and on, whatever the number of hosts.

    Attributes:
        batch_size: examples of a step, over all hosts.
        rows: which of a step's are this host's, ascending; None for all.
        first: examples that were taken before the first step.
    """

    batch_size: int
    rows: Int[np.ndarray, " r"] | None = None
    first: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that cannot be."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size = {self.batch_size}, must be at least 1")
        if self.first < 0:
            raise ValueError(f"first = {self.first}, must be at least 0")
        rows = self.own_rows
        if not len(rows) or rows.min() < 0 or rows.max() >= self.batch_size:
            raise ValueError(f"rows = {rows}, must lie in [0, {self.batch_size})")

    @property
    def own_rows(self) -> Int[np.ndarray, " r"]:
        """This host's rows of a step."""
        return np.arange(self.batch_size) if self.rows is None else self.rows


def shuffled(count: int, seed: int) -> grain.MapDataset:
    """The numbers below `count`, epoch after epoch, each shuffled anew.

    Args:
        count: examples in an epoch.
        seed: decides the order, in [0, 2**32).
    """
    return grain.MapDataset.range(count).seed(seed).shuffle().repeat()


def own_part(stream: grain.MapDataset, share: Share) -> grain.MapDataset:
    """A host's examples, step after step: `len(share.own_rows)` of each."""
    source: Any = _OwnPart(stream, share)
    return grain.MapDataset.source(source)


class _OwnPart:
    """What Grain calls a source, over another stream."""

    def __init__(self, stream: grain.MapDataset, share: Share):
        self._stream, self._share, self._rows = stream, share, share.own_rows.tolist()

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: Any) -> Any:
        step, row = divmod(int(index), len(self._rows))
        return self._stream[self._share.first + step * self._share.batch_size + self._rows[row]]

    def __repr__(self) -> str:
        return "examples of one host"
