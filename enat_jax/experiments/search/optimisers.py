"""Optimisers that ask for numbers to be evaluated, and are told what came of them."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from enat_jax.experiments.search.config import CmaConfig, SearchConfig, SgdConfig
from enat_jax.experiments.search.parameters import LARGEST_RATIO, SMALLEST, Parameters


@runtime_checkable
class Optimiser(Protocol):
    """Pure: what it asks for depends on its start and on what it was told alone.

    Attributes:
        current: where it stands; what a search that goes on with other images starts from.
    """

    current: Float[np.ndarray, " n"]

    def ask(self) -> Float[np.ndarray, "k n"]:
        """Numbers to evaluate, the same until `tell`, and always as many."""
        ...

    def tell(self, values: Float[np.ndarray, " k"]) -> None:
        """Takes what was asked for, all finite, less being better: one update."""
        ...


class Sgd:
    """Gradient descent with momentum on forward finite differences (AutoNAT).

    An update evaluates where it stands, and one probe for every number.
    """

    def __init__(self, start: Float[np.ndarray, " n"], parameters: Parameters, cfg: SgdConfig):
        ratio = parameters.is_ratio
        self.current = parameters.clamp(start)
        self._parameters = parameters
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
        # over the whole step, as published, also where the probe was cut off at 1
        slope = (values[1:] - values[0]) / self._probe
        self._velocity = self._momentum * self._velocity + slope
        self.current = self._parameters.clamp(self.current - self._rate * self._velocity)


class Cma:
    """CMA-ES within the search's limits (Hansen; package `cma`)."""

    def __init__(
        self,
        start: Float[np.ndarray, " n"],
        parameters: Parameters,
        cfg: CmaConfig,
        *,
        seed: int,
    ):
        import cma

        ratio = parameters.is_ratio
        self.current = parameters.clamp(start)
        spread = np.where(ratio, cfg.ratio_spread, cfg.spread * np.maximum(1.0, self.current))
        rng = np.random.default_rng(seed)
        options: dict[str, Any] = {
            "CMA_stds": spread,
            "bounds": [np.where(ratio, 0.0, SMALLEST), np.where(ratio, LARGEST_RATIO, np.inf)],
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
        asked = self._asked = self._asked or self._strategy.ask()
        return np.stack([self._parameters.clamp(each) for each in asked])

    def tell(self, values: Float[np.ndarray, " k"]) -> None:
        """Moves and reshapes the distribution; the search stands at its mean."""
        self._strategy.tell(self._asked, values.tolist())
        self._asked = None
        self.current = self._parameters.clamp(np.asarray(self._strategy.result.xfavorite))


def make_optimiser(
    cfg: SearchConfig, start: Float[np.ndarray, " n"], parameters: Parameters, *, phase: int
) -> Optimiser:
    """The optimiser that a config describes, at a start."""
    if cfg.optimiser == "sgd":
        return Sgd(start, parameters, cfg.sgd)
    return Cma(start, parameters, cfg.cma, seed=cfg.seed + phase)
