"""The generation loop: the reference's traces, one result however it runs, and its decisions."""

import dataclasses
import functools
import os
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from enat_jax.config import Config, SampleConfig, TokenizerConfig
from enat_jax.convert.verify import Pass, replay
from enat_jax.core.generate import (
    Layout,
    StepRecord,
    TracedStrategy,
    generate,
    guided_steps,
    image_noise,
    plan_generation,
    trace_strategy,
)
from enat_jax.core.network import Network
from enat_jax.core.orders import ORDERS
from enat_jax.core.plans import Plan, generation_plans
from enat_jax.core.schedules import StrategyConfig, make_strategy
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.models.flops import step_flops
from enat_jax.sampling.sampler import Sampler
from tests.support.golden import GOLDEN, enat_from, golden_enat_config
from tests.support.on_hosts import xla_flags
from tests.support.replay import verify_generations

TIE = 1e-5  # decisions closer than this, in units of logits, may fall differently in float32
MODEL = golden_enat_config()


# The reference's traces.


def recorded_traces():
    """The recorded generations, `trace/variant`."""
    with np.load(GOLDEN / "enat/traces.npz") as recorded:
        return sorted(n.removesuffix("/final_ids") for n in recorded if n.endswith("/final_ids"))


@pytest.mark.parametrize("name", recorded_traces())
def test_our_sampler_reproduces_the_references_trace_id_for_id(enat, golden, name):
    given = (f"{name}/", f"{name.partition('/')[0]}/labels", f"{name.partition('/')[0]}/gumbel")
    recorded = golden("enat/traces.npz")
    comparisons = verify_generations(
        enat, {k: x for k, x in recorded.items() if k.startswith(given)}
    )
    decisions = {f"{name}/{each}" for each in ("is_mask", "sampled_ids", "final_ids")}
    assert {each.name for each in comparisons if each.exact} == decisions
    numbers = ("sampled_logp", "confidence", "logits", "cond_logits", "uncond_logits")
    recorded_numbers = {f"{name}/{each}" for each in numbers} & recorded.keys()
    assert {each.name for each in comparisons if not each.exact} == recorded_numbers
    assert [each for each in comparisons if each.fails(5e-5)] == []


def test_six_traces_are_recorded():
    assert len(recorded_traces()) == 6


def trace(name, golden):
    """A recorded generation's own arrays, beside the classes and the noise that its twins share."""
    recorded, shared = golden("enat/traces.npz"), name.partition("/")[0]
    own = {k.rpartition("/")[2]: x for k, x in recorded.items() if k.startswith(f"{name}/")}
    names = ("labels", "gumbel_sample", "gumbel_conf")
    return own, [jnp.asarray(recorded[f"{shared}/{each}"]) for each in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", recorded_traces())
def test_ids_before_and_masks_after_every_step_are_the_references(enat, golden, name):
    own, (labels, *both) = trace(name, golden)
    left = own["n_mask_next"]
    strategy = GenerationStrategy((left + 0.5 * (left > 0)) / MODEL.length, own["mask_temp"],
                                  own["samp_temp"], own["cfg_scale"])  # fmt: skip
    cost = functools.partial(step_flops, MODEL)
    layout, traced = plan_generation(strategy, MODEL.length, cost, buckets=1)

    def noise(step, positions):
        tokens = jnp.take_along_axis(both[0][step], positions[..., None], axis=1)
        return tokens, jnp.take_along_axis(both[1][step], positions, axis=1)

    @nnx.jit
    def go(model):
        return generate(model, labels[:, 0], traced, noise, layout=layout)[1]

    ids = np.full((2, MODEL.length), MODEL.mask_id)
    for step, record in enumerate(cut(go(enat), traced)):
        np.testing.assert_array_equal(ids, own["ids"][step])
        sampled, masked = ids.copy(), np.ones(ids.shape, bool)
        np.put_along_axis(sampled, record.positions, record.sampled_ids, axis=1)
        np.testing.assert_array_equal(sampled, own["sampled_ids"][step])
        revealed = record.order[:, : MODEL.length - left[step]]
        np.put_along_axis(masked, revealed, False, axis=1)
        np.testing.assert_array_equal(masked, own["new_mask"][step])
        ids = np.where(masked, MODEL.mask_id, sampled)


@pytest.mark.slow
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_logits_and_features_of_all_tokens_are_the_references(enat, golden, branch):
    own, (labels, *_) = trace("T8/cfg", golden)
    classes = np.full(2, MODEL.null_class_id) if branch == "uncond" else np.asarray(labels)[:, 0]
    passes = [None]
    for ids in own["ids"]:
        passes.append(replay(enat, ids, classes, passes[-1]))
    logits, features = (np.stack([getattr(x, k) for x in passes[1:]]) for k in Pass._fields[:2])
    for ours, recorded in ((logits, f"{branch}_logits"),
                           (features[own["sel_steps"]], f"{branch}_feat_sel")):  # fmt: skip
        np.testing.assert_allclose(ours, own[recorded], rtol=0, atol=5e-5)


# One result, however it runs.


class Generation(NamedTuple):
    """A generation with what every step decided.

    Attributes:
        ids: token ids `[b l]`.
        steps: one record a step, its padding cut off.
        margins: per image, how close its closest decision was, in units of logits.
    """

    ids: np.ndarray
    steps: list[StepRecord]
    margins: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 5))
