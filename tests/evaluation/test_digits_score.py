import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from enat_jax.evaluation.digits_score import Judge, main, real_halves


@pytest.fixture(scope="module")
def digits():
    return load_digits(return_X_y=True)


@pytest.mark.parametrize("seed", range(3))
def test_real_digits_are_read_well_and_are_near_each_other(digits, seed):
    halves = real_halves(*digits, seed=seed)
    assert halves.accuracy > 0.97
    assert 12 < halves.frechet_distance < 25


def test_all_real_digits_are_at_distance_0(digits):
    pixels, labels = digits
    found = Judge(pixels, labels)(pixels.astype(int), labels)
    assert found.accuracy > 0.99
    assert found.frechet_distance == pytest.approx(0, abs=1e-6)


def test_wrong_classes_cost_accuracy_alone(digits):
    pixels, labels = digits
    found = Judge(pixels, labels)(pixels.astype(int), (labels + 1) % 10)
    assert found.accuracy < 0.01
    assert found.frechet_distance == pytest.approx(0, abs=1e-6)


def test_noise_is_far_away(digits):
    noise = np.random.default_rng(0).integers(17, size=(500, 64))
    found = Judge(*digits)(noise, np.arange(500) % 10)
    assert found.accuracy < 0.3
    assert found.frechet_distance > 500


def test_one_class_alone_is_further_away_than_half_of_all(digits):
    pixels, labels = digits
    ones = labels == 1
    found = Judge(pixels, labels)(pixels[ones].astype(int), labels[ones])
    assert found.accuracy > 0.97
    assert found.frechet_distance > 5 * real_halves(pixels, labels).frechet_distance


class TestCommand:
    def test_it_scores_a_run(self, trained, capsys):
        assert main([f"--workdir={trained}", "--per_class=2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("20 generated digits: 2 steps")
        figures = json.loads(lines[-1])
        assert set(figures) == {"generated", "real"}
        assert figures["generated"]["frechet_distance"] > 100  # hardly trained at all
        assert figures["real"]["accuracy"] > 0.97

    def test_a_missing_run_is_said_in_one_line(self, tmp_path, capsys):
        assert main([f"--workdir={tmp_path}"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("score: no checkpoint in ")
        assert err.count("\n") == 1
