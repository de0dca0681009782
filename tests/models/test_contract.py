"""What every network must do, whatever it is: a new one joins `tests.support.networks.CONFIGS`."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.core.generate import generate, image_noise, plan_generation
from enat_jax.core.network import Network, RowPlan
from enat_jax.core.plans import Plan
from enat_jax.core.strategy import GenerationStrategy
from enat_jax.models.flops import step_flops
from enat_jax.models.networks import abstract_params
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.training.step import Draws, row_loss
from tests.support.networks import (
    CONFIGS,
    changed,
    condition,
    in_reveal_order,
    network,
    without_previous,
)

PLANS = (Plan(5, 4, 7), Plan(0, 6, 10))


def each(*quick):
    """All networks, most of them with the slow tests."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow)
             for name in CONFIGS]  # fmt: skip
    return pytest.mark.parametrize("name", names)


def all_networks(test):
    return pytest.mark.parametrize("name", CONFIGS)(test)


@all_networks
def test_it_answers_what_the_loop_and_the_training_step_ask(name):
    model = network(name)
    assert isinstance(model, Network)
    given = condition(model.cfg, [[0, 2], [1, 1]])
    null = model.null_condition(given)
    nothing = condition(model.cfg, np.full((2, 2), 3))
    jax.tree.map(np.testing.assert_array_equal, null, nothing)
    embedded = jax.eval_shape(model.embed_condition, given)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(embedded)} == {2}


# Training.


@functools.partial(jax.jit, static_argnums=(0, 5))
def loss_and_grad(graphdef, params, ema, tokens, draws, plans):
    """A row's loss and its gradient."""

    def loss(params):
        models = (nnx.merge(graphdef, weights) for weights in (params, ema))
        return row_loss(*models, tokens, draws, plans, label_smoothing=0.1)

    return jax.value_and_grad(loss)(params)


def row(cfg):
    """A batch of two rows of two images, and their plans."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(cfg.codebook_size, size=(2, 2, 16))
    order = np.stack([[rng.permutation(16) for _ in range(2)] for _ in range(2)])
    given = condition(cfg, [[0, 2], [3, 1]])  # 3 is the null class
    plans = tuple(without_previous(plan, cfg) for plan in PLANS)
    return jnp.array(tokens), Draws(jnp.array(order), given), plans


@each("masked_to_masked", "all_layers", "autonat", "text", "text_every_step", "autonat_text")
def test_every_parameter_learns_and_the_loss_falls(name):
    graphdef, params = nnx.split(network(name))
    tokens, draws, plans = row(CONFIGS[name])
    loss, grads = loss_and_grad(graphdef, params, params, tokens, draws, plans)
    still = [jax.tree_util.keystr(path) for path, grad in jax.tree_util.tree_leaves_with_path(grads)
             if not np.any(grad)]  # fmt: skip
    assert still == []
    lower = jax.tree.map(lambda p, g: p - 0.003 * g, params, grads)
    assert loss_and_grad(graphdef, lower, params, tokens, draws, plans)[0] < loss - 0.001


@functools.partial(jax.jit, static_argnums=(0, 4))
def loss_alone(graphdef, params, tokens, draws, plans):
    """A row's loss, without the gradient's programs."""
    model = nnx.merge(graphdef, params)
    return row_loss(model, model, tokens, draws, plans, label_smoothing=0.1)


@each("enat", "all_tokens", "nat", "autonat", "text")
def test_images_of_a_row_do_not_touch(name):
    graphdef, params = nnx.split(network(name))
    tokens, draws, plans = row(CONFIGS[name])
    together = loss_alone(graphdef, params, tokens, draws, plans)
    alone = []
    for i, plan in enumerate(plans):
        own, drawn = jax.tree.map(lambda x, i=i: x[:, i : i + 1], (tokens, draws))
        alone.append(loss_alone(graphdef, params, own, drawn, (plan,)))
    np.testing.assert_allclose(together, np.mean(alone), rtol=1e-5)


@each("enat", "all_tokens", "masked_to_masked", "autonat", "text", "text_every_step")
def test_padding_of_drawn_plans_is_read_by_nothing(name):
    graphdef, params = nnx.split(network(name))
    tokens, draws, _ = row(CONFIGS[name])
    fits, *plans = (
        tuple(without_previous(plan, CONFIGS[name]) for plan in several)
        for several in ((Plan(6, 5, 12), Plan(0, 7, 15)), PLANS, (Plan(3, 2, 11), Plan(0, 2, 14)))
    )
    drawn = draws._replace(plans=jnp.array(plans))
    padded = loss_and_grad(graphdef, params, params, tokens, drawn, fits)
    exact = [
        loss_and_grad(
            graphdef,
            params,
            params,
            tokens[i : i + 1],
            jax.tree.map(lambda x, i=i: x[i : i + 1], draws),
            plans[i],
        )
        for i in range(2)
    ]
    exact = jax.tree.map(lambda a, b: (a + b) / 2, *exact)
    for ours, expected in zip(*map(jax.tree.leaves, (padded, exact)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, cfg in CONFIGS.items() if cfg.carries_features])
def test_training_recalls_what_generation_carries(name):
    # what a step that reveals the first tokens hands on, and the step after it reads
    model = network(name)
    order = jnp.asarray(np.random.default_rng(4).permutation(16)[None])
    ids = jnp.asarray(np.random.default_rng(5).integers(11, size=(1, 16)))
    first, before = in_reveal_order(ids, order, Plan(0, 4, 12))
    tokens, now = in_reveal_order(ids, order, Plan(4, 5, 7))

    @jax.jit
    def logits():
        embedded = model.embed_condition(condition(model.cfg, [[2]]))
        out = model(embedded, first, before)
        memory = model.memory.write(model.initial_memory(1, 9), out, first, before)
        generated, _ = model.predict(embedded, memory, tokens, now)
        recalled = model.recall(embedded, first, now)
        out = model(embedded, tokens, now, recalled=recalled)
        return generated, model.logits(out.masked)

    generated, trained = logits()
    np.testing.assert_allclose(trained, generated, rtol=0, atol=1e-4)


# Generation.


@functools.partial(jax.jit, static_argnums=(0, 3))
def sample(graphdef, params, strategy, layout):
    """Ids of two images, and the logits of each bucket's last step."""
    model = nnx.merge(graphdef, params)
    images = jnp.arange(2)
    noise = image_noise(jax.random.key(0), images, model.cfg.codebook_size)
    given = condition(model.cfg, images)
    ids, records = generate(model, given, strategy, noise, layout=layout)
    return ids, records[-1].logits[-1]


