import csv
import dataclasses

import numpy as np
import pytest

from enat_jax.errors import UserError
from enat_jax.evaluation.objective import ObjectiveConfig
from enat_jax.experiments.search import loop, training
from enat_jax.experiments.search.config import SearchConfig, TrainingSearchConfig
from enat_jax.experiments.search.training import alternate, candidates
from enat_jax.sampling.sampler import restore
from enat_jax.sampling.strategy_file import read_strategy
from tests.support.made_up import made_up
from tests.support.searches import CONFIG, Distance, without_images

CFG = dataclasses.replace(
    CONFIG, updates=(1, 2), training=TrainingSearchConfig(rounds=2, factor=2.0)
)
BEST = (8.0, 4.0)  # the (a, b) that `ByBeta` likes best; the run has (4, 2)


class ByBeta(Distance):
    """The distance of a strategy's numbers and of the model's (a, b) to the best ones."""

    def value(self, numbers, images):
        miss = np.abs(np.log(np.array(self.config.train.mask_beta) / BEST)).sum()
        return super().value(numbers, images) + miss


@pytest.fixture(scope="module")
def model():
    return made_up("digits_autonat")


@pytest.fixture
def trainings(monkeypatch, model):
    """Training without any: the configs that were trained."""
    configs = {}
    without_images(monkeypatch, loop, training, evaluations=ByBeta)
    monkeypatch.setattr(
        training, "train", lambda config, workdir, **_: configs.update({workdir.name: config})
    )
    monkeypatch.setattr(
        training, "restore", lambda _, overrides: model._replace(config=overrides({}))
    )
    return configs


def search(model, out, cfg=CFG):
    return alternate(cfg, model, out, log=lambda line: None)


def rows(folder):
    with open(folder / "betas.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def beta(row):
    return row["a"], row["b"]


def value(row):
    return row["never_called"]


def test_a_round_tries_the_current_pair_and_each_of_its_numbers_made_larger_and_smaller():
    assert candidates((4.0, 2.0), 2.0) == [(4, 2), (8, 2), (2, 2), (4, 4), (4, 1)]


def test_rounds_descend_to_the_best_pair_and_search_the_strategy_in_between(
    model, tmp_path, trainings
):
    best = search(model, tmp_path)
    tried = rows(tmp_path)
    assert [row["round"] for row in tried] == [0] * 5 + [1] * 5
    assert list(map(beta, tried)) == [*candidates((4.0, 2.0), 2.0), *candidates((8.0, 2.0), 2.0)]
    assert [beta(min(part, key=value)) for part in (tried[:5], tried[5:])] == [(8, 2), BEST]
    assert best.path == tmp_path / "round_1/best.yaml"
    # the second round judges and searches from the strategy that the first one found
    first = read_strategy(tmp_path / "round_0/best.yaml")
    started = (tmp_path / "round_1/evaluations.csv").read_text().splitlines()[1].split(",")
    np.testing.assert_array_equal(np.array(started[5:7], float), first.sampling_temperature)
    assert value(tried[5]) < value(tried[1])


def test_all_but_the_mask_ratios_is_trained_as_the_run_was(model, tmp_path, trainings):
    cfg = dataclasses.replace(CFG, training=dataclasses.replace(CFG.training, steps=900))
    search(model, tmp_path, cfg)
    assert "8_2" in trainings
    assert "4_2" not in trainings  # the run itself
    for name, config in trainings.items():
        pair = tuple(map(float, name.split("_")))
        train = dataclasses.replace(model.config.train, mask_beta=pair, steps=900)
        assert config == dataclasses.replace(model.config, train=train)


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on_to_the_same_end(model, tmp_path, trainings):
    search(model, tmp_path / "complete")
    complete, asked = (tmp_path / "complete/betas.csv").read_text(), Distance.asked
    for share in (0.4, 1.0):
        kept = complete[: int(share * len(complete))]
        folder = tmp_path / str(share)
        folder.mkdir()
        (folder / "about.json").write_bytes((tmp_path / "complete/about.json").read_bytes())
        (folder / "betas.csv").write_text(kept)
        Distance.asked = 0
        search(model, folder)
        assert (folder / "betas.csv").read_text() == complete
        assert Distance.asked == asked - (kept.count("\n") - 1)  # what is there is not judged again
    search(model, folder)
    assert Distance.asked == asked - 10  # all was there


def test_a_value_that_is_not_finite_is_named(model, tmp_path, trainings):
    Distance.bad = (3,)
    with pytest.raises(UserError, match=r"not finite: .*\(2\.0, 2\.0\): nan"):
        search(model, tmp_path)


def test_another_config_is_refused(model, tmp_path, trainings):
    search(model, tmp_path)
    with pytest.raises(UserError, match="seed = 4, there 3"):
        search(model, tmp_path, dataclasses.replace(CFG, seed=4))


@pytest.mark.slow
def test_a_tiny_run_is_trained_judged_and_searched(trained, tmp_path):
    cfg = SearchConfig(
        steps=2, num_images=(20,), updates=(1,), objective=ObjectiveConfig(name="digits"),
        start="run", optimiser="cma", training=TrainingSearchConfig(rounds=1),
    )  # fmt: skip
    best = search(restore(trained), tmp_path, cfg)
    assert len(rows(tmp_path)) == 5
    assert len(list((tmp_path / "trained").glob("*/checkpoints"))) == 4
    assert np.isfinite(best.value)
    assert best.path.exists()
