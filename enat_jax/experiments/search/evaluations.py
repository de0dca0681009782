"""Values of many strategies from one compiled program, with the same images and noise for all."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from enat_jax.core.generate import Layout, TracedStrategy, trace_strategy
from enat_jax.core.plans import Bucket, Plan, generation_plans
from enat_jax.core.strategy import clipped_counts
from enat_jax.evaluation.objective import Objective, Wants
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.sampling.sampler import Sampler


def roomy_layout(steps: int, length: int, *, new: int, reuse: bool) -> Layout:
    """A layout of one padded body, for any counts of steps that read at most `new` new tokens.

    With `reuse`, steps read features of earlier ones; otherwise all visible tokens are new.
    """
    # every plan but the first at the limits: what the loop's buffers are measured by
    limits = Plan(length - 1 if reuse else 0, new, length)
    plans = (Plan(0, 0, length), *[limits] * (steps - 1))
    return Layout(length, (Bucket(plans, plans[-1], guided=True),))


class Evaluations:
    """Makes the images of strategies, and has them judged.

    Image i of every strategy has the same class and the same noise, so that a difference between
    two values is the strategies'. At most two programs are compiled: one for strategies that
    reveal not too many tokens at a time, and where features are reused one for the others. How
    many these are, `cfg.margin` says of the numbers that the search starts from.

    Attributes:
        parameters: where a strategy's numbers are.
        layouts: of the programs; the last has room for any strategy.
        run: the jitted function of both.
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
        self.parameters = Parameters(cfg.steps)
        room = [self._length - 1]
        if self._reuse:
            room.insert(0, min(int(cfg.margin * self._most_new(start)), self._length - 1))
        self.layouts = tuple(
            roomy_layout(cfg.steps, self._length, new=new, reuse=self._reuse)
            for new in dict.fromkeys(room)
        )
        self.run = jax.jit(
            self._generate,
            static_argnames=("layout", "output"),
            out_shardings=sampler.placement.batch,
        )

    def class_ids(self, images: int) -> Int[np.ndarray, " b"]:
        """The images' classes, or numbers of prompts, the same for every strategy."""
        classes = self._objective.kinds(self._sampler.config.model.num_classes)
        if self._cfg.classes == "balanced":
            return np.arange(images, dtype=np.int32) % classes
        rng = np.random.default_rng(self._cfg.seed)
        return rng.integers(classes, size=images, dtype=np.int32)

    def __call__(
        self, candidates: Float[np.ndarray, "k n"], images: int, *, together: int | None = None
    ) -> list[dict[str, float]]:
        """The scores of strategies, by so many images of each.

        A call of the program takes as many as `together` says, however many there are.
        """
        room = self.layouts[0].buckets[0].shape.new
        fit = [k for k, numbers in enumerate(candidates) if self._most_new(numbers) <= room]
        scores: dict[int, dict[str, float]] = {}
        if fit:
            lanes = together or len(candidates)
            values = self._scores(candidates[fit], self.layouts[0], lanes, images)
            scores |= zip(fit, values, strict=True)
        for k in set(range(len(candidates))) - scores.keys():  # rare: no lanes are filled up
            (scores[k],) = self._scores(candidates[[k]], self.layouts[-1], 1, images)
        return [scores[k] for k in range(len(candidates))]

    def _scores(
        self, candidates: Float[np.ndarray, "k n"], layout: Layout, lanes: int, images: int
    ) -> list[dict[str, float]]:
        """Scores of strategies that fit a layout, whose program takes as many as it has lanes."""
        filled = candidates[np.minimum(np.arange(lanes), len(candidates) - 1)]
        traced = [
            trace_strategy(self.parameters.strategy(numbers, self._length), self._plans(numbers))
            for numbers in filled
        ]
        stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]), *traced)
        classes, done = self.class_ids(images), 0
        scorers = [self._objective.start() for _ in candidates]
        for count, made in self._sampler.batches(
            **self._objective.asked(classes),
            output=self._objective.wants,
            seed=self._cfg.seed,
            plan=(layout, stacked),
            run=self.run,
            batch_size=self._sampler.program.batch_size(max(self._cfg.num_images)),
        ):
            for scorer, part in zip(scorers, made, strict=False):  # what fills up is not scored
                scorer.add(part, classes[done : done + count])
            done += count
        return [scorer.value() for scorer in scorers]

    def _plans(self, numbers: Float[np.ndarray, " n"]) -> tuple[Plan, ...]:
        """Token counts of every step, under AutoNAT's masking rule."""
        counts = clipped_counts(numbers[self.parameters.is_ratio], self._length)
        return generation_plans(counts, self._length, reuse=self._reuse)

    def _most_new(self, numbers: Float[np.ndarray, " n"]) -> int:
        return max(plan.new for plan in self._plans(numbers))

    def _generate(self, *arguments: Any, layout: Layout, output: Wants) -> tuple[Array, ...]:
        """What every strategy makes of a batch; arguments as `GenerationProgram.run` has them."""
        *before, strategies, key = arguments

        def one(strategy: TracedStrategy) -> Array:
            run = self._sampler.program.run
            return run(*before, strategy, key, layout=layout, output=output)

        width = min(self._cfg.strategies_at_once, len(strategies.step))  # side by side
        return tuple(jax.lax.map(one, strategies, batch_size=width if width > 1 else None))
