import dataclasses
import pathlib

import numpy as np
import pytest

from enat_jax.core.schedules import SCHEDULES, StrategyConfig, make_strategy
from enat_jax.core.strategy import GenerationStrategy, clipped_counts
from enat_jax.experiments.search.parameters import clip_ratios

PUBLISHED = pathlib.Path(__file__).parents[2] / "configs/strategies/autonat_l_256_t8.yaml"
FIELDS = ("mask_ratio", "choice_temperature", "sampling_temperature", "guidance_scale")


def arrays(**changed):
    values = {
        "mask_ratio": [0.5, 0.0],
        "choice_temperature": [1.0, 0.0],
        "sampling_temperature": [1.0, 1.0],
        "guidance_scale": [0.0, 2.0],
    } | changed
    return {name: np.array(value, np.float64) for name, value in values.items()}


class TestRules:
    def test_enats_rule_at_eight_steps(self):
        strategy = make_strategy(StrategyConfig())
        expected = {
            "mask_ratio": [0.980785, 0.92388, 0.83147, 0.707107, 0.55557, 0.382683, 0.19509, 0],
            "choice_temperature": [1.3125, 1.125, 0.9375, 0.75, 0.5625, 0.375, 0.1875, 0],
            "sampling_temperature": [5.25, 4.5, 3.75, 3, 2.25, 1.5, 0.75, 0.001],
            "guidance_scale": [0, 0.3125, 0.625, 0.9375, 1.25, 1.5625, 1.875, 2.1875],
        }
        assert strategy.steps == 8
        for name, values in expected.items():
            np.testing.assert_allclose(getattr(strategy, name), values, atol=5e-7, err_msg=name)

    def test_maskgits_rule_holds_the_sampling_temperature(self):
        cfg = StrategyConfig(rule="maskgit", sampling_temperature=1.3)
        ours, enat = make_strategy(cfg), make_strategy(dataclasses.replace(cfg, rule="enat"))
        np.testing.assert_array_equal(ours.sampling_temperature, [1.3] * 8)
        for name in set(FIELDS) - {"sampling_temperature"}:
            np.testing.assert_array_equal(getattr(ours, name), getattr(enat, name))

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_a_schedule_falls_from_1_to_0(self, schedule):
        ratios = SCHEDULES[schedule](np.linspace(0, 1, 101), 256)
        assert ratios[0] == pytest.approx(1)
        assert ratios[-1] == pytest.approx(0, abs=1e-12)
        assert np.all(np.diff(ratios) < 0)

    @pytest.mark.parametrize(
        ("schedule", "half"),
        [("cosine", 0.5**0.5), ("linear", 0.5), ("square", 0.75), ("cubic", 0.875),
         ("sqrt", 1 - 0.5**0.5), ("arccos", 2 / 3), ("log", 1 / 6)],
    )  # fmt: skip
    def test_a_schedule_is_its_formula(self, schedule, half):
        strategy = make_strategy(StrategyConfig(schedule=schedule, steps=2), length=64)
        np.testing.assert_allclose(strategy.mask_ratio, [half, 0])

    def test_the_log_schedule_needs_the_number_of_tokens(self):
        with pytest.raises(ValueError, match="'log' needs at least 2 tokens per image, not None"):
            make_strategy(StrategyConfig(schedule="log"))

    def test_no_steps_are_refused(self):
        with pytest.raises(ValueError, match="steps is 0, must be at least 1"):
            make_strategy(StrategyConfig(steps=0))


class TestCounts:
    @pytest.mark.parametrize("length", [64, 256])
    def test_every_step_of_a_cosine_has_a_token_to_reveal(self, length):
        for steps in range(1, length + 1):
            counts = make_strategy(StrategyConfig(steps=steps)).masked_counts(length)
            assert len(counts) == steps
            assert counts[-1] == 0
            assert 0 not in counts[:-1]
            assert np.all(np.diff([length, *counts]) <= 0)

    def test_counts_are_rounded_down(self):
        counts = make_strategy(StrategyConfig()).masked_counts(256)
        assert counts == (251, 236, 212, 181, 142, 97, 49, 0)

    def test_more_steps_than_tokens_are_refused(self):
        with pytest.raises(ValueError, match="steps is 65, must be between 1 and 64 tokens"):
            make_strategy(StrategyConfig(steps=65)).masked_counts(64)

    def test_a_step_without_a_token_is_named(self):
        ones = {name: [1.0] * 3 for name in FIELDS}
        strategy = GenerationStrategy(**arrays(**ones | {"mask_ratio": [0.5, 0.01, 0.0]}))
        with pytest.raises(ValueError, match=r"no token for step 3 of 3 \(floor of 64 \* 0.0100"):
            strategy.masked_counts(64)


