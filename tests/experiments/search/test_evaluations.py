import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from enat_jax.config import load_config
from enat_jax.core.strategy import write_strategy
from enat_jax.evaluation.objective import ObjectiveConfig, make_objective
from enat_jax.experiments.search.config import SearchConfig, SgdConfig
from enat_jax.experiments.search.evaluations import Evaluations
from enat_jax.experiments.search.optimisers import make_optimiser
from enat_jax.experiments.search.parameters import Parameters
from enat_jax.models.networks import make_network
from enat_jax.sampling.sampler import Sampler
from tests.support.on_hosts import on_devices

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 2
IMAGES = 11  # in batches of 8: a whole one, and a part of one
PARAMETERS = Parameters(STEPS)
SMALL = ("model.width=16", "model.num_heads=2", "sample.batch_size=8")
SIZES = {
    "digits": ("model.encoder_depth=1", "model.decoder_depth=1"),
    "digits_autonat": ("model.depth=2",),
}


@functools.cache
def made_up(name):
    """A sampler of digits that nobody trained."""
    config = load_config(f"configs/{name}.py", [*SMALL, *SIZES[name]])
    init = jax.jit(lambda: nnx.split(make_network(config.model, rngs=nnx.Rngs(0)), nnx.Param)[1])
    return Sampler(config, init())


def ink(token_ids, class_ids):
    """A number that depends on every token of every image, and on its class."""
    weights = np.linspace(-1, 2, token_ids.shape[1]) * (1 + class_ids[:, None])
    return float(np.mean(weights * token_ids))


INK = ObjectiveConfig(name="tests.experiments.search.test_evaluations:ink", output="token_ids")
CONFIG = SearchConfig(
    steps=STEPS, num_images=(IMAGES,), updates=(2,), seed=3, objective=INK, start="run",
    sgd=SgdConfig(ratio_probe=0.1, probe=0.5),
)  # fmt: skip


def evaluations(name, cfg=CONFIG):
    sampler = made_up(name)
    objective = make_objective(cfg.objective, sampler.config, sampler.placement)
    start = PARAMETERS.numbers(sampler.strategy(steps=cfg.steps))
    return Evaluations(cfg, sampler, objective, start), start


def directly(name, numbers, folder, classes):
    """The same value from the plain sampler, which reads the strategy from its file."""
    sampler = made_up(name)
    write_strategy(PARAMETERS.strategy(numbers, 64), folder / "s.yaml")
    options = {"rule": "file", "file": str(folder / "s.yaml"), "steps": STEPS, "masking": "autonat"}
    tokens = np.concatenate(list(sampler.token_batches(classes, seed=3, **options)))
    return ink(tokens, classes)


@pytest.mark.parametrize("name", SIZES)
def test_an_update_is_the_finite_differences_that_the_plain_sampler_gives(name, tmp_path):
    evaluate, start = evaluations(name)
    optimiser = make_optimiser(CONFIG, start, PARAMETERS, phase=0)
    asked = optimiser.ask()
    values = np.array([scores["ink"] for scores in evaluate(asked, IMAGES)])
    classes = evaluate.class_ids(IMAGES)
    own = np.array([directly(name, numbers, tmp_path, classes) for numbers in asked])
    np.testing.assert_allclose(values, own, rtol=1e-12)
    assert len(set(values)) > 3  # strategies do differ
    optimiser.tell(values)
    probe = np.where(PARAMETERS.is_ratio, 0.1, 0.5)
    rate = np.where(PARAMETERS.is_ratio, 1e-3, 0.1)
    moved = PARAMETERS.clamp(start - rate * (own[1:] - own[0]) / probe)
    np.testing.assert_allclose(optimiser.current, moved, rtol=1e-9)


@pytest.mark.parametrize(("name", "programs"), [("digits", 2), ("digits_autonat", 1)])
def test_whatever_is_asked_compiles_at_most_twice(name, programs):
    evaluate, start = evaluations(name)
    rng = np.random.default_rng(0)
    before = []
    for _ in range(2):
        asked = PARAMETERS.clamp(rng.uniform(0, 1, size=(3, PARAMETERS.size)))
        asked[0], asked[1, 0] = start, 0.1  # the second reveals most tokens at its first step
        evaluate(asked, IMAGES)
        evaluate(asked, 5)  # other sample sizes fit as well
        before.append(len(evaluate.compiled))
    assert before == [programs] * 2


