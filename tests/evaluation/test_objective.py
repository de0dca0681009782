import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from enat_jax.config import Config, TokenizerConfig, load_config
from enat_jax.errors import UserError
from enat_jax.evaluation import objective
from enat_jax.evaluation.digits_score import Judge
from enat_jax.evaluation.inception import Features, Inception
from enat_jax.evaluation.objective import ObjectiveConfig, is_finite, make_objective
from enat_jax.evaluation.reference import Reference
from enat_jax.evaluation.scores import frechet_distance_of_moments
from enat_jax.parallel.placement import MeshConfig, Placement

P = 5  # features in place of Inception's
DIGITS = load_config("configs/digits.py")


class FakeInception(Inception):
    """Random projections of an image's pixels in place of Inception's features."""

    def __init__(self):
        self.weights = nnx.Param(jax.random.normal(jax.random.key(0), (2 * 2 * 3, P)))

    def __call__(self, images):
        made = jnp.sin(images.reshape(len(images), -1) @ self.weights[...])
        return Features(made, made, made)


def made(name, generator=DIGITS, **options):
    return make_objective(
        ObjectiveConfig(name=name, **options), generator, Placement.of(MeshConfig(data=1))
    )


@pytest.fixture
def fid(monkeypatch):
    rng = np.random.default_rng(1)
    real = rng.normal(size=(40, P))
    reference = Reference(real.mean(axis=0), np.cov(real, rowvar=False))
    monkeypatch.setattr(objective, "POOL_FEATURES", P)
    monkeypatch.setattr(objective, "load_inception", lambda path, digest: FakeInception())
    monkeypatch.setattr(objective, "read_reference", lambda path: reference)
    return made("fid", inception="a.pth", reference="b.npz"), reference


def images(count):
    return np.random.default_rng(2).uniform(size=(count, 2, 2, 3)).astype(np.float32)


def test_fid_of_batches_is_that_of_all_images_at_once_and_no_others(fid):
    judge, reference = fid
    assert (judge.wants, judge.names) == ("floats", ("fid",))
    all_images, scorer = images(23), judge.start()
    for first in (0, 10):
        scorer.add(jnp.asarray(all_images[first : first + 10]), np.zeros(10, np.int32))
    filled = np.concatenate([all_images[20:], np.ones((7, 2, 2, 3), np.float32)])
    scorer.add(filled, np.zeros(3, np.int32))  # seven of the batch do not count
    features = np.asarray(FakeInception()(jnp.asarray(all_images)).pool, np.float64)
    expected = frechet_distance_of_moments(
        features.mean(axis=0), np.cov(features, rowvar=False), reference.mean, reference.covariance
    )
    assert scorer.value()["fid"] == pytest.approx(expected, rel=1e-5)


def test_fid_of_an_image_that_is_not_finite_is_nan(fid):
    scorer = fid[0].start()
    wrong = images(4)
    wrong[2] = np.nan
    scorer.add(wrong, np.zeros(4, np.int32))
    assert not is_finite(scorer.value())


def test_two_scorers_keep_apart_what_they_saw(fid):
    one, other = fid[0].start(), fid[0].start()
    one.add(images(8), np.zeros(8, np.int32))
    other.add(images(8) / 2, np.zeros(8, np.int32))
    assert one.value() != other.value()


def test_digits_are_judged_as_their_own_script_does():
    real, labels = load_digits(return_X_y=True)
    tokens = real[::7].astype(np.int32)
    tokens[:50] = tokens[50:100]  # some of a wrong class
    classes = labels[::7].astype(np.int32)
    scorer = made("digits").start()
    for first in (0, 100, 200):
        scorer.add(jnp.asarray(tokens[first : first + 100]), classes[first : first + 100])
    expected = Judge(real, labels)(tokens, classes)
    assert scorer.value() == pytest.approx(expected._asdict(), rel=1e-9)
    assert next(iter(scorer.value())) == "frechet_distance"


def first_tokens(token_ids, class_ids):
    return np.sum(token_ids[:, 0] * class_ids)


def raising(token_ids, class_ids):
    raise KeyError("lost")


def test_a_users_function_is_given_all_that_counts():
    judge = made("tests.evaluation.test_objective:first_tokens", output="token_ids")
    assert (judge.wants, judge.names) == ("token_ids", ("first_tokens",))
    scorer = judge.start()
    scorer.add(np.full((3, 4), 5), np.array([1, 2]))
    scorer.add(np.full((3, 4), 7), np.array([3]))
    assert scorer.value() == {"first_tokens": 5 * 1 + 5 * 2 + 7 * 3}


def test_a_users_function_that_fails_is_named():
    scorer = made("tests.evaluation.test_objective:raising", output="token_ids").start()
    scorer.add(np.ones((1, 2)), np.array([1]))
    with pytest.raises(UserError, match="'test_objective:raising': KeyError: 'lost'"):
        scorer.value()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "is"}, "must be 'fid', 'digits' or 'package.module:function'"),
        ({"name": "no_such_module:f"}, "cannot be imported: ModuleNotFoundError"),
        ({"name": "tests.evaluation.test_objective:nothing"}, "cannot be imported: AttributeError"),
        ({"name": "tests.evaluation.test_objective:P"}, "is no function but 5"),
        ({"name": "fid"}, "objective.inception must name a file.*; objective.reference must"),
        ({"name": "fid", "inception": "a", "reference": "b", "output": "token_ids"},
         "FID needs 'floats' or 'uint8'"),
        ({"name": "fid", "inception": "a", "reference": "b", "batch_size": 0},
         "objective.batch_size = 0, must be at least 1"),
    ],
)  # fmt: skip
def test_an_objective_that_cannot_be_is_named(options, message):
    with pytest.raises(UserError, match=message):
        made(**options)


def test_a_generator_that_cannot_be_judged_is_named():
    tokens_only = dataclasses.replace(DIGITS, tokenizer=TokenizerConfig(grid=(8, 8)))
    for name in ("fid", "tests.evaluation.test_objective:first_tokens"):
        with pytest.raises(UserError, match=r"judges images, but tokenizer\.name is 'none'"):
            made(name, tokens_only)
    with pytest.raises(UserError, match="64 tokens, 17 codes and 10 classes, not of 256, 1024"):
        made("digits", Config())
