"""Optimisers: they ask for numbers to be evaluated, and are told what came of them.

What one asks for depends on its start and on what it was told alone. `current` is where it stands;
`ask` gives always as many numbers `[k n]`, the same until `tell`, which takes their values `[k]`,
all finite, less being better: one update.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from enat_jax.experiments.search.config import CmaConfig, SearchConfig, SgdConfig
from enat_jax.experiments.search.parameters import Parameters


class Sgd:
    """Gradient descent with momentum on forward finite differences (AutoNAT).

    An update evaluates where it stands, and one probe for every number.
    """

    def __init__(self, start: Float[np.ndarray, " n"], parameters: Parameters, cfg: SgdConfig):
        self.current = start.copy()  # not clamped: from 12 steps on the published one is beyond
        self._parameters, ratio = parameters, parameters.is_ratio
        self._probe = np.where(ratio, cfg.ratio_probe, cfg.probe)
        self._rate = np.where(ratio, cfg.ratio_learning_rate, cfg.learning_rate)
        self._momentum = cfg.momentum
        self._velocity = np.zeros_like(self.current)

    def ask(self) -> Float[np.ndarray, "k n"]:
        """Where it stands, and a probe beside it for every number."""
        probes = self.current + np.diag(self._probe)
        ratio = self._parameters.is_ratio
        probes[:, ratio] = np.clip(probes[:, ratio], 0.0, 1.0)
        return np.concatenate([self.current[None], probes])

    def tell(self, values: Float[np.ndarray, " k"]) -> None:
        """A step down the slope that the probes found."""
        # over the step that was taken, as published, also where the probe was cut off at 1
        room = np.where(self._parameters.is_ratio, 1 - self.current, np.inf)
        slope = (values[1:] - values[0]) / np.minimum(self._probe, room)
        self._velocity = self._momentum * self._velocity + slope
        self.current = self._parameters.clamp(self.current - self._rate * self._velocity)


class Cma:
    """CMA-ES within the search's limits (Hansen; package `cma`)."""

    def __init__(
        self, start: Float[np.ndarray, " n"], parameters: Parameters, cfg: CmaConfig, seed: int
    ):
        import cma

        self.current = parameters.clamp(start)
        spread = cfg.spread * np.maximum(1.0, self.current)
        rng = np.random.default_rng(seed)
        options: dict[str, Any] = {
            "CMA_stds": np.where(parameters.is_ratio, cfg.ratio_spread, spread),
            "bounds": list(parameters.limits),
            "seed": np.nan,  # leaves NumPy's global state alone
            "randn": lambda *shape: rng.standard_normal(shape),
            "verbose": -10,  # no output, no files
        }
        if cfg.population:
            options["popsize"] = cfg.population
        self._parameters = parameters
        self._strategy = cma.CMAEvolutionStrategy(self.current, 1.0, options)
        self._asked: list[np.ndarray] | None = None

    def ask(self) -> Float[np.ndarray, "k n"]:
        """A generation of numbers, drawn from the distribution as it is now."""
        self._asked = self._asked or self._strategy.ask()
        return self._parameters.clamp(np.stack(self._asked))

    def tell(self, values: Float[np.ndarray, " k"]) -> None:
        """Moves and reshapes the distribution; the search stands at its mean."""
        self._strategy.tell(self._asked, values.tolist())
        self._asked = None
        self.current = self._parameters.clamp(np.asarray(self._strategy.result.xfavorite))


def make_optimiser(
    cfg: SearchConfig, start: Float[np.ndarray, " n"], parameters: Parameters, *, phase: int
) -> Sgd | Cma:
    """The optimiser that a config describes, at a start."""
    if cfg.optimiser == "sgd":
        return Sgd(start, parameters, cfg.sgd)
    return Cma(start, parameters, cfg.cma, cfg.seed + phase)
