"""The config of a search: what is searched, how, and what it is judged by."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from enat_jax.config_file import make_config, read_fields
from enat_jax.evaluation.objective import ObjectiveConfig


@dataclass(frozen=True)
class SgdConfig:
    """Gradient descent on forward finite differences; AutoNAT's settings by default.

    Attributes:
        ratio_probe: step of a mask ratio's difference.
        probe: step of the other numbers' differences.
        ratio_learning_rate: of the mask ratios.
        learning_rate: of the other numbers.
        momentum: share of the last update's direction that is kept.
    """

    ratio_probe: float = 1e-2
    probe: float = 0.1
    ratio_learning_rate: float = 1e-3
    learning_rate: float = 0.1
    momentum: float = 0.5


@dataclass(frozen=True)
class CmaConfig:
    """CMA-ES, by the package `cma`.

    Attributes:
        population: evaluations per update; 0 chooses by the number of parameters.
        ratio_spread: standard deviation of the first mask ratios.
        spread: of the other numbers, relative to their start where that is above 1.
    """

    population: int = 0
    ratio_spread: float = 0.03
    spread: float = 0.25


@dataclass(frozen=True)
class TrainingSearchConfig:
    """The alternating search over training's Beta(a, b) of mask ratios.

    Attributes:
        rounds: of choosing (a, b) and then the strategy; 0 searches the strategy alone.
        factor: a round tries a and b, each multiplied and divided by this, one at a time.
        steps: training steps of a candidate; 0: as many as the run has.
    """

    rounds: int = 0
    factor: float = 1.25
    steps: int = 0


@dataclass(frozen=True)
class SearchConfig:
    """A search for a generation strategy; AutoNAT's by default, on `objective`.

    Attributes:
        steps: of the strategy.
        start: `published`, AutoNAT's (cosine; choice temperatures 1 - t/T; sampling temperatures 1;
            guidance t/T); `run`, the run's own with the schedule and scales of its config at so
            many steps; or the path of a strategy file.
        optimiser: `sgd`, as published, or `cma`.
        num_images: images that every evaluation makes, in one phase after another: small first.
        updates: of each phase, at most.
        classes: `random`: drawn uniformly, as AutoNAT evaluates; or `balanced`.
        seed: of the classes, of the noise that all evaluations share, and of `cma`.
        strategies_per_call: evaluated together by one call of the compiled program; 0: all of an
            update. What a killed search loses is what the last call was at.
        strategies_at_once: of these, computed side by side rather than one after another, in more
            memory.
        margin: room of the first compiled program, for networks that reuse features: this many
            times as many new tokens per step as the start has. What does not fit is evaluated by a
            second program, with room for anything.
        on_nonfinite: `stop`, or go on with the `worst` value so far in place of one that is
            infinite or not a number.
        generator: overrides of the run's config, `section.field=value` each.
        objective: what is minimised.
        sgd: options of `sgd`.
        cma: options of `cma`.
        training: the search over training's mask ratios.
    """

    steps: int = 8
    start: str = "published"
    optimiser: Literal["sgd", "cma"] = "sgd"
    num_images: tuple[int, ...] = (50_000,)
    updates: tuple[int, ...] = (100,)
    classes: Literal["random", "balanced"] = "random"
    seed: int = 0
    strategies_per_call: int = 0
    strategies_at_once: int = 1
    margin: float = 2.0
    on_nonfinite: Literal["stop", "worst"] = "stop"
    generator: tuple[str, ...] = ()
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sgd: SgdConfig = field(default_factory=SgdConfig)
    cma: CmaConfig = field(default_factory=CmaConfig)
    training: TrainingSearchConfig = field(default_factory=TrainingSearchConfig)


def load_search_config(path: str, overrides: Sequence[str] = ()) -> SearchConfig:
    """Reads a search's config file, applies overrides (`field=value`), and checks the whole.

    Raises:
        ConfigError: an unreadable file, unknown fields, wrong types or values; all at once.
    """
    return make_config(SearchConfig, read_fields(path), check, overrides)


def check(cfg: SearchConfig) -> list[str]:
    """What is wrong with a config, one phrase per problem, each with value, limit and field."""
    at_least = {
        "steps": (cfg.steps, 1),
        **{f"num_images[{i}]": (n, 2) for i, n in enumerate(cfg.num_images)},
        **{f"updates[{i}]": (n, 1) for i, n in enumerate(cfg.updates)},
        "seed": (cfg.seed, 0),
        "strategies_per_call": (cfg.strategies_per_call, 0),
        "strategies_at_once": (cfg.strategies_at_once, 1),
        "margin": (cfg.margin, 1),
        "cma.population": (cfg.cma.population, 0),
        "training.rounds": (cfg.training.rounds, 0),
        "training.steps": (cfg.training.steps, 0),
    }
    problems = [
        f"{name} = {value} must be at least {limit}"
        for name, (value, limit) in at_least.items()
        if not value >= limit
    ]
    above = {
        "sgd.ratio_probe": cfg.sgd.ratio_probe,
        "sgd.probe": cfg.sgd.probe,
        "sgd.ratio_learning_rate": cfg.sgd.ratio_learning_rate,
        "sgd.learning_rate": cfg.sgd.learning_rate,
        "cma.ratio_spread": cfg.cma.ratio_spread,
        "cma.spread": cfg.cma.spread,
    }
    problems += [
        f"{name} = {value} must be above 0 and finite"
        for name, value in above.items()
        if not 0 < value < math.inf
    ]
    if not 0 <= cfg.sgd.momentum < 1:
        problems.append(f"sgd.momentum = {cfg.sgd.momentum} must be in [0, 1)")
    if cfg.training.factor <= 1:
        problems.append(f"training.factor = {cfg.training.factor} must be above 1")
    if cfg.cma.population == 1:
        problems.append("cma.population = 1 must be 0 or at least 2")
    if cfg.seed >= 2**32:
        problems.append(f"seed = {cfg.seed} must be below 2**32")
    if not cfg.num_images or len(cfg.num_images) != len(cfg.updates):
        problems.append(
            f"num_images = {cfg.num_images} and updates = {cfg.updates} must be of one length: an"
            " entry per phase"
        )
    return problems
