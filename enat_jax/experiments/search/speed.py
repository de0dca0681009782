"""Measures how many evaluations a search makes per second, against compiling every strategy.

Run as `python -m enat_jax.experiments.search.speed --config=CONFIG --workdir=RUN`.
"""

import argparse
import dataclasses
import json
import sys
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from enat_jax.config import override_config
from enat_jax.errors import UserError
from enat_jax.evaluation.objective import Objective, make_objective
from enat_jax.experiments.search.config import SearchConfig, load_search_config
from enat_jax.experiments.search.evaluations import Evaluations
from enat_jax.experiments.search.loop import starting_numbers
from enat_jax.experiments.search.optimisers import make_optimiser
from enat_jax.sampling.sampler import Restored, Sampler, restore, sampler_of


def measure(
    cfg: SearchConfig, restored: Restored, *, images: int, updates: int = 3, compiled: int = 2
) -> dict[str, Any]:
    """Times both ways on strategies that the search might ask for, of so many images each.

    Args:
        cfg: the search's config; its phases are not looked at.
        restored: the generator.
        images: of an evaluation.
        updates: of the search that are timed, after one that is not.
        compiled: strategies that are compiled each on its own, for their exact counts.

    Returns:
        Evaluations per second of both ways, their ratio, the seconds that the search's own
        program took to compile and run for the first time, and the seconds of an evaluation of
        the other way that went into compiling.
    """
    cfg = dataclasses.replace(cfg, num_images=(images,), updates=(updates,))
    sampler = sampler_of(restored)
    objective = make_objective(cfg.objective, restored.config, sampler.placement)
    start = starting_numbers(cfg, sampler)
    evaluations = Evaluations(cfg, sampler, objective, start)
    optimiser = make_optimiser(cfg, start, evaluations.parameters, phase=0)

    def seconds(made: int) -> float:
        begin = time.perf_counter()
        for _ in range(made):
            found = evaluations(optimiser.ask(), images)
            optimiser.tell(np.array([scores[objective.names[0]] for scores in found]))
        return time.perf_counter() - begin

    first, later = seconds(1), seconds(updates)
    candidates = optimiser.ask()
    searching = updates * len(candidates) / later

    alone = Alone(cfg, sampler, objective, evaluations)
    begin = time.perf_counter()
    for numbers in candidates[:compiled]:
        alone(numbers, images)
    compiling = compiled / (time.perf_counter() - begin)
    return {
        "device": jax.devices()[0].device_kind,
        "model": restored.config.model.name,
        "steps": cfg.steps,
        "images": images,
        "batch_size": evaluations.batch_size,
        "evaluations_per_update": len(candidates),
        "evaluations_per_second": searching,
        "evaluations_per_second_compiling_each": compiling,
        "ratio": searching / compiling,
        "first_update_seconds": first,
        "compile_seconds_each": alone.compile_seconds / compiled,
        "programs_of_the_search": len(evaluations.compiled),
    }


class Alone:
    """Evaluates one strategy by a program compiled for its own counts."""

    def __init__(
        self, cfg: SearchConfig, sampler: Sampler, objective: Objective, evaluations: Evaluations
    ):
        self._cfg, self._sampler, self._objective = cfg, sampler, objective
        self._evaluations = evaluations
        self.compile_seconds = 0.0

    def __call__(self, numbers: Float[np.ndarray, " n"], images: int) -> dict[str, float]:
        """The scores of a strategy, given by its numbers."""
        program, wants = self._sampler.program, self._objective.wants
        strategy = self._evaluations.parameters.strategy(numbers, program.config.model.length)
        layout, traced = program.plan(strategy)
        by_image = program.placement.batch
        traced, key = program.placement.put((traced, jax.random.key(self._cfg.seed)))
        decoder = program.tokenizer.params if program.tokenizer and wants != "token_ids" else ()
        classes, size = self._evaluations.class_ids(images), program.batch_size(images)
        scorer, compiled = self._objective.start(), None
        for first in range(0, images, size):
            ids = np.arange(first, first + size, dtype=np.int32)
            batch = classes[np.minimum(ids, images - 1)]
            arguments = (
                self._sampler.params,
                decoder,
                *program.placement.put((batch, ids), by_image),
                traced,
                key,
            )
            if compiled is None:
                begin = time.perf_counter()
                compiled = program.run.lower(*arguments, layout=layout, output=wants).compile()
                self.compile_seconds += time.perf_counter() - begin
            scorer.add(compiled(*arguments), batch[: images - first])
        return scorer.value()


def main(arguments: list[str]) -> int:
    """Prints the figures as JSON."""
    parser = argparse.ArgumentParser(description="speed of a search")
    parser.add_argument("--config", required=True, help="a search's config file")
    parser.add_argument("--workdir", required=True, help="a run")
    parser.add_argument("--images", type=int, default=0, help="the first phase's by default")
    args = parser.parse_args(arguments)
    try:
        cfg = load_search_config(args.config)
        restored = restore(
            args.workdir, overrides=lambda fields: override_config(fields, cfg.generator)
        )
        found = measure(cfg, restored, images=args.images or cfg.num_images[0])
    except UserError as error:
        print(f"speed: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
