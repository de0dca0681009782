"""The search for a strategy: updates one after another, each evaluated, recorded and applied."""

import dataclasses
import itertools
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.errors import UserError
from enat_jax.evaluation.objective import make_objective
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.experiments.search.evaluations import Evaluations
from enat_jax.experiments.search.optimisers import make_optimiser
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.experiments.table import Row, Table
from enat_jax.files import Path, atomic
from enat_jax.sampling.sampler import Restored, Sampler, sampler_of
from enat_jax.sampling.strategy_file import read_strategy, write_strategy


class Best(NamedTuple):
    """The best strategy evaluated on as many images as a search's last phase takes.

    Attributes:
        path: of its file.
        value: of it.
        evaluations: in all.
    """

    path: pathlib.Path
    value: float
    evaluations: int


def search(
    cfg: SearchConfig, restored: Restored, out: Path, *, log: Callable[[str], object] = print
) -> Best:
    """Searches for a strategy, or goes on where a search in the same folder was stopped.

    The folder holds `evaluations.csv`, a row per evaluation; `updates/0000.yaml` and so on, the
    strategy where the optimiser stood after each update; `best.yaml`, the best strategy evaluated
    in the last phase so far; and `about.json`, what it was started with.

    Raises:
        UserError: a folder of another search, a start or an objective that cannot be, a value that
            is not finite where the config says to stop.
    """
    if jax.process_count() > 1:
        raise UserError(f"search runs on one host, not on {jax.process_count()}")
    return _Search(cfg, restored, pathlib.Path(out), log).run()


def starting_numbers(cfg: SearchConfig, sampler: Sampler) -> Float[np.ndarray, " n"]:
    """The numbers that a search starts from.

    Raises:
        UserError: more steps than tokens, or a strategy file that cannot be read.
    """
    parameters, length = Parameters(cfg.steps), sampler.config.model.length
    if cfg.steps > length:
        raise UserError(f"steps = {cfg.steps} must be between 1 and {length} tokens")
    if cfg.start == "published":
        return parameters.published_start()
    if cfg.start == "run":
        return parameters.numbers(sampler.program.strategy(steps=cfg.steps))
    try:
        return parameters.numbers(read_strategy(cfg.start, steps=cfg.steps))
    except ValueError as error:
        raise UserError(
            f"start = {cfg.start!r} must be 'published', 'run' or a file: {error}"
        ) from error


def identity(
    cfg: SearchConfig, restored: Restored, start: Float[np.ndarray, " n"]
) -> dict[str, Any]:
    """Everything that determines the values."""
    own, run = dataclasses.asdict(cfg), dataclasses.asdict(restored.config)
    del own["on_nonfinite"]  # a search that was stopped may go on with the worst value
    return {
        **own,
        "start_numbers": start.tolist(),
        "run": {
            **{section: run[section] for section in ("model", "tokenizer", "sample")},
            "reuse": restored.config.strategy.reuse,
            "step": restored.step,
            "digest": weights_digest(restored.ema),
        },
    }


