"""The loop around the steps of a training run: its log, its progress and its checkpoints."""

import contextlib
import dataclasses
import importlib.metadata
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

from enat_jax.checkpoints.store import Checkpoints
from enat_jax.checkpoints.tokenizer import CHECKPOINTS
from enat_jax.config import LoopConfig
from enat_jax.data.pictures import write_png
from enat_jax.errors import UserError
from enat_jax.parallel import hosts
from enat_jax.parallel.compilation import compile_seconds
from enat_jax.training.log import MetricLog, NoLog

Metrics = Mapping[str, jax.Array]
Log = MetricLog | NoLog


class TrainError(UserError):
    """A run that cannot go on."""


@runtime_checkable
class Steps(Protocol):
    """What a kind of run does in the loop; its state is whatever it wants."""

    def step(self, step: int, state: Any, batch: Any, key: jax.Array) -> tuple[Any, Metrics]:
        """One step, counted from 0; its metrics: `loss`, `grad_norm`, `skipped`, and its own."""
        ...

    def summary(self, done: int, images_per_second: float) -> dict[str, float]:
        """What a line of the log says besides the means of the metrics and the speed."""
        ...

    def sample(self, done: int, state: Any, log: Log) -> None:
        """Shows what has been learnt."""
        ...

    def trees(self, state: Any) -> dict[str, PyTree]:
        """What a checkpoint holds of a state."""
        ...


class Clock:
    """Where the time between two lines of the log went, in seconds."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new line."""
        self._since, self._compiled = time.perf_counter(), compile_seconds()
        self.waited = self.checkpoints = self._elsewhere = self._compiled_elsewhere = 0.0

    @contextlib.contextmanager
    def elsewhere(self, what: str) -> Any:
        """Time that is not the steps': `samples`, or `checkpoints`, which the log counts."""
        start, compiled = time.perf_counter(), compile_seconds()
        yield
        seconds = time.perf_counter() - start
        self._elsewhere += seconds
        self._compiled_elsewhere += compile_seconds() - compiled
        if what == "checkpoints":
            self.checkpoints += seconds

    def line(self, steps: int, images_per_step: int) -> dict[str, float]:
        """The line's figures: rates of the steps alone, without compilation and what is beside."""
        compiled = compile_seconds() - self._compiled - self._compiled_elsewhere
        seconds = time.perf_counter() - self._since - self._elsewhere - compiled
        rate = steps / max(seconds, 1e-9)
        return {
            "images_per_second": rate * images_per_step,
            "steps_per_second": rate,
            "data_wait": self.waited / max(seconds, 1e-9),
            "compile_seconds": compiled,
            "checkpoint_seconds": self.checkpoints,
        }


class Soundness:
    """Watches for steps that were skipped, because their loss or gradient was not finite.

    Args:
        limit: so many in a row stop the run.
        say: called with a line for each.
    """

    def __init__(self, limit: int, say: Callable[[str], object]):
        self._limit, self._say, self._row, self._seen = limit, say, 0, 0

    def look(self, step: int, metrics: Metrics) -> None:
        """Looks at a step, counted from 1, unless it was looked at before.

        Raises:
            TrainError: too many in a row.
        """
        if step <= self._seen:
            return
        self._seen = step
        if not float(metrics["skipped"]):
            self._row = 0
            return
        self._row += 1
        what = f"loss {float(metrics['loss'])}, gradient norm {float(metrics['grad_norm'])}"
        if self._row >= self._limit:
            raise TrainError(
                f"step {step}: {what}: the last {self._row} steps were not finite and not applied;"
                f" train.max_bad_steps = {self._limit}"
            )
        self._say(f"step {step} was not applied: {what}")


def mean_metrics(metrics: list[Metrics]) -> dict[str, float]:
    """Means over steps, without those that were skipped, whose number is in `skipped`."""
    host = jax.device_get(metrics)
    applied = [each for each in host if not each["skipped"]] or host
    # Where a term of the loss begins between two lines, not all steps have it.
    names = {name: None for each in applied for name in each}
    means = {name: float(np.mean([each[name] for each in applied if name in each]))
             for name in names}  # fmt: skip
    return {**means, "skipped": float(sum(each["skipped"] for each in host))}


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


