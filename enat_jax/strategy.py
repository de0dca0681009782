"""A generation strategy: per step, how many tokens are revealed and with which temperatures."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import yaml

Rule = Literal["enat", "maskgit", "file"]
Schedule = Literal["cosine", "linear", "square", "cubic", "sqrt", "arccos"]

SCHEDULES: dict[Schedule, Callable[[np.ndarray], np.ndarray]] = {
    "cosine": lambda progress: np.cos(progress * np.pi / 2),
    "linear": lambda progress: 1 - progress,
    "square": lambda progress: 1 - progress**2,
    "cubic": lambda progress: 1 - progress**3,
    "sqrt": lambda progress: 1 - np.sqrt(progress),
    "arccos": lambda progress: np.arccos(progress) / (np.pi / 2),
}
"""Mask schedules (MaskGIT section 3.3): progress in [0, 1] -> fraction still masked, 1 to 0."""

_YAML_KEYS = {  # AutoNAT's published keys; the last ratio and the last choice temperature are 0
    "manual_ratios": "mask_ratio",
    "manual_temp": "choice_temperature",
    "manual_samp_temp": "sampling_temperature",
    "manual_cfg": "guidance_scale",
}
_LAST_IS_ZERO = ("mask_ratio", "choice_temperature")


@dataclass(frozen=True)
class StrategyConfig:
    """How a generation strategy is made.

    Attributes:
        rule: `enat` anneals the sampling temperature to 0, `maskgit` holds it, `file` reads YAML.
        steps: number of network calls, 1 to the number of tokens.
        schedule: the mask schedule's name.
        guidance_scale: reached (almost) at the last step, linearly from 0 at the first.
        choice_temperature: Gumbel scale on the confidence before the first step, annealed to 0.
        sampling_temperature: divides logits; see `rule`.
        reuse: whether steps reuse features of earlier ones, in networks that carry them.
        file: strategy YAML for `rule="file"`.
    """

    rule: Rule = "enat"
    steps: int = 8
    schedule: Schedule = "cosine"
    guidance_scale: float = 2.5
    choice_temperature: float = 1.5
    sampling_temperature: float = 6.0
    reuse: bool = True
    file: str = ""


@dataclass(frozen=True)
class GenerationStrategy:
    """Per-step arrays `[t]` that drive generation; plain data, traced except for the mask ratios.

    Attributes:
        mask_ratio: fraction still masked after the step, in [0, 1], the last one 0.
        choice_temperature: Gumbel noise scale on the confidence, >= 0.
        sampling_temperature: divides the logits, > 0.
        guidance_scale: s in `c + s (c - u)`, >= 0.

    Raises:
        ValueError: arrays of different lengths or values out of range, all named at once.
    """

    mask_ratio: np.ndarray
    choice_temperature: np.ndarray
    sampling_temperature: np.ndarray
    guidance_scale: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, np.asarray(getattr(self, field.name), np.float64))
        problems = [
            f"{field.name} must be finite, not {getattr(self, field.name).tolist()}"
            for field in fields(self)
            if not np.all(np.isfinite(getattr(self, field.name)))
        ]
        lengths = {field.name: getattr(self, field.name).shape for field in fields(self)}
        if len(set(lengths.values())) > 1 or self.mask_ratio.ndim != 1 or not self.mask_ratio.size:
            problems.append(f"arrays must all be of one length, not {lengths}")
        else:
            if np.any(np.diff(self.mask_ratio) > 0) or not 0 <= self.mask_ratio[0] <= 1:
                problems.append(f"mask_ratio must fall within [0, 1], not {self.mask_ratio}")
            if self.mask_ratio[-1] != 0:
                problems.append(f"mask_ratio must end at 0, not {self.mask_ratio[-1]}")
        if np.any(self.sampling_temperature <= 0):
            problems.append(f"sampling_temperature must be > 0, not {self.sampling_temperature}")
        for name in ("choice_temperature", "guidance_scale"):
            if np.any(getattr(self, name) < 0):
                problems.append(f"{name} must be >= 0, not {getattr(self, name)}")
        if problems:
            raise ValueError("generation strategy: " + "; ".join(problems))

    @property
    def steps(self) -> int:
        """Number of network calls."""
        return len(self.mask_ratio)

    def masked_counts(self, length: int) -> tuple[int, ...]:
        """Tokens still masked after each step: `floor(length * mask_ratio)` (ENAT's rule).

        Raises:
            ValueError: fewer than 1 or more than `length` steps, or ratios that leave a later
                step nothing to predict.
        """
        if not 1 <= self.steps <= length:
            raise ValueError(f"steps is {self.steps}, must be between 1 and {length} tokens")
        counts = tuple(int(count) for count in np.floor(length * self.mask_ratio))
        if 0 in counts[:-1]:
            raise ValueError(
                f"mask_ratio leaves no token for step {counts.index(0) + 2} of {self.steps}"
                f" (floor of {length} * {self.mask_ratio[counts.index(0)]:.4f} is 0)"
            )
        return counts


def make_strategy(cfg: StrategyConfig) -> GenerationStrategy:
    """The strategy a config describes: ENAT's rule (its section 5.1), MaskGIT's, or a file's.

    Raises:
        ValueError: a field out of range or an unreadable strategy file.
    """
    if cfg.rule == "file":
        return read_strategy(cfg.file)
    if cfg.steps < 1:
        raise ValueError(f"steps is {cfg.steps}, must be at least 1")
    step = np.arange(cfg.steps)
    progress = (step + 1) / cfg.steps
    remaining = 1 - progress
    ratio = SCHEDULES[cfg.schedule](progress)
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
    )


def read_strategy(path: str | os.PathLike[str]) -> GenerationStrategy:
    """Reads a strategy from YAML with AutoNAT's published keys.

    Raises:
        ValueError: a missing file, missing or unknown keys, or lengths that do not fit; named.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"strategy file {path}: {error}") from error
    if not isinstance(content, Mapping) or set(content) != set(_YAML_KEYS):
        found = sorted(content) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"strategy file {path}: keys are {found}, must be {sorted(_YAML_KEYS)}")
    try:
        arrays = {
            name: np.asarray(content[key], np.float64).reshape(-1)
            for key, name in _YAML_KEYS.items()
        }
    except (TypeError, ValueError) as error:
        raise ValueError(f"strategy file {path}: {error}") from error
    steps = len(arrays["sampling_temperature"])
    for name in _LAST_IS_ZERO:
        if len(arrays[name]) == steps - 1:
            arrays[name] = np.append(arrays[name], 0.0)
    try:
        return GenerationStrategy(**arrays)
    except ValueError as error:
        raise ValueError(f"strategy file {path}: {error}") from error


def write_strategy(strategy: GenerationStrategy, path: str | os.PathLike[str]) -> None:
    """Writes a strategy as YAML with AutoNAT's published keys."""
    content = {
        key: getattr(strategy, name)[: -1 if name in _LAST_IS_ZERO else None].tolist()
        for key, name in _YAML_KEYS.items()
    }
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False)
