import dataclasses
import functools

import numpy as np
import pytest

from enat_jax.evaluation.objective import ObjectiveConfig, make_objective
from enat_jax.experiments.search.config import SearchConfig, SgdConfig
from enat_jax.experiments.search.evaluations import Evaluations
from enat_jax.experiments.search.optimisers import make_optimiser
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.sampling.sampler import Sampler
from enat_jax.sampling.strategy_file import write_strategy
from tests.support.made_up import made_up
from tests.support.on_hosts import on_devices

PARAMETERS = Parameters(2)
IMAGES = 11  # in batches of 8: a full one, and a part of one
NAMES = ("digits", "digits_autonat")


@functools.cache
def sampler_of(name):
    checkpoint = made_up(name)
    return Sampler(checkpoint.config, checkpoint.ema)


def ink(token_ids, class_ids):
    """A number that depends on every token of every image, and on its class."""
    weights = np.linspace(-1, 2, token_ids.shape[1]) * (1 + class_ids[:, None])
    return float(np.mean(weights * token_ids))


def brightness(images, class_ids):
    assert images.shape == (len(class_ids), 4, 4, 3)
    assert images.dtype == np.uint8
    return float(images.mean())


def objective(function, output):
    return ObjectiveConfig(name=f"{__name__}:{function}", output=output)


CONFIG = SearchConfig(
    steps=2, num_images=(IMAGES,), updates=(2,), seed=3, objective=objective("ink", "token_ids"),
    start="run", sgd=SgdConfig(ratio_probe=0.1, probe=0.5),
)  # fmt: skip


def evaluations(name, **changes):
    sampler, cfg = sampler_of(name), dataclasses.replace(CONFIG, **changes)
    start = PARAMETERS.numbers(sampler.program.strategy(steps=2))
    scored = make_objective(cfg.objective, sampler.config, sampler.placement)
    return Evaluations(cfg, sampler, scored, start), start


def values(evaluate, asked, **options):
    return [scores["ink"] for scores in evaluate(asked, IMAGES, **options)]


@pytest.mark.parametrize("name", ["digits", pytest.param("digits_autonat", marks=pytest.mark.slow)])
def test_an_update_is_the_finite_differences_that_the_plain_sampler_gives(name, tmp_path):
    evaluate, start = evaluations(name)
    optimiser = make_optimiser(CONFIG, start, PARAMETERS, phase=0)
    classes, own = evaluate.class_ids(IMAGES), []
    for numbers in optimiser.ask():  # by the sampler, which reads the strategy from its file
        write_strategy(PARAMETERS.strategy(numbers, 16), tmp_path / "s.yaml")
        tokens = np.concatenate(list(sampler_of(name).token_batches(
            classes, seed=3, rule="file", file=str(tmp_path / "s.yaml"), steps=2, masking="autonat"
        )))  # fmt: skip
        own.append(ink(tokens, classes))
    told = np.array(values(evaluate, optimiser.ask()))
    np.testing.assert_allclose(told, own, rtol=1e-12)
    assert len(set(told)) > 3  # strategies do differ
    optimiser.tell(told)
    probe, rate = (np.where(PARAMETERS.is_ratio, *each) for each in ((0.1, 0.5), (1e-3, 0.1)))
    moved = PARAMETERS.clamp(start - rate * (np.array(own[1:]) - own[0]) / probe)
    np.testing.assert_allclose(optimiser.current, moved, rtol=1e-9)


@pytest.mark.parametrize(("name", "programs"), [("digits", 2), ("digits_autonat", 1)])
def test_whatever_is_asked_compiles_at_most_twice(name, programs):
    evaluate, start = evaluations(name)
    rng = np.random.default_rng(0)
    for images in (IMAGES, 5, IMAGES):
        asked = PARAMETERS.clamp(rng.uniform(0, 1, size=(3, 6)))
        asked[0], asked[1, 0] = start, 0.1  # the second reveals most tokens at its first step
        evaluate(asked, images)
        assert evaluate.run._cache_size() == programs


def test_a_strategy_without_room_in_the_first_program_has_the_same_value_in_the_second():
    (tight, start), (wide, _) = (evaluations("digits", margin=margin) for margin in (1.0, 100.0))
    assert (len(tight.layouts), len(wide.layouts)) == (2, 1)
    other = np.array([0.3, *start[1:]])  # most tokens are revealed at the first step
    asked = np.stack([other, start])
    np.testing.assert_allclose(values(tight, asked), values(wide, asked), rtol=1e-12)
    assert (tight.run._cache_size(), wide.run._cache_size()) == (2, 1)


def test_side_by_side_and_in_calls_of_any_size_values_are_the_same():
    one, start = evaluations("digits_autonat")
    rng = np.random.default_rng(1)
    asked = PARAMETERS.clamp(start + rng.uniform(-0.2, 0.2, size=(3, 6)))
    expected = values(one, asked)
    assert len(set(expected)) == 3
    abreast, _ = evaluations("digits_autonat", strategies_at_once=2)
    np.testing.assert_allclose(values(abreast, asked), expected, rtol=1e-12)
    np.testing.assert_allclose(values(one, asked, together=4), expected, rtol=1e-12)


def test_classes_are_drawn_uniformly_or_balanced_the_same_every_time():
    drawn, _ = evaluations("digits_autonat")
    counts = np.bincount(drawn.class_ids(10_000), minlength=10)
    assert 0 < np.abs(counts - 1000).max() < 150
    np.testing.assert_array_equal(drawn.class_ids(50), evaluations("digits")[0].class_ids(50))
    balanced, _ = evaluations("digits_autonat", classes="balanced")
    np.testing.assert_array_equal(balanced.class_ids(12), [*range(10), 0, 1])


def test_images_of_256_levels_are_judged_where_they_are_asked_for():
    evaluate, start = evaluations("digits_autonat", objective=objective("brightness", "uint8"))
    (scores,) = evaluate(start[None], 4)
    assert 0 < scores["brightness"] < 255


ON_FOUR = """
import tests.experiments.search.test_evaluations as t
evaluate, start = t.evaluations("digits_autonat")
np.save(arguments[0], t.values(evaluate, np.stack([start, 0.9 * start])))
assert jax.device_count() == 4
"""


def test_several_devices_share_out_the_images_and_give_the_same_values(tmp_path):
    evaluate, start = evaluations("digits_autonat")
    expected = values(evaluate, np.stack([start, 0.9 * start]))
    on_devices(ON_FOUR, tmp_path / "values.npy", devices=4)
    np.testing.assert_allclose(np.load(tmp_path / "values.npy"), expected, rtol=1e-12)
    assert len(set(expected)) == 2