def run(graphdef: Any, params: Any, class_ids, image_ids, strategy: TracedStrategy, layout: Layout):
    """Generates with the noise of key 0, recording every step."""
    model = nnx.merge(graphdef, params)
    noise = image_noise(jax.random.key(0), image_ids, MODEL.codebook_size)
    return generate(model, class_ids, strategy, noise, layout=layout)


def plan(steps, buckets):
    """The config's default strategy at some number of steps."""
    strategy = make_strategy(StrategyConfig(steps=steps))
    cost = functools.partial(step_flops, MODEL)
    return plan_generation(strategy, MODEL.length, cost, buckets=buckets)


def classes_of(image_ids):
    """The classes that images have in this file."""
    return jnp.asarray(image_ids, jnp.int32) % MODEL.num_classes


def generation(model, planned, image_ids) -> Generation:
    """Generates images by number, of a layout and its traced strategy."""
    layout, strategy = planned
    image_ids = jnp.asarray(image_ids, jnp.int32)
    params = nnx.split(model)
    ids, records = run(*params, classes_of(image_ids), image_ids, strategy, layout)
    taken = cut(records, strategy)
    noise = noise_everywhere(image_ids, layout.steps)
    numbers = (revealed(strategy), strategy.sampling_temperature, noise)
    margins = [margin(*each) for each in zip(taken, *map(np.asarray, numbers), strict=True)]
    return Generation(np.asarray(ids), taken, np.min(margins, axis=0))


@functools.partial(jax.jit, static_argnums=1)
def noise_everywhere(image_ids, steps):
    """The noise on logits that `run` has, `[t b l v]`."""
    noise = image_noise(jax.random.key(0), image_ids, MODEL.codebook_size)
    everywhere = jnp.broadcast_to(jnp.arange(MODEL.length), (len(image_ids), MODEL.length))
    return jax.lax.map(lambda step: noise(step, everywhere)[0], jnp.arange(steps))


def cut(records, strategy):
    """One record a step, without the padding of its bucket."""
    records = jax.tree.map(np.asarray, records)
    steps = [jax.tree.map(lambda x, i=i: x[i], r) for r in records for i in range(len(r.order))]
    return [
        StepRecord(*(x[:, :count] for x in record[:-1]), record.order)
        for record, count in zip(steps, np.asarray(strategy.masked), strict=True)
    ]


def revealed(strategy):
    """How many tokens each step reveals."""
    return -np.diff(np.append(strategy.masked, 0))


def margin(step, revealed, temperature, noise):
    """How close an image's closest decision was in a step, in units of logits."""
    noise = np.take_along_axis(noise, step.positions[..., None], axis=1)
    scores = np.sort(step.logits / temperature + noise, axis=-1)
    sampling = temperature * np.min(scores[..., -1] - scores[..., -2], axis=-1)
    if revealed in (0, step.confidence.shape[1]):
        return sampling
    ranked = np.sort(step.confidence, axis=-1)[:, ::-1]
    return np.minimum(sampling, ranked[:, revealed - 1] - ranked[:, revealed])


def assert_same_images(ours, reference: Generation, rows=slice(None)):
    """Equal ids, but for images whose closest decision is a tie in float32; those are few."""
    differ = np.any(ours != reference.ids[rows], axis=1)
    tied = reference.margins[rows] < TIE
    assert not np.any(differ & ~tied), reference.margins[rows][differ]
    assert tied.sum() <= 1


