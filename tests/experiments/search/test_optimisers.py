import numpy as np
import pytest

from enat_jax.experiments.search.config import SearchConfig, SgdConfig
from enat_jax.experiments.search.optimisers import make_optimiser
from enat_jax.experiments.search.parameters import Parameters

FOUR = Parameters(4)
KNOWN = FOUR.clamp(np.linspace(0.9, 0.2, 14))  # where the quadratic below is least
# curvatures for which the published rates descend: 1e-3 for ratios, 0.1 for the others
CURVATURE = np.where(FOUR.is_ratio, 100.0, 1.0)
PROBE = np.where(FOUR.is_ratio, 1e-2, 0.1)


def quadratic(numbers):
    return np.sum(CURVATURE * (numbers - KNOWN) ** 2, axis=-1)


def descended(optimiser, updates):
    for _ in range(updates):
        optimiser.tell(quadratic(optimiser.ask()))
    return optimiser.current


def start(parameters=FOUR, **changes):
    cfg = SearchConfig(steps=parameters.steps, **changes)
    return make_optimiser(cfg, parameters.published_start(), parameters, phase=0)


class TestPublished:
    def test_it_asks_for_where_it_stands_and_one_probe_per_number(self):
        asked = start().ask()
        np.testing.assert_array_equal(asked[0], FOUR.clamp(FOUR.published_start()))
        np.testing.assert_allclose(asked[1:] - asked[0], np.diag(PROBE), atol=1e-15)

    def test_a_ratios_probe_stays_within_0_and_1(self):
        cfg, two = SearchConfig(steps=2, sgd=SgdConfig(ratio_probe=0.5)), Parameters(2)
        asked = make_optimiser(cfg, np.full(6, 0.99), two, phase=0).ask()
        assert asked[1, 0] == 1.0
        assert asked[2, 1] == pytest.approx(1.09)

    def test_two_updates_by_hand(self):
        optimiser = start()
        rate = np.where(FOUR.is_ratio, 1e-3, 0.1)
        slope = np.linspace(-0.5, 1, 14)
        values = np.concatenate([[3.0], 3.0 + slope * PROBE])
        for share in (1, 1.5):  # with half of the last direction on top
            expected = FOUR.clamp(optimiser.current - rate * share * slope)
            optimiser.tell(values)
            np.testing.assert_allclose(optimiser.current, expected, rtol=1e-12)

    def test_it_converges_to_a_known_optimum_and_finer_probes_come_closer(self):
        # a forward difference sees the slope half a probe ahead, and so stops half a probe short
        np.testing.assert_allclose(descended(start(), 100), KNOWN - PROBE / 2, atol=1e-4)
        fine = start(sgd=SgdConfig(probe=1e-4, ratio_probe=1e-4))
        np.testing.assert_allclose(descended(fine, 100), KNOWN, atol=1e-4)

    def test_it_never_leaves_the_limits(self):
        optimiser = start()
        for sign in (1e6, -1e6):
            optimiser.tell(sign * np.arange(15.0))
            np.testing.assert_array_equal(optimiser.current, FOUR.clamp(optimiser.current))


class TestCma:
    def test_it_converges_to_a_known_optimum(self):
        np.testing.assert_allclose(descended(start(optimiser="cma"), 200), KNOWN, atol=2e-2)

    def test_asking_twice_is_asking_once_and_the_seed_decides(self):
        one, same, other = (start(optimiser="cma", seed=seed) for seed in (1, 1, 2))
        for _ in range(3):
            asked = one.ask()
            np.testing.assert_array_equal(one.ask(), asked)
            np.testing.assert_array_equal(same.ask(), asked)
            np.testing.assert_array_equal(asked, FOUR.clamp(asked))
            assert np.abs(other.ask() - asked).max() > 1e-3
            for each in (one, same, other):
                each.tell(quadratic(each.ask()))

    def test_numpys_own_random_numbers_are_left_alone(self):
        np.random.seed(7)
        expected = np.random.RandomState(7).uniform(size=3)
        descended(start(optimiser="cma"), 2)
        np.testing.assert_array_equal(np.random.uniform(size=3), expected)


@pytest.mark.parametrize("name", ["sgd", "cma"])
def test_a_single_step_has_numbers_to_search(name):
    optimiser = start(Parameters(1), optimiser=name)
    for _ in range(3):
        asked = optimiser.ask()
        assert asked.shape[1] == 2
        optimiser.tell(np.sum((asked - 0.5) ** 2, axis=1))
