import dataclasses

import pytest

from enat_jax.experiments.ablate import points
from enat_jax.experiments.ablate.config import AblateConfig
from enat_jax.experiments.ablate.points import AblateError, by_program, check_points, settings

pytestmark = pytest.mark.usefixtures("quick_compilation")


def points_of(workdir, grid=None, named=None):
    return check_points(settings(AblateConfig(grid=grid or {}, points=named or {}), str(workdir)))


class TestSettings:
    def test_a_grid_is_all_combinations_named_by_what_varies(self):
        grid = {"strategy": {"steps": (4, 8), "guidance_scale": [0.0, 1.5], "rule": ("enat",)},
                "sample": {"batch_size": 10}}  # fmt: skip
        found = settings(AblateConfig(grid=grid), "run")
        assert [each.name for each in found] == [
            "steps=4, guidance_scale=0.0", "steps=4, guidance_scale=1.5",
            "steps=8, guidance_scale=0.0", "steps=8, guidance_scale=1.5",
        ]  # fmt: skip
        for each in found:
            assert each.changes["strategy"]["rule"] == "enat"
            assert each.changes["sample"] == {"batch_size": 10}
            assert each.workdir == "run"

    def test_points_of_a_list_stand_beside_those_of_the_grid(self):
        config = AblateConfig(
            grid={"strategy": {"steps": (4,)}},
            points={"wide": {"workdir": "other", "strategy": {"schedule": "linear"}}},
        )
        grid, wide = settings(config, "run")
        assert (grid.name, grid.workdir) == ("the grid's point", "run")
        assert wide == ("wide", "other", {"strategy": {"schedule": "linear"}})

    def test_runs_are_compared_like_any_field(self):
        config = AblateConfig(grid={"workdir": ("runs/a", "runs/b"), "strategy": {"steps": (4,)}})
        assert [each[:2] for each in settings(config, None)] == [("runs/a", "runs/a"),
                                                                ("runs/b", "runs/b")]  # fmt: skip

    def test_a_point_without_a_run_is_named(self):
        config = AblateConfig(points={"one": {"strategy": {"steps": 4}}})
        with pytest.raises(AblateError, match="point 'one' has no run: give --workdir"):
            settings(config, None)

    def test_two_points_of_one_name_are_refused(self):
        config = AblateConfig(grid={"strategy": {"steps": (4, 8)}}, points={"steps=4": {}})
        with pytest.raises(AblateError, match="2 points are named 'steps=4'"):
            settings(config, "run")


class TestPoints:
    def test_a_point_has_its_runs_config_but_for_its_changes(self, trained):
        (point,) = points_of(trained, {"strategy": {"steps": 3}, "sample": {"batch_size": 7}})
        stored = point.model.config
        assert point.config == dataclasses.replace(
            stored,
            strategy=dataclasses.replace(stored.strategy, steps=3),
            sample=dataclasses.replace(stored.sample, batch_size=7),
        )
        assert point.layout.steps == 3
        assert point.model.step == 4

    def test_all_that_cannot_be_is_named_at_once(self, trained, tmp_path):
        with pytest.raises(AblateError) as caught:
            points_of(
                trained,
                {"strategy": {"steps": (0, 65, 2), "schedule": ("cosine", "cosin")}},
                {
                    "nowhere": {"workdir": str(tmp_path / "none")},
                    "file": {"strategy": {"rule": "file", "file": "none.yaml"}},
                    "typed": {"strategy": {"guidance_scale": "high"}},
                },
            )
        message = str(caught.value)
        for part in (
            "strategy.steps = 0 must be between 1 and model.length = 64",
            "strategy.steps = 65 must be between 1 and model.length = 64",
            "strategy.schedule = 'cosin' must be one of",
            f"no checkpoint in {tmp_path / 'none'}",
            "strategy file none.yaml: ",
            "strategy.guidance_scale = 'high' must be of type float",
        ):
            assert message.count(part) == 1, part
        assert "\n" not in message

    def test_two_points_with_the_same_settings_are_refused(self, trained):
        with pytest.raises(AblateError, match="points 'a' and 'b' are the same"):
            points_of(trained, named={"a": {"strategy": {"steps": 3}},
                                       "b": {"strategy": {"steps": 3}}})  # fmt: skip

    def test_a_run_that_was_stopped_is_told(self, trained, monkeypatch):
        whole, told = points.restore, []
        setting = settings(AblateConfig(points={"one": {}}), str(trained))
        check_points(setting, warn=told.append)
        assert told == []
        monkeypatch.setattr(points, "restore", lambda *a, **k: whole(*a, **k)._replace(step=2))
        check_points(setting, warn=told.append)
        assert told == [f"{trained}: its training stands at step 2 of 4"]

    def test_reuse_changes_the_plan(self, trained):
        on, off = points_of(trained, {"strategy": {"steps": 3, "reuse": (True, False)}})
        assert on.layout.buckets[-1].plans[-1].previous > 0
        assert off.layout.buckets[-1].plans[-1].previous == 0
        assert off.flops > on.flops

    def test_points_that_share_a_program_are_measured_one_after_another(self, trained):
        grid = {"strategy": {"choice_temperature": (1.0, 2.0), "steps": (2, 3)}}
        found = by_program(points_of(trained, grid))
        assert [(p.config.strategy.steps, p.config.strategy.choice_temperature) for p in found] == [
            (2, 1.0), (2, 2.0), (3, 1.0), (3, 2.0),
        ]  # fmt: skip
        grid = {"strategy": {"steps": (2, 3)}, "sample": {"batch_size": (5, 6)}}
        found = by_program(points_of(trained, grid))
        assert [p.config.sample.batch_size for p in found] == [5, 5, 6, 6]
