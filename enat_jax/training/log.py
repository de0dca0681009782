"""Where a run's numbers go: JSON lines and TensorBoard events."""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping
from typing import SupportsFloat

import numpy as np
import tensorboardX
from jaxtyping import UInt8

from enat_jax.files import atomic, naming

_FLUSH_SECONDS = 10  # how far TensorBoard's files may lag behind; they lose this much to a kill


class MetricLog:
    """Appends to `metrics.jsonl` and to TensorBoard's event files in a local directory.

    A run that resumes after step k passes `start_step=k`: what was logged for later steps, by the
    part of the run that is lost, leaves `metrics.jsonl` and is hidden by TensorBoard.
    """

    def __init__(self, workdir: str | os.PathLike, *, start_step: int = 0):
        directory = pathlib.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = path = directory / "metrics.jsonl"
        _keep_up_to(path, start_step)
        # Line-buffered: a killed process loses at most the line it was writing.
        self._lines = path.open("a", buffering=1, encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=start_step + 1, flush_secs=_FLUSH_SECONDS
        )

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Logs `values` as one line of JSON, with `step` and the wall `time` in seconds.

        JSON has no NaN and no infinity: they become null there, and stay themselves in TensorBoard.
        """
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with naming(self._path):
            self._lines.write(json.dumps({"step": step, "time": round(now, 3), **finite}) + "\n")
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step, walltime=now)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "y x 3"]) -> None:
        """Shows an image in TensorBoard."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes what is still under way and closes the files."""
        self._lines.close()
        self._events.close()


def _keep_up_to(path: pathlib.Path, last_step: int) -> None:
    """Drops the lines of steps after `last_step`, and one a killed process left half-written."""

    def is_kept(line: bytes) -> bool:
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= last_step
        except (ValueError, TypeError, KeyError, RecursionError):
            return False

    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if is_kept(line)]
    if kept != lines:
        with atomic(path) as part:
            part.write_bytes(b"".join(kept))
