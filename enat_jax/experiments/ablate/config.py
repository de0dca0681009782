"""The config of an ablation: which settings are compared, and by what."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from enat_jax.config import SampleConfig
from enat_jax.config_file import make_config, read_fields
from enat_jax.core.strategy import StrategyConfig
from enat_jax.evaluation.objective import ObjectiveConfig

SECTIONS = {
    "strategy": tuple(each.name for each in fields(StrategyConfig)),
    "sample": tuple(each.name for each in fields(SampleConfig)),
    "model": ("dtype", "attention", "reproject"),  # what leaves the weights as they are
}
"""The sections of a run's config, with the fields that can be compared."""


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
    num_images: int = 50_000
    seeds: tuple[int, ...] = (0,)
    timed_batches: int = 5
    sheet: int = 10


def load_ablation(path: str, overrides: Sequence[str] = ()) -> AblateConfig:
    """Reads an ablation's config file, applies overrides, and checks the whole.

    Raises:
        ConfigError: an unreadable file, unknown fields, wrong types or values; all at once.
    """
    return ablation_from_dict(read_fields(path), overrides)


def ablation_from_dict(fields: Mapping[str, Any], overrides: Sequence[str] = ()) -> AblateConfig:
    """A checked ablation from nested mappings after `field=value` overrides.

    Raises:
        ConfigError: unknown fields, wrong types or values; all at once.
    """
    return make_config(AblateConfig, fields, check, overrides)


def check(config: AblateConfig) -> list[str]:
    """What is wrong with an ablation, as far as can be said without the runs it compares."""
    rules = [
        (bool(config.grid or config.points), "grid", config.grid,
         "holds nothing to compare, nor does points"),
        (config.num_images >= 2, "num_images", config.num_images, "must be at least 2"),
        (bool(config.seeds), "seeds", config.seeds, "must hold at least one"),
        (len(set(config.seeds)) == len(config.seeds), "seeds", config.seeds, "must all differ"),
        (all(0 <= seed < 2**32 for seed in config.seeds), "seeds", config.seeds,
         f"must be from 0 to {2**32 - 1}"),
        (config.timed_batches >= 1, "timed_batches", config.timed_batches, "must be at least 1"),
        (0 <= config.sheet <= config.num_images, "sheet", config.sheet,
         f"must be from 0 to num_images = {config.num_images}"),
    ]  # fmt: skip
    problems = [f"{name} = {value} {limit}" for holds, name, value, limit in rules if not holds]
    problems += _unknown(config.grid, "grid")
    problems += [
        f"grid.{where} = {values!r} is empty"
        for where, values in _leaves(config.grid)
        if isinstance(values, list | tuple) and not values
    ]
    for name, point in config.points.items():
        if isinstance(point, Mapping):
            problems += _unknown(point, f"points.{name}")
        else:
            problems.append(f"points.{name} = {point!r} must be a section of fields")
    return problems


def _leaves(changes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every value of a grid with its field's name."""
    found = []
    for name, value in changes.items():
        inner = _leaves(value) if isinstance(value, Mapping) else [("", value)]
        found += [(f"{name}.{rest}".rstrip("."), each) for rest, each in inner]
    return found


def _unknown(changes: Mapping[str, Any], path: str) -> list[str]:
    """A phrase for each thing in a grid or a point that no run's config has."""
    problems = []
    for section, values in changes.items():
        if section == "workdir":
            several = path == "grid" and isinstance(values, list | tuple)
            problems += [f"{path}.workdir = {each!r} must be a path"
                         for each in (values if several else [values])
                         if not isinstance(each, str)]  # fmt: skip
        elif section not in SECTIONS:
            problems.append(f"{path}.{section} is nothing to compare{_guess(section, SECTIONS)}")
        elif not isinstance(values, Mapping):
            problems.append(f"{path}.{section} = {values!r} must be a section of fields")
        else:
            known = SECTIONS[section]
            problems += [
                f"{path}.{section}.{name} is nothing to compare{_guess(name, known)}"
                for name in values
                if name not in known
            ]
    return problems


def _guess(name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), [*known, "workdir"], n=1)
    return f" (did you mean {close[0]}?)" if close else ""