def compilations():
    """A list that grows by every program that is compiled."""
    events = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events


def test_another_strategy_compiles_nothing():
    evaluate, start = evaluations("digits_autonat")
    evaluate(np.stack([start, start]), IMAGES)
    events = compilations()
    other = PARAMETERS.clamp(start * 0.7)
    evaluate(np.stack([other, start]), IMAGES)
    assert events == []


def test_a_strategy_without_room_in_the_first_program_has_the_same_value_in_the_second():
    tight, start = evaluations("digits", dataclasses.replace(CONFIG, margin=1.0))
    wide, _ = evaluations("digits", dataclasses.replace(CONFIG, margin=100.0))
    assert (len(tight.layouts), len(wide.layouts)) == (2, 1)
    other = start.copy()
    other[0] = 0.3  # most tokens are revealed at the first step
    asked = np.stack([start, other])
    np.testing.assert_allclose(
        *([scores["ink"] for scores in each(asked, IMAGES)] for each in (tight, wide)), rtol=1e-12
    )
    assert len(tight.compiled) == 2


def test_side_by_side_and_in_calls_of_any_size_values_are_the_same():
    one, start = evaluations("digits_autonat")
    rng = np.random.default_rng(1)
    asked = PARAMETERS.clamp(start + rng.uniform(-0.2, 0.2, size=(3, PARAMETERS.size)))
    expected = [scores["ink"] for scores in one(asked, IMAGES)]
    assert len(set(expected)) == 3
    abreast, _ = evaluations("digits_autonat", dataclasses.replace(CONFIG, strategies_at_once=2))
    for each, options in ((abreast, {}), (one, {"together": 4})):
        found = [scores["ink"] for scores in each(asked, IMAGES, **options)]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_classes_are_drawn_uniformly_or_balanced_the_same_every_time():
    drawn, _ = evaluations("digits_autonat")
    counts = np.bincount(drawn.class_ids(10_000), minlength=10)
    assert 0 < np.abs(counts - 1000).max() < 150
    np.testing.assert_array_equal(drawn.class_ids(50), evaluations("digits")[0].class_ids(50))
    balanced, _ = evaluations("digits", dataclasses.replace(CONFIG, classes="balanced"))
    np.testing.assert_array_equal(balanced.class_ids(12), [*range(10), 0, 1])


def test_images_of_256_levels_are_judged_where_they_are_asked_for():
    cfg = dataclasses.replace(CONFIG, objective=dataclasses.replace(INK, output="uint8"))
    cfg = dataclasses.replace(
        cfg,
        objective=dataclasses.replace(
            cfg.objective, name="tests.experiments.search.test_evaluations:brightness"
        ),
    )
    evaluate, start = evaluations("digits_autonat", cfg)
    (scores,) = evaluate(start[None], 4)
    assert 0 < scores["brightness"] < 255


def brightness(images, class_ids):
    assert images.shape == (len(class_ids), 8, 8, 3)
    assert images.dtype == np.uint8
    return float(images.mean())


ON_EIGHT = """
import tests.experiments.search.test_evaluations as t
evaluate, start = t.evaluations("digits")
assert jax.device_count() == 8
values = [scores["ink"] for scores in evaluate(t.asked_by_an_update(start), t.IMAGES)]
np.save(arguments[0], values)
"""


def asked_by_an_update(start):
    return make_optimiser(CONFIG, start, PARAMETERS, phase=0).ask()[:4]


def test_eight_devices_share_out_the_images_and_give_the_same_values(tmp_path):
    evaluate, start = evaluations("digits")
    expected = [scores["ink"] for scores in evaluate(asked_by_an_update(start), IMAGES)]
    on_devices(ON_EIGHT, tmp_path / "values.npy", devices=8)
    np.testing.assert_allclose(np.load(tmp_path / "values.npy"), expected, rtol=1e-12)
    assert len(set(expected)) > 1
