import dataclasses

import numpy as np
import pytest

import tests.experiments.search.test_loop as test_loop
from enat_jax.core.strategy import read_strategy
from enat_jax.errors import UserError
from enat_jax.evaluation.objective import ObjectiveConfig
from enat_jax.experiments.search import loop, training
from enat_jax.experiments.search.config import SearchConfig, TrainingSearchConfig
from enat_jax.experiments.search.training import alternate, candidates
from enat_jax.sampling.sampler import restore
from tests.experiments.search.test_loop import CONFIG, Distance, restored, still

CFG = dataclasses.replace(
    CONFIG, updates=(1, 2), training=TrainingSearchConfig(rounds=2, factor=2.0)
)
BEST = (8.0, 4.0)  # the (a, b) that `ByBeta` likes best; the run has (4, 2)


class ByBeta(Distance):
    """The distance of a strategy's numbers and of the model's (a, b) to the best ones."""

    def __init__(self, cfg, sampler, objective, start):
        super().__init__(cfg, sampler, objective, start)
        self.miss = np.abs(np.log(np.array(sampler.config.train.mask_beta) / BEST)).sum()

    def __call__(self, candidates, images, *, together=None):
        found = super().__call__(candidates, images, together=together)
        return [{"never_called": scores["never_called"] + self.miss} for scores in found]


@pytest.fixture(scope="module")
def model():
    return restored()


@pytest.fixture
def trainings(monkeypatch, model):
    """Training without any: the configs that were trained."""
    configs = {}

    def train(config, workdir, *, log):
        configs[workdir.name] = config

    def restoring(workdir, *, overrides):
        return model._replace(config=overrides({}))

    for name, value in (("asked", 0), ("bad", ()), ("fatal", None)):
        monkeypatch.setattr(test_loop.Distance, name, value)
    monkeypatch.setattr(loop, "Evaluations", ByBeta)
    monkeypatch.setattr(training, "Evaluations", ByBeta)
    for module in (loop, training):
        monkeypatch.setattr(module, "sampler_of", still)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "restore", restoring)
    return configs


def rows(folder):
    lines = (folder / "betas.csv").read_text().splitlines()
    return [tuple(map(float, line.split(","))) for line in lines[1:]]


def test_a_round_tries_the_current_pair_and_each_of_its_numbers_made_larger_and_smaller():
    assert candidates((4.0, 2.0), 2.0) == [(4, 2), (8, 2), (2, 2), (4, 4), (4, 1)]


def test_rounds_descend_to_the_best_pair_and_search_the_strategy_in_between(
    model, tmp_path, trainings
):
    found = alternate(CFG, model, tmp_path, say=lambda line: None)
    judged = rows(tmp_path)
    assert [row[0] for row in judged] == [0] * 5 + [1] * 5
    assert [row[1:3] for row in judged[:5]] == candidates((4.0, 2.0), 2.0)
    assert min(judged[:5], key=lambda row: row[3])[1:3] == (8, 2)
    assert [row[1:3] for row in judged[5:]] == candidates((8.0, 2.0), 2.0)
    assert min(judged[5:], key=lambda row: row[3])[1:3] == BEST
    assert found.path == tmp_path / "round_1/best.yaml"
    # the second round judges and searches from the strategy that the first one found
    first = read_strategy(tmp_path / "round_0/best.yaml")
    line = (tmp_path / "round_1/evaluations.csv").read_text().splitlines()[1].split(",")
    np.testing.assert_array_equal(np.array(line[5:7], np.float64), first.sampling_temperature)
    assert judged[5][3] < judged[1][3]


def test_all_but_the_mask_ratios_is_trained_as_the_run_was(model, tmp_path, trainings):
    cfg = dataclasses.replace(CFG, training=dataclasses.replace(CFG.training, steps=900))
    alternate(cfg, model, tmp_path, say=lambda line: None)
    assert "8_2" in trainings
    assert "4_2" not in trainings  # the run itself
    for name, config in trainings.items():
        beta = tuple(map(float, name.split("_")))
        train = dataclasses.replace(model.config.train, mask_beta=beta, steps=900)
        assert config == dataclasses.replace(model.config, train=train)


def test_run_again_nothing_is_judged_or_evaluated_again(model, tmp_path, trainings):
    alternate(CFG, model, tmp_path, say=lambda line: None)
    before, asked = (tmp_path / "betas.csv").read_text(), Distance.asked
    alternate(CFG, model, tmp_path, say=lambda line: None)
    assert Distance.asked == asked
    assert (tmp_path / "betas.csv").read_text() == before


def test_stopped_between_candidates_it_goes_on_to_the_same_end(model, tmp_path, trainings):
    alternate(CFG, model, tmp_path / "whole", say=lambda line: None)
    whole = (tmp_path / "whole/betas.csv").read_text()
    folder = tmp_path / "stopped"
    folder.mkdir()
    (folder / "about.json").write_bytes((tmp_path / "whole/about.json").read_bytes())
    (folder / "betas.csv").write_text(whole[: int(0.4 * len(whole))])
    alternate(CFG, model, folder, say=lambda line: None)
    assert (folder / "betas.csv").read_text() == whole


def test_a_value_that_is_not_finite_is_named(model, tmp_path, trainings):
    Distance.bad = (3,)
    with pytest.raises(UserError, match=r"not finite: .*\(2\.0, 2\.0\): nan"):
        alternate(CFG, model, tmp_path, say=lambda line: None)


def test_another_config_is_refused(model, tmp_path, trainings):
    alternate(CFG, model, tmp_path, say=lambda line: None)
    with pytest.raises(UserError, match="seed = 4, there 3"):
        alternate(dataclasses.replace(CFG, seed=4), model, tmp_path, say=lambda line: None)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_tiny_run_is_trained_judged_and_searched(trained, tmp_path):
    cfg = SearchConfig(
        steps=2, num_images=(20,), updates=(1,), objective=ObjectiveConfig(name="digits"),
        start="run", optimiser="cma", training=TrainingSearchConfig(rounds=1),
    )  # fmt: skip
    found = alternate(cfg, restore(trained), tmp_path, say=lambda line: None)
    assert len(rows(tmp_path)) == 5
    assert len(list((tmp_path / "trained").glob("*/checkpoints"))) == 4
    assert np.isfinite(found.value)
    assert found.path.exists()
