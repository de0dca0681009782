import pytest

from enat_jax.config_file import ConfigError
from enat_jax.experiments.ablate.config import ablation_from_dict, load_ablation

POINTS = {"points": {"one": {"strategy": {"steps": 4}}}}


def refused(fields, *overrides):
    with pytest.raises(ConfigError) as caught:
        ablation_from_dict(fields, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_example_compares_the_papers_steps_on_digits():
    config = load_ablation("configs/ablate_steps.py")
    assert config.grid == {"strategy": {"steps": (4, 6, 8, 12, 16)}}
    assert config.objective.name == "digits"
    assert len(config.seeds) > 1


def test_a_grid_can_be_overridden_field_by_field():
    config = load_ablation("configs/ablate_steps.py", ["grid.strategy.steps=(4, 8)", "seeds=(7,)"])
    assert config.grid == {"strategy": {"steps": (4, 8)}}
    assert config.seeds == (7,)


def test_unknown_fields_and_sections_are_named_with_the_closest_all_at_once():
    message = refused({
        "grid": {"stratgy": {"steps": (4,)}, "strategy": {"stps": (4, 6)}},
        "points": {"fast": {"sample": {"bath_size": 4}}, "odd": 3},
    })  # fmt: skip
    assert "grid.stratgy is nothing to compare (did you mean strategy?)" in message
    assert "grid.strategy.stps is nothing to compare (did you mean steps?)" in message
    assert (
        "points.fast.sample.bath_size is nothing to compare (did you mean batch_size?)" in message
    )
    assert "points.odd = 3 must be a section of fields" in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "grid = {} holds nothing to compare"),
        ({"grid": {"strategy": {"steps": ()}}}, "grid.strategy.steps = () is empty"),
        ({"grid": {"strategy": 3}}, "grid.strategy = 3 must be a section"),
        ({"grid": {"workdir": ("a", 3)}}, "grid.workdir = 3 must be a path"),
        ({"points": {"x": {"workdir": ("a",)}}}, "points.x.workdir = ('a',) must be a path"),
        ({**POINTS, "num_images": 1}, "num_images = 1 must be at least 2"),
        ({**POINTS, "seeds": ()}, "seeds = () must hold at least one"),
        ({**POINTS, "seeds": (1, 1)}, "seeds = (1, 1) must all differ"),
        ({**POINTS, "seeds": (-1,)}, "seeds = (-1,) must be from 0"),
        ({**POINTS, "timed_batches": 0}, "timed_batches = 0 must be at least 1"),
        ({**POINTS, "num_images": 5, "sheet": 6}, "sheet = 6 must be from 0 to num_images = 5"),
        ({**POINTS, "num_imges": 5}, "num_imges = 5 is no field"),
    ],
)
def test_what_cannot_be_is_refused_with_value_and_limit(fields, message):
    assert message in refused(fields)
