"""ENAT's ablations: what each may read, how it trains and generates, and which there are not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.core.generate import generate, image_noise, plan_generation
from enat_jax.core.plans import Plan
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.models.ablations.blocked_attention import attention_masks, readable
from enat_jax.models.enat import config as enat_config
from enat_jax.models.enat import memory as reuse
from enat_jax.models.enat.config import ENATConfig
from enat_jax.models.enat.network import ENAT
from enat_jax.models.flops import step_flops
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training.step import Draws, row_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

BASE = ENATConfig(
    length=16,
    codebook_size=11,
    num_classes=3,
    width=16,
    num_heads=2,
    encoder_depth=2,
    decoder_depth=1,
    dropout=0.0,
)
NAT = {"stacks": "shared", "reuse": "none", "decoder_depth": 0}
VARIANTS = {
    "nat": NAT,
    "masked_to_visible": {**NAT, "blocked": "masked_to_visible"},
    "visible_to_masked": {**NAT, "blocked": "visible_to_masked"},
    "visible_to_visible": {**NAT, "blocked": "visible_to_visible"},
    "masked_to_masked": {**NAT, "blocked": "masked_to_masked"},
    "disentangled": {"reuse": "none"},
    "alternating": {"context_attention": "alternating"},
    "no_projection": {"reuse_projection": False},
    "projected_once": {"reproject": False},
    "all_tokens": {"reuse": "all_tokens"},
    "all_layers": {"reuse": "all_layers"},
    "alternating_all_tokens": {"reuse": "all_tokens", "context_attention": "alternating"},
}


def each(*quick):
    """All variants, most of them with the slow tests."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow)
             for name in VARIANTS]  # fmt: skip
    return pytest.mark.parametrize("name", names)


@functools.cache
def network(name, **changes):
    """A variant with weights that let everything through; fresh blocks are the identity."""
    cfg = dataclasses.replace(BASE, **VARIANTS.get(name, {}), **changes)
    graphdef, params = nnx.split(ENAT(cfg, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    noisy = [x + 0.3 * rng.standard_normal(x.shape).astype("f4") for x in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, noisy))


def without_previous(plan, cfg):
    """The plan as a network gets it that carries no features."""
    if cfg.carries_features:
        return plan
    return Plan(0, plan.previous + plan.new, plan.masked)


# What may be read.


def positions_read(model, plan, outputs, features=None):
    """Per output token, the positions whose embedding its features depend on, in reveal order."""
    order = np.arange(16)[None]
    graphdef, params, others = nnx.split(model, lambda path, _: path[0] == "embedding", ...)
    direction = jnp.asarray(np.random.default_rng(1).standard_normal(model.cfg.width), "f4")

    def run(params, features):
        model = nnx.merge(graphdef, params, others)
        _, new, masked = np.split(order, np.cumsum(plan)[:-1], axis=1)
        ids = jnp.zeros(new.shape, jnp.int32)
        modulation = model.modulate(jnp.zeros((1, 1), jnp.int32))
        out = model(modulation, ids, jnp.array(new), jnp.array(masked), [plan], features=features)
        return outputs(out) @ direction

    by_params, by_features = jax.jit(jax.jacrev(run, argnums=(0, 1)))(params, features)
    position = np.abs(by_params["embedding"]["position"][...]).max(axis=-1)
    values = position[position > 0]
    assert values.min() > 1e-6  # nothing between not at all and clearly
    read = [set(np.flatnonzero(row)) for row in position]
    if features is None:
        return read
    return read, np.abs(by_features)[:, 0].max(axis=-1) > 0


VISIBLE, MASKED = set(range(6)), set(range(6, 16))


@pytest.mark.parametrize(
    ("name", "of_visible", "of_masked"),
    [
        ("nat", VISIBLE | MASKED, VISIBLE | MASKED),
        ("masked_to_visible", VISIBLE | MASKED, MASKED),
        ("visible_to_masked", VISIBLE, VISIBLE | MASKED),
        ("visible_to_visible", {1} | MASKED, VISIBLE | MASKED),
        ("masked_to_masked", VISIBLE | MASKED, VISIBLE | {8}),
    ],
)
def test_one_shared_block_reads_all_tokens_but_the_blocked(name, of_visible, of_masked):
    model = network(name, encoder_depth=1)
    read = positions_read(
        model, Plan(0, 6, 10), lambda out: jnp.stack([out.new[0, 1], out.masked[0, 2]])
    )
    assert read == [of_visible, of_masked]


def test_blocked_attention_as_rows_of_what_a_token_reads():
    rows = {
        name: np.asarray(readable(name, 2, 4)).astype(int).tolist()
        for name in VARIANTS
        if "_to_" in name
    }
    assert rows == {
        "masked_to_visible": [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1]],
        "visible_to_masked": [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]],
        "visible_to_visible": [[1, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        "masked_to_masked": [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]],
    }
    assert attention_masks(ENATConfig(), [Plan(0, 2, 4)]) is None


