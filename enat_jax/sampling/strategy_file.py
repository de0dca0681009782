"""Strategies in files: YAML with AutoNAT's published keys."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml

from enat_jax.core.orders import position_priority
from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.core.strategy import GenerationStrategy, Masking
from enat_jax.files import Path, read_bytes

_YAML_KEYS = {  # AutoNAT's published keys; the last ratio and the last choice temperature are 0
    "manual_ratios": "mask_ratio",
    "manual_temp": "choice_temperature",
    "manual_samp_temp": "sampling_temperature",
    "manual_cfg": "guidance_scale",
}
_MOST_BYTES, _MOST_DEPTH = 2**18, 8  # of a strategy file
_LAST_IS_ZERO = ("mask_ratio", "choice_temperature")


def configured_strategy(cfg: StrategyConfig, length: int) -> GenerationStrategy:
    """The strategy a config describes: its file's where it names one, else its rule's.

    Raises:
        ValueError: a field out of range or an unreadable strategy file.
    """
    if cfg.rule != "file":
        return make_strategy(cfg, length)
    strategy = read_strategy(cfg.file, steps=cfg.steps, masking=cfg.masking)
    priority = position_priority(cfg.order, length)
    return dataclasses.replace(strategy, priority=priority, ranking=cfg.ranking)


def read_strategy(
    path: Path, *, steps: int | None = None, masking: Masking = "enat"
) -> GenerationStrategy:
    """Reads a strategy from YAML with AutoNAT's published keys.

    Args:
        path: the file; a relative one from the current folder.
        steps: how many it must have; as many as it has sampling temperatures by default.
        masking: how its ratios become counts, which the file does not say.

    Raises:
        ValueError: a missing file, missing or unknown keys, lengths that do not fit, or values out
            of range; named.
    """
    try:
        text = read_bytes(pathlib.Path(path), most=_MOST_BYTES)
        return _strategy(yaml.load(text, _PlainLoader), steps, masking)
    except (OSError, ValueError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())  # YAML's complaints are of several lines
        raise ValueError(f"strategy file {path}: {line}") from error


class _PlainLoader(yaml.SafeLoader):
    """Reads somebody else's YAML: nothing deep, nothing by reference, no key twice."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError(f"aliases are not taken: *{self.peek_event().anchor}")
        if self._depth == _MOST_DEPTH:
            raise ValueError(f"is nested deeper than {_MOST_DEPTH}")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (str(key.value) for key, _ in node.value):
            if key in seen:
                raise ValueError(f"has the key {key!r:.80} twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _strategy(content: Any, steps: int | None, masking: Masking) -> GenerationStrategy:
    if not isinstance(content, Mapping) or set(content) != set(_YAML_KEYS):
        keys = list(content) if isinstance(content, Mapping) else content
        shown = f"{keys!r:.200}"
        raise ValueError(f"must have the keys {', '.join(_YAML_KEYS)} and no others, not {shown}")
    arrays = {}
    for key, name in _YAML_KEYS.items():
        try:
            values = np.asarray(content[key], object).reshape(-1).tolist()
            if any(isinstance(value, bool) for value in values):
                raise TypeError("true and false are no numbers")
            arrays[name] = np.array([float(value) for value in values])  # 1e-4 is text in YAML
        except (TypeError, ValueError, OverflowError) as error:
            shown = f"{content[key]!r:.200}"
            raise ValueError(f"{key} = {shown} must be a list of numbers") from error
    count = len(arrays["sampling_temperature"])
    for name in _LAST_IS_ZERO:
        if len(arrays[name]) == count - 1:
            arrays[name] = np.append(arrays[name], 0.0)
    if steps not in (None, count):
        raise ValueError(f"has {count} steps, but strategy.steps = {steps}")
    return GenerationStrategy(**arrays, masking=masking)


def write_strategy(strategy: GenerationStrategy, path: Path) -> None:
    """Writes a strategy as YAML with AutoNAT's published keys; `masking` is not among them."""
    content = {}
    for key, name in _YAML_KEYS.items():
        values = getattr(strategy, name).tolist()
        content[key] = values[:-1] if name in _LAST_IS_ZERO and values[-1] == 0 else values
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False)
