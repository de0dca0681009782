import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from enat_jax.evaluation.digits import digits_objective, real_halves
from enat_jax.evaluation.frechet import Gaussian, frechet_distance

PIXELS, LABELS = load_digits(return_X_y=True)


def score(token_ids, class_ids):
    scorer = digits_objective(PIXELS, LABELS).start()
    scorer.add(token_ids, class_ids)
    return scorer.value()


def test_they_are_a_classifiers_accuracy_and_the_distance_of_pixels():
    tokens = PIXELS[::7].astype(np.int32)
    tokens[:50] = tokens[50:100]  # some of a wrong class
    right = SVC(gamma=0.001).fit(PIXELS, LABELS).predict(tokens) == LABELS[::7]
    gaussians = (Gaussian(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (tokens, PIXELS))
    expected = {"frechet_distance": frechet_distance(*gaussians), "accuracy": np.mean(right)}
    assert score(tokens, LABELS[::7]) == pytest.approx(expected, rel=1e-9)
    assert 0.7 < expected["accuracy"] < 0.9


@pytest.mark.parametrize("seed", range(3))
def test_real_digits_are_read_well_and_are_near_each_other(seed):
    halves = real_halves(seed)
    assert halves["accuracy"] > 0.97
    assert 12 < halves["frechet_distance"] < 25


def test_wrong_classes_cost_accuracy_alone():
    value = score(PIXELS.astype(np.int32), (LABELS + 1) % 10)
    assert value["accuracy"] < 0.01
    assert value["frechet_distance"] == pytest.approx(0, abs=1e-6)


def test_noise_is_far_away_and_one_class_alone_is_further_than_half_of_all():
    noise = score(np.random.default_rng(0).integers(17, size=(500, 64)), np.arange(500) % 10)
    assert noise["accuracy"] < 0.3
    assert noise["frechet_distance"] > 500
    ones = score(PIXELS[LABELS == 1].astype(np.int32), LABELS[LABELS == 1])
    assert ones["accuracy"] > 0.97
    assert ones["frechet_distance"] > 5 * real_halves()["frechet_distance"]