@each("enat", "autonat", "text")
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


# How it computes.


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(graphdef, params, tokens, plan, key=None):
    """Logits of one image's masked tokens."""
    model = nnx.merge(graphdef, params)
    embedded = model.embed_condition(condition(model.cfg, [[2]]))
    recalled = jnp.ones((1, plan.previous, model.cfg.width)) if plan.previous else None
    out = model(embedded, tokens, RowPlan((plan,)), recalled=recalled, key=key)
    return model.logits(out.masked)


def one_image(cfg):
    """An image's tokens, and their plan."""
    plan = without_previous(PLANS[0], cfg)
    order = jnp.arange(16)[None]
    return in_reveal_order(order % 11, order, plan)[0], plan


KINDS = pytest.mark.parametrize("name", ["enat", "autonat"])


@KINDS
def test_dropout_is_on_in_training_alone(name):
    model = changed(network(name), dropout=0.5)
    tokens, plan = one_image(model.cfg)
    still = forward(*nnx.split(model), tokens, plan)
    np.testing.assert_array_equal(still, forward(*nnx.split(network(name)), tokens, plan))
    one, other = (forward(*nnx.split(model), tokens, plan, jax.random.key(k)) for k in (0, 1))
    assert np.all(np.any(one != other, axis=-1))


@KINDS
def test_the_head_gives_the_word_matrix_no_gradient(name):
    graphdef, params = nnx.split(network(name))
    features = jax.random.normal(jax.random.key(0), (1, 4, 16))

    def total(params, features):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params).logits(features)))

    grads, into_features = jax.jit(jax.grad(total, argnums=(0, 1)))(params, features)
    assert not np.any(grads["embedding"]["word"][...])
    assert np.all(np.any(into_features, axis=-1))
    assert np.flatnonzero(grads["head"]["bias"][...] == 0).tolist() == [CONFIGS[name].mask_id]


@KINDS
def test_remat_recomputes_more_and_changes_no_gradient(name):
    tokens, plan = one_image(CONFIGS[name])
    grads, products = {}, {}
    for remat in ("none", "dots", "block"):
        graphdef, params = nnx.split(changed(network(name), remat=remat))

        def loss(params, graphdef=graphdef):
            return jnp.mean(jnp.square(forward.__wrapped__(graphdef, params, tokens, plan)))

        traced = jax.jit(jax.grad(loss)).trace(params)
        products[remat] = str(traced.jaxpr).count("dot_general")
        if remat != "dots":
            grads[remat] = traced.lower().compile()(params)
    assert products["none"] < products["dots"] < products["block"]
    for ours, expected in zip(*map(jax.tree.leaves, grads.values()), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


@KINDS
def test_every_product_in_bfloat16_takes_16_bits_and_sums_in_32(name):
    model = changed(network(name), dtype="bfloat16")
    tokens, plan = one_image(model.cfg)
    text = forward.lower(*nnx.split(model), tokens, plan).as_text()
    types = re.findall(
        r"dot_general.*: \(tensor<.*x(\w+)>, tensor<.*x(\w+)>\) -> tensor<.*x(\w+)>", text
    )
    assert len(types) > 10
    assert set(types) == {("bf16", "bf16", "f32")}
    assert forward(*nnx.split(model), tokens, plan).dtype == jnp.float32


@all_networks
def test_every_kernel_is_split_over_devices(name):
    params = abstract_params(dataclasses.replace(CONFIGS[name], num_classes=1))[1]
    placement = Placement.of(MeshConfig(1, 2, 2), jax.devices()[:1] * 4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(placement.params(params)):
        name, spec = jax.tree_util.keystr(path), leaf.sharding.spec
        axes = {axis for entry in spec if entry for axis in np.atleast_1d(entry)}
        if "kernel" in name and "skip" not in name:
            assert axes == {"fsdp", "tensor"}, name
            is_stacked = name.startswith(
                ("['encoder']", "['decoder']", "['inward']", "['outward']")
            )
            assert not is_stacked or spec[0] is None, name
