import dataclasses

import pytest

from enat_jax.config_file import make_config
from enat_jax.errors import UserError
from enat_jax.experiments.ablate.config import AblateConfig
from enat_jax.experiments.ablate.points import make_points
from tests.support.made_up import made_up, save


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(save(made_up("digits"), tmp_path_factory.mktemp("run")))


def points(workdir, grid=None, named=None, log=print, **fields):
    fields = {"grid": grid or {}, "points": named or {}, "num_images": 10, **fields}
    fields.setdefault("objective", {"name": "math:sqrt", "output": "token_ids"})
    return make_points(make_config(AblateConfig, fields), workdir, log=log)


def test_a_grid_is_all_combinations_named_by_what_varies(run):
    grid = {"strategy": {"steps": (4, 8), "guidance_scale": [0.0, 1.5], "rule": ("maskgit",)},
            "sample": {"batch_size": 10}, "workdir": run}  # fmt: skip
    made = points(None, grid, {"wide": {"workdir": run, "strategy": {"schedule": "linear"}}})
    assert [point.name for point in made] == [
        "steps=4, guidance_scale=0.0", "steps=4, guidance_scale=1.5",
        "steps=8, guidance_scale=0.0", "steps=8, guidance_scale=1.5", "wide",
    ]  # fmt: skip
    assert {point.config.strategy.rule for point in made[:4]} == {"maskgit"}
    assert [point.config.sample.batch_size for point in made] == [10, 10, 10, 10, 8]
    assert [point.layout.steps for point in made] == [4, 4, 8, 8, 8]


def test_a_point_has_its_runs_config_but_for_its_changes(run):
    (point,) = points(run, {"strategy": {"steps": 3}, "sample": {"batch_size": 7}})
    trained = made_up("digits").config
    strategy = dataclasses.replace(trained.strategy, steps=3)
    sample = dataclasses.replace(trained.sample, batch_size=7)
    assert point.config == dataclasses.replace(trained, strategy=strategy, sample=sample)
    assert (point.name, point.workdir, point.checkpoint) == ("the grid's point", run, 4)


def test_reuse_changes_the_plan(run):
    on, off = points(run, {"strategy": {"steps": 3, "reuse": (True, False)}})
    assert on.layout.buckets[-1].plans[-1].previous > 0
    assert off.layout.buckets[-1].plans[-1].previous == 0
    assert off.flops > on.flops


def test_a_run_that_was_stopped_is_named(tmp_path):
    stopped, lines = save(made_up("digits", "train.steps=9"), tmp_path), []
    points(str(stopped), named={"one": {}}, log=lines.append)
    assert lines == [f"{stopped}: its training stands at step 4 of 9"]


def test_all_that_cannot_be_is_named_at_once(run, tmp_path):
    with pytest.raises(UserError) as error:
        points(run, {"strategy": {"steps": (0, 17, 2), "schedule": ("cosine", "cosin")}}, {
            "nowhere": {"workdir": str(tmp_path / "none")},
            "file": {"strategy": {"rule": "file", "file": "none.yaml"}},
            "typed": {"strategy": {"guidance_scale": "high"}},
            "a": {"strategy": {"steps": 3}}, "b": {"strategy": {"steps": 3}},
            "steps=2, schedule=cosine": {"strategy": {"steps": 5}},
        })  # fmt: skip
    for part in (
        "strategy.steps = 0 must be between 1 and model.length = 16",
        "strategy.steps = 17 must be between 1 and model.length = 16",
        "strategy.schedule = 'cosin' must be one of",
        f"no checkpoint in {tmp_path / 'none'}",
        "strategy file none.yaml: ",
        "strategy.guidance_scale = 'high' must be of type float",
        "points 'a' and 'b' are the same",
        "2 points are named 'steps=2, schedule=cosine'",
    ):
        assert str(error.value).count(part) == 1, part
    assert "\n" not in str(error.value)


def test_a_point_without_a_run_and_an_objective_that_cannot_be_are_named(run):
    with pytest.raises(UserError, match="point 'one' has no run: give --workdir"):
        points(None, named={"one": {"strategy": {"steps": 4}}})
    with pytest.raises(UserError, match=f"{run}: objective.name = 'digits' scores models of 64"):
        points(run, named={"one": {}}, objective={"name": "digits"})
