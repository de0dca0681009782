"""The points of an ablation: each a run, and the settings it is to generate with."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.config import Config, config_from_dict
from enat_jax.core.generate import Layout
from enat_jax.core.plans import padding
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.errors import UserError
from enat_jax.experiments.ablate.config import SECTIONS, AblateConfig
from enat_jax.models.flops import generation_flops, step_flops
from enat_jax.parallel.hosts import all_gather
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram
from enat_jax.sampling.sampler import restore


class AblateError(UserError):
    """An ablation that cannot be made or gone on with."""


class Setting(NamedTuple):
    """A point as the ablation's config says it.

    Attributes:
        name: what is different about it.
        workdir: its run.
        changes: to the run's config, field by field in each section.
    """

    name: str
    workdir: str
    changes: dict[str, dict[str, Any]]


class Model(NamedTuple):
    """What a run's newest checkpoint holds.

    Attributes:
        config: the run's.
        step: of the checkpoint.
        digest: of the moving average's values.
        tokenizer_digest: of the tokenizer whose tokens the model was trained on.
    """

    config: Config
    step: int
    digest: str
    tokenizer_digest: str


@dataclasses.dataclass(frozen=True)
class Point:
    """A point that can be measured.

    Attributes:
        name: what is different about it.
        workdir: its run.
        model: what the run's checkpoint holds.
        config: the run's config with the point's changes.
        layout: the static shapes that it is compiled for.
        by_step: its strategy, step by step.
    """

    name: str
    workdir: str
    model: Model
    config: Config
    layout: Layout
    by_step: GenerationStrategy

    @property
    def strategy(self) -> dict[str, Any]:
        """All fields of its strategy."""
        return dataclasses.asdict(self.config.strategy)

    @property
    def generator(self) -> Any:
        """What a sampler is made for: points that have it in common share one."""
        config = self.config
        return (config.model, config.tokenizer, config.sample, config.mesh,
                self.model.tokenizer_digest)  # fmt: skip

    @property
    def flops(self) -> float:
        """FLOPs of an image by formula, two per multiply-add, without padding or tokenizer."""
        return generation_flops(self.config.model, self.layout.buckets, padded=False)

    @property
    def padding(self) -> float:
        """What padding adds to the FLOPs, as a fraction."""
        return padding(self.layout.buckets, lambda plan: step_flops(self.config.model, plan))


def settings(cfg: AblateConfig, workdir: str | None) -> list[Setting]:
    """The points of a config, those of the grid first.

    Args:
        cfg: the ablation.
        workdir: the run of points that name none.

    Raises:
        AblateError: a point without a run, or two of one name.
    """
    axes, fixed = [], {}
    for section, values in cfg.grid.items():
        fields = values.items() if section in SECTIONS else [(None, values)]
        for name, value in fields:
            if isinstance(value, list | tuple):
                axes.append([((section, name), each) for each in value])
            else:
                fixed[section, name] = value
    found = []
    for values in itertools.product(*axes) if cfg.grid else ():
        varied = [(where, value) for axis, (where, value) in zip(axes, values, strict=True)
                  if len(axis) > 1]  # fmt: skip
        name = ", ".join(_named(where, value) for where, value in varied) or "the grid's point"
        found.append(_setting(name, {**fixed, **dict(values)}, workdir))
    for name, point in cfg.points.items():
        changes = {
            (section, field): value
            for section, values in point.items()
            for field, value in (values.items() if section in SECTIONS else [(None, values)])
        }
        found.append(_setting(str(name), changes, workdir))
    problems = [f"point {each.name!r} has no run: give --workdir, or workdir in the config"
                for each in found if not each.workdir]  # fmt: skip
    names = [each.name for each in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    problems += [f"{names.count(name)} points are named {name!r}" for name in twice]
    if problems:
        raise AblateError("; ".join(dict.fromkeys(problems)))
    return found


def check_points(found: Iterable[Setting], *, warn: Callable[[str], object] = print) -> list[Point]:
    """Reads the runs and plans every point, before anything is compiled.

    Raises:
        AblateError: all runs that cannot be read and all points that cannot be, at once.
    """
    found = list(found)
    problems: list[str] = []
    models: dict[str, Model] = {}
    for workdir in dict.fromkeys(each.workdir for each in found):
        try:
            models[workdir] = read_model(workdir, warn=warn)
        except UserError as error:
            problems.append(str(error))
    points, seen = [], {}
    programs: dict[Any, GenerationProgram] = {}
    for name, workdir, changes in found:
        if workdir not in models:
            continue
        model = models[workdir]
        fields = dataclasses.asdict(model.config)
        for section, values in changes.items():
            fields[section] = {**fields[section], **values}
        try:
            config = config_from_dict(fields)
            same = config.model, config.sample, config.mesh
            if same not in programs:
                programs[same] = GenerationProgram(config, Placement.of(config.mesh), None)
            strategy = dataclasses.asdict(config.strategy)
            layout, _ = programs[same].plan(**strategy)
            by_step = programs[same].strategy(**strategy)
        except UserError as error:
            problems += str(error).removeprefix("config: ").split("; ")
            continue
        twin = seen.setdefault((workdir, config), name)
        if twin != name:
            problems.append(f"points {twin!r} and {name!r} are the same")
        points.append(Point(name, workdir, model, config, layout, by_step))
    if problems:
        raise AblateError("; ".join(dict.fromkeys(problems)))
    return points


def read_model(workdir: str, *, warn: Callable[[str], object] = print) -> Model:
    """What the newest checkpoint of a run holds; its weights are read, but not kept.

    A run whose training is not done is told.

    Raises:
        CheckpointError: no readable checkpoint there, or one of another kind.
    """
    restored = restore(workdir, warn=warn)
    planned = restored.config.train.steps
    if 0 < restored.step < planned:  # imported weights are of step 0
        warn(f"{workdir}: its training stands at step {restored.step} of {planned}")
    digest = weights_digest(jax.tree.map(all_gather, restored.ema))
    return Model(restored.config, restored.step, digest, restored.tokenizer_digest)


def by_program(points: Iterable[Point]) -> list[Point]:
    """The points in an order in which those that share a sampler, a run or a program are together.

    Groups stand in the order in which their first points do.
    """
    ordered = list(points)
    for key in (lambda p: p.layout, lambda p: p.workdir, lambda p: p.generator):
        place: dict[Any, int] = {}
        for point in ordered:
            place.setdefault(key(point), len(place))
        ordered.sort(key=lambda point, k=key, at=place: at[k(point)])
    return ordered


def identity(point: Point) -> dict[str, Any]:
    """What determines a point's images, beside the seed: as JSON holds it."""
    return {
        "workdir": point.workdir,
        "checkpoint": point.model.step,
        "digest": point.model.digest,
        **{section: dataclasses.asdict(getattr(point.config, section)) for section in SECTIONS},
        "by_step": {  # what a strategy file said, not only its name
            name: np.asarray(values).tolist()
            for name, values in dataclasses.asdict(point.by_step).items()
        },
    }


def _setting(
    name: str, changes: Mapping[tuple[str, str | None], Any], workdir: str | None
) -> Setting:
    sections: dict[str, dict[str, Any]] = {}
    for (section, field), value in changes.items():
        if field is None:
            workdir = os.fspath(value)
        else:
            sections.setdefault(section, {})[field] = value
    return Setting(name, workdir or "", sections)


def _named(where: tuple[str, str | None], value: Any) -> str:
    """How a value of the grid shows in a point's name."""
    if where == ("strategy", "file"):
        return pathlib.Path(str(value)).stem
    if where[1] is None:
        return os.path.normpath(value)
    return f"{where[1]}={value}"
