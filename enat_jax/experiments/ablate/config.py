"""The config of an ablation: which settings are compared, and by what."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from enat_jax.config import ObjectiveConfig, SampleConfig
from enat_jax.config_file import did_you_mean, limited
from enat_jax.core.schedules import StrategyConfig
from enat_jax.errors import UserError

SECTIONS = {
    "strategy": tuple(each.name for each in fields(StrategyConfig)),
    "sample": tuple(each.name for each in fields(SampleConfig)),
    "model": ("dtype", "attention", "reproject"),  # what leaves the weights as they are
}
"""The sections of a run's config, with the fields that can be compared."""


def _comparable(grid: Mapping[str, Any], points: Mapping[str, Any]) -> bool:
    """Whether there is anything to compare.

    Raises:
        UserError: what cannot be compared, all at once, as far as can be said without the runs.
    """
    problems = list(_problems("grid", grid, several=True))
    for name, point in points.items():
        problems += _problems(f"points.{name}", point, several=False)
    if problems:
        raise UserError("; ".join(problems))
    return bool(grid or points)


def _problems(path: str, settings: Any, *, several: bool) -> Iterator[str]:
    """A phrase for each thing that cannot be in a point, or in a grid of several values a field."""
    if not isinstance(settings, Mapping):
        yield f"{path} = {settings!r} must be a section of fields"
        return
    for section, values in settings.items():
        where = f"{path}.{section}"
        if section == "workdir":
            paths = values if several and isinstance(values, list | tuple) else [values]
            yield from (f"{where} = {p!r} must be a path" for p in paths if not isinstance(p, str))
            if not paths:
                yield f"{where} = {values!r} is empty"
        elif section not in SECTIONS:
            yield f"{where} is nothing to compare{did_you_mean(section, [*SECTIONS, 'workdir'])}"
        elif not isinstance(values, Mapping):
            yield f"{where} = {values!r} must be a section of fields"
        else:
            for name, value in values.items():
                if name not in SECTIONS[section]:
                    guess = did_you_mean(name, SECTIONS[section])
                    yield f"{where}.{name} is nothing to compare{guess}"
                elif several and value in ([], ()):
                    yield f"{where}.{name} = {value!r} is empty"


@dataclass(frozen=True)
class AblateConfig:
    """One ablation; fields that a point does not name are as in its run's own config.

    Attributes:
        grid: all combinations of the values of `strategy` fields, `sample` fields, some `model`
            fields (`dtype`, `attention`, `reproject`) and `workdir`, such as
            `{"strategy": {"steps": (4, 8), "guidance_scale": (0.0, 1.0)}}`; a value alone, not in a
            list, is for all of the grid.
        points: further points by name, such as `{"fast": {"strategy": {"steps": 4}}}`.
        objective: what the images are judged by.
        num_images: images per point and seed, image i of class i modulo the number of classes.
        seeds: of the noise; every point is judged once with each.
        timed_batches: batches whose median time gives the speed, after one that is not timed.
        sheet: images of every point in the sheet, the same ones of the first seed; 0 for none.
    """

    grid: dict = field(default_factory=dict)
    points: dict = field(default_factory=dict)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    num_images: int = limited(50_000, at_least=2, at_most=10**8)
    seeds: tuple[int, ...] = limited((0,), at_least=0, below=2**32)
    timed_batches: int = limited(5, at_least=1)
    sheet: int = limited(10, at_least=0)

    RULES = (
        ("grid points", _comparable, "holds nothing to compare, nor does {1}"),
        ("seeds", lambda seeds: 0 < len(seeds) == len(set(seeds)),
         "must be at least one, all different"),
        ("sheet num_images", lambda sheet, images: sheet <= images, "must be at most {1}"),
    )  # fmt: skip
