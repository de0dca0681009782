import dataclasses
import itertools
import os
import pathlib

import numpy as np
import pytest
import yaml

from enat_jax.core.schedules import (
    SCHEDULES,
    StrategyConfig,
    make_strategy,
    read_strategy,
    write_strategy,
)
from enat_jax.core.strategy import GenerationStrategy, clipped_counts
from enat_jax.experiments.search.parameters import clip_ratios

PUBLISHED = pathlib.Path(__file__).parents[2] / "configs/strategies/autonat_l_256_t8.yaml"
FIELDS = ("mask_ratio", "choice_temperature", "sampling_temperature", "guidance_scale")

# AutoNAT's published strategy for 256 x 256 at 8 steps, to five digits
SEARCHED = {
    "manual_ratios": [0.95316, 0.87954, 0.79402, 0.74600, 0.62498, 0.40732, 0.26066],
    "manual_temp": [2.40491, 2.47762, 1.19170, 0.76854, 1.06735, 0.93537, 0.78438],
    "manual_samp_temp": [2.8999, 1.86726, 1.14437, 1.37963, 1.46999, 1.37607, 1.70822, 0.71331],
    "manual_cfg": [0.0001, 0.0001, 0.0001, 0.91513, 1.61602, 1.19455, 1.38322, 1.22679],
}


def arrays(**changed):
    values = {
        "mask_ratio": [0.5, 0.0],
        "choice_temperature": [1.0, 0.0],
        "sampling_temperature": [1.0, 1.0],
        "guidance_scale": [0.0, 2.0],
    } | changed
    return {name: np.array(value, np.float64) for name, value in values.items()}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "strategy.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


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

    def test_published_counts_are_those_of_both_rules(self):
        one, other = (read_strategy(PUBLISHED, masking=masking) for masking in ("enat", "autonat"))
        expected = (244, 225, 203, 190, 159, 104, 66, 0)
        assert one.masked_counts(256) == other.masked_counts(256) == expected

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
        ratios = np.array(SEARCHED["manual_ratios"])
        np.testing.assert_array_equal(clip_ratios(ratios, 256), [*ratios, 0])


