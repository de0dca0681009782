import numpy as np
import pytest

from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.core.strategy import clipped_counts
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.sampling.strategy_file import read_strategy, write_strategy


def test_there_are_4t_minus_2_numbers_with_a_name_each():
    for steps in (1, 2, 8):
        parameters = Parameters(steps)
        assert len(set(parameters.names)) == len(parameters.names) == 4 * steps - 2
        assert len(parameters.published_start()) == 4 * steps - 2


def test_the_published_start_by_hand():
    half = 0.5**0.5
    np.testing.assert_allclose(
        Parameters(4).published_start(),
        [np.cos(np.pi / 8), half, np.sin(np.pi / 8), 1, 0.75, 0.5, 1, 1, 1, 1, 0.25, 0.5, 0.75, 1],
    )


def test_a_strategys_numbers_give_the_strategy_back():
    made = make_strategy(StrategyConfig(steps=4, schedule="linear"))
    again = Parameters(4).strategy(Parameters(4).numbers(made), 64)
    np.testing.assert_array_equal(again.mask_ratio, made.mask_ratio)
    np.testing.assert_array_equal(again.choice_temperature, made.choice_temperature)
    np.testing.assert_array_equal(again.guidance_scale, [1e-4, *made.guidance_scale[1:]])
    assert again.masking == "autonat"


def test_clamps_are_the_published_ones():
    low, high = (Parameters(2).clamp(np.full(6, value)) for value in (-1.0, 2.0))
    np.testing.assert_array_equal(low, [0, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4])
    np.testing.assert_array_equal(high, [0.99, 2, 2, 2, 2, 2])


@pytest.mark.parametrize("steps", [2, 5])
def test_what_search_writes_can_be_read_with_the_same_counts(tmp_path, steps):
    rng, parameters = np.random.default_rng(0), Parameters(steps)
    for _ in range(20):
        numbers = parameters.clamp(rng.uniform(-0.2, 1.2, size=4 * steps - 2))
        write_strategy(parameters.strategy(numbers, 64), tmp_path / "s.yaml")
        for masking in ("enat", "autonat"):
            again = read_strategy(tmp_path / "s.yaml", masking=masking)
            assert again.masked_counts(64) == clipped_counts(numbers[: steps - 1], 64)
        sampling = numbers[2 * steps - 2 : 3 * steps - 2]
        np.testing.assert_array_equal(again.sampling_temperature, sampling)