class TestAutonatsRule:
    """floor(length * ratio), clipped to [1, masked before - 1], the last one 0."""

    @pytest.mark.parametrize(
        ("ratios", "counts"),
        [
            ([0.9, 0.5], (7, 4, 0)),  # as ENAT's rule where nothing is clipped
            ([0.99, 1.0, 0.9], (7, 6, 5, 0)),  # every step reveals at least one token
            ([0.5, 0.8, 0.4], (4, 3, 2, 0)),  # a ratio that rises
            ([0.01, 0.5], (1, 1, 0)),  # something is left for the last step
        ],
    )
    def test_counts_of_eight_tokens_by_hand(self, ratios, counts):
        assert clipped_counts(np.array(ratios), 8) == counts

    def test_the_masking_is_a_choice(self):
        cfg = StrategyConfig(schedule="sqrt", steps=12)
        with pytest.raises(ValueError, match="leaves no token for step 12 of 12"):
            make_strategy(cfg).masked_counts(16)
        autonat = make_strategy(dataclasses.replace(cfg, masking="autonat"))
        assert autonat.masked_counts(16)[-2:] == (1, 0)

    @pytest.mark.parametrize("length", [8, 49, 64, 100, 256])
    def test_clipped_ratios_have_the_same_counts_under_either_rule(self, length):
        rng = np.random.default_rng(length)
        for steps in (2, 4, 8):
            for _ in range(50):
                ratios = rng.uniform(0, 0.99, size=steps - 1)
                counts = clipped_counts(ratios, length)
                clipped = clip_ratios(ratios, length)
                for masking in ("enat", "autonat"):
                    ones = arrays(**{name: np.ones(steps) for name in FIELDS})
                    ours = GenerationStrategy(**ones | {"mask_ratio": clipped}, masking=masking)
                    assert ours.masked_counts(length) == counts

    def test_ratios_that_need_no_clipping_are_kept(self):
        ratios = np.array([0.95, 0.88, 0.79, 0.75, 0.62, 0.41, 0.26])
        np.testing.assert_array_equal(clip_ratios(ratios, 256), [*ratios, 0])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("mask_ratio", [0.5, 0.1], "mask_ratio must end at 0, not 0.1"),
        ("mask_ratio", [1.5, 0.0], "mask_ratio must be within"),
        ("choice_temperature", [-1.0, 0.0], "choice_temperature must be within"),
        ("sampling_temperature", [1.0, 0.0], "sampling_temperature must be within"),
        ("guidance_scale", [0.0, -2.0], "guidance_scale must be within"),
        ("guidance_scale", [0.0, np.nan], "guidance_scale must be .* finite"),
        ("guidance_scale", [0.0], "arrays must all be of one length"),
    ],
)
def test_a_value_out_of_range_is_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        GenerationStrategy(**arrays(**{field: value}))


def test_a_mask_ratio_that_rises_is_refused():
    three = {name: [1.0] * 3 for name in FIELDS}
    with pytest.raises(ValueError, match="mask_ratio must not rise"):
        GenerationStrategy(**arrays(**three | {"mask_ratio": [0.2, 0.4, 0.0]}))


def test_an_empty_strategy_is_refused():
    with pytest.raises(ValueError, match="one length"):
        GenerationStrategy(**arrays(**{name: [] for name in FIELDS}))


def test_all_that_is_wrong_is_named_at_once():
    wrong = arrays(
        mask_ratio=[0.5, 0.1], choice_temperature=[-1.0, 0.0],
        sampling_temperature=[0.0, 1.0], guidance_scale=[-1.0, 0.0],
    )  # fmt: skip
    with pytest.raises(ValueError, match="generation strategy") as caught:
        GenerationStrategy(**wrong)
    assert all(name in str(caught.value) for name in FIELDS)