PLAN = Plan(4, 5, 7)
NEW = {4, 5, 6, 7, 8}


@pytest.mark.parametrize("name", ["disentangled", "alternating", "all_tokens"])
def test_new_tokens_never_read_masked_ones_whatever_is_reused(name):
    model = network(name)
    plan = without_previous(PLAN, model.cfg)
    count = {"disentangled": 0, "all_tokens": 16}.get(name, plan.previous)
    features = jnp.asarray(np.random.default_rng(2).standard_normal((1, count, 16)), "f4")
    read, reused = positions_read(
        model, plan, lambda out: jnp.stack([out.new[0, 1], out.masked[0, 2]]), features
    )
    new = NEW if plan == PLAN else NEW | set(range(4))
    assert read == [new, set(range(16)) - (set() if plan != PLAN else set(range(4)))]
    assert np.all(reused)


def test_a_block_reuses_the_features_of_its_own_depth_alone():
    model = network("all_layers")
    features = jnp.asarray(np.random.default_rng(2).standard_normal((1, 4, 2, 16)), "f4")
    read, reused = positions_read(
        model,
        PLAN,
        lambda out: jnp.stack([*out.new[0, 1], out.masked[0, 2], *out.previous[0, 3]]),
        features,
    )
    assert read == [NEW, NEW, NEW | set(range(9, 16)), set(), set()]
    every, own = np.ones(4, bool), np.arange(4) == 3
    none = ~every
    expected = [  # by layer: what its features are read by
        [every, none],  # new tokens after the first block
        [every, every],  # and after the second
        [every, every],  # masked tokens
        [own, none],  # the projections, layer by layer
        [none, own],
    ]
    np.testing.assert_array_equal(reused, np.stack([np.stack(e, axis=-1) for e in expected]))


def test_without_a_projection_features_are_handed_on_as_they_are():
    model = network("no_projection")
    features = jax.random.normal(jax.random.key(0), (1, 4, 16))
    new, masked = jnp.arange(4, 9)[None], jnp.arange(9, 16)[None]

    @jax.jit
    def previous():
        modulation = model.modulate(jnp.zeros((1, 1), jnp.int32))
        return model(modulation, new, new, masked, [PLAN], features=features).previous

    np.testing.assert_array_equal(previous(), features)


def test_the_features_of_all_tokens_are_kept_by_position():
    model = network("all_tokens")
    order = np.random.default_rng(0).permutation(16)[None]
    new, masked = jnp.array(order[:, 4:9]), jnp.array(order[:, 9:])
    state = jax.random.normal(jax.random.key(0), (1, 16, 16))

    @jax.jit
    def step():
        modulation = model.condition(jnp.zeros(1, jnp.int32))
        ids = jnp.zeros_like(new)
        _, after = model.predict(modulation, state, ids, new, masked, PLAN, None)
        return after, model(modulation, ids, new, masked, [PLAN], features=state)

    after, out = step()
    expected = [out.previous[:, order[0, :4]], out.new, out.masked]
    np.testing.assert_allclose(after[:, order[0]], np.concatenate(expected, axis=1), atol=1e-5)


# Training.