# steps, and the bucketings held against the one bucket of all steps
BUCKETINGS = [(1, 1), (2, 2), (8, 3)]
SLOW = [(4, 3), (4, 4), (8, 8), (13, 3), (13, 13), (64, 3), (64, 64)]


@pytest.fixture(scope="module")
def generated(enat):
    """Generations of three images by steps and buckets, each made once."""
    return functools.cache(lambda steps, buckets: generation(enat, plan(steps, buckets), range(3)))


@pytest.mark.parametrize(
    ("steps", "buckets"), BUCKETINGS + [pytest.param(*s, marks=pytest.mark.slow) for s in SLOW]
)
def test_exact_bucketed_and_one_bucket_sampling_agree(generated, steps, buckets):
    layout, _ = plan(steps, buckets)
    assert len(layout.buckets) == buckets
    assert_same_images(generated(steps, buckets).ids, generated(steps, 1))


@pytest.mark.parametrize(
    ("steps", "buckets"),
    [(1, 1), (2, 2), (8, 3), *(pytest.param(64, n, marks=pytest.mark.slow) for n in (1, 3))],
)
def test_each_position_is_revealed_exactly_once(generated, steps, buckets):
    assert_reveals_follow_the_schedule(generated(steps, buckets), steps, MODEL.length)


def assert_reveals_follow_the_schedule(made, steps, length):
    """Each step reveals as many as planned, none twice, and moves no token revealed before."""
    left = make_strategy(StrategyConfig(steps=steps)).masked_counts(length)
    for image, ids in enumerate(made.ids):
        revealed: dict[int, int] = {}  # ids by position, in the order they were revealed
        for step, masked in zip(made.steps, left, strict=True):
            sampled = dict(zip(step.positions[image], step.sampled_ids[image], strict=True))
            assert len(sampled) == step.positions.shape[1]
            assert set(sampled) == set(range(length)) - set(revealed)
            order = step.order[image, : length - masked].tolist()
            assert order[: len(revealed)] == list(revealed)
            revealed |= {position: sampled[position] for position in order[len(revealed) :]}
            assert len(revealed) == length - masked
        assert [revealed[position] for position in range(length)] == ids.tolist()


@pytest.fixture(scope="module")
def batch_of_32(enat):
    """Images 0 to 31 in 4 steps, generated together."""
    return generation(enat, plan(4, 2), range(32))


@pytest.mark.parametrize("size", [1, 7])
def test_an_image_is_the_same_in_any_batch(enat, batch_of_32, size):
    for first in (0, 11, 32 - size):
        rows = slice(first, first + size)
        layout, strategy = plan(4, 2)
        image_ids = jnp.arange(32)[rows]
        ids, _ = run(*nnx.split(enat), classes_of(image_ids), image_ids, strategy, layout)
        assert_same_images(np.asarray(ids), batch_of_32, rows)


def sampler_tokens(batch_size):
    """Images 0 to 11 by the package's sampler, on all devices there are."""
    config = Config(
        model=MODEL,
        tokenizer=TokenizerConfig(grid=(8, 8)),
        strategy=StrategyConfig(steps=4),
        sample=SampleConfig(batch_size=batch_size, buckets=1),
    )
    weights = load_file(GOLDEN / "enat/state_dict.safetensors")
    sampler = Sampler(config, nnx.state(enat_from(weights), nnx.Param))
    batches = sampler.token_batches(np.asarray(classes_of(range(12))).tolist(), seed=0)
    return np.concatenate(list(batches))


def test_the_sampler_makes_the_same_images(batch_of_32):
    assert_same_images(sampler_tokens(batch_size=5), batch_of_32, slice(12))


ON_EIGHT_DEVICES = """
import sys
import jax, numpy
from tests.core.test_generate import sampler_tokens
assert jax.device_count() == 8
numpy.save(sys.argv[1], sampler_tokens(batch_size=8))
"""


def test_an_image_is_the_same_on_eight_devices(batch_of_32, tmp_path):
    subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(tmp_path / "tokens.npy")],
        env=os.environ
        | {
            "XLA_FLAGS": xla_flags(8),
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": os.pathsep.join([".", *sys.path]),
        },
        check=True,
        timeout=300,
    )
    assert_same_images(np.load(tmp_path / "tokens.npy"), batch_of_32, slice(12))


