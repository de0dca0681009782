"""The loop of every training run: batch, step, metrics, picture, checkpoint, until told to stop."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from clu import parameter_overview
from flax import nnx
from tqdm import tqdm

from enat_jax.checkpoints.tokenizer import CHECKPOINTS
from enat_jax.data.batches import Share
from enat_jax.errors import UserError
from enat_jax.parallel import hosts
from enat_jax.parallel.compilation import compile_seconds
from enat_jax.training.programs import Metrics, Programs
from enat_jax.training.workdir import Workdir


def training_loop(
    programs: Programs, workdir: Workdir, batches: Callable[[Share], Iterator[Any]], *, data: str
) -> None:
    """Takes the steps that are left, and leaves a checkpoint of the last.

    Told to stop, by SIGTERM to any of its processes, the run saves a checkpoint of the step that
    it is at, and returns. Nothing is saved while the last step was not finite: the next that is
    makes up for it.

    Args:
        programs: what is trained; the section `train` of its config says how long, and what
            happens between steps.
        workdir: entered.
        batches: the data of a share.
        data: what they are, for the user.

    Raises:
        UserError: too many steps in a row that are not finite, or the last one; or as
            `Workdir.resume`.
    """
    cfg, placement, log = programs.config.train, programs.placement, workdir.log
    state, start, images = workdir.resume(programs)
    if start >= cfg.steps:
        log(f"{workdir.path} is trained already: {start} of {cfg.steps} steps")
        return
    params = nnx.to_pure_dict(state.params)
    log(
        f"training {parameter_overview.count_parameters(params) / 1e6:.4g}M parameters on {data},"
        f" steps {start} to {cfg.steps}, on {placement.mesh.devices.size} x"
        f" {jax.devices()[0].device_kind}"
    )
    workdir.begin(start, params)
    stream = batches(Share(cfg.batch_size, placement.own_rows(cfg.batch_size), images))
    key = placement.put(jax.random.key(cfg.seed))
    meter, done, due = Meter(cfg.max_bad_steps, log), start, False
    quiet = None if hosts.is_primary() else True  # None: where there is no terminal
    with tqdm(
        total=cfg.steps, initial=start, unit="step", disable=quiet, dynamic_ncols=True
    ) as bar:
        for step in range(start, cfg.steps):
            with meter.measure("data"):
                batch = next(stream)
            workdir.trace(step + 1, state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                state, metrics = programs.step(step, state, batch, key)
            done, images = step + 1, images + cfg.batch_size
            meter.add(done, metrics)
            bar.update()
            stopping = hosts.preempted(done)
            last = done == cfg.steps or stopping
            if done % cfg.log_every == 0 or last:
                values = meter.entry(cfg.batch_size)
                values |= programs.summary(done, values["images_per_second"])
                workdir.write(done, values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                if bar.disable:
                    left = (cfg.steps - done) / values["steps_per_second"] / 60
                    log(
                        f"step {done}/{cfg.steps} loss {values['loss']:.4f}"
                        f" {values['images_per_second']:.0f} images/s, {left:.1f} min left"
                    )
            if cfg.sample_every and (done % cfg.sample_every == 0 or done == cfg.steps):
                with meter.measure("show"):
                    if shown := programs.show(state):
                        workdir.show(done, *shown)
            due = due or last or done % cfg.checkpoint_every == 0
            if due and meter.check():
                with meter.measure("checkpoint"):
                    workdir.save(done, state, images)
                due = False
            if stopping:
                break
        workdir.checkpoints.wait()
    if due:
        raise UserError(f"step {done}, the last, was not finite: it is not saved")
    where = workdir.path / CHECKPOINTS
    if done < cfg.steps:
        log(f"told to stop: step {done} of {cfg.steps} is saved in {where}; the same command goes"
            " on from there")  # fmt: skip
    else:
        log(f"trained {cfg.steps} steps; the checkpoint is in {where}")


class Meter:
    """What steps came to since the last entry: their metrics, and where the time went.

    `limit` steps in a row that are not finite, and so not applied, stop the run; `log` is called
    with a line for each.
    """

    def __init__(self, limit: int, log: Callable[[str], object]):
        self._limit, self._log, self._skipped = limit, log, 0
        self._unread: tuple[int, Metrics] | None = None
        self._restart()

    def _restart(self) -> None:
        self._metrics: list[Metrics] = []
        self._seconds: dict[str, float] = collections.defaultdict(float)
        self._start, self._compiled = time.perf_counter(), compile_seconds()

    @contextlib.contextmanager
    def measure(self, what: Literal["data", "show", "checkpoint"]) -> Iterator[None]:
        """Counts the time within; all but waiting for data is none of the steps'."""
        start, compiled = time.perf_counter(), compile_seconds()
        yield
        self._seconds[what] += time.perf_counter() - start
        if what != "data":
            self._compiled += compile_seconds() - compiled

    def add(self, step: int, metrics: Metrics) -> None:
        """Takes a step's metrics and checks the step before, so that the device never waits."""
        self.check()
        self._metrics.append(metrics)
        self._unread = step, metrics

    def check(self) -> bool:
        """Reads the last step's metrics, if they were not read yet; whether the step was applied.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        if self._unread is None:
            return not self._skipped
        (step, metrics), self._unread = self._unread, None
        if not float(metrics["skipped"]):
            self._skipped = 0
            return True
        self._skipped += 1
        values = float(metrics["loss"]), float(metrics["grad_norm"])
        what = "loss {}, gradient norm {}".format(*values)
        what += ", weights that are not finite" if np.isfinite(values).all() else ""
        if self._skipped >= self._limit:
            raise UserError(
                f"step {step}: {what}: the last {self._skipped} steps were not finite and not"
                f" applied; train.max_bad_steps = {self._limit}"
            )
        self._log(f"step {step} was not applied: {what}")
        return False

    def entry(self, images_per_step: int) -> dict[str, float]:
        """Means of the applied steps' metrics, how many were `skipped`, speed and peak memory.

        A term of the loss that begins in between has the mean of the steps that have it. Rates
        are of the steps alone, without compilation, pictures and checkpoints.
        """
        self.check()  # waits for the device
        every, beside = jax.device_get(self._metrics), self._seconds
        applied = [each for each in every if not each["skipped"]] or every
        means = {name: float(np.mean([each[name] for each in applied if name in each]))
                 for name in sorted({name for each in applied for name in each})}  # fmt: skip
        compiled = compile_seconds() - self._compiled
        seconds = time.perf_counter() - self._start - compiled
        seconds = max(seconds - beside["show"] - beside["checkpoint"], 1e-9)
        speed = {
            "skipped": float(sum(each["skipped"] for each in every)),
            "images_per_second": len(every) * images_per_step / seconds,
            "steps_per_second": len(every) / seconds,
            "data_wait": beside["data"] / seconds,
            "compile_seconds": compiled,
            "checkpoint_seconds": beside["checkpoint"],
        }
        self._restart()
        return means | speed | _peak_memory()


def _peak_memory() -> dict[str, float]:
    """The most that any device of this host has held, where devices tell."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", math.nan)
             for device in jax.local_devices()]  # fmt: skip
    peak = float(np.max(peaks))
    return {} if math.isnan(peak) else {"peak_memory_gib": peak / 2**30}
