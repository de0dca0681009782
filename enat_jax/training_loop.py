"""The loop around the steps of a training run: its log, its progress and its checkpoints."""

import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import PyTree, UInt8
from tqdm import tqdm

from enat_jax.checkpoint import CheckpointError, Checkpoints
from enat_jax.errors import UserError
from enat_jax.images import write_png
from enat_jax.metric_log import MetricLog
from enat_jax.tokenizer import CHECKPOINTS

Metrics = Mapping[str, jax.Array]


class TrainError(UserError):
    """A run that cannot go on."""


@runtime_checkable
class LoopConfig(Protocol):
    """How long a run is, and what happens every so many steps: the `train` section of a config."""

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        ...

    @property
    def log_every(self) -> int:
        """Steps between two lines of the log."""
        ...

    @property
    def sample_every(self) -> int:
        """Steps between two pictures; 0 makes none."""
        ...

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints."""
        ...


@runtime_checkable
class Steps(Protocol):
    """What a kind of run does in the loop; its state is whatever it wants."""

    def step(self, step: int, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Metrics]:
        """One optimiser step, counted from 0; its metrics have a loss and a gradient norm."""
        ...

    def summary(
        self, done: int, metrics: list[Metrics], seconds: float, waited: float
    ) -> dict[str, float]:
        """A line of the log about the last steps: see `averages`."""
        ...

    def sample(self, done: int, state: Any, log: MetricLog) -> None:
        """Shows what has been learnt."""
        ...

    def trees(self, state: Any) -> dict[str, PyTree]:
        """What a checkpoint holds of a state."""
        ...


def averages(
    metrics: list[Metrics], seconds: float, waited: float, *, images_per_step: int
) -> dict[str, float]:
    """Means over steps that took so many seconds, and how fast they were.

    Args:
        metrics: of each step.
        seconds: that they took together.
        waited: seconds of these that went by before the data were there.
        images_per_step: over all devices.
    """
    host = jax.device_get(metrics)
    rate = len(metrics) / max(seconds, 1e-9)
    # Where a term of the loss begins between two lines, not all steps have it.
    names = {name: None for each in host for name in each}
    return {
        **{name: float(np.mean([each[name] for each in host if name in each])) for name in names},
        "images_per_second": rate * images_per_step,
        "steps_per_second": rate,
        "data_wait": waited / max(seconds, 1e-9),
    }


def open_workdir(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the folder of a run, unless it is there.

    Raises:
        TrainError: it cannot be made.
    """
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainError(f"cannot write to workdir {workdir}: {error}") from error
    return workdir


def run_steps(
    steps: Steps,
    state: Any,
    start: int,
    batches: Any,
    key: jax.Array,
    cfg: LoopConfig,
    *,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    metadata: dict[str, Any],
    say: Callable[[str], object],
) -> None:
    """Takes the steps from `start` to the last, and leaves a checkpoint of it.

    Args:
        steps: what a step, a line of the log, a picture and a checkpoint are.
        state: after `start` steps.
        start: steps done.
        batches: a Grain iterator at their position; saved with every checkpoint.
        key: the run's, on every device.
        cfg: how many steps, and what happens between them.
        workdir: holds `metrics.jsonl`, `tensorboard/` and `samples/`.
        checkpoints: the workdir's.
        metadata: saved with every checkpoint.
        say: called with lines for the user.

    Raises:
        TrainError: a loss or a gradient that is not finite.
    """
    pending: list[Metrics] = []  # since the last line of the log
    waited, since = 0.0, time.perf_counter()
    bar = tqdm(total=cfg.steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
    with MetricLog(workdir, start_step=start) as log, bar:
        for step in range(start, cfg.steps):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            state, metrics = steps.step(step, state, batch, key)
            pending.append(metrics)
            if len(pending) > 1:  # one step behind, so that the device never waits
                _stop_if_not_finite(pending[-2], step, checkpoints)
            done = step + 1
            bar.update()
            last = done == cfg.steps
            if done % cfg.log_every == 0 or last:
                _stop_if_not_finite(metrics, done, checkpoints)
                elapsed = time.perf_counter() - since
                values = steps.summary(done, pending, elapsed, waited)
                log.scalars(done, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                if bar.disable:
                    left = elapsed / len(pending) * (cfg.steps - done)
                    say(
                        f"step {done}/{cfg.steps} loss {values['loss']:.4f}"
                        f" {values['images_per_second']:.0f} images/s, {left / 60:.1f} min left"
                    )
                pending, waited, since = [], 0.0, time.perf_counter()
            if cfg.sample_every and (done % cfg.sample_every == 0 or last):
                paused = time.perf_counter()
                steps.sample(done, state, log)
                since += time.perf_counter() - paused
            if done % cfg.checkpoint_every == 0 or last:
                _stop_if_not_finite(metrics, done, checkpoints)
                trees = steps.trees(state)
                checkpoints.save(done, trees, data=batches, metadata=metadata)
        checkpoints.wait()
    say(f"trained {cfg.steps} steps; the checkpoint is in {workdir / CHECKPOINTS}")


def write_samples(
    workdir: pathlib.Path, step: int, picture: UInt8[np.ndarray, "y x 3"], log: MetricLog
) -> None:
    """Puts a picture into `samples/` and into the log."""
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    write_png(folder / f"step_{step:07d}.png", picture)
    log.image(step, "samples", picture)


def restore_trees(
    checkpoints: Checkpoints,
    abstract: Mapping[str, PyTree],
    sharding: Mapping[str, PyTree],
    *,
    batches: Any,
    config: Mapping[str, Any],
    sections: tuple[str, ...],
    may_differ: tuple[str, ...],
    say: Callable[[str], object],
) -> tuple[int, dict[str, PyTree]] | None:
    """The newest whole checkpoint of a run, with the data moved to its position.

    Args:
        checkpoints: the workdir's.
        abstract: the shapes of the trees wanted.
        sharding: where their leaves are to lie.
        batches: the Grain iterator.
        config: of this run, as `dataclasses.asdict` gives it.
        sections: those that say what the model is, which must be as saved.
        may_differ: their fields that only say how it computes.
        say: called with lines for the user.

    Returns:
        The steps done and the trees; None where nothing is saved yet.

    Raises:
        CheckpointError: a checkpoint of another model, or no readable one.
    """
    if not checkpoints.steps():
        return None
    saved = checkpoints.metadata().get("config", {})
    saved = {section: _as_json(fields) for section, fields in saved.items()}
    differences = [
        f"{section}.{name} = {value!r}, there {saved.get(section, {}).get(name)!r}"
        for section in sections
        for name, value in _as_json(config[section]).items()
        if saved.get(section, {}).get(name) != value and name not in may_differ
    ]
    if differences:
        raise CheckpointError(f"the workdir holds another model: {'; '.join(differences)}")
    placed = {
        name: jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            tree,
            sharding[name],
        )
        for name, tree in abstract.items()
    }
    found = checkpoints.restore(placed, data=batches, warn=say)
    if found is not None:
        say(f"resuming from step {found[0]}")
    return found


def _as_json(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields.items()}


def _stop_if_not_finite(metrics: Metrics, step: int, checkpoints: Checkpoints) -> None:
    loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
    if math.isfinite(loss) and math.isfinite(norm):
        return
    checkpoints.wait()
    steps = checkpoints.steps()
    kept = f"the last good checkpoint is of step {steps[-1]}" if steps else "nothing was saved yet"
    raise TrainError(f"step {step}: loss {loss}, gradient norm {norm}, not finite; {kept}")