def test_noise_belongs_to_key_image_step_and_position():
    def draw(key, image_ids, step, positions):
        noise = image_noise(jax.random.key(key), jnp.array(image_ids), 5)
        tokens, choices = noise(jnp.int32(step), jnp.array(positions))
        return np.concatenate([tokens, choices[..., None]], axis=-1)

    together = draw(0, [3, 8], 2, [[4, 1, 6], [0, 1, 2]])
    np.testing.assert_array_equal(together[:1, 1:2], draw(0, [3], 2, [[1]]))
    np.testing.assert_array_equal(together[1:, :1], draw(0, [8], 2, [[0]]))
    others = [draw(1, [3], 2, [[1]]), draw(0, [8], 2, [[1]]), draw(0, [3], 1, [[1]]),
              draw(0, [3], 2, [[4]])]  # fmt: skip
    assert all(np.all(other != together[0, 1]) for other in others)


# Decisions, on a network whose answers are known.

LENGTH, CODES, NULL = 16, 5, 3


class Known(Network):
    """A network that answers from a table `[class, position, code]` and remembers its calls."""

    def __init__(self, table):
        self.table = jnp.asarray(table, jnp.float32)
        self.batches = []

    def null_condition(self, condition):
        return jnp.full_like(condition, NULL)

    def embed_condition(self, condition):
        return condition

    def initial_memory(self, batch, capacity):
        return jnp.zeros((batch, capacity))

    def predict(self, condition, memory, tokens, row):
        self.batches.append(len(condition))
        return self.table[condition, tokens.masked_positions], memory


def silence(step, positions):
    return jnp.zeros((*positions.shape, CODES)), jnp.zeros(positions.shape)


def ask(network, strategy, *, buckets=None, class_ids=(0, 1)):
    """Generates without noise; returns ids and the record of each step."""
    layout, traced = plan_generation(strategy, LENGTH, sum, buckets=buckets)

    def go(class_ids):
        return generate(network, class_ids, traced, silence, layout=layout)

    ids, records = jax.jit(go)(jnp.array(class_ids))
    return Generation(np.asarray(ids), cut(records, traced), np.zeros(len(class_ids)))


def strategy_of(guidance_scale, steps=4):
    made = make_strategy(StrategyConfig(steps=steps))
    return GenerationStrategy(
        mask_ratio=made.mask_ratio,
        choice_temperature=made.choice_temperature,
        sampling_temperature=made.sampling_temperature,
        guidance_scale=np.array(guidance_scale, float),
    )


@pytest.mark.parametrize("buckets", [4, 2, 1])
def test_the_most_confident_positions_are_revealed_first(buckets):
    rng = np.random.default_rng(0)
    targets = rng.integers(CODES, size=(2, LENGTH))
    strength = np.stack([rng.permutation(LENGTH) for _ in range(2)]) / 4 + 1
    table = np.zeros((NULL + 1, LENGTH, CODES))
    for image in range(2):
        table[image, np.arange(LENGTH), targets[image]] = strength[image]
    made = ask(Known(table), strategy_of(np.zeros(4)), buckets=buckets)
    np.testing.assert_array_equal(made.ids, targets)
    order = made.steps[-1].order[:, :LENGTH]
    np.testing.assert_array_equal(order, np.argsort(-strength, axis=1))


@pytest.mark.parametrize("buckets", [5, 2, 1])
def test_masked_counts_are_the_schedules_where_all_confidences_tie(buckets):
    table = np.zeros((NULL + 1, LENGTH, CODES))
    made = ask(Known(table), strategy_of(np.zeros(5), steps=5), buckets=buckets)
    assert_reveals_follow_the_schedule(made, 5, LENGTH)


@pytest.mark.parametrize(
    ("guidance_scale", "batches"),
    [
        ((0, 1, 2, 3), [2, 4, 4, 4]),  # nothing visible at the first step
        ((0, 1, 2, 0), [2, 4, 4, 2]),  # nothing guided after the third
        ((0, 0, 0, 0), [2, 2, 2, 2]),
        ((1, 0, 0, 0), [4, 2, 2, 2]),
        ((0, 0, 0, 1), [2, 4, 4, 4]),  # its features are read at the last
    ],
)
def test_the_unconditional_branch_runs_only_where_it_is_read(guidance_scale, batches):
    network = Known(np.zeros((NULL + 1, LENGTH, CODES)))
    ask(network, strategy_of(guidance_scale))
    assert network.batches == batches


