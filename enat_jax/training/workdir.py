"""A run's folder: what it goes on from, and everything it writes."""

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jaxtyping import PyTree, UInt8

from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS
from enat_jax.data.pictures import write_png
from enat_jax.errors import UserError, differences
from enat_jax.files import lock, write_text
from enat_jax.parallel import hosts
from enat_jax.training.log import MetricLog
from enat_jax.training.programs import Programs


class Workdir(contextlib.ExitStack):
    """The folder of a run, shared by its hosts; all call every method, process 0 writes.

    It holds `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `samples/`, `parameters.txt` and
    `profile/`, and is made when it is entered as a context.

    Args:
        path: the folder.
        config: the run's, with a `LoopConfig` as its section `train`.
        metadata: saved with every checkpoint, beside the config.
        stream: what decides the order of the data: a run goes on in the same stream only.
        sections: of the config, which say what the model is: a run goes on with the same only.
        may_differ: fields of these sections that only say how it computes.
        log: called with lines for the user.

    Raises:
        UserError: hosts that were started with different configs, data, workdirs or versions; or,
            when entered, a folder that cannot be made, or that another run works in.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Any,
        *,
        metadata: Mapping[str, Any],
        stream: Mapping[str, Any],
        sections: tuple[str, ...],
        may_differ: tuple[str, ...],
        log: Callable[[str], object],
    ):
        super().__init__()
        self.path, self._loop, self.log = pathlib.Path(path), config.train, log
        self._metadata = {"config": dataclasses.asdict(config), **metadata}
        self._stream, self._sections, self._may_differ = stream, sections, may_differ
        self._metrics: MetricLog | None = None  # on process 0
        hosts.require_agreement(
            {
                "workdir": os.fspath(path),
                "data": stream,
                "jax": jax.__version__,
                "enat_jax": importlib.metadata.version("enat_jax"),
                **self._metadata,
            }
        )

    def __enter__(self) -> "Workdir":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to workdir {self.path}: {error}") from error
        held = self.enter_context(contextlib.ExitStack())
        hosts.from_primary(lambda: held.enter_context(lock(self.path / "lock")))
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, keep=self._loop.keep)
        self.callback(self.checkpoints.close)
        self._trace = self.enter_context(contextlib.ExitStack())
        return self

    def resume(self, programs: Programs) -> tuple[Any, int, int]:
        """A run's state, its steps done and images taken: of the newest checkpoint, or the first.

        Raises:
            CheckpointError: a checkpoint of another model or of other data, or no readable one.
        """
        if not self.checkpoints.steps():
            return programs.initial_state(), 0, 0
        metadata, config = self.checkpoints.metadata(), self._metadata["config"]
        stream = self._stream
        saved, position = metadata.get("config", {}), metadata.get("position", {})
        here = {
            section: {k: v for k, v in config[section].items() if k not in self._may_differ}
            for section in self._sections
        }
        there = _common(saved, here)
        if phrases := differences(there, here):
            raise CheckpointError(f"the workdir holds another model: {phrases}")
        if phrases := differences({name: position.get(name) for name in stream}, stream):
            raise CheckpointError(
                f"the workdir's run is in the middle of other data: {phrases}; give a new run a"
                " workdir of its own"
            )
        restored = self.checkpoints.restore(_trees(programs.abstract), warn=self.log)
        assert restored is not None  # there are steps
        step, trees = restored
        self.log(f"resuming from step {step}")
        if phrases := differences(_common(saved, config), _common(config, saved)):
            self.log(f"differs from the run so far: {phrases}")
        images = self.checkpoints.metadata(step)["position"]["images"]
        state = programs.abstract._replace(step=programs.placement.put(np.int32(step)), **trees)
        return state, step, images

    def begin(self, step: int, params: Mapping[str, Any]) -> None:
        """From here on metrics are written, those after `step` anew, and SIGTERM is listened to.

        Metrics of a run that starts anew do not go on in the log of another, which is set aside. A
        table of the parameters' names, shapes and shardings is `parameters.txt`.
        """
        self.enter_context(hosts.listen())
        if hosts.is_primary():
            log = self.path / "metrics.jsonl"
            if not step and log.exists():
                number = sum(1 for _ in self.path.glob("metrics.*.jsonl")) + 1
                log.rename(aside := self.path / f"metrics.{number}.jsonl")
                self.log(f"no checkpoint: starts anew; the log so far is now {aside}")
            self._metrics = MetricLog(self.path, start_step=step)
            self.callback(self._metrics.close)
            table = parameter_overview.get_parameter_overview(params, include_stats="sharding")
            write_text(self.path / "parameters.txt", table + "\n")

    def trace(self, step: int, state: PyTree) -> None:
        """Before a step, counted from 1: begins or ends the trace that `profile_steps` asks for."""
        first, last = self._loop.profile_steps if hosts.is_primary() else (0, 0)
        if step in (first, last + 1):
            jax.block_until_ready(state)  # the steps before are no part of what begins here
        if step == first:
            folder = self.path / "profile"
            self._trace.callback(self.log, f"wrote a profiler trace to {folder}")
            self._trace.enter_context(jax.profiler.trace(str(folder)))
        elif step == last + 1:
            self._trace.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds an entry to the metrics; with the seconds that the newest checkpoint took."""
        if self._metrics:
            seconds = self.checkpoints.last_save_seconds
            saved = {} if seconds is None else {"checkpoint_write_seconds": seconds}
            self._metrics.scalars(step, {**values, **saved})

    def show(
        self, step: int, picture: UInt8[np.ndarray, "y x 3"], scores: Mapping[str, float]
    ) -> None:
        """Puts a picture into `samples/` and TensorBoard, and its scores into the metrics."""
        if self._metrics:
            folder = self.path / "samples"
            folder.mkdir(exist_ok=True)
            write_png(folder / f"step_{step:07d}.png", picture)
            self._metrics.image(step, "samples", picture)
            if scores:
                self._metrics.scalars(step, scores)
                values = ", ".join(f"{name} {value:.6g}" for name, value in scores.items())
                self.log(f"step {step}: {values}")

    def save(self, step: int, state: Any, images: int) -> None:
        """Starts to write a checkpoint of a state, after so many images of the stream."""
        position = {**self._stream, "images": images}
        self.checkpoints.save(
            step, _trees(state), metadata={**self._metadata, "position": position}
        )


def _common(config: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The fields that another config has, too: one of another version may have others."""
    return {
        section: {k: v for k, v in config[section].items() if k in fields}
        for section, fields in other.items()
        if section in config
    }


def _trees(state: Any) -> dict[str, PyTree]:
    """What a checkpoint holds of a state."""
    parts = state._asdict().items()
    return {name: tree for name, tree in parts if name != "step" and tree is not None}
