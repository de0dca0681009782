"""Values of many strategies from one compiled program, with the same images and noise for all."""

from typing import Any

import jax
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from enat_jax.core.generate import Layout, TracedStrategy, trace_strategy
from enat_jax.core.plans import Bucket, Plan, generation_plans
from enat_jax.core.strategy import clipped_counts
from enat_jax.evaluation.objective import Objective
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.sampling.sampler import Sampler


def roomy_layout(steps: int, length: int, *, new: int, reuse: bool) -> Layout:
    """A layout of one padded body, for any counts of so many steps with few enough new tokens.

    Args:
        steps: of the strategies.
        length: tokens per image.
        new: most tokens that a step may be the first to read.
        reuse: whether steps reuse features of earlier ones; otherwise all visible tokens are new.
    """
    first, visible = Plan(0, 0, length), length - 1
    # every plan but the first at the limits: what the loop's buffers are measured by
    limits = Plan(visible if reuse else 0, new, length)
    plans = (first, *[limits] * (steps - 1))
    return Layout(length, (Bucket(plans, plans[-1], guided=True),))


class Evaluations:
    """Makes the images of strategies, and has them judged.

    Image i of every strategy has the same class and the same noise, so that a difference between
    two values is the strategies'.

    Args:
        cfg: the search's config.
        sampler: the generator.
        objective: what strategies are judged by.
        start: numbers that the search starts from.

    Attributes:
        parameters: where a strategy's numbers are.
        layouts: that may be compiled: at most two.
        compiled: programs by layout, and number of strategies in a call.
        batch_size: images in a call.
    """

    def __init__(
        self,
        cfg: SearchConfig,
        sampler: Sampler,
        objective: Objective,
        start: Float[np.ndarray, " n"],
    ):
        model = sampler.config.model
        self._cfg, self._sampler, self._objective = cfg, sampler, objective
        self._length = model.length
        self._reuse = model.carries_features and sampler.config.strategy.reuse
        self.batch_size = sampler.program.batch_size(max(cfg.num_images))
        self.parameters = Parameters(cfg.steps)
        new = [self._length - 1]
        if self._reuse:
            most = max(plan.new for plan in self.plans(start))
            new.insert(0, min(int(cfg.margin * most), self._length - 1))
        self.layouts = tuple(
            roomy_layout(cfg.steps, self._length, new=n, reuse=self._reuse)
            for n in dict.fromkeys(new)
        )
        self.compiled: dict[tuple[Layout, int], Any] = {}

    def plans(self, numbers: Float[np.ndarray, " n"]) -> tuple[Plan, ...]:
        """Token counts of every step, under AutoNAT's masking rule."""
        counts = clipped_counts(numbers[self.parameters.is_ratio], self._length)
        return generation_plans(counts, self._length, reuse=self._reuse)

    def class_ids(self, images: int) -> Int[np.ndarray, " b"]:
        """The images' classes, the same for every strategy."""
        classes = self._sampler.config.model.num_classes
        if self._cfg.classes == "balanced":
            return np.arange(images, dtype=np.int32) % classes
        rng = np.random.default_rng(self._cfg.seed)
        return rng.integers(classes, size=images, dtype=np.int32)

    def __call__(
        self, candidates: Float[np.ndarray, "k n"], images: int, *, together: int | None = None
    ) -> list[dict[str, float]]:
        """The scores of strategies.

        Args:
            candidates: their numbers.
            images: to make of each.
            together: strategies that a call of the program takes, however many there are.
        """
        roomy = [not self._fits(numbers) for numbers in candidates]
        usual = [k for k, more in enumerate(roomy) if not more]
        scores: dict[int, dict[str, float]] = {}
        if usual:
            width = together or len(candidates)
            found = self._scores(candidates[usual], self.layouts[0], width, images)
            scores |= dict(zip(usual, found, strict=True))
        for k in np.flatnonzero(roomy):  # rare ones: no lanes are filled up for them
            (scores[int(k)],) = self._scores(candidates[k][None], self.layouts[-1], 1, images)
        return [scores[k] for k in range(len(candidates))]

    def _fits(self, numbers: Float[np.ndarray, " n"]) -> bool:
        """Whether the first layout has room."""
        return max(p.new for p in self.plans(numbers)) <= self.layouts[0].buckets[0].shape.new

    def _scores(
        self, candidates: Float[np.ndarray, "k n"], layout: Layout, together: int, images: int
    ) -> list[dict[str, float]]:
        """Scores of strategies that fit a layout, whose program takes so many together."""
        lanes = np.minimum(np.arange(together), len(candidates) - 1)  # filled up with the last one
        traced = self._traced(candidates[lanes])
        sampler, placement = self._sampler, self._sampler.placement
        wants = self._objective.wants
        classes = self.class_ids(images)
        by_image = placement.batch
        traced, key = placement.put((traced, jax.random.key(self._cfg.seed)))
        decoder = sampler.tokenizer.params if sampler.tokenizer and wants != "token_ids" else ()
        scorers = [self._objective.start() for _ in candidates]
        for first in range(0, images, self.batch_size):
            ids = np.arange(first, first + self.batch_size, dtype=np.int32)
            batch = classes[np.minimum(ids, images - 1)]  # the last one is filled up
            arguments = (
                sampler.params, decoder, *placement.put((batch, ids), by_image), traced, key
            )  # fmt: skip
            made = self._program(layout, together, arguments)(*arguments)
            count = min(self.batch_size, images - first)
            for scorer, part in zip(scorers, made, strict=False):  # some lanes are not counted
                scorer.add(part, batch[:count])
        return [scorer.value() for scorer in scorers]

    def _traced(self, candidates: Float[np.ndarray, "k n"]) -> TracedStrategy:
        """The loop's numbers, `[k t]` each."""
        traced = [
            trace_strategy(self.parameters.strategy(numbers, self._length), self.plans(numbers))
            for numbers in candidates
        ]
        return jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *traced)

    def _program(self, layout: Layout, together: int, arguments: tuple[Any, ...]) -> Any:
        if (layout, together) not in self.compiled:
            where = self._sampler.placement.batch
            made = jax.jit(self._make, static_argnames="layout", out_shardings=where)
            self.compiled[layout, together] = made.lower(*arguments, layout=layout).compile()
        return self.compiled[layout, together]

    def _make(
        self,
        params: Any,
        decoder: Any,
        class_ids: Int[Array, " b"],
        image_ids: Int[Array, " b"],
        strategies: TracedStrategy,
        key: jax.Array,
        *,
        layout: Layout,
    ) -> tuple[Array, ...]:
        """What every strategy makes, a few of them side by side."""

        def one(strategy: TracedStrategy) -> Array:
            return self._sampler.program.run(
                params, decoder, class_ids, image_ids, strategy, key,
                layout=layout, output=self._objective.wants,
            )  # fmt: skip

        total = len(strategies.step)
        width = min(self._cfg.strategies_at_once, total)
        if width == 1:
            return tuple(jax.lax.map(one, strategies))
        filled = np.arange(-(-total // width) * width) % total
        groups = jax.tree.map(
            lambda x: rearrange(x[filled], "(m w) t -> m w t", w=width), strategies
        )
        made = jax.lax.map(jax.vmap(one), groups)
        return tuple(rearrange(made, "m w ... -> (m w) ...")[:total])
