import dataclasses
import itertools
import os
import pathlib

import numpy as np
import pytest
import yaml

from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.sampling.strategy_file import configured_strategy, read_strategy, write_strategy

PUBLISHED = pathlib.Path(__file__).parents[2] / "configs/strategies/autonat_l_256_t8.yaml"
FIELDS = ("mask_ratio", "choice_temperature", "sampling_temperature", "guidance_scale")

# AutoNAT's published strategy for 256 x 256 at 8 steps, to five digits
SEARCHED = {
    "manual_ratios": [0.95316, 0.87954, 0.79402, 0.74600, 0.62498, 0.40732, 0.26066],
    "manual_temp": [2.40491, 2.47762, 1.19170, 0.76854, 1.06735, 0.93537, 0.78438],
    "manual_samp_temp": [2.8999, 1.86726, 1.14437, 1.37963, 1.46999, 1.37607, 1.70822, 0.71331],
    "manual_cfg": [0.0001, 0.0001, 0.0001, 0.91513, 1.61602, 1.19455, 1.38322, 1.22679],
}


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "strategy.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def test_the_published_strategy_is_there_to_all_digits():
    content = yaml.safe_load(PUBLISHED.read_text())
    assert {key: [round(x, 5) for x in values] for key, values in content.items()} == SEARCHED
    assert content["manual_ratios"][0] == 0.9531645174140464
    assert content["manual_samp_temp"][-1] == 0.7133060703601533


def test_the_file_used_by_a_config_must_have_its_steps(write):
    cfg = StrategyConfig(rule="file", file=str(write(SEARCHED)), masking="autonat")
    assert configured_strategy(cfg, 256).masking == "autonat"
    with pytest.raises(ValueError, match=r"has 8 steps, but strategy\.steps = 4"):
        configured_strategy(dataclasses.replace(cfg, steps=4), 256)


def test_autonats_published_keys_are_read(write):
    strategy = read_strategy(write(SEARCHED))
    np.testing.assert_array_equal(strategy.mask_ratio, [*SEARCHED["manual_ratios"], 0])
    np.testing.assert_array_equal(strategy.choice_temperature, [*SEARCHED["manual_temp"], 0])
    np.testing.assert_array_equal(strategy.sampling_temperature, SEARCHED["manual_samp_temp"])
    np.testing.assert_array_equal(strategy.guidance_scale, SEARCHED["manual_cfg"])


def test_the_last_ratio_and_choice_temperature_may_be_written_out(write):
    longer = {**SEARCHED, "manual_ratios": [*SEARCHED["manual_ratios"], 0.0],
              "manual_temp": [*SEARCHED["manual_temp"], 0.3]}  # fmt: skip
    strategy = read_strategy(write(longer))
    assert strategy.steps == 8
    assert strategy.choice_temperature[-1] == 0.3


def test_a_written_file_has_autonats_keys_and_lengths(tmp_path):
    write_strategy(make_strategy(StrategyConfig()), tmp_path / "s.yaml")
    content = yaml.safe_load((tmp_path / "s.yaml").read_text())
    assert {key: len(values) for key, values in content.items()} == {
        "manual_ratios": 7,
        "manual_temp": 7,
        "manual_samp_temp": 8,
        "manual_cfg": 8,
    }


@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_a_strategy_survives_its_file(tmp_path, steps):
    strategy = make_strategy(StrategyConfig(steps=steps))
    write_strategy(strategy, tmp_path / "s.yaml")
    again = read_strategy(tmp_path / "s.yaml", steps=steps)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(strategy, name))


def test_a_last_choice_temperature_above_0_survives(write, tmp_path):
    longer = {**SEARCHED, "manual_temp": [*SEARCHED["manual_temp"], 0.3]}
    write_strategy(read_strategy(write(longer)), tmp_path / "again.yaml")
    assert read_strategy(tmp_path / "again.yaml").choice_temperature[-1] == 0.3


def test_a_searched_file_survives_being_read_and_written(write, tmp_path):
    write_strategy(read_strategy(write(SEARCHED)), tmp_path / "again.yaml")
    assert yaml.safe_load((tmp_path / "again.yaml").read_text()) == SEARCHED


def refusal(path):
    with pytest.raises(ValueError, match="strategy file") as caught:
        read_strategy(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.yaml")


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
def test_what_is_made_to_harm_is_refused(write, content, part):
    message = refusal(write(content))
    assert part in message
    assert len(message) < 2000


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize("content", ["[1, 2", "just text", "- 1\n- 2", ""])
def test_what_is_no_strategy_is_refused(write, content):
    refusal(write(content))


def test_missing_and_unknown_keys_are_named(write):
    content = {**SEARCHED, "manual_scale": [1.0]}
    del content["manual_cfg"]
    message = refusal(write(content))
    assert "must have the keys manual_ratios, manual_temp, manual_samp_temp, manual_cfg" in message
    assert "'manual_scale'" in message


@pytest.mark.parametrize("key", ["manual_cfg", "manual_samp_temp", "manual_temp"])
def test_lengths_that_do_not_fit_are_named(write, key):
    message = refusal(write({**SEARCHED, key: [1.0] * 5}))
    assert "arrays must all be of one length" in message
    assert "(5,)" in message
    assert "(8,)" in message


def test_a_ratio_that_rises_is_named_with_its_step(write):
    rising = [0.9, 0.5, 0.6, 0.4, 0.3, 0.2, 0.1]
    message = refusal(write({**SEARCHED, "manual_ratios": rising}))
    assert "must not rise, but is 0.6 at step 3 after 0.5" in message


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_a_number_that_is_not_finite_is_named(write, value):
    text = yaml.safe_dump({**SEARCHED, "manual_cfg": 8 * ["X"]}).replace("X", value)
    assert "guidance_scale must be within [0, 1e+06] and finite" in refusal(write(text))


@pytest.mark.parametrize("values", [["a"] * 8, [[1.0], [2.0, 3.0]], None])
def test_values_that_are_no_numbers_are_refused(write, values):
    refusal(write({**SEARCHED, "manual_cfg": values}))


def test_published_counts_are_those_of_both_rules():
    one, other = (read_strategy(PUBLISHED, masking=masking) for masking in ("enat", "autonat"))
    expected = (244, 225, 203, 190, 159, 104, 66, 0)
    assert one.masked_counts(256) == other.masked_counts(256) == expected
