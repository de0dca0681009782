import pytest

from enat_jax.config_file import make_config, read_config
from enat_jax.errors import UserError
from enat_jax.experiments.ablate.config import AblateConfig


def test_a_grid_can_be_overridden_field_by_field():
    overrides = ["grid.strategy.steps=(4, 8)", "seeds=(7,)"]
    config = read_config(AblateConfig, "configs/ablate_steps.py", overrides)
    assert config.grid == {"strategy": {"steps": (4, 8)}}
    assert (config.seeds, config.objective.name) == ((7,), "digits")


def test_all_that_is_unknown_is_named_with_the_closest_at_once():
    with pytest.raises(UserError) as caught:
        make_config(AblateConfig, {
            "grid": {"stratgy": {"steps": (4,)}, "strategy": {"stps": (4, 6)}},
            "points": {"fast": {"sample": {"bath_size": 4}}, "odd": 3},
            "num_images": 1,
        })  # fmt: skip
    assert set(str(caught.value).removeprefix("config: ").split("; ")) == {
        "num_images = 1 must be between 2 and 100000000",
        "grid.stratgy is nothing to compare (did you mean strategy?)",
        "grid.strategy.stps is nothing to compare (did you mean steps?)",
        "points.fast.sample.bath_size is nothing to compare (did you mean batch_size?)",
        "points.odd = 3 must be a section of fields",
    }


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"grid": {}}, "grid = {} holds nothing to compare, nor does points = {}"),
        ({"grid": {"strategy": {"steps": ()}}}, "grid.strategy.steps = () is empty"),
        ({"grid": {"strategy": 3}}, "grid.strategy = 3 must be a section of fields"),
        ({"grid": {"workdir": ("a", 3)}}, "grid.workdir = 3 must be a path"),
        ({"points": {"x": {"workdir": ("a",)}}}, "points.x.workdir = ('a',) must be a path"),
        ({"seeds": ()}, "seeds = () must be at least one, all different"),
        ({"seeds": (1, 1)}, "seeds = (1, 1) must be at least one, all different"),
        ({"seeds": (-1,)}, "seeds[0] = -1 must be in [0, 4294967296)"),
        ({"timed_batches": 0}, "timed_batches = 0 must be at least 1"),
        ({"num_images": 5, "sheet": 6}, "sheet = 6 must be at most num_images = 5"),
    ],
)
def test_what_cannot_be_is_refused_with_value_and_limit(fields, problem):
    with pytest.raises(UserError) as caught:
        make_config(AblateConfig, {"grid": {"strategy": {"steps": (4,)}}, **fields})
    assert str(caught.value) == f"config: {problem}"
