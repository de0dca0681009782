"""A generation strategy: per step, how many tokens are revealed and with which temperatures."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Masking = Literal["enat", "autonat"]
Ranking = Literal["probability", "logit"]
_LIMITS = {  # beyond these logits overflow float32
    "mask_ratio": (0, 1),
    "choice_temperature": (0, 1e6),
    "sampling_temperature": (1e-6, 1e6),
    "guidance_scale": (0, 1e6),
}


@dataclass(frozen=True)
class GenerationStrategy:
    """Per-step arrays `[t]` that drive generation; plain data, traced except for the mask ratios.

    Attributes:
        mask_ratio: fraction still masked after the step, in [0, 1], not rising, the last one 0.
        choice_temperature: Gumbel noise scale on the confidence, in [0, 1e6].
        sampling_temperature: divides the logits, in [1e-6, 1e6].
        guidance_scale: s in `c + s (c - u)`, in [0, 1e6].
        masking: how ratios become counts.
        ranking: what confidence is made of: the log-probability of the sampled id, or its logit, as
            MUSE's code has it.
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
    ranking: Ranking = "probability"
    priority: np.ndarray | None = None

    def __post_init__(self) -> None:
        problems, shapes = [], {}
        for name, (low, high) in _LIMITS.items():
            array = np.asarray(getattr(self, name), np.float64)
            object.__setattr__(self, name, array)
            shapes[name] = array.shape
            if not np.all((array >= low) & (array <= high)):  # nor NaN
                limits = f"within [{low:g}, {high:g}] and finite"
                problems.append(f"{name} must be {limits}, not {array.tolist()}")
        ratio = self.mask_ratio
        if len(set(shapes.values())) > 1 or ratio.ndim != 1 or not ratio.size:
            problems.append(f"arrays must all be of one length, not {shapes}")
        elif ratio[-1] != 0:
            problems.append(f"mask_ratio must end at 0, not {ratio[-1]:.6g}")
        elif rises := list(np.flatnonzero(np.diff(ratio) > 0)):
            problems.append(f"mask_ratio must not rise, but is {ratio[rises[0] + 1]:.6g} at step"
                            f" {rises[0] + 2} after {ratio[rises[0]]:.6g}")  # fmt: skip
        if self.masking not in ("enat", "autonat"):
            problems.append(f"masking = {self.masking!r} must be 'enat' or 'autonat'")
        if problems:
            raise ValueError("generation strategy: " + "; ".join(problems))

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
    step but the last ones of very many reveals a token. The last step, which leaves none, has no
    ratio here.
    """
    counts, before = [], length
    for ratio in ratios:
        before = max(1, min(before - 1, int(np.floor(length * ratio))))
        counts.append(before)
    return (*counts, 0)