PLANS = (Plan(5, 4, 7), Plan(0, 6, 10))


def row(cfg):
    """A row of two images with their plans."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(cfg.codebook_size, size=(2, 2, 16))
    order = np.stack([[rng.permutation(16) for _ in range(2)] for _ in range(2)])
    classes = np.array([[0, 2], [3, 1]])  # 3 is the null class
    plans = tuple(without_previous(plan, cfg) for plan in PLANS)
    return jnp.array(tokens), Draws(jnp.array(order), jnp.array(classes)), plans


@functools.partial(jax.jit, static_argnums=(0, 5))
def loss_and_grad(graphdef, params, ema, tokens, draws, plans):
    """A row's loss and its gradient."""

    def loss(params):
        models = (nnx.merge(graphdef, weights) for weights in (params, ema))
        return row_loss(*models, tokens, draws, plans, label_smoothing=0.1)

    return jax.value_and_grad(loss)(params)


@each("masked_to_masked", "all_layers")
def test_every_parameter_learns_and_the_loss_falls(name):
    graphdef, params = nnx.split(network(name))
    tokens, draws, plans = row(network(name).cfg)
    loss, grads = loss_and_grad(graphdef, params, params, tokens, draws, plans)
    still = [jax.tree_util.keystr(path) for path, grad in jax.tree_util.tree_leaves_with_path(grads)
             if not np.any(grad)]  # fmt: skip
    assert still == []
    lower = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
    assert loss_and_grad(graphdef, lower, params, tokens, draws, plans)[0] < loss - 0.01


@each("all_tokens")
def test_images_of_a_row_do_not_touch(name):
    graphdef, params = nnx.split(network(name))
    tokens, draws, plans = row(network(name).cfg)
    together, _ = loss_and_grad(graphdef, params, params, tokens, draws, plans)
    alone = [
        loss_and_grad(
            graphdef,
            params,
            params,
            tokens[:, i : i + 1],
            jax.tree.map(lambda x, i=i: x[:, i : i + 1], draws),
            (plan,),
        )[0]
        for i, plan in enumerate(plans)
    ]
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)


@pytest.mark.parametrize("name", ["all_tokens", "all_layers"])
def test_training_reuses_what_generation_does(name):
    # what a step that reveals the first tokens hands on, and the step after it reads
    model = network(name)
    order = np.random.default_rng(4).permutation(16)[None]
    first, new, masked = (jnp.array(x) for x in np.split(order, np.cumsum(PLAN)[:-1], axis=1))
    hidden = jnp.concatenate([new, masked], axis=1)
    ids = jnp.array(np.random.default_rng(5).integers(11, size=(1, 16)))
    classes, earlier = jnp.array([2]), Plan(0, 4, 12)

    @jax.jit
    def logits():
        condition = model.condition(classes)
        state = model.initial_state(1, 9)
        out = model(condition, ids[:, :4], first, hidden, [earlier])
        state = reuse.write(model.cfg, state, out, first, hidden, shape=earlier, counts=None)
        generated, _ = model.predict(condition, state, ids[:, 4:9], new, masked, PLAN, None)
        remembered = model.remember(classes[None], ids[:, :4], first, hidden, [PLAN])
        trained = model.train_logits(
            classes[None], ids[:, 4:9], new, masked, [PLAN], features=remembered, key=None
        )
        return generated, trained

    generated, trained = logits()
    np.testing.assert_allclose(trained, generated, rtol=0, atol=1e-4)


# Generation.


@functools.partial(jax.jit, static_argnums=(0, 3))
def sample(graphdef, params, strategy, layout):
    """Ids of two images, and the conditional logits of each bucket's last step."""
    model = nnx.merge(graphdef, params)
    ids = jnp.arange(2)
    noise = image_noise(jax.random.key(0), ids, model.cfg.codebook_size)
    ids, records = generate(
        model, ids, strategy, noise, layout=layout, null_class_id=3, record=True
    )
    return ids, records[-1].logits[-1]


