"""Measures how many evaluations a search makes per second, against compiling every strategy.

Run as `python -m enat_jax.search.speed --config=configs/search_digits.py --workdir=RUN`.
"""

import argparse
import json
import sys
import time
from typing import Any

import jax
import numpy as np

from enat_jax.config import override_config
from enat_jax.errors import UserError
from enat_jax.generate import plan_generation
from enat_jax.models.flops import step_flops
from enat_jax.objective import make_objective
from enat_jax.sample import Restored, restore, sampler_of
from enat_jax.search.config import SearchConfig, load_search_config
from enat_jax.search.evaluations import Evaluations
from enat_jax.search.loop import starting_numbers
from enat_jax.search.optimisers import make_optimiser
from enat_jax.sharding import batch_sharding, put, replicated


def measure(
    cfg: SearchConfig, restored: Restored, *, images: int, updates: int = 3, compiled: int = 2
) -> dict[str, Any]:
    """Times both ways on strategies that the search might ask for, of so many images each.

    Args:
        cfg: the search's config.
        restored: the generator.
        images: of an evaluation.
        updates: of the search that are timed, after one that is not.
        compiled: strategies that are compiled each on its own, for their exact counts.

    Returns:
        Evaluations per second of both ways, their ratio, and the seconds that the search's own
        program took to compile and run for the first time.
    """
    sampler = sampler_of(restored)
    objective = make_objective(cfg.objective, restored.config, sampler.mesh)
    start = starting_numbers(cfg, sampler)
    evaluations = Evaluations(cfg, sampler, objective, start)
    optimiser = make_optimiser(cfg, start, evaluations.parameters, phase=0)

    def seconds(made: int) -> float:
        begin = time.perf_counter()
        for _ in range(made):
            candidates = optimiser.ask()
            found = evaluations(candidates, images)
            optimiser.tell(np.array([scores[objective.names[0]] for scores in found]))
        return time.perf_counter() - begin

    first, later = seconds(1), seconds(updates)
    candidates = optimiser.ask()
    searching = updates * len(candidates) / later

    model, classes = restored.config.model, evaluations.class_ids(images)
    size = sampler.program.batch_size(images)
    by_image, whole = batch_sharding(sampler.mesh), replicated(sampler.mesh)
    decoder = sampler.tokenizer.params if sampler.tokenizer else ()
    begin = time.perf_counter()
    for numbers in candidates[:compiled]:
        strategy = evaluations.parameters.strategy(numbers, model.length)
        layout, traced = plan_generation(
            strategy, model.length, lambda plan: step_flops(model, plan),
            reuse=model.carries_features and restored.config.strategy.reuse,
        )  # fmt: skip
        traced, key = put((traced, jax.random.key(cfg.seed)), whole)
        scorer = objective.start()
        program: Any = None
        for at in range(0, images, size):
            ids = np.arange(at, at + size, dtype=np.int32)
            batch = classes[np.minimum(ids, images - 1)]
            arguments = (sampler.params, decoder if objective.wants != "token_ids" else (),
                         put(batch, by_image), put(ids, by_image), traced, key)  # fmt: skip
            if program is None:
                fresh = jax.jit(lambda *a, _at=layout: sampler.program.run(
                    *a, layout=_at, output=objective.wants))  # fmt: skip
                program = fresh.lower(*arguments).compile()
            scorer.add(program(*arguments), batch[: min(size, images - at)])
        scorer.value()
    compiling = len(candidates[:compiled]) / (time.perf_counter() - begin)
    return {
        "device": jax.devices()[0].device_kind,
        "steps": cfg.steps,
        "images": images,
        "evaluations_per_update": len(candidates),
        "evaluations_per_second": searching,
        "evaluations_per_second_compiling_each": compiling,
        "ratio": searching / compiling,
        "first_update_seconds": first,
        "programs_of_the_search": len(evaluations.compiled),
    }


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
