"""The search for a strategy: updates one after another, each evaluated, recorded and applied."""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.core.strategy import GenerationStrategy, read_strategy, write_strategy
from enat_jax.evaluation.objective import Objective, make_objective
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.experiments.search.evaluations import Evaluations
from enat_jax.experiments.search.log import EVALUATIONS, Log, Row, SearchError
from enat_jax.experiments.search.optimisers import Optimiser, make_optimiser
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.experiments.study_folder import open_study
from enat_jax.files import atomic
from enat_jax.parallel.hosts import all_gather
from enat_jax.sampling.sampler import Restored, Sampler, sampler_of

BEST = "best.yaml"
UPDATES = "updates"


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        strategy: the best one that was evaluated on as many images as the last phase takes.
        value: of it.
        evaluations: in all.
        path: of the strategy's file.
    """

    strategy: GenerationStrategy
    value: float
    evaluations: int
    path: pathlib.Path


def search(
    cfg: SearchConfig,
    restored: Restored,
    out: str | os.PathLike[str],
    *,
    say: Callable[[str], object] = print,
) -> Found:
    """Searches for a strategy, or goes on where a search in the same folder was stopped.

    The folder holds `evaluations.csv`, a row per evaluation; `updates/0000.yaml` and so on, the
    strategy where the optimiser stood after each update; `best.yaml`, the best strategy evaluated
    in the last phase so far; and `about.json`, what it was started with.

    Args:
        cfg: the search's config.
        restored: the generator and its config.
        out: the folder.
        say: called with lines for the user.

    Raises:
        UserError: a folder of another search, a start or an objective that cannot be, a value that
            is not finite where the config says to stop.
    """
    if jax.process_count() > 1:
        raise SearchError(f"search runs on one host, not on {jax.process_count()}")
    sampler = sampler_of(restored)
    objective = make_objective(cfg.objective, restored.config, sampler.placement)
    start = starting_numbers(cfg, sampler)
    folder = pathlib.Path(out)
    open_study(folder, identity(cfg, restored, start), results=EVALUATIONS)
    evaluations = Evaluations(cfg, sampler, objective, start)
    return _Search(cfg, evaluations, objective, folder, restored.config.model.length, say).run(
        start
    )


def starting_numbers(cfg: SearchConfig, sampler: Sampler) -> Float[np.ndarray, " n"]:
    """The numbers that a search starts from.

    Raises:
        UserError: more steps than tokens, or a strategy file that cannot be read.
    """
    parameters, length = Parameters(cfg.steps), sampler.config.model.length
    if cfg.steps > length:
        raise SearchError(f"steps = {cfg.steps} must be between 1 and {length} tokens")
    if cfg.start == "published":
        return parameters.clamp(parameters.published_start())
    if cfg.start == "run":
        return parameters.numbers(sampler.strategy(steps=cfg.steps))
    try:
        return parameters.numbers(read_strategy(cfg.start, steps=cfg.steps))
    except ValueError as error:
        said = f"start = {cfg.start!r} must be 'published', 'run' or a file: {error}"
        raise SearchError(said) from error


def identity(
    cfg: SearchConfig, restored: Restored, start: Float[np.ndarray, " n"]
) -> dict[str, Any]:
    """Everything that determines the record."""
    generator = restored.config
    own = dataclasses.asdict(cfg)
    del own["on_nonfinite"]  # a search that was stopped may go on with the worst value
    fields = {
        "model": generator.model,
        "tokenizer": generator.tokenizer,
        "sample": generator.sample,
    }
    return {
        **own,
        "start_numbers": start.tolist(),
        "run": {
            **{name: dataclasses.asdict(value) for name, value in fields.items()},
            "reuse": generator.strategy.reuse,
            "step": restored.step,
            "digest": weights_digest(jax.tree.map(all_gather, restored.ema)),
        },
    }


class _Search:
    def __init__(
        self,
        cfg: SearchConfig,
        evaluations: Evaluations,
        objective: Objective,
        folder: pathlib.Path,
        length: int,
        say: Callable[[str], object],
    ):
        self._cfg, self._evaluations, self._objective = cfg, evaluations, objective
        self._folder, self._length, self._say = folder, length, say
        self._parameters = evaluations.parameters
        self._log = Log(folder, self._parameters.names, objective.names)
        self._seconds, self._made = 0.0, 0  # spent on evaluations by this process; and how many
        self._worst = -math.inf  # finite value of the phase
        self._best: Row | None = None  # of the phase

    def run(self, start: Float[np.ndarray, " n"]) -> Found:
        cfg = self._cfg
        known = len(self._log.rows)
        if known:
            self._say(f"going on: {known} evaluations are there")
        (self._folder / UPDATES).mkdir(exist_ok=True)
        update, numbers = 0, start
        for phase, (images, updates) in enumerate(zip(cfg.num_images, cfg.updates, strict=True)):
            optimiser = make_optimiser(cfg, numbers, self._parameters, phase=phase)
            self._worst, self._best = -math.inf, None  # values of other images do not compare
            for _ in range(updates):
                values = self._update(optimiser, update, images)
                optimiser.tell(values)
                self._write(optimiser.current, self._folder / UPDATES / f"{update:04d}.yaml")
                self._report(update, images, len(values))
                update += 1
            numbers = optimiser.current
        assert self._best is not None  # an update there was, and it had a finite value
        return Found(
            strategy=self._parameters.strategy(np.array(self._best.numbers), self._length),
            value=self._best.value,
            evaluations=len(self._log.rows),
            path=self._folder / BEST,
        )

    def _update(self, optimiser: Optimiser, update: int, images: int) -> Float[np.ndarray, " k"]:
        """Values of all that the optimiser asks for, evaluated where they are not known."""
        candidates = optimiser.ask()
        rows = self._log.known(update, candidates, images)
        together = min(self._cfg.strategies_per_call or len(candidates), len(candidates))
        for first in range(0, len(candidates), together):
            group = range(first, min(first + together, len(candidates)))
            missing = [k for k in group if k not in rows]
            if missing:
                # the known ones, too: each has its place in the call, whatever was there before
                rows |= self._evaluate(candidates, group, missing, update, images, together)
        values = np.array([rows[k].value for k in range(len(candidates))])
        self._keep_best(rows)
        return self._finite(values)

    def _evaluate(
        self,
        candidates: Float[np.ndarray, "k n"],
        group: Sequence[int],
        missing: Sequence[int],
        update: int,
        images: int,
        together: int,
    ) -> dict[int, Row]:
        begin = time.perf_counter()
        scores = self._evaluations(candidates[list(group)], images, together=together)
        self._seconds += time.perf_counter() - begin
        self._made += len(group)
        rows = {}
        for k, found in zip(group, scores, strict=True):
            if k in missing:
                values = tuple(float(found[name]) for name in self._objective.names)
                rows[k] = Row(update, k, images, tuple(candidates[k].tolist()), values)
        self._log.add(list(rows.values()))
        return rows

    def _keep_best(self, rows: dict[int, Row]) -> None:
        finite = [row for _, row in sorted(rows.items()) if math.isfinite(row.value)]
        for row in finite:
            if self._best is None or row.value < self._best.value:
                self._best = row
                self._write(np.array(row.numbers), self._folder / BEST)
        self._worst = max([self._worst, *(row.value for row in finite)])
        for row in rows.values():
            if not math.isfinite(row.value):
                path = self._folder / f"not_finite_{row.update:04d}_{row.candidate:02d}.yaml"
                self._write(np.array(row.numbers), path)
                said = (
                    f"{self._objective.names[0]} = {row.value} of candidate {row.candidate} of"
                    f" update {row.update}, the strategy in {path}"
                )
                if self._cfg.on_nonfinite == "stop" or not math.isfinite(self._worst):
                    raise SearchError(said)
                self._say(f"{said}: goes on as {self._worst:.6g}, the worst value so far")

    def _finite(self, values: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
        return np.where(np.isfinite(values), values, self._worst)

    def _write(self, numbers: Float[np.ndarray, " n"], path: pathlib.Path) -> None:
        with atomic(path) as part:
            write_strategy(self._parameters.strategy(numbers, self._length), part)

    def _report(self, update: int, images: int, per_update: int) -> None:
        assert self._best is not None
        cfg, done = self._cfg, update + 1
        line = (
            f"update {done} of {sum(cfg.updates)}, {images} images: best"
            f" {self._objective.names[0]} {self._best.value:.6g}"
        )
        if self._made:
            rate = self._made / self._seconds  # evaluations of so many images per second
            line += f", {rate:.3g} evaluations/s"
            ends = np.cumsum(cfg.updates)
            left = np.clip(ends - done, 0, cfg.updates) * np.array(cfg.num_images) / images
            line += f", about {_duration(left.sum() * per_update / rate)} left"
        self._say(line)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
