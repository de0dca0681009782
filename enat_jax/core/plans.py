"""Plans: how many tokens of an image are previous, new and masked, decided before tracing."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv


class Plan(NamedTuple):
    """Token counts of one image at one network call; they sum to the image's length.

    Attributes:
        previous: tokens revealed earlier, whose features are reused.
        new: tokens revealed last, which the encoder reads.
        masked: tokens not yet revealed, which the decoder predicts.
    """

    previous: int
    new: int
    masked: int


def generation_plans(
    masked_counts: Sequence[int], length: int, *, reuse: bool = True
) -> tuple[Plan, ...]:
    """Turns the masked counts after each step into one plan per step.

    Without `reuse`, where no step reads features of earlier ones, all visible tokens are new to it.

    Raises:
        ValueError: counts that increase, leave a step nothing to predict, or do not end at 0.
    """
    masked = [length, *(int(count) for count in masked_counts)]
    if masked != sorted(masked, reverse=True) or masked[-1] != 0 or 0 in masked[:-1]:
        raise ValueError(f"masked counts {masked} must not increase, and be 0 after the last step")
    visible = [length - count for count in masked[:-1]]
    previous = [0, *visible[:-1]] if reuse else [0] * len(visible)
    return tuple(Plan(p, v - p, length - v) for p, v in zip(previous, visible, strict=True))


def training_plans(
    length: int,
    *,
    programs: int,
    images_per_row: int,
    mask_beta: tuple[float, float] = (12.0, 3.0),
    reuse_probability: float = 0.5,
    seed: int = 0,
) -> tuple[tuple[Plan, ...], ...]:
    """A stratified sample of the training distribution: `programs` rows of `images_per_row` plans.

    Masked counts are Beta(a, b) quantiles at the middles of equally likely strata, dealt out so
    that every single row spans the whole distribution. A share `reuse_probability` of the plans
    keeps a stratified uniform fraction of the visible tokens as previous ones (ENAT section 4.2).

    Args:
        length: tokens per image, at least 2.
        programs: number of rows, each one compiled training program.
        images_per_row: images packed into a row.
        mask_beta: parameters (a, b) of the mask ratio's Beta distribution.
        reuse_probability: share of images trained with reused features, in [0, 1].
        seed: pairs mask ratios with reuse fractions.
    """
    total = programs * images_per_row
    rng = np.random.default_rng(seed)
    quantiles = (np.arange(total) + 0.5) / total
    ratios = betaincinv(*mask_beta, quantiles)
    masked = np.clip(np.rint(ratios * length).astype(int), 1, length - 1)
    rows = masked.reshape(images_per_row, programs).T  # row p holds quantiles p, p + programs, ...

    reuse = np.zeros((programs, images_per_row), dtype=bool)
    bounds = np.rint(np.linspace(0, reuse_probability * total, programs + 1)).astype(int)
    for row, count in zip(reuse, np.diff(bounds), strict=True):
        row[rng.permutation(images_per_row)[:count]] = True
    hidden = np.zeros(reuse.shape)  # fraction of the visible tokens that are new, not previous
    fractions = (np.arange(reuse.sum()) + 0.5) / max(reuse.sum(), 1)
    hidden[reuse] = rng.permutation(fractions)

    def plan(masked: int, reuse: bool, hidden: float) -> Plan:
        visible = length - masked
        new = int(np.rint(visible * hidden)) if reuse else visible
        return Plan(visible - new, new, masked)

    return tuple(
        tuple(plan(int(m), bool(r), float(h)) for m, r, h in zip(*row, strict=True))
        for row in zip(rows, reuse, hidden, strict=True)
    )


@dataclass(frozen=True)
class Bucket:
    """Consecutive steps that share one compiled body.

    Attributes:
        plans: the steps' own plans.
        shape: the padded counts, at least those of every step; equal to them when `exact`.
        guided: whether the body runs the unconditional branch.
    """

    plans: tuple[Plan, ...]
    shape: Plan
    guided: bool

    @classmethod
    def around(cls, plans: Sequence[Plan], guided: Sequence[bool]) -> "Bucket":
        """The smallest bucket of these steps."""
        shape = Plan(*(max(counts) for counts in zip(*plans, strict=True)))
        return cls(tuple(plans), shape, any(guided))

    @property
    def exact(self) -> bool:
        """Whether no step of the bucket is padded."""
        return all(plan == self.shape for plan in self.plans)


def group_into_buckets(
    plans: Sequence[Plan],
    guided: Sequence[bool],
    cost: Callable[[Plan], float],
    *,
    buckets: int | None = None,
    max_padding: float = 0.15,
    exact_steps: int = 16,
) -> tuple[Bucket, ...]:
    """Groups steps so that the padded cost is least.

    Args:
        plans: one plan per step.
        guided: per step, whether it needs the unconditional branch (which doubles the cost).
        cost: FLOPs of one branch at a plan.
        buckets: how many buckets; None chooses: every step its own up to `exact_steps` steps,
            else the fewest whose padding stays within `max_padding`.
        max_padding: most extra FLOPs accepted by the automatic choice, as a fraction.
        exact_steps: longest strategy for which the automatic choice does not pad at all.

    Raises:
        ValueError: `buckets` below 1.
    """
    steps = len(plans)
    if buckets is not None and buckets < 1:
        raise ValueError(f"buckets is {buckets}, must be at least 1")
    if (buckets or 0) >= steps or (buckets is None and steps <= exact_steps):
        return tuple(Bucket.around([p], [g]) for p, g in zip(plans, guided, strict=True))

    span = np.full((steps, steps + 1), np.inf)  # span[i, j]: padded cost of steps i..j-1 together
    for i in range(steps):
        shape, needs_guidance = plans[i], False
        for j in range(i + 1, steps + 1):
            shape = Plan(*map(max, shape, plans[j - 1]))
            needs_guidance |= guided[j - 1]
            span[i, j] = (j - i) * cost(shape) * (2 if needs_guidance else 1)
    exact_cost = sum(span[i, i + 1] for i in range(steps))

    best = np.full(steps + 1, np.inf)  # best[j]: least cost of steps 0..j-1 in the current number
    best[0] = 0.0
    cuts = []
    for count in range(1, steps + 1):
        candidates = best[:steps, None] + span
        cuts.append(np.argmin(candidates, axis=0))
        best = np.min(candidates, axis=0)
        enough = best[steps] <= (1 + max_padding) * exact_cost
        if count == buckets or (buckets is None and enough):
            break
    ends = [steps]
    for cut in reversed(cuts):
        ends.append(int(cut[ends[-1]]))
    ends.reverse()
    return tuple(Bucket.around(plans[i:j], guided[i:j]) for i, j in itertools.pairwise(ends))