class _Search:
    """A search under way."""

    def __init__(
        self,
        cfg: SearchConfig,
        restored: Restored,
        folder: pathlib.Path,
        log: Callable[[str], object],
    ):
        sampler = sampler_of(restored)
        objective = make_objective(cfg.objective, restored.config, sampler.placement)
        self.cfg, self.folder, self.log = cfg, folder, log
        self.parameters, self.length = Parameters(cfg.steps), restored.config.model.length
        self.start, self.score = starting_numbers(cfg, sampler), objective.names[0]
        self.evaluate = Evaluations(cfg, sampler, objective, self.start)
        columns = {
            **dict.fromkeys(("update", "candidate", "images"), int),
            **dict.fromkeys((*self.parameters.names, *objective.names), float),
        }
        about = identity(cfg, restored, self.start)
        self.table = Table(folder / "evaluations.csv", columns, keys=2, about=about)
        self.seconds, self.evaluated = 0.0, 0  # by this process
        self.best: Row | None = None  # of the phase
        self.worst = -math.inf  # finite value of the phase

    def run(self) -> Best:
        if self.table.rows:
            self.log(f"going on: {len(self.table.rows)} evaluations are there")
        (self.folder / "updates").mkdir(exist_ok=True)
        done, numbers = 0, self.start
        phases = zip(self.cfg.num_images, self.cfg.updates, strict=True)
        for phase, (images, updates) in enumerate(phases):
            optimiser = make_optimiser(self.cfg, numbers, self.parameters, phase=phase)
            self.best, self.worst = None, -math.inf  # values of other images do not compare
            for _ in range(updates):
                rows = self._rows(optimiser.ask(), done, images)
                optimiser.tell(self._values(rows))
                self._write(optimiser.current, f"updates/{done:04d}.yaml")
                done += 1
                self._report(done, images, len(rows))
            numbers = optimiser.current
        assert self.best is not None  # an update there was, and it had a finite value
        return Best(self.folder / "best.yaml", self.best[self.score], len(self.table.rows))

    def _rows(self, candidates: Float[np.ndarray, "k n"], update: int, images: int) -> list[Row]:
        """The table's rows of an update, evaluated where they are not there."""
        rows, names = self.table.rows, self.parameters.names
        keys = [(update, k) for k in range(len(candidates))]
        together = min(self.cfg.strategies_per_call or len(keys), len(keys))
        for first in range(0, len(keys), together):
            group = slice(first, first + together)
            if all(key in rows for key in keys[group]):
                continue
            # the known ones, too: each has its place in the call, whatever was there before
            begin = time.perf_counter()
            scores = self.evaluate(candidates[group], images, together=together)
            self.seconds += time.perf_counter() - begin
            self.evaluated += len(scores)
            made = []
            for key, numbers, values in zip(keys[group], candidates[group], scores, strict=True):
                what = {"update": update, "candidate": key[1], "images": images}
                made.append(what | dict(zip(names, numbers, strict=True)) | values)
            self.table.add(*made)
        return [rows[key] for key in keys]

    def _values(self, rows: list[Row]) -> Float[np.ndarray, " k"]:
        """What an optimiser is told of evaluations; keeps the best and the worst of them."""
        values = np.array([row[self.score] for row in rows])
        finite = np.isfinite(values)
        for row in itertools.compress(rows, finite):
            self.worst = max(self.worst, row[self.score])
            if self.best is None or row[self.score] < self.best[self.score]:
                self.best = row
                self._write(self._numbers(row), "best.yaml")
        for row in itertools.compress(rows, ~finite):
            name = f"not_finite_{row['update']:04d}_{row['candidate']:02d}.yaml"
            self._write(self._numbers(row), name)
            message = (
                f"{self.score} = {row[self.score]} of candidate {row['candidate']} of update"
                f" {row['update']}, the strategy in {self.folder / name}"
            )
            if self.cfg.on_nonfinite == "stop" or not math.isfinite(self.worst):
                raise UserError(message)
            self.log(f"{message}: goes on as {self.worst:.6g}, the worst value so far")
        return np.where(finite, values, self.worst)

    def _numbers(self, row: Row) -> Float[np.ndarray, " n"]:
        return np.array([row[name] for name in self.parameters.names])

    def _write(self, numbers: Float[np.ndarray, " n"], name: str) -> None:
        with atomic(self.folder / name) as part:
            write_strategy(self.parameters.strategy(numbers, self.length), part)

    def _report(self, done: int, images: int, per_update: int) -> None:
        assert self.best is not None
        text = f"best {self.score} {self.best[self.score]:.6g}"
        if self.evaluated:
            rate = self.evaluated / self.seconds  # evaluations of so many images per second
            updates = np.array(self.cfg.updates)
            left = np.clip(np.cumsum(updates) - done, 0, updates) @ self.cfg.num_images / images
            minutes = left * per_update / rate / 60
            text += f", {rate:.3g} evaluations/s, about {minutes:.1f} min left"
        self.log(f"update {done} of {sum(self.cfg.updates)}, {images} images: {text}")
