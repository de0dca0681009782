"""The numbers that a search changes: 4T - 2 of them stand for a strategy of T steps."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from enat_jax.core.strategy import GenerationStrategy, clip_ratios

LARGEST_RATIO = 0.99  # of the searched ones; a probe may go on to 1
SMALLEST = 1e-4  # of all other numbers


@dataclass(frozen=True)
class Parameters:
    """Where in a vector of 4T - 2 numbers a strategy's are.

    T - 1 mask ratios, T - 1 choice temperatures, T sampling temperatures, T guidance scales; the
    last ratio and the last choice temperature are 0 (AutoNAT).

    Attributes:
        steps: T.
    """

    steps: int

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return 4 * self.steps - 2

    @property
    def is_ratio(self) -> np.ndarray:
        """Which of the numbers are mask ratios."""
        return np.arange(self.size) < self.steps - 1

    @property
    def names(self) -> tuple[str, ...]:
        """A name for every number, with its step, from 1."""
        counts = {
            "mask_ratio": self.steps - 1,
            "choice_temperature": self.steps - 1,
            "sampling_temperature": self.steps,
            "guidance_scale": self.steps,
        }
        return tuple(f"{name}_{i + 1}" for name, count in counts.items() for i in range(count))

    def published_start(self) -> Float[np.ndarray, " n"]:
        """Where AutoNAT's search starts."""
        line = np.linspace(0, 1, self.steps + 1)
        return np.concatenate(
            [np.cos(line * np.pi / 2)[1:-1], (1 - line)[:-2], np.ones(self.steps), line[1:]]
        )

    def clamp(self, numbers: Float[np.ndarray, "*k n"]) -> Float[np.ndarray, "*k n"]:
        """The nearest numbers within the search's limits."""
        low = np.where(self.is_ratio, 0.0, SMALLEST)
        high = np.where(self.is_ratio, LARGEST_RATIO, np.inf)
        return np.clip(numbers, low, high)

    def numbers(self, strategy: GenerationStrategy) -> Float[np.ndarray, " n"]:
        """A strategy's numbers, within the search's limits."""
        parts = (
            strategy.mask_ratio[:-1],
            strategy.choice_temperature[:-1],
            strategy.sampling_temperature,
            strategy.guidance_scale,
        )
        return self.clamp(np.concatenate(parts))

    def strategy(self, numbers: Float[np.ndarray, " n"], length: int) -> GenerationStrategy:
        """The strategy that numbers stand for, under AutoNAT's masking rule.

        Mask ratios of the search may rise, and the rule clips them; a strategy's may not. So
        a ratio that is clipped at `length` tokens is written as what it is clipped to (see
        `strategy.clip_ratios`), and every other number as it is.
        """
        t = self.steps
        ratios, choice, sampling, guidance = np.split(numbers, [t - 1, 2 * t - 2, 3 * t - 2])
        return GenerationStrategy(
            mask_ratio=clip_ratios(ratios, length),
            choice_temperature=np.append(choice, 0.0),
            sampling_temperature=sampling,
            guidance_scale=guidance,
            masking="autonat",
        )
