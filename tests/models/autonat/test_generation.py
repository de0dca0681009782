"""AutoNAT in the generation loop: the reference's trace, and one result however it runs."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.config import Config, SampleConfig, TokenizerConfig
from enat_jax.core.generate import plan_generation
from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.models.flops import step_flops
from enat_jax.parallel.placement import MeshConfig
from enat_jax.sampling.sampler import Sampler
from tests.core.test_generate import assert_same_images, classes_of, generation, run
from tests.support.on_hosts import on_devices
from tests.support.recorded_autonat import recorded_autonat, recorded_config
from tests.support.replay import verify_generations

GUIDED = StrategyConfig(steps=4, masking="autonat")


@pytest.fixture(scope="module")
def autonat():
    return recorded_autonat()


# The reference's trace.


def test_our_sampler_reproduces_the_references_trace_id_for_id(autonat, golden):
    replayed = verify_generations(autonat, golden("autonat/trace.npz"))
    comparisons = {each.name: each for each in replayed}
    decisions = {"is_mask", "sampled_ids", "final_ids"}
    assert set(comparisons) == decisions | {"sampled_logp", "confidence", "cond_logits"}
    assert [each for each in comparisons.values() if each.fails(1e-4)] == []
    assert {name for name, each in comparisons.items() if each.exact} == decisions
    assert comparisons["sampled_ids"].size == 8 * 2 * 64


def test_the_traces_counts_are_autonats_rule(golden):
    recorded = golden("autonat/trace.npz")
    strategy = GenerationStrategy(
        mask_ratio=np.append(recorded["manual_ratios"], 0.0),
        choice_temperature=np.append(recorded["manual_temp"], 0.0),
        sampling_temperature=recorded["manual_samp_temp"],
        guidance_scale=recorded["manual_cfg"],
        masking="autonat",
    )
    assert strategy.masked_counts(64) == (*recorded["mask_len"][:-1], 0)


# One result, however it runs.


def planned(cfg, buckets):
    model = recorded_config()
    cost = functools.partial(step_flops, model)
    return plan_generation(make_strategy(cfg), model.length, cost, reuse=False, buckets=buckets)


@pytest.fixture(scope="module")
def together(autonat):
    """Eight images by strategy, each of whose steps has a body of its own."""
    return functools.cache(lambda cfg: generation(autonat, planned(cfg, 4), range(8)))


def test_another_strategy_runs_in_the_same_program(autonat):
    # as long as its counts fit the one bucket's shapes, nothing is compiled again
    layout, strategy = planned(GUIDED, 1)
    faster = make_strategy(StrategyConfig(steps=4, masking="autonat", schedule="square"))
    plans, other = plan_generation(
        faster, 64, functools.partial(step_flops, recorded_config()), reuse=False, buckets=4
    )
    image_ids = jnp.arange(2)
    classes = classes_of(image_ids)
    exact, _ = run(*nnx.split(autonat), classes, image_ids, other, plans)
    compiled = run._cache_size()
    fits = all(
        mine <= room
        for bucket in plans.buckets
        for mine, room in zip(bucket.shape, layout.buckets[0].shape, strict=True)
    )
    assert fits
    first, _ = run(*nnx.split(autonat), classes, image_ids, strategy, layout)
    second, _ = run(*nnx.split(autonat), classes, image_ids, other, layout)
    assert run._cache_size() == compiled + 1
    np.testing.assert_array_equal(second, exact)
    assert np.any(np.asarray(first) != np.asarray(second))


def sampler_tokens(mesh=None, layers="auto"):
    """Images 0 to 7 by the package's sampler."""
    config = Config(
        model=recorded_config(),
        tokenizer=TokenizerConfig(grid=(8, 8)),
        strategy=GUIDED,
        sample=SampleConfig(batch_size=8, buckets=1),
        mesh=mesh or MeshConfig(),
    )
    sampler = Sampler(config, nnx.state(recorded_autonat(), nnx.Param), layers=layers)
    return next(iter(sampler.token_batches(np.asarray(classes_of(range(8))).tolist(), seed=0)))


@pytest.mark.parametrize("layers", ["stacked", "unstacked"])
def test_the_sampler_makes_the_same_images_stacked_or_not(together, layers):
    assert_same_images(sampler_tokens(layers=layers), together(GUIDED))


ON_EIGHT_DEVICES = """
from tests.models.autonat.test_generation import MeshConfig, sampler_tokens
assert jax.device_count() == 8
meshes = [MeshConfig(), MeshConfig(2, 2, 2, "fsdp")]
np.save(arguments[0], np.stack([sampler_tokens(mesh) for mesh in meshes]))
"""


@pytest.mark.slow
def test_an_image_is_the_same_on_eight_devices(together, tmp_path):
    on_devices(ON_EIGHT_DEVICES, tmp_path / "tokens.npy", devices=8)
    for tokens in np.load(tmp_path / "tokens.npy"):
        assert_same_images(tokens, together(GUIDED))
