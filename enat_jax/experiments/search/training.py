"""The alternating search: training's mask ratios, then the strategy, round after round."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import numpy as np

from enat_jax.config import config_from_dict
from enat_jax.errors import UserError
from enat_jax.evaluation.objective import make_objective
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.experiments.search.evaluations import Evaluations
from enat_jax.experiments.search.log import SearchError
from enat_jax.experiments.search.loop import Found, identity, search, starting_numbers
from enat_jax.experiments.study_folder import open_study
from enat_jax.files import write_text
from enat_jax.sampling.sampler import Restored, restore, sampler_of
from enat_jax.training.train import train

BETAS = "betas.csv"
_COLUMNS = "round,a,b"


def alternate(
    cfg: SearchConfig,
    restored: Restored,
    out: str | os.PathLike[str],
    *,
    say: Callable[[str], object] = print,
) -> Found:
    """Searches training's Beta(a, b) of mask ratios and the strategy, in turns (AutoNAT).

    AutoNAT alternates so; the code of its search over (a, b) is not published. Here, each round
    trains candidates around the current (a, b) from scratch, all else as the run was trained, and
    judges them and the current model under the current strategy; on the best of them the strategy
    is searched, from the current one. A candidate's run is `trained/A_B` in the folder, a round's
    search `round_0` and so on, and `betas.csv` has a row per candidate judged. What is there is
    not made again: trainings and searches go on where they were stopped.

    Args:
        cfg: the search's config.
        restored: the first model and its config.
        out: the folder.
        say: called with lines for the user.

    Returns:
        What the last round's search found.

    Raises:
        UserError: as `search` and `train`; or candidates' values that are not finite.
    """
    numbers = starting_numbers(cfg, sampler_of(restored))
    folder = pathlib.Path(out)
    open_study(folder, identity(cfg, restored, numbers), results=BETAS)
    current, start, found = restored, cfg, None
    for number in range(cfg.training.rounds):
        betas = _Betas(start, restored, folder, number, say)
        current = betas.best(current)
        say(f"round {number + 1} of {cfg.training.rounds}: Beta{_beta(current)} is trained with")
        alone = dataclasses.replace(start.training, rounds=0)
        found = search(
            dataclasses.replace(start, training=alone), current, folder / f"round_{number}", say=say
        )
        start = dataclasses.replace(cfg, start=str(found.path))
    assert found is not None  # there is at least one round
    return found


def candidates(beta: tuple[float, float], factor: float) -> list[tuple[float, float]]:
    """What a round tries: the current (a, b), and each of them made larger and smaller."""
    a, b = beta
    return [(a, b), (a * factor, b), (a / factor, b), (a, b * factor), (a, b / factor)]


class _Betas:
    """A round's candidates, trained and judged."""

    def __init__(
        self,
        cfg: SearchConfig,
        first: Restored,
        folder: pathlib.Path,
        number: int,
        say: Callable[[str], object],
    ):
        self._first = first
        self._cfg, self._folder, self._number, self._say = cfg, folder, number, say
        self._path = folder / BETAS

    def best(self, current: Restored) -> Restored:
        """The candidate of the least value; the current model where none is better."""
        betas = candidates(_beta(current), self._cfg.training.factor)
        known, values = self._known(), []
        for beta in betas:
            key = (self._number, *beta)
            if key not in known:
                model = current if beta == betas[0] else self._trained(current, beta)
                known[key] = self._judge(model)
            values.append(known[key])
        if not np.all(np.isfinite(values)):
            pairs = dict(zip(betas, values, strict=True))
            raise SearchError(f"values of Beta(a, b) that are not finite: {pairs}")
        at = int(np.argmin(values))
        return current if at == 0 else self._trained(current, betas[at])

    def _judge(self, model: Restored) -> float:
        """The value of a model under the round's strategy; recorded."""
        cfg, sampler = self._cfg, sampler_of(model)
        objective = make_objective(cfg.objective, model.config, sampler.placement)
        start = starting_numbers(cfg, sampler)
        (scores,) = Evaluations(cfg, sampler, objective, start)(start[None], cfg.num_images[-1])
        value = float(scores[objective.names[0]])
        self._add((self._number, *_beta(model)), value, objective.names[0])
        self._say(f"round {self._number + 1}: Beta{_beta(model)}: {value:.6g}")
        return value

    def _trained(self, current: Restored, beta: tuple[float, float]) -> Restored:
        """A model trained with other mask ratios; trained further where it was stopped."""
        if beta == _beta(self._first):
            return self._first
        fields = dataclasses.asdict(current.config)
        fields["train"]["mask_beta"] = beta
        if self._cfg.training.steps:
            fields["train"]["steps"] = self._cfg.training.steps
        config = config_from_dict(fields)
        workdir = self._folder / "trained" / f"{beta[0]:.6g}_{beta[1]:.6g}"
        train(config, workdir, log=self._say)
        return restore(workdir, overrides=lambda _: config)

    def _known(self) -> dict[tuple[int, float, float], float]:
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        known = {}
        for line in text[: text.rfind("\n") + 1].splitlines()[1:]:  # after the columns' names
            try:
                number, a, b, value = line.split(",")
                known[int(number), float(a), float(b)] = float(value)
            except ValueError as error:
                raise UserError(f"{self._path}: {line!r}: {error}") from error
        return known

    def _add(self, key: tuple[int, float, float], value: float, name: str) -> None:
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1] or f"{_COLUMNS},{name}\n"
        write_text(self._path, whole + ",".join(map(repr, (*key, value))) + "\n")


def _beta(restored: Restored) -> tuple[float, float]:
    return restored.config.train.mask_beta
