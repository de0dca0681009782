"""What training sees: the distribution of plans, cut into strata of static shapes."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from scipy.special import betaincinv

from enat_jax.core.plans import Plan, generation_plans
from enat_jax.core.schedules import StrategyConfig, make_strategy

Plans = Int[np.ndarray, "_ 3"]
ReusePlans = Literal["uniform", "sampling"]
_EACH = 512  # equally likely plans that stand for a stratum's part of the distribution
_SAMPLING_STEPS = range(4, 17)


class Stratum(NamedTuple):
    """A share of the distribution that one image of a row is drawn from at every step.

    Attributes:
        shape: counts that every one of its plans fits into; what is compiled.
        plans: equally likely ones.
    """

    shape: Plan
    plans: Plans


def training_strata(
    length: int,
    cost: Callable[[Plan], float],
    *,
    programs: int,
    images_per_row: int,
    mask_beta: tuple[float, float] = (12.0, 3.0),
    reuse_probability: float = 0.5,
    reuse_plans: ReusePlans = "uniform",
    seed: int = 0,
) -> tuple[tuple[Stratum, ...], ...]:
    """The distribution of plans as `programs` rows of `images_per_row` equally likely strata.

    Mask ratios are Beta(a, b). A share `reuse_probability` of the images keeps a uniform fraction
    of the visible tokens as previous ones (ENAT section 4.2). Each row spans the distribution.

    Args:
        length: tokens per image, at least 2.
        cost: FLOPs of training on an image at a plan; strata are cut so that padding costs little.
        programs: number of rows, each one compiled training program.
        images_per_row: images packed into a row.
        mask_beta: parameters (a, b) of the mask ratio's Beta distribution.
        reuse_probability: share of images trained with reused features, in [0, 1].
        reuse_plans: `sampling` draws those of images with reuse from the steps of generation with
            4 to 16 steps under the cosine schedule, instead.
        seed: pairs mask ratios with reuse fractions.
    """
    total = programs * images_per_row
    reusing = round(reuse_probability * total)
    rng = np.random.default_rng(seed)
    masked = _masked_counts(length, (total - reusing) * _EACH, mask_beta)
    kinds = [np.stack([0 * masked, length - masked, masked], axis=1)]
    if reuse_plans == "sampling":
        kinds.append(_plans_of_sampling(length, reusing * _EACH))
    else:
        masked = _masked_counts(length, reusing * _EACH, mask_beta)
        hidden = rng.permutation((np.arange(len(masked)) + 0.5) / max(len(masked), 1))
        new = np.rint((length - masked) * hidden).astype(int)
        kinds.append(np.stack([length - masked - new, new, masked], axis=1))
    strata = []
    for plans in kinds:
        cells = _cut(plans, len(plans) // _EACH, cost)
        strata += sorted((Stratum(_shape(cell), cell) for cell in cells), key=lambda s: s.shape)
    return tuple(tuple(strata[row::programs]) for row in range(programs))


def draw_plans(
    key: jax.Array, row: Sequence[Stratum], rows: int
) -> Int[Array, "{rows} {len(row)} 3"]:
    """Plans for `rows` rows, of each image one of its stratum's."""
    tables = jnp.asarray(np.stack([stratum.plans for stratum in row]), jnp.int32)
    index = jax.random.randint(key, (rows, len(row)), 0, tables.shape[1])
    return tables[jnp.arange(len(row)), index]


def _masked_counts(length: int, count: int, mask_beta: tuple[float, float]) -> np.ndarray:
    ratios = betaincinv(*mask_beta, (np.arange(count) + 0.5) / max(count, 1))
    return np.clip(np.rint(ratios * length).astype(int), 1, length - 1)


def _plans_of_sampling(length: int, count: int) -> Plans:
    every = []
    for steps in _SAMPLING_STEPS:
        counts = make_strategy(StrategyConfig(steps=steps), length).masked_counts(length)
        plans = np.array(generation_plans(counts, length)[1:])
        every.append(plans[np.arange(count) % len(plans)])
    which = np.arange(count) % len(every)
    return np.array(every)[which, np.arange(count) // len(every)]


def _shape(plans: Plans) -> Plan:
    return Plan(*plans.max(axis=0).tolist())


def _cut(plans: Plans, parts: int, cost: Callable[[Plan], float]) -> list[Plans]:
    """Halves plans along the count whose halves cost least, again and again."""
    if parts <= 1:
        return [plans] * parts
    few, best = parts // 2, (np.inf, plans, plans)
    for axis in range(3):
        ordered = plans[np.argsort(plans[:, axis], kind="stable")]
        low, high = np.split(ordered, [few * _EACH])
        padded = few * cost(_shape(low)) + (parts - few) * cost(_shape(high))
        best = min(best, (padded, low, high), key=lambda each: each[0])
    return _cut(best[1], few, cost) + _cut(best[2], parts - few, cost)
