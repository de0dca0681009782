"""The numbers that a search changes: 4T - 2 of them stand for a strategy of T steps."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from enat_jax.core.strategy import GenerationStrategy, clipped_counts

_LARGEST_RATIO = 0.99  # of the searched ones; a probe may go on to 1
_SMALLEST = 1e-4  # of all other numbers


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
    def names(self) -> tuple[str, ...]:
        """A name for every number, with its step, from 1."""
        t = self.steps
        counts = {"mask_ratio": t - 1, "choice_temperature": t - 1,
                  "sampling_temperature": t, "guidance_scale": t}  # fmt: skip
        return tuple(f"{name}_{i + 1}" for name, count in counts.items() for i in range(count))

    @property
    def is_ratio(self) -> Bool[np.ndarray, " n"]:
        """Which of the numbers are mask ratios."""
        return np.arange(4 * self.steps - 2) < self.steps - 1

    @property
    def limits(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The least and the largest that each number may be."""
        low = np.where(self.is_ratio, 0.0, _SMALLEST)
        return low, np.where(self.is_ratio, _LARGEST_RATIO, np.inf)

    def clamp(self, numbers: Float[np.ndarray, "*k n"]) -> Float[np.ndarray, "*k n"]:
        """The nearest numbers within the limits."""
        return np.clip(numbers, *self.limits)

    def published_start(self) -> Float[np.ndarray, " n"]:
        """Where AutoNAT's search starts."""
        progress = np.linspace(0, 1, self.steps + 1)
        ratios, choice = np.cos(progress * np.pi / 2)[1:-1], (1 - progress)[:-2]
        return np.concatenate([ratios, choice, np.ones(self.steps), progress[1:]])

    def numbers(self, strategy: GenerationStrategy) -> Float[np.ndarray, " n"]:
        """A strategy's numbers, within the limits."""
        ratios, choice = strategy.mask_ratio[:-1], strategy.choice_temperature[:-1]
        sampling, guidance = strategy.sampling_temperature, strategy.guidance_scale
        return self.clamp(np.concatenate([ratios, choice, sampling, guidance]))

    def strategy(self, numbers: Float[np.ndarray, " n"], length: int) -> GenerationStrategy:
        """The strategy that numbers stand for, under AutoNAT's masking rule.

        Mask ratios of the search may rise, and the rule clips them; a strategy's may not. So
        a ratio that is clipped at `length` tokens is written as what it is clipped to (see
        `clip_ratios`), and every other number as it is.
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


def clip_ratios(ratios: np.ndarray, length: int) -> np.ndarray:
    """Ratios that do not rise and leave AutoNAT's counts as they are, all steps' `[t]`.

    A searched ratio may exceed the one before it, where the rule clips the count. Such a ratio is
    replaced by the smallest one of its clipped count, and the others are kept: both rules read the
    same counts from the result. `ratios` are of all steps but the last.
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
