"""Searches without images: the score is how far a strategy's numbers are from known ones."""

import numpy as np

from enat_jax import files
from enat_jax.evaluation.objective import ObjectiveConfig
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.parallel.placement import Placement
from enat_jax.sampling.program import GenerationProgram
from enat_jax.sampling.sampler import Sampler

KNOWN = np.array([0.6, 0.5, 0.8, 0.9, 0.4, 0.7])  # where `Distance` is least
CONFIG = SearchConfig(
    steps=2, num_images=(10, 50), updates=(3, 4), seed=3, strategies_per_call=3,
    objective=ObjectiveConfig(name=f"{__name__}:never_called", output="token_ids"),
)  # fmt: skip


def never_called(token_ids, class_ids):
    raise AssertionError


class Distance:
    """In place of `Evaluations`; counts what was asked of it."""

    asked = 0
    bad = ()  # evaluations that are not finite
    fatal = None  # the evaluation that ends the process

    def __init__(self, cfg, sampler, objective, start):
        self.config = sampler.config

    def __call__(self, candidates, images, *, together=None):
        scores = []
        for numbers in candidates:
            Distance.asked += 1
            if Distance.asked == Distance.fatal:
                raise KeyboardInterrupt
            value = np.nan if Distance.asked in Distance.bad else self.value(numbers, images)
            scores.append({"never_called": value})
        return scores

    def value(self, numbers, images):
        # few images flatter, so that values of two sizes do not compare
        return float(np.sum((numbers - KNOWN) ** 2) - 100 / images)


def idle(restored):
    """A sampler that knows its config, and is never asked for anything."""
    sampler = object.__new__(Sampler)
    sampler.config, sampler.placement = restored.config, Placement.of(restored.config.mesh)
    sampler.program = GenerationProgram(sampler.config, sampler.placement, None)
    return sampler


def without_images(monkeypatch, *modules, evaluations=Distance):
    """Makes modules of the search use what is here, and not wait for the disk."""
    monkeypatch.setattr(files, "fsync", lambda path: None)
    for name, value in (("asked", 0), ("bad", ()), ("fatal", None)):
        monkeypatch.setattr(Distance, name, value)
    for module in modules:
        monkeypatch.setattr(module, "Evaluations", evaluations)
        monkeypatch.setattr(module, "sampler_of", idle)