class TestFile:
    def test_the_published_strategy_is_there_to_all_digits(self):
        content = yaml.safe_load(PUBLISHED.read_text())
        assert {key: [round(x, 5) for x in values] for key, values in content.items()} == SEARCHED
        assert content["manual_ratios"][0] == 0.9531645174140464
        assert content["manual_samp_temp"][-1] == 0.7133060703601533

    def test_the_file_used_by_a_config_must_have_its_steps(self, write):
        cfg = StrategyConfig(rule="file", file=str(write(SEARCHED)), masking="autonat")
        assert make_strategy(cfg).masking == "autonat"
        with pytest.raises(ValueError, match=r"has 8 steps, but strategy\.steps = 4"):
            make_strategy(dataclasses.replace(cfg, steps=4))

    def test_autonats_published_keys_are_read(self, write):
        strategy = read_strategy(write(SEARCHED))
        np.testing.assert_array_equal(strategy.mask_ratio, [*SEARCHED["manual_ratios"], 0])
        np.testing.assert_array_equal(strategy.choice_temperature, [*SEARCHED["manual_temp"], 0])
        np.testing.assert_array_equal(strategy.sampling_temperature, SEARCHED["manual_samp_temp"])
        np.testing.assert_array_equal(strategy.guidance_scale, SEARCHED["manual_cfg"])

    def test_the_last_ratio_and_choice_temperature_may_be_written_out(self, write):
        longer = {**SEARCHED, "manual_ratios": [*SEARCHED["manual_ratios"], 0.0],
                  "manual_temp": [*SEARCHED["manual_temp"], 0.3]}  # fmt: skip
        strategy = read_strategy(write(longer))
        assert strategy.steps == 8
        assert strategy.choice_temperature[-1] == 0.3

    def test_a_written_file_has_autonats_keys_and_lengths(self, tmp_path):
        write_strategy(make_strategy(StrategyConfig()), tmp_path / "s.yaml")
        content = yaml.safe_load((tmp_path / "s.yaml").read_text())
        assert {key: len(values) for key, values in content.items()} == {
            "manual_ratios": 7,
            "manual_temp": 7,
            "manual_samp_temp": 8,
            "manual_cfg": 8,
        }

    @pytest.mark.parametrize("steps", [1, 2, 8, 64])
    def test_a_strategy_survives_its_file(self, tmp_path, steps):
        strategy = make_strategy(StrategyConfig(steps=steps))
        write_strategy(strategy, tmp_path / "s.yaml")
        again = read_strategy(tmp_path / "s.yaml", steps=steps)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(again, name), getattr(strategy, name))

    def test_a_last_choice_temperature_above_0_survives(self, write, tmp_path):
        longer = {**SEARCHED, "manual_temp": [*SEARCHED["manual_temp"], 0.3]}
        write_strategy(read_strategy(write(longer)), tmp_path / "again.yaml")
        assert read_strategy(tmp_path / "again.yaml").choice_temperature[-1] == 0.3

    def test_a_searched_file_survives_being_read_and_written(self, write, tmp_path):
        write_strategy(read_strategy(write(SEARCHED)), tmp_path / "again.yaml")
        assert yaml.safe_load((tmp_path / "again.yaml").read_text()) == SEARCHED

    def refusal(self, path):
        with pytest.raises(ValueError, match="strategy file") as caught:
            read_strategy(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_a_missing_file_is_named(self, tmp_path):
        assert "No such file" in self.refusal(tmp_path / "none.yaml")

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ("a: &a [1, 1]\n" + "".join(
                f"{k}: &{k} [*{j}, *{j}, *{j}, *{j}, *{j}, *{j}, *{j}, *{j}]\n"
                for j, k in itertools.pairwise("abcdefghijk")), "aliases are not taken"),
            ("a: " + "[" * 5000, "nested deeper than 8"),
            (yaml.safe_dump(SEARCHED) + "manual_cfg: [1]\n", "has the key 'manual_cfg' twice"),
            ("#" + " " * 2**20, "has more than 262144 bytes"),
            (yaml.safe_dump({**SEARCHED, "manual_cfg": [True] * 8}), "must be a list of numbers"),
            (yaml.safe_dump({**SEARCHED, "manual_cfg": [10**400] * 8}), "must be a list of"),
            (yaml.safe_dump({**SEARCHED, "manual_cfg": [1e39] * 8}), "guidance_scale must be"),
        ],
    )  # fmt: skip
    def test_what_is_made_to_harm_is_refused(self, write, content, part):
        message = self.refusal(write(content))
        assert part in message
        assert len(message) < 2000

    def test_what_is_no_file_is_not_opened(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        assert "no regular file" in self.refusal(tmp_path / "pipe")

    @pytest.mark.parametrize("content", ["[1, 2", "just text", "- 1\n- 2", ""])
    def test_what_is_no_strategy_is_refused(self, write, content):
        self.refusal(write(content))

    def test_missing_and_unknown_keys_are_named(self, write):
        content = {**SEARCHED, "manual_scale": [1.0]}
        del content["manual_cfg"]
        message = self.refusal(write(content))
        assert (
            "must have the keys manual_ratios, manual_temp, manual_samp_temp, manual_cfg" in message
        )
        assert "'manual_scale'" in message

    @pytest.mark.parametrize("key", ["manual_cfg", "manual_samp_temp", "manual_temp"])
    def test_lengths_that_do_not_fit_are_named(self, write, key):
        message = self.refusal(write({**SEARCHED, key: [1.0] * 5}))
        assert "arrays must all be of one length" in message
        assert "(5,)" in message
        assert "(8,)" in message

    def test_a_ratio_that_rises_is_named_with_its_step(self, write):
        rising = [0.9, 0.5, 0.6, 0.4, 0.3, 0.2, 0.1]
        message = self.refusal(write({**SEARCHED, "manual_ratios": rising}))
        assert "must not rise, but is 0.6 at step 3 after 0.5" in message

    @pytest.mark.parametrize("value", [".nan", ".inf"])
    def test_a_number_that_is_not_finite_is_named(self, write, value):
        text = yaml.safe_dump({**SEARCHED, "manual_cfg": 8 * ["X"]}).replace("X", value)
        assert "guidance_scale must be within [0, 1e+06] and finite" in self.refusal(write(text))

    @pytest.mark.parametrize("values", [["a"] * 8, [[1.0], [2.0, 3.0]], None])
    def test_values_that_are_no_numbers_are_refused(self, write, values):
        self.refusal(write({**SEARCHED, "manual_cfg": values}))


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
