"""Measures a point: how good its images are, and how fast they are made."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Shaped

from enat_jax.evaluation.objective import Objective, Wants
from enat_jax.experiments.ablate.points import AblateError, Point
from enat_jax.parallel.compilation import compile_seconds
from enat_jax.parallel.hosts import all_gather
from enat_jax.sampling.sampler import Sampler, restore, sampler_of


class Speed(NamedTuple):
    """How fast a point generates token ids; turning them into images is the same for all.

    Attributes:
        images_per_second: median over warm batches.
        compile_seconds: of the point's program, also where another point compiled it.
    """

    images_per_second: float
    compile_seconds: float


class Generators:
    """One sampler at a time, shared by all points whose programs can be shared.

    Args:
        warn: called with lines for the user.
    """

    def __init__(self, *, warn: Callable[[str], object] = print):
        self._warn = warn
        self._made_for: tuple[Any, str] | None = None
        self._sampler: Any = None
        self._seconds: dict[Any, float] = {}  # to compile each layout

    def sampler(self, point: Point) -> Sampler:
        """The point's sampler, with its run's weights.

        Raises:
            UserError: the run cannot be read, or has gone on since the points were checked.
        """
        if self._made_for != (point.generator, point.workdir):
            restored = restore(point.workdir, warn=self._warn)
            if restored.step != point.model.step:
                raise AblateError(
                    f"{point.workdir} has a checkpoint of step {restored.step} now, it had one of"
                    f" step {point.model.step}"
                )
            if self._made_for is not None and self._made_for[0] == point.generator:
                self._sampler.update(restored.ema)
            else:
                self._sampler = None  # gives its memory back first
                self._seconds = {}
                self._sampler = sampler_of(restored._replace(config=point.config))
            self._made_for = point.generator, point.workdir
        return self._sampler

    def speed(self, point: Point, classes: np.ndarray, batches: int) -> Speed:
        """Compiles the point's program where no other point has, and times it."""
        sampler = self.sampler(point)
        size = sampler.program.batch_size(len(classes))
        layout, traced = sampler.plan(**point.strategy)
        rows = sampler.placement.batch
        inputs = (
            *sampler.placement.put(
                (np.resize(classes, size).astype(np.int32), np.arange(size, dtype=np.int32)), rows
            ),
            *sampler.placement.put((traced, jax.random.key(0))),
        )

        def call() -> float:
            start = time.perf_counter()
            made = sampler.program.run(
                sampler.params, (), *inputs, layout=layout, output="token_ids"
            )
            jax.block_until_ready(made)
            return time.perf_counter() - start

        before = compile_seconds()
        call()
        if layout not in self._seconds:
            self._seconds[layout] = compile_seconds() - before
        seconds = statistics.median(call() for _ in range(batches))
        return Speed(size / seconds, self._seconds[layout])

    def judge(
        self, point: Point, objective: Objective, classes: np.ndarray, *, seed: int, keep: int
    ) -> tuple[dict[str, float], Shaped[np.ndarray, "k y x 3"] | None]:
        """The scores of a point's images with one seed, and the first images.

        Args:
            point: what generates.
            objective: what judges.
            classes: one per image.
            seed: of the noise.
            keep: how many images to return, none of them where the run has no tokenizer.
        """
        sampler, scorer = self.sampler(point), objective.start()

        def decoded(token_ids: Array, wants: Wants) -> Array:
            if wants == "token_ids":
                return token_ids
            assert sampler.tokenizer is not None  # `make_objective` has seen to it
            return sampler.program.decode(sampler.tokenizer.params, token_ids, output=wants)

        kept: list[np.ndarray] = []
        done = 0
        keep = keep if sampler.tokenizer is not None else 0
        for count, token_ids in sampler.batches(
            classes, output="token_ids", seed=seed, **point.strategy
        ):
            made = decoded(token_ids, objective.wants)
            scorer.add(made, classes[done : done + count])
            if done < keep:
                images = all_gather(decoded(token_ids, "uint8"))
                kept.append(images[: min(count, keep - done)])
            done += count
        return scorer.value(), np.concatenate(kept) if kept else None
