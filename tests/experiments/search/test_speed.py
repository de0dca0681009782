import json

import pytest

from enat_jax.evaluation.objective import make_objective
from enat_jax.experiments.search import speed
from tests.experiments.search.test_evaluations import CONFIG, INK, directly, evaluations, made_up
from tests.experiments.search.test_loop import restored

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("name", ["digits", "digits_autonat"])
def test_a_strategy_compiled_alone_is_judged_as_the_plain_sampler_judges_it(name, tmp_path):
    evaluate, start = evaluations(name)
    sampler = made_up(name)
    objective = make_objective(INK, sampler.config, sampler.placement)
    alone = speed.Alone(CONFIG, sampler, objective, evaluate)
    for images in (3, 11):  # less than a batch; a batch and a part of one
        expected = directly(name, start, tmp_path, evaluate.class_ids(images))
        assert alone(start, images) == pytest.approx({"ink": expected}, rel=1e-12)
    assert alone.compile_seconds > 0


def test_both_ways_are_timed_on_batches_of_the_images_asked_for():
    found = speed.measure(CONFIG, restored(), images=5, updates=1, compiled=1)
    assert found["images"] == found["batch_size"] == 5
    assert found["programs_of_the_search"] == 1
    ways = ("evaluations_per_second", "evaluations_per_second_compiling_each")
    assert found["ratio"] == pytest.approx(found[ways[0]] / found[ways[1]])
    assert 0 < found["compile_seconds_each"] < 1 / found[ways[1]]
    json.dumps(found)
