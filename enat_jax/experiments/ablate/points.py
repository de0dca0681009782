"""The points of an ablation: each a run, and the settings it is to generate with."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.config import Config, config_from_dict
from enat_jax.core.generate import Layout
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.errors import UserError
from enat_jax.evaluation.objective import Objective, make_objective
from enat_jax.experiments.ablate.config import SECTIONS, AblateConfig
from enat_jax.models.flops import generation_flops, padding
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram
from enat_jax.sampling.sampler import restore


@dataclasses.dataclass(frozen=True)
class Point:
    """A point that can be measured.

    Attributes:
        name: what is different about it.
        workdir: its run.
        config: the run's with the point's changes.
        layout: the static shapes that it is compiled for.
        by_step: its strategy, step by step.
        checkpoint: step of the run's newest.
        digest: of the weights there.
        tokenizer_digest: of the tokenizer whose tokens the model was trained on.
        objective: what images are scored by.
    """

    name: str
    workdir: str
    config: Config
    layout: Layout
    by_step: GenerationStrategy
    checkpoint: int
    digest: str
    tokenizer_digest: str
    objective: Objective

    @property
    def generator(self) -> tuple[Any, ...]:
        """What a sampler is made for: points that have it in common share one."""
        cfg = self.config
        return cfg.model, cfg.tokenizer, cfg.sample, cfg.mesh, self.tokenizer_digest

    @property
    def flops(self) -> float:
        """FLOPs of an image by formula, two per multiply-add, without padding or tokenizer."""
        return generation_flops(self.config.model, self.layout.buckets, padded=False)

    @property
    def padding(self) -> float:
        """What padding adds to the FLOPs, as a fraction."""
        return padding(self.config.model, self.layout.buckets)

    def identity(self) -> dict[str, Any]:
        """What determines its images, beside the seed: as JSON holds it."""
        by_step = dataclasses.asdict(self.by_step)
        return {
            **{name: getattr(self, name) for name in ("workdir", "checkpoint", "digest")},
            **{section: dataclasses.asdict(getattr(self.config, section)) for section in SECTIONS},
            # what a strategy file said, not only its name
            "by_step": {name: np.asarray(values).tolist() for name, values in by_step.items()},
        }


def make_points(
    cfg: AblateConfig, workdir: str | None, *, log: Callable[[str], object] = print
) -> list[Point]:
    """Reads the runs and plans every point, those of the grid first; nothing is compiled.

    Points that name no run are of `workdir`; runs whose training is not done are logged.

    Raises:
        UserError: all runs that cannot be read and all points that cannot be, at once.
    """
    changes = [*_grid_points(cfg.grid), *((str(k), point) for k, point in cfg.points.items())]
    names = [name for name, _ in changes]
    problems = [f"{names.count(name)} points are named {name!r}"
                for name in names if names.count(name) > 1]  # fmt: skip
    paths = [point.get("workdir") or workdir or "" for _, point in changes]
    problems += [f"point {name!r} has no run: give --workdir, or workdir in the config"
                 for name, path in zip(names, paths, strict=True) if not path]  # fmt: skip
    runs: dict[str, tuple[Config, dict[str, Any]]] = {}
    objectives: dict[Any, Objective] = {}
    for path in filter(None, dict.fromkeys(paths)):
        try:
            runs[path] = _read_run(path, cfg, objectives, log)
        except UserError as error:
            problems.append(f"{path}: {error}")
    points: list[Point] = []
    programs: dict[Any, GenerationProgram] = {}
    for (name, point), path in zip(changes, paths, strict=True):
        if path not in runs:
            continue
        trained, facts = runs[path]
        fields = dataclasses.asdict(trained)
        for section in SECTIONS:
            fields[section] |= point.get(section, {})
        try:
            config = config_from_dict(fields)
            same = config.model, config.sample, config.mesh
            if same not in programs:
                programs[same] = GenerationProgram(config, Placement.of(config.mesh), None)
            by_step = programs[same].strategy(**dataclasses.asdict(config.strategy))
            layout, _ = programs[same].plan(by_step, reuse=config.strategy.reuse)
        except UserError as error:
            problems += str(error).removeprefix("config: ").split("; ")
            continue
        problems += [f"points {twin.name!r} and {name!r} are the same" for twin in points
                     if (twin.workdir, twin.config) == (path, config)]  # fmt: skip
        points.append(Point(name, path, config, layout, by_step, **facts))
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    return points


def _grid_points(grid: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """All combinations of a grid's values, by names that say what varies."""
    sections = {section: part if section in SECTIONS else {"": part}  # a section, or workdir
                for section, part in grid.items()}  # fmt: skip
    axes = {(section, name): values if isinstance(values, list | tuple) else (values,)
            for section, part in sections.items() for name, values in part.items()}  # fmt: skip
    for values in itertools.product(*axes.values()) if grid else ():
        point, varied = {}, []
        for (section, name), value in zip(axes, values, strict=True):
            if not name:
                point[section], shown = value, os.path.normpath(value)
            else:
                point.setdefault(section, {})[name] = value
                shown = pathlib.Path(str(value)).stem if name == "file" else f"{name}={value}"
            varied += [shown] if len(axes[section, name]) > 1 else []
        yield ", ".join(varied) or "the grid's point", point


def _read_run(
    workdir: str, cfg: AblateConfig, objectives: dict[Any, Objective], log: Callable[[str], object]
) -> tuple[Config, dict[str, Any]]:
    """The config of a run, and what else its points are made of; its weights are not kept."""
    restored = restore(workdir, warn=log)
    config, step = restored.config, restored.step
    if 0 < step < config.train.steps:  # imported weights are of step 0
        log(f"{workdir}: its training stands at step {step} of {config.train.steps}")
    scored = config.model, config.tokenizer, config.mesh
    if scored not in objectives:
        objectives[scored] = make_objective(cfg.objective, config, Placement.of(config.mesh))
    return config, {
        "checkpoint": step,
        "digest": weights_digest(restored.ema),
        "tokenizer_digest": restored.tokenizer_digest,
        "objective": objectives[scored],
    }