@pytest.mark.parametrize("kind", ["last_layer", "all_tokens", "all_layers"])
@pytest.mark.parametrize("again", [True, False])
def test_features_are_handed_on_projected_again_or_as_the_encoder_put_them_out(kind, again):
    model = network("", reuse=kind, reproject=again)
    ids, order = jnp.arange(16)[None] % 11, jnp.arange(16)[None]

    def step(state, plan):
        new = slice(plan.previous, plan.previous + plan.new)
        condition = model.condition(jnp.array([1]))
        return model.predict(
            condition, state, ids[:, new], order[:, new], order[:, new.stop :], plan, None
        )[1]

    first = step(model.initial_state(1, 16), Plan(0, 3, 13))
    second = step(first, Plan(3, 4, 9))
    projected = reuse.project(model.cfg, model.reuse_projection, first)
    expected = projected if again else first
    np.testing.assert_allclose(second[:, :3], expected[:, :3], rtol=1e-5, atol=1e-5)
    assert not np.allclose(projected[:, :3], first[:, :3], atol=0.1)


@each("alternating", "projected_once", "all_tokens")
def test_exact_bucketed_and_one_bucket_generation_agree(name):
    model = network(name)
    strategy = GenerationStrategy(
        mask_ratio=np.array([0.9, 0.5, 0.0]),  # 14, then 8 masked tokens are left
        choice_temperature=np.array([1.5, 1.0, 0.0]),
        sampling_temperature=np.full(3, 1.5),
        guidance_scale=np.array([0.0, 1.0, 2.0]),  # the first step is not guided
    )
    made = []
    for buckets, net in ((3, model.unstacked()), (2, model), (1, model)):
        layout, traced = plan_generation(
            strategy,
            16,
            functools.partial(step_flops, model.cfg),
            reuse=model.cfg.carries_features,
            reads_masked=model.cfg.carries_masked_features,
            buckets=buckets,
        )
        assert len(layout.buckets) == buckets
        ids, logits = sample(*nnx.split(net), traced, layout)
        made.append((ids, logits[:, :8]))
    for ids, logits in made[1:]:
        np.testing.assert_array_equal(ids, made[0][0])
        np.testing.assert_allclose(logits, made[0][1], rtol=0, atol=2e-4)


# Configs and parameters.


@pytest.mark.parametrize("name", VARIANTS)
def test_every_matrix_of_a_block_is_split_over_devices(name):
    cfg = dataclasses.replace(BASE, **VARIANTS[name])
    params = nnx.state(nnx.eval_shape(lambda: ENAT(cfg, rngs=nnx.Rngs(0))), nnx.Param)
    placement = Placement.of(MeshConfig(1, 2, 2), jax.devices()[:1] * 4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(placement.params(params)):
        sharding = leaf.sharding
        path = jax.tree_util.keystr(path)
        axes = {axis for entry in sharding.spec if entry for axis in np.atleast_1d(entry)}
        if "kernel" in path:
            assert axes == {"fsdp", "tensor"}, path
            assert sharding.shard_shape(leaf.shape)[0] == leaf.shape[0] or leaf.ndim == 2, path


@pytest.mark.parametrize("name", ["default", *VARIANTS])
def test_the_variants_of_the_paper_can_be(name):
    assert enat_config.problems(dataclasses.replace(BASE, **VARIANTS.get(name, {}))) == []


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"blocked": "masked_to_visible"}, ["blocked"]),
        ({"decoder_depth": 0}, ["decoder_depth"]),
        ({"encoder_depth": 0}, ["encoder_depth"]),
        ({"stacks": "shared"}, ["decoder_depth", "reuse"]),
        ({**NAT, "context_attention": "alternating"}, ["context_attention"]),
        ({**NAT, "reuse": "all_layers"}, ["reuse"]),
        ({"reuse": "none", "reuse_projection": False}, ["reuse_projection"]),
    ],
)
def test_fields_that_do_not_go_together_are_named(changes, fields):
    found = enat_config.problems(dataclasses.replace(BASE, **changes))
    assert [line.split(" = ")[0] for line in found] == [f"model.{name}" for name in fields]
