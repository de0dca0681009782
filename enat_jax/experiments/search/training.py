"""The alternating search: training's mask ratios, then the strategy, round after round."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

from enat_jax.config import config_from_dict
from enat_jax.errors import UserError
from enat_jax.evaluation.objective import make_objective
from enat_jax.experiments.search.config import SearchConfig
from enat_jax.experiments.search.evaluations import Evaluations
from enat_jax.experiments.search.loop import Best, identity, search, starting_numbers
from enat_jax.experiments.table import Table
from enat_jax.files import Path
from enat_jax.sampling.sampler import Restored, restore, sampler_of
from enat_jax.training.train import train

Beta = tuple[float, float]


def alternate(
    cfg: SearchConfig, restored: Restored, out: Path, *, log: Callable[[str], object] = print
) -> Best:
    """Searches training's Beta(a, b) of mask ratios and the strategy, in turns (AutoNAT).

    AutoNAT alternates so; the code of its search over (a, b) is not published. Here, each round
    trains candidates around the current (a, b) from scratch, all else as the run was trained, and
    judges them and the current model under the current strategy; on the best of them the strategy
    is searched, from the current one. A candidate's run is `trained/A_B` in the folder, a round's
    search `round_0` and so on, and `betas.csv` has a row per candidate judged. What is there is
    not made again: trainings and searches go on where they were stopped. What is returned came of
    the last round's search.

    Raises:
        UserError: as `search` and `train`; or candidates' values that are not finite.
    """
    sampler, folder = sampler_of(restored), pathlib.Path(out)
    score = make_objective(cfg.objective, restored.config, sampler.placement).names[0]
    about = identity(cfg, restored, starting_numbers(cfg, sampler))
    columns = {"round": int, "a": float, "b": float, score: float}
    table = Table(folder / "betas.csv", columns, keys=3, about=about)
    rounds = cfg.training.rounds
    cfg = dataclasses.replace(cfg, training=dataclasses.replace(cfg.training, rounds=0))
    current, best = restored, None

    def model(beta: Beta) -> Restored:
        for known in (current, restored):
            if beta == _beta(known):
                return known
        return _trained(restored, beta, cfg.training.steps, folder / "trained", log)

    for number in range(rounds):
        betas = candidates(_beta(current), cfg.training.factor)
        for beta in betas:
            if (number, *beta) not in table.rows:
                value = _value(cfg, model(beta))
                table.add({"round": number, "a": beta[0], "b": beta[1], score: value})
                log(f"round {number + 1}: Beta{beta}: {value:.6g}")
        values = {beta: table.rows[number, *beta][score] for beta in betas}
        if not np.all(np.isfinite([*values.values()])):
            raise UserError(f"values of Beta(a, b) that are not finite: {values}")
        current = model(min(betas, key=values.__getitem__))
        log(f"round {number + 1} of {rounds}: Beta{_beta(current)} is trained with")
        best = search(cfg, current, folder / f"round_{number}", log=log)
        cfg = dataclasses.replace(cfg, start=str(best.path))
    assert best is not None  # there is at least one round
    return best


def candidates(beta: Beta, factor: float) -> list[Beta]:
    """What a round tries: the current (a, b), and each of them made larger and smaller."""
    a, b = beta
    return [(a, b), (a * factor, b), (a / factor, b), (a, b * factor), (a, b / factor)]


def _value(cfg: SearchConfig, model: Restored) -> float:
    """The value of a model under the strategy that a search would start from."""
    sampler = sampler_of(model)
    objective = make_objective(cfg.objective, model.config, sampler.placement)
    start = starting_numbers(cfg, sampler)
    (scores,) = Evaluations(cfg, sampler, objective, start)(start[None], cfg.num_images[-1])
    return float(scores[objective.names[0]])


def _trained(
    first: Restored, beta: Beta, steps: int, folder: pathlib.Path, log: Callable[[str], object]
) -> Restored:
    """A model trained with other mask ratios, further where that was stopped."""
    fields = dataclasses.asdict(first.config)
    fields["train"] |= {"mask_beta": beta, "steps": steps or first.config.train.steps}
    config = config_from_dict(fields)
    workdir = folder / f"{beta[0]:.6g}_{beta[1]:.6g}"
    train(config, workdir, log=log)
    return restore(workdir, overrides=lambda _: config)


def _beta(restored: Restored) -> Beta:
    return restored.config.train.mask_beta