@pytest.mark.parametrize(
    ("plans", "guidance_scale", "guided"),
    [
        ([(0, 0, 9), (0, 2, 7), (2, 3, 4)], (0, 0, 0), [False, False, False]),
        ([(0, 0, 9), (0, 2, 7), (2, 3, 4)], (0, 1, 1), [False, True, True]),
        ([(0, 0, 9), (0, 2, 7), (2, 3, 4)], (1, 0, 0), [True, False, False]),
        ([(0, 0, 9), (0, 2, 7), (2, 3, 4)], (0, 0, 1), [False, True, True]),
        ([(0, 0, 9), (0, 2, 7), (2, 3, 4)], (1, 1, 0), [True, True, False]),
        ([(0, 0, 9), (0, 0, 9), (0, 5, 4)], (0, 0, 1), [False, False, True]),  # nothing revealed
        ([(0, 0, 9), (0, 2, 7), (0, 5, 4)], (0, 0, 1), [False, False, True]),  # nothing reused
        ([(0, 0, 9)], (0,), [False]),
        ([(0, 0, 9)], (2,), [True]),
    ],
)
def test_guided_steps(plans, guidance_scale, guided):
    assert guided_steps([Plan(*c) for c in plans], np.array(guidance_scale)) == guided


@pytest.mark.parametrize("buckets", [4, 1])
def test_guidance_moves_away_from_the_null_class(buckets):
    table = np.random.default_rng(0).normal(size=(NULL + 1, LENGTH, CODES))
    scales = (0.0, 0.5, 1.0, 2.5)
    made = ask(Known(table), strategy_of(scales), buckets=buckets)
    for step, scale in zip(made.steps, scales, strict=True):
        for image, where in enumerate(step.positions):
            conditional, unconditional = table[image, where], table[NULL, where]
            expected = conditional + scale * (conditional - unconditional)
            expected -= np.log(np.exp(expected).sum(axis=-1, keepdims=True))
            np.testing.assert_allclose(step.logits[image], expected, atol=1e-5)


def test_other_numbers_do_not_recompile():
    network = Known(np.random.default_rng(0).normal(size=(NULL + 1, LENGTH, CODES)))
    first = strategy_of((0.0, 1.0, 2.0, 3.0))
    layout, traced = plan_generation(first, LENGTH, sum, buckets=1)

    @jax.jit
    def go(strategy):
        return generate(network, jnp.zeros(2, int), strategy, silence, layout=layout)[0]

    go(traced)
    calls = len(network.batches)
    other = GenerationStrategy(  # mask ratios whose counts fit within the first one's
        mask_ratio=np.array([0.9, 0.75, 0.45, 0.0]),
        choice_temperature=np.array([3.0, 2.0, 1.0, 0.0]),
        sampling_temperature=np.array([2.0, 2.0, 2.0, 1.0]),
        guidance_scale=np.array([0.5, 0.0, 4.0, 1.0]),
    )
    plans = generation_plans(other.masked_counts(LENGTH), LENGTH)
    ours = go(trace_strategy(other, plans))
    assert len(network.batches) == calls
    np.testing.assert_array_equal(ours, ask(network, other, class_ids=(0, 0)).ids)


def test_where_masked_tokens_features_are_read_the_first_step_runs_both_branches():
    plans = [Plan(0, 0, 9), Plan(0, 2, 7), Plan(2, 3, 4)]
    assert guided_steps(plans, (0.0, 0.0, 1.0), reads_masked=True) == [True, True, True]
    assert guided_steps(plans, (0.0, 0.0, 0.0), reads_masked=True) == [False, False, False]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("buckets", [4, 1])
def test_every_order_reveals_each_position_once(order, buckets):
    network = Known(np.random.default_rng(1).normal(size=(NULL + 1, LENGTH, CODES)))
    strategy = make_strategy(StrategyConfig(steps=4, order=order), LENGTH)
    made = ask(network, strategy, buckets=buckets)
    assert_reveals_follow_the_schedule(made, 4, LENGTH)
    places = made.steps[-1].order[:, :LENGTH]
    assert np.all(places == np.arange(LENGTH)) == (order == "raster")


def test_a_priority_reorders_and_leaves_what_is_sampled_alone():
    table = np.random.default_rng(1).normal(size=(NULL + 1, LENGTH, CODES))
    plain = strategy_of(np.zeros(4))
    priority = 100.0 * np.random.default_rng(2).permutation(LENGTH)
    ours = ask(Known(table), dataclasses.replace(plain, priority=priority))
    expected = np.argsort(-priority)
    assert np.all(ours.steps[-1].order[:, :LENGTH] == expected)
    np.testing.assert_array_equal(ours.ids, ask(Known(table), plain).ids)
