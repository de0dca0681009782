"""The config of a search: what is searched, how, and what it is judged by."""

from dataclasses import dataclass, field
from typing import Literal

from enat_jax.config import ObjectiveConfig
from enat_jax.config_file import limited


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

    ratio_probe: float = limited(1e-2, above=0)
    probe: float = limited(0.1, above=0)
    ratio_learning_rate: float = limited(1e-3, above=0)
    learning_rate: float = limited(0.1, above=0)
    momentum: float = limited(0.5, at_least=0, below=1)


@dataclass(frozen=True)
class CmaConfig:
    """CMA-ES, by the package `cma`.

    Attributes:
        population: evaluations per update; 0 chooses by the number of parameters.
        ratio_spread: standard deviation of the first mask ratios.
        spread: of the other numbers, relative to their start where that is above 1.
    """

    population: int = limited(0, at_least=2, or_zero=True)
    ratio_spread: float = limited(0.03, above=0)
    spread: float = limited(0.25, above=0)


@dataclass(frozen=True)
class TrainingSearchConfig:
    """The alternating search over training's Beta(a, b) of mask ratios.

    Attributes:
        rounds: of choosing (a, b) and then the strategy; 0 searches the strategy alone.
        factor: a round tries a and b, each multiplied and divided by this, one at a time.
        steps: training steps of a candidate; 0: as many as the run has.
    """

    rounds: int = limited(0, at_least=0)
    factor: float = limited(1.25, above=1)
    steps: int = limited(0, at_least=0)


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

    steps: int = limited(8, at_least=1)
    start: str = "published"
    optimiser: Literal["sgd", "cma"] = "sgd"
    num_images: tuple[int, ...] = limited((50_000,), at_least=2, at_most=10**8)
    updates: tuple[int, ...] = limited((100,), at_least=1)
    classes: Literal["random", "balanced"] = "random"
    seed: int = limited(0, at_least=0, below=2**32)
    strategies_per_call: int = limited(0, at_least=0)
    strategies_at_once: int = limited(1, at_least=1)
    margin: float = limited(2.0, at_least=1)
    on_nonfinite: Literal["stop", "worst"] = "stop"
    generator: tuple[str, ...] = ()
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sgd: SgdConfig = field(default_factory=SgdConfig)
    cma: CmaConfig = field(default_factory=CmaConfig)
    training: TrainingSearchConfig = field(default_factory=TrainingSearchConfig)

    RULES = (
        ("num_images updates", lambda images, updates: 0 < len(images) == len(updates),
         "and {1} must be of one length: an entry per phase"),
    )  # fmt: skip
