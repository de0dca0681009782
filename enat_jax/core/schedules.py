"""How strategies are made: mask schedules, the papers' rules, and YAML with AutoNAT's keys."""

import dataclasses
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import yaml

from enat_jax.core.orders import ORDERS
from enat_jax.core.strategy import GenerationStrategy, Masking

Rule = Literal["enat", "maskgit", "file"]
Schedule = Literal["cosine", "linear", "square", "cubic", "sqrt", "log", "arccos"]

SCHEDULES: dict[Schedule, Callable[[np.ndarray, int], np.ndarray]] = {
    "cosine": lambda progress, length: np.cos(progress * np.pi / 2),
    "linear": lambda progress, length: 1 - progress,
    "square": lambda progress, length: 1 - progress**2,
    "cubic": lambda progress, length: 1 - progress**3,
    "sqrt": lambda progress, length: 1 - np.sqrt(progress),
    "log": lambda progress, length: -np.log(np.maximum(progress, 1 / length)) / np.log(length),
    "arccos": lambda progress, length: np.arccos(progress) / (np.pi / 2),
}
"""Mask schedules (MaskGIT section 3.3; square, cubic and sqrt are its powers 2, 3 and 1/2; log is
from its code): progress in [0, 1] and tokens per image -> fraction still masked, 1 to 0."""

_YAML_KEYS = {  # AutoNAT's published keys; the last ratio and the last choice temperature are 0
    "manual_ratios": "mask_ratio",
    "manual_temp": "choice_temperature",
    "manual_samp_temp": "sampling_temperature",
    "manual_cfg": "guidance_scale",
}
_MOST_BYTES, _MOST_DEPTH = 2**18, 8  # of a strategy file
_LAST_IS_ZERO = ("mask_ratio", "choice_temperature")


@dataclass(frozen=True)
class StrategyConfig:
    """How a generation strategy is made.

    Attributes:
        rule: `enat` anneals the sampling temperature to 0, `maskgit` holds it, `file` reads YAML.
        steps: number of network calls, 1 to the number of tokens; a file must have as many.
        schedule: the mask schedule's name.
        masking: how ratios become counts, see `GenerationStrategy.masked_counts`.
        guidance_scale: reached (almost) at the last step, linearly from 0 at the first.
        choice_temperature: Gumbel scale on the confidence before the first step, annealed to 0.
        sampling_temperature: divides logits; see `rule`.
        order: what is revealed first: the tokens the network is most confident of, or positions in
            an order of `core.orders`.
        reuse: whether steps reuse features of earlier ones, in networks that carry them.
        file: strategy YAML for `rule="file"`; a relative path is one from the current folder.
    """

    rule: Rule = "enat"
    steps: int = 8
    schedule: Schedule = "cosine"
    masking: Masking = "enat"
    guidance_scale: float = field(default=2.5, metadata={"at_least": 0})
    choice_temperature: float = field(default=1.5, metadata={"at_least": 0})
    sampling_temperature: float = field(default=6.0, metadata={"above": 0})
    order: str = "confidence"
    reuse: bool = True
    file: str = ""


def make_strategy(cfg: StrategyConfig, length: int | None = None) -> GenerationStrategy:
    """The strategy a config describes: ENAT's rule (its section A.2), MaskGIT's, or a file's.

    Args:
        cfg: the strategy's config.
        length: tokens per image, which the schedule `log` depends on.

    Raises:
        ValueError: a field out of range or an unreadable strategy file.
    """
    if cfg.order not in ORDERS:
        raise ValueError(f"order = {cfg.order!r} must be one of {', '.join(ORDERS)}")
    priority = None
    if cfg.order != "confidence":
        if length is None:
            raise ValueError(f"order = {cfg.order!r} needs the number of tokens per image")
        priority = ORDERS[cfg.order](length)
    if cfg.rule == "file":
        strategy = read_strategy(cfg.file, steps=cfg.steps, masking=cfg.masking)
        return dataclasses.replace(strategy, priority=priority)
    if cfg.steps < 1:
        raise ValueError(f"steps is {cfg.steps}, must be at least 1")
    if cfg.schedule not in SCHEDULES:
        raise ValueError(f"schedule = {cfg.schedule!r} must be one of {', '.join(SCHEDULES)}")
    if cfg.schedule == "log" and (length or 0) < 2:
        raise ValueError(f"schedule = 'log' needs at least 2 tokens per image, not {length}")
    step = np.arange(cfg.steps)
    progress = (step + 1) / cfg.steps
    remaining = 1 - progress
    ratio = SCHEDULES[cfg.schedule](progress, length or 0)
    ratio[-1] = 0.0  # cos(pi / 2) is not exactly 0 in floating point
    if cfg.rule == "enat":
        sampling = np.maximum(cfg.sampling_temperature * remaining, 1e-3)
    else:
        sampling = np.full(cfg.steps, cfg.sampling_temperature)
    return GenerationStrategy(
        mask_ratio=ratio,
        choice_temperature=cfg.choice_temperature * remaining,
        sampling_temperature=sampling,
        guidance_scale=cfg.guidance_scale * step / cfg.steps,
        masking=cfg.masking,
        priority=priority,
    )


def read_strategy(
    path: str | os.PathLike[str], *, steps: int | None = None, masking: Masking = "enat"
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
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("is no regular file")
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise ValueError(f"has more than {_MOST_BYTES} bytes")
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


def write_strategy(strategy: GenerationStrategy, path: str | os.PathLike[str]) -> None:
    """Writes a strategy as YAML with AutoNAT's published keys; `masking` is not among them."""
    content = {}
    for key, name in _YAML_KEYS.items():
        values = getattr(strategy, name).tolist()
        content[key] = values[:-1] if name in _LAST_IS_ZERO and values[-1] == 0 else values
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False)
