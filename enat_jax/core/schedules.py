"""How strategies are made: mask schedules, and the papers' rules."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from enat_jax.core.orders import position_priority
from enat_jax.core.strategy import GenerationStrategy, Masking, Ranking

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


@dataclass(frozen=True)
class StrategyConfig:
    """How a generation strategy is made.

    Attributes:
        rule: `enat` anneals the sampling temperature to 0, `maskgit` holds it, `file` reads YAML.
        steps: number of network calls, 1 to the number of tokens; a file must have as many.
        schedule: the mask schedule's name.
        masking: how ratios become counts, see `GenerationStrategy.masked_counts`.
        ranking: what confidence is made of, see `GenerationStrategy`.
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
    ranking: Ranking = "probability"
    guidance_scale: float = field(default=2.5, metadata={"at_least": 0})
    choice_temperature: float = field(default=1.5, metadata={"at_least": 0})
    sampling_temperature: float = field(default=6.0, metadata={"above": 0})
    order: str = "confidence"
    reuse: bool = True
    file: str = ""


def make_strategy(cfg: StrategyConfig, length: int | None = None) -> GenerationStrategy:
    """The strategy of a config's rule: ENAT's (its section A.2) or MaskGIT's.

    Args:
        cfg: the strategy's config.
        length: tokens per image, on which the schedule `log` and orders depend.

    Raises:
        ValueError: a field out of range, or a strategy that stands in a file.
    """
    if cfg.rule == "file":
        raise ValueError("rule = 'file' is no rule of numbers: `sampling.strategy_file` reads it")
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
        ranking=cfg.ranking,
        priority=position_priority(cfg.order, length),
    )
