"""A generation strategy: per step, how many tokens are revealed and with which temperatures."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import yaml

from enat_jax.core.orders import ORDERS

Rule = Literal["enat", "maskgit", "file"]
Schedule = Literal["cosine", "linear", "square", "cubic", "sqrt", "log", "arccos"]
Masking = Literal["enat", "autonat"]

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
_ARRAYS = tuple(_YAML_KEYS.values())
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


@dataclass(frozen=True)
class GenerationStrategy:
    """Per-step arrays `[t]` that drive generation; plain data, traced except for the mask ratios.

    Attributes:
        mask_ratio: fraction still masked after the step, in [0, 1], not rising, the last one 0.
        choice_temperature: Gumbel noise scale on the confidence, >= 0.
        sampling_temperature: divides the logits, > 0.
        guidance_scale: s in `c + s (c - u)`, >= 0.
        masking: how ratios become counts.
        priority: of each position, added to the confidence it is ranked by, `[l]`, or `[t l]` where
            steps differ; None for 0.

    Raises:
        ValueError: arrays of different lengths or values out of range, all named at once.
    """

    mask_ratio: np.ndarray
    choice_temperature: np.ndarray
    sampling_temperature: np.ndarray
    guidance_scale: np.ndarray
    masking: Masking = "enat"
    priority: np.ndarray | None = None

    def __post_init__(self) -> None:
        arrays = {name: np.asarray(getattr(self, name), np.float64) for name in _ARRAYS}
        for name, array in arrays.items():
            object.__setattr__(self, name, array)
        problems = [
            f"{name} must be finite, not {array.tolist()}"
            for name, array in arrays.items()
            if not np.all(np.isfinite(array))
        ]
        lengths = {name: array.shape for name, array in arrays.items()}
        if len(set(lengths.values())) > 1 or self.mask_ratio.ndim != 1 or not self.mask_ratio.size:
            problems.append(f"arrays must all be of one length, not {lengths}")
        elif not problems:
            problems += self._ratio_problems()
        if np.any(self.sampling_temperature <= 0):
            problems.append(
                f"sampling_temperature must be > 0, not {self.sampling_temperature.tolist()}"
            )
        for name in ("choice_temperature", "guidance_scale"):
            if np.any(arrays[name] < 0):
                problems.append(f"{name} must be >= 0, not {arrays[name].tolist()}")
        if self.masking not in ("enat", "autonat"):
            problems.append(f"masking = {self.masking!r} must be 'enat' or 'autonat'")
        if problems:
            raise ValueError("generation strategy: " + "; ".join(problems))

    def _ratio_problems(self) -> list[str]:
        ratio = self.mask_ratio
        problems = []
        if ratio.min() < 0 or ratio.max() > 1:
            problems.append(f"mask_ratio must be within [0, 1], not {ratio.tolist()}")
        rises = np.flatnonzero(np.diff(ratio) > 0)
        if rises.size and rises[0] + 2 < len(ratio):
            at = rises[0] + 1
            problems.append(
                f"mask_ratio must not rise, but is {ratio[at]:.6g} at step {at + 1} after"
                f" {ratio[at - 1]:.6g}"
            )
        if ratio[-1] != 0:
            problems.append(f"mask_ratio must end at 0, not {ratio[-1]:.6g}")
        return problems

    @property
    def steps(self) -> int:
        """Number of network calls."""
        return len(self.mask_ratio)

    def masked_counts(self, length: int) -> tuple[int, ...]:
        """Tokens still masked after each step.

        ENAT's rule is `floor(length * mask_ratio)`. AutoNAT's keeps that within 1 and what lets
        the step reveal a token, see `clipped_counts`.

        Raises:
            ValueError: fewer than 1 or more than `length` steps, or under ENAT's rule ratios that
                leave a later step nothing to predict.
        """
        if not 1 <= self.steps <= length:
            raise ValueError(f"steps is {self.steps}, must be between 1 and {length} tokens")
        if self.masking == "autonat":
            return clipped_counts(self.mask_ratio[:-1], length)
        counts = tuple(int(count) for count in np.floor(length * self.mask_ratio))
        if 0 in counts[:-1]:
            raise ValueError(
                f"mask_ratio leaves no token for step {counts.index(0) + 2} of {self.steps}"
                f" (floor of {length} * {self.mask_ratio[counts.index(0)]:.4f} is 0)"
            )
        return counts


def clipped_counts(ratios: np.ndarray, length: int) -> tuple[int, ...]:
    """Tokens still masked after each step under AutoNAT's rule, for any ratios at all.

    `floor(length * ratio)`, but at most one less than before the step, and at least 1; so every
    step but the last ones of very many reveals a token.

    Args:
        ratios: of all steps but the last, which leaves none.
        length: tokens per image.
    """
    counts, before = [], length
    for ratio in ratios:
        before = max(1, min(before - 1, int(np.floor(length * ratio))))
        counts.append(before)
    return (*counts, 0)


def clip_ratios(ratios: np.ndarray, length: int) -> np.ndarray:
    """Ratios that do not rise and leave AutoNAT's counts as they are, all steps' `[t]`.

    A searched ratio may exceed the one before it, where the rule clips the count. Such a ratio is
    replaced by the smallest one of its clipped count, and the others are kept: both rules read the
    same counts from the result.

    Args:
        ratios: of all steps but the last.
        length: tokens per image.
    """
    clipped = [float(ratio) for ratio in ratios]
    for step, count in enumerate(clipped_counts(ratios, length)[:-1]):
        if int(np.floor(length * clipped[step])) != count:
            ratio = count / length
            while np.floor(length * ratio) < count:  # a quotient rounded down
                ratio = np.nextafter(ratio, 1.0)
            clipped[step] = float(ratio)
        elif step:  # one token is left, and no fewer can be
            clipped[step] = min(clipped[step], clipped[step - 1])
    return np.array([*clipped, 0.0])


def make_strategy(cfg: StrategyConfig, length: int | None = None) -> GenerationStrategy:
    """The strategy a config describes: ENAT's rule (its section 5.1), MaskGIT's, or a file's.

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
        with open(path, encoding="utf-8") as file:
            content: Any = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())  # YAML's complaints are of several lines
        raise ValueError(f"strategy file {path}: {said}") from error
    if not isinstance(content, Mapping):
        raise ValueError(
            f"strategy file {path}: must hold {', '.join(_YAML_KEYS)}, not {content!r}"
        )
    unknown = [f"unknown key {key!r}" for key in content if key not in _YAML_KEYS]
    missing = [f"no key {key!r}" for key in _YAML_KEYS if key not in content]
    if unknown or missing:
        said = "; ".join(unknown + missing)
        raise ValueError(f"strategy file {path}: {said}; keys must be {', '.join(_YAML_KEYS)}")
    arrays, problems = {}, []
    for key, name in _YAML_KEYS.items():
        try:
            arrays[name] = np.asarray(content[key], np.float64).reshape(-1)
        except (TypeError, ValueError):
            problems.append(f"{key} = {content[key]} must be a list of numbers")
    if problems:
        raise ValueError(f"strategy file {path}: " + "; ".join(problems))
    found = len(arrays["sampling_temperature"])
    for key, name in _YAML_KEYS.items():
        if name in _LAST_IS_ZERO and len(arrays[name]) == found - 1:
            arrays[name] = np.append(arrays[name], 0.0)
        elif len(arrays[name]) != found:
            fits = f"{found - 1} or {found}" if name in _LAST_IS_ZERO else f"{found}"
            problems.append(
                f"{key} has {len(arrays[name])} values, must have {fits} as manual_samp_temp has"
                f" {found}"
            )
    if not problems and steps not in (None, found):
        problems.append(f"has {found} steps, but strategy.steps = {steps}")
    if problems:
        raise ValueError(f"strategy file {path}: " + "; ".join(problems))
    try:
        return GenerationStrategy(**arrays, masking=masking)
    except ValueError as error:
        raise ValueError(f"strategy file {path}: {error}") from error


def write_strategy(strategy: GenerationStrategy, path: str | os.PathLike[str]) -> None:
    """Writes a strategy as YAML with AutoNAT's published keys; `masking` is not among them."""
    content = {}
    for key, name in _YAML_KEYS.items():
        values = getattr(strategy, name).tolist()
        content[key] = values[:-1] if name in _LAST_IS_ZERO and values[-1] == 0 else values
    with open(path, "w", encoding="utf-8") as file:
        yaml.safe_dump(content, file, sort_keys=False)
