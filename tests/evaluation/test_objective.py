import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.config import Config, ObjectiveConfig, TokenizerConfig, load_config
from enat_jax.errors import UserError
from enat_jax.evaluation.frechet import frechet_distance
from enat_jax.evaluation.objective import make_objective
from enat_jax.parallel.placement import MeshConfig, Placement
from tests.support.fake_inception import FakeInception, gaussian, reference, use_fake_inception

DIGITS = load_config("configs/digits.py")


def made(name, generator=DIGITS, **options):
    return make_objective(
        ObjectiveConfig(name=name, **options), generator, Placement.of(MeshConfig(data=1))
    )


@pytest.fixture
def fid(monkeypatch):
    use_fake_inception(monkeypatch.setattr, side=2)
    return made("fid", inception="a.pth", reference="b.npz")


def test_fid_of_batches_is_that_of_all_images_at_once_and_no_others(fid):
    assert (fid.wants, fid.names) == ("floats", ("fid",))
    images = np.random.default_rng(2).uniform(size=(23, 2, 2, 3)).astype(np.float32)
    scorer = fid.start()
    for first in (0, 10):
        scorer.add(jnp.asarray(images[first : first + 10]), np.zeros(10, np.int32))
    filled = np.concatenate([images[20:], np.ones((7, 2, 2, 3), np.float32)])
    scorer.add(filled, np.zeros(3, np.int32))  # seven of the batch do not count
    features = np.asarray(FakeInception(2)(jnp.asarray(images)).pool, np.float64)
    expected = frechet_distance(gaussian(features), reference().pool)
    assert scorer.value() == {"fid": pytest.approx(expected, rel=1e-5)}
    assert np.isfinite(list(scorer.value().values())).all()
    scorer.add(filled * np.nan, np.zeros(3, np.int32))
    assert not np.isfinite(list(scorer.value().values())).all()


def test_digits_minimise_the_distance_of_pixels():
    objective = made("digits")
    assert (objective.wants, objective.names) == ("token_ids", ("frechet_distance", "accuracy"))


def first_tokens(token_ids, class_ids):
    return np.sum(token_ids[:, 0] * class_ids)


def raising(token_ids, class_ids):
    raise KeyError("lost")


def test_a_users_function_is_given_all_that_counts():
    objective = made(f"{__name__}:first_tokens", output="token_ids")
    assert (objective.wants, objective.names) == ("token_ids", ("first_tokens",))
    scorer = objective.start()
    scorer.add(np.full((3, 4), 5), np.array([1, 2]))
    scorer.add(np.full((3, 4), 7), np.array([3]))
    assert scorer.value() == {"first_tokens": 5 * 1 + 5 * 2 + 7 * 3}


def test_a_users_function_that_fails_is_named():
    scorer = made(f"{__name__}:raising", output="token_ids").start()
    scorer.add(np.ones((1, 2)), np.array([1]))
    with pytest.raises(UserError, match="test_objective:raising': KeyError: 'lost'"):
        scorer.value()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "is"}, "'is' must be 'fid', 'digits', 'emoji' or 'package.module:func"),
        ({"name": "math:"}, "must be 'fid', 'digits', 'emoji' or 'package.module:func"),
        ({"name": "no_such_module:f"}, "cannot be imported: ModuleNotFoundError"),
        ({"name": "math:nothing"}, "cannot be imported: AttributeError"),
        ({"name": "math:pi"}, "is no function but 3.14"),
        ({"name": "fid"}, "objective.inception and objective.reference must name a file"),
        ({"name": "fid", "inception": "a", "reference": "b", "output": "token_ids"},
         "objective.output = 'token_ids' cannot be"),
    ],
)  # fmt: skip
def test_an_objective_that_cannot_be_is_named(options, message):
    with pytest.raises(UserError, match=message):
        made(**options)


def test_a_generator_that_cannot_be_scored_is_named():
    tokens_only = dataclasses.replace(DIGITS, tokenizer=TokenizerConfig(grid=(8, 8)))
    for name in ("fid", f"{__name__}:first_tokens"):
        with pytest.raises(UserError, match=r"scores images, but tokenizer\.name is 'none'"):
            made(name, tokens_only)
    with pytest.raises(UserError, match="64 tokens, 17 codes and 10 classes, not of 256, 1024"):
        made("digits", Config())