def require_same_run(config: Any, workdir: str | os.PathLike[str], data: Any) -> None:
    """Refuses hosts that were started with different configs, data, workdirs or versions.

    Raises:
        UserError: what differs, and between which processes.
    """
    hosts.require_agreement(
        {
            "config": dataclasses.asdict(config),
            "workdir": os.fspath(workdir),
            "data": data,
            "jax": jax.__version__,
            "enat_jax": importlib.metadata.version("enat_jax"),
        }
    )


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
    position: dict[str, Any],
    say: Callable[[str], object],
) -> None:
    """Takes the steps from `start` to the last, and leaves a checkpoint of it.

    Told to stop, by SIGTERM to any of its processes, the run saves a checkpoint of the step that
    it is at, and returns.

    Args:
        steps: what a step, a line of the log, a picture and a checkpoint are.
        state: after `start` steps.
        start: steps done.
        batches: an iterator of batches from there on.
        key: the run's, on every device.
        cfg: how many steps, and what happens between them.
        workdir: holds `metrics.jsonl`, `tensorboard/`, `samples/` and `profile/`.
        checkpoints: the workdir's.
        metadata: saved with every checkpoint.
        position: after `start` steps, how many `images` were taken from which stream.
        say: called with lines for the user.

    Raises:
        TrainError: too many steps in a row that are not finite.
    """
    pending: list[Metrics] = []  # since the last line of the log
    first, sound, clock = position["images"], Soundness(cfg.max_bad_steps, say), Clock()
    quiet = None if hosts.is_primary() else True
    bar = tqdm(total=cfg.steps, initial=start, unit="step", disable=quiet, dynamic_ncols=True)
    log = MetricLog(workdir, start_step=start) if hosts.is_primary() else NoLog()
    profile = Profile(cfg.profile_steps, workdir, say)
    with hosts.listen(), profile, log, bar:
        clock.restart()
        for step in range(start, cfg.steps):
            asked = time.perf_counter()
            batch = next(batches)
            clock.waited += time.perf_counter() - asked
            done = step + 1
            with profile.of(done, state):
                state, metrics = steps.step(step, state, batch, key)
            pending.append(metrics)
            if len(pending) > 1:  # one step behind, so that the device never waits
                sound.look(step, pending[-2])
            bar.update()
            stopping = hosts.preempted(done)
            last = done == cfg.steps or stopping
            if done % cfg.log_every == 0 or last:
                sound.look(done, metrics)  # waits for the device: the clock then is the steps'
                line = clock.line(len(pending), cfg.batch_size)
                values = mean_metrics(pending) | line
                values |= steps.summary(done, line["images_per_second"]) | _memory()
                if checkpoints.last_save_seconds is not None:
                    values["checkpoint_write_seconds"] = checkpoints.last_save_seconds
                log.scalars(done, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                if bar.disable:
                    left = (cfg.steps - done) / line["steps_per_second"]
                    say(
                        f"step {done}/{cfg.steps} loss {values['loss']:.4f}"
                        f" {values['images_per_second']:.0f} images/s, {left / 60:.1f} min left"
                    )
                pending = []
                clock.restart()
            if cfg.sample_every and (done % cfg.sample_every == 0 or done == cfg.steps):
                with clock.elsewhere("samples"):
                    steps.sample(done, state, log)
            if done % cfg.checkpoint_every == 0 or last:
                sound.look(done, metrics)
                with clock.elsewhere("checkpoints"):
                    here = {**position, "images": first + (done - start) * cfg.batch_size}
                    trees = steps.trees(state)
                    checkpoints.save(done, trees, metadata={**metadata, "position": here})
            if stopping:
                break
        checkpoints.wait()
    where = workdir / CHECKPOINTS
    if done < cfg.steps:
        say(f"told to stop: step {done} of {cfg.steps} is saved in {where}; the same command goes"
            " on from there")  # fmt: skip
    else:
        say(f"trained {cfg.steps} steps; the checkpoint is in {where}")


class Profile:
    """A profiler trace of some steps, in `profile/`, which TensorBoard shows.

    Args:
        steps: the first and the last, counted from 1; (0, 0) traces nothing.
        workdir: the run's.
        say: called with a line for the user.
    """

    def __init__(self, steps: tuple[int, int], workdir: pathlib.Path, say: Callable[[str], object]):
        self._first, self._last = steps if hosts.is_primary() else (0, 0)
        self._folder, self._say, self._running = workdir / "profile", say, False

    @contextlib.contextmanager
    def of(self, step: int, state: Any) -> Any:
        """Traces a step if it is one of them; `state` is what the step before left."""
        if not self._first <= step <= self._last:
            yield
            return
        if not self._running:
            jax.block_until_ready(state)  # what was dispatched before is not traced
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if step == self._last:
            jax.effects_barrier()
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
        self._say(f"wrote a profiler trace to {self._folder}")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:  # the run ended within these steps
            self._stop()


def write_samples(
    workdir: pathlib.Path, step: int, picture: UInt8[np.ndarray, "y x 3"], log: Log
) -> None:
    """Puts a picture into `samples/` and into the log; of several hosts one does."""
    if not hosts.is_primary():
        return
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    write_png(folder / f"step_{step:07d}.png", picture)
    log.image(step, "samples", picture)


def _memory() -> dict[str, float]:
    """The most that any device of this host has held, where devices tell."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", math.nan)
             for device in jax.local_devices()]  # fmt: skip
    peak = float(np.max(peaks))
    return {} if math.isnan(peak) else {"peak_memory_gib": peak / 2**30}
