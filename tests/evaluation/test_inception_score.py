import numpy as np
import pytest
import scipy.special

from enat_jax.errors import UserError
from enat_jax.evaluation.inception import Features
from enat_jax.evaluation.inception_score import inception_score


def score(logits, splits=10):
    """Mean and spread of images in two batches."""
    metric = inception_score(len(logits), splits)
    sums = metric.empty()
    for part in np.split(logits, [len(logits) // 3]):
        sums = metric.add(sums, Features(part, part, part), np.zeros(len(part)))
    value = metric.value(sums)["inception_score"]
    assert value["splits"] == splits
    return value["mean"], value["spread"]


def classes_of(count, classes=20):
    """Logits that are certain of one class each, in order of class."""
    return 1000.0 * np.eye(classes)[np.arange(count) * classes // count]


def test_it_is_the_formula_for_every_split():
    logits = 3 * np.random.default_rng(0).normal(size=(103, 6))
    scores = []
    splits = np.random.RandomState(0).permutation(103) * 10 // 103
    assert set(np.bincount(splits)) == {10, 11}
    for split in range(10):
        p = scipy.special.softmax(logits[splits == split], axis=1)
        divergence = scipy.special.rel_entr(p, p.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    assert score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    assert score(logits + 5000) == pytest.approx(score(logits))


@pytest.mark.parametrize(
    ("logits", "splits", "expected"),
    [
        (np.full((50, 1008), 3.0), 10, 1),
        (np.repeat(np.random.default_rng(0).normal(size=(1, 30)), 50, axis=0), 10, 1),
        (classes_of(400), 1, 20),
    ],
    ids=["of images of any class", "of images all alike", "of certain and balanced classes"],
)
def test_it_is_how_many_classes_there_are(logits, splits, expected):
    assert score(logits, splits) == pytest.approx((expected, 0))


def test_images_in_order_of_class_are_spread_over_the_splits():
    mean, spread = score(classes_of(4000))
    assert 19 < mean < 20
    assert 0 < spread < 0.5


def test_too_few_images_are_refused():
    with pytest.raises(UserError, match="9 images for 10 splits, want one each at least"):
        inception_score(9)
    metric = inception_score(40)
    some = np.zeros((30, 5))
    sums = metric.add(metric.empty(), Features(some, some, some), np.zeros(30))
    with pytest.raises(UserError, match="30 of 40 images were added"):
        metric.value(sums)
