"""AutoNAT's network against recordings of the reference, and what may flow from where to where."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.config import load_config
from enat_jax.convert.verify import replay, verify
from enat_jax.core.plans import Plan
from enat_jax.sampling.program import abstract_params
from tests.support.recorded_autonat import (
    autonat_from,
    recorded_autonat,
    recorded_config,
    recorded_weights,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLANS = (Plan(0, 12, 52), Plan(0, 0, 64), Plan(0, 40, 24))
CONFIG = pathlib.Path(__file__).parents[3] / "configs/autonat_l_256.py"


@pytest.fixture(scope="module")
def autonat():
    return recorded_autonat()


# Parity with the reference.


def test_forward_passes_equal_the_references(autonat, golden):
    recorded = golden("autonat/forward.npz")
    found = verify(autonat, recorded)
    groups = ("all_masked", "half_masked", "one_masked", "ragged")
    assert {comparison.name for comparison in found} == {f"{group}/logits" for group in groups}
    assert [comparison for comparison in found if comparison.fails(1e-4)] == []


def test_every_epsilon_is_the_references(golden):
    # activations so small that any wrong epsilon moves a logit by 7e-5 or more
    exponents = {
        r"(word|position)_embeddings\.weight$": -8,
        r"(token_emb|context_embed)\.LayerNorm\.": -9,
        r"\.(attn\.proj|mlp\.fc2)\.(weight|bias)$": -9,
        r"skip_linear\.bias$": -9,
        r"^mlm_layer\.fc\.": -9,
    }
    tiny = {
        name: np.ldexp(w, next((e for rule, e in exponents.items() if re.search(rule, name)), 0))
        for name, w in recorded_weights().items()
    }
    found = verify(autonat_from(tiny), golden("autonat/eps_probe.npz"))
    assert [comparison.name for comparison in found] == ["logits"]
    assert [comparison for comparison in found if comparison.fails(1e-5)] == []


def test_every_recorded_submodule_equals_the_references(autonat, golden):
    recorded = golden("autonat/forward.npz")
    arrays = {k.removeprefix("sub/"): v for k, v in recorded.items() if k.startswith("sub/")}
    graphdef, params = nnx.split(autonat)
    ours = jax.jit(submodules, static_argnums=0)(graphdef, params, arrays)
    theirs = {key for key in arrays if key.endswith("/out")}
    assert set(ours) == theirs
    assert len(theirs) >= 10
    for key in theirs:
        np.testing.assert_allclose(ours[key], arrays[key], rtol=0, atol=1e-4, err_msg=key)
    ours = replay(autonat, recorded["half_masked/ids"][:1], recorded["context"][:1, 0])
    np.testing.assert_allclose(ours.logits, arrays["logits"], rtol=0, atol=1e-4)


def submodules(graphdef, params, arrays):
    """Each submodule's output on the reference's inputs, for the outputs recorded."""
    model = nnx.merge(graphdef, params).unstacked()
    blocks = {"mid_block": model.middle}
    blocks |= {f"in_blocks.{n}": block for n, block in enumerate(model.inward)}
    blocks |= {f"out_blocks.{n}": block for n, block in enumerate(model.outward)}
    outputs = {}
    for key in arrays:
        module, _, what = key.rpartition("/")
        if what != "out":
            continue
        own, skip = arrays[f"{module}/in0"], arrays.get(f"{module}/in1")
        name, _, part = module.rpartition(".")
        if module in blocks:
            outputs[key] = blocks[module](own, skip)
        elif name in blocks:
            ours = {"norm1": "attention_norm", "attn": "attention", "skip_linear": "skip"}
            outputs[key] = getattr(blocks[name], ours.get(part, part))(own)
        elif module == "token_emb":
            where = jnp.broadcast_to(jnp.arange(own.shape[1]), own.shape)
            outputs[key] = model.embedding(own, where)
        elif module == "context_embed":
            outputs[key] = model.embed_class(own[:, 0])
        elif module == "norm":
            outputs[key] = model.head.norm_in(own)
        elif module == "mlm_layer.ln":
            outputs[key] = model.head.norm_out(own)
        elif module == "mlm_layer":  # its last column, the mask's, is never used
            logits = model.logits(arrays["norm/in0"])
            outputs[key] = jnp.concatenate([logits, arrays[key][..., -1:]], axis=-1)
    return outputs


# Rows of several images.


@functools.partial(jax.jit, static_argnums=(0, 2))
def train_logits(graphdef, params, plans, row):
    """Logits of a row's masked tokens."""
    return nnx.merge(graphdef, params).train_logits(**row, plans=plans, key=None)


def make_row(cfg, plans, *, batch=2, seed=0, orders=None):
    """A row of random images; `orders` holds each image's positions, the visible ones first."""
    rng = np.random.default_rng(seed)
    if orders is None:
        orders = [np.stack([rng.permutation(cfg.length) for _ in range(batch)]) for _ in plans]
    visible, masked = zip(
        *(np.split(order, [plan.new], axis=1) for order, plan in zip(orders, plans, strict=True)),
        strict=True,
    )
    positions = np.concatenate(visible, axis=1)
    return {
        "class_ids": jnp.asarray(rng.integers(cfg.num_classes, size=(batch, len(plans)))),
        "token_ids": jnp.asarray(rng.integers(cfg.codebook_size, size=positions.shape)),
        "positions": jnp.asarray(positions),
        "masked_positions": jnp.asarray(np.concatenate(masked, axis=1)),
    }


@pytest.fixture(scope="module")
def packed(autonat):
    """A row of three images and what the network makes of it."""
    row = make_row(autonat.cfg, PLANS)
    return row, train_logits(*nnx.split(autonat), PLANS, row)


def test_a_packed_row_equals_the_images_in_raster_order(autonat, packed):
    row, logits = packed
    visible, masked = (np.cumsum([0, *(p[group] for p in PLANS)]) for group in (1, 2))
    for image, plan in enumerate(PLANS):
        new, hidden = (slice(ends[image], ends[image + 1]) for ends in (visible, masked))
        ids = np.full((2, sum(plan)), autonat.cfg.mask_id)
        positions = np.asarray(row["positions"])[:, new]
        np.put_along_axis(ids, positions, np.asarray(row["token_ids"])[:, new], axis=1)
        whole = replay(autonat, ids, np.asarray(row["class_ids"])[:, image]).logits
        where = row["masked_positions"][:, hidden, None]
        expected = jnp.take_along_axis(whole, where, axis=1)
        np.testing.assert_allclose(logits[:, hidden], expected, rtol=0, atol=2e-5)


def test_unstacked_equals_stacked(autonat, packed):
    row, expected = packed
    ours = train_logits(*nnx.split(autonat.unstacked()), PLANS, row)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5)


def test_a_token_reads_its_own_image_and_class_and_nothing_of_its_neighbours(autonat):
    # every image's class and codes are its own, so that embeddings tell who is read
    plans = (Plan(0, 24, 40), Plan(0, 8, 56))
    row = make_row(autonat.cfg, plans, batch=1) | {"class_ids": jnp.array([[3, 7]])}
    row["token_ids"] = jnp.array([[*range(24), *range(24, 32)]])
    direction = jax.random.normal(jax.random.key(0), (autonat.cfg.codebook_size,))
    graphdef, params = nnx.split(autonat)

    def outputs(params):
        logits = train_logits.__wrapped__(graphdef, params, plans, row)
        return jnp.stack([logits[0, 1], logits[0, 40 + 1]]) @ direction

    grads = jax.jit(jax.jacrev(outputs))(params)
    word, position, classes = (
        np.abs(leaf[...]).max(axis=-1)
        for leaf in (
            grads["embedding"]["word"], grads["embedding"]["position"],
            grads["class_embedding"]["word"],
        )
    )  # fmt: skip
    for values in (word, position, classes):  # nothing between not at all and clearly
        assert values[values > 0].min() > 1e-4
    mask = autonat.cfg.mask_id
    assert set(np.flatnonzero(word[0])) == {*range(24), mask}
    assert set(np.flatnonzero(word[1])) == {*range(24, 32), mask}
    assert [np.flatnonzero(each).tolist() for each in classes] == [[3], [7]]
    assert (position > 0).all()  # masked tokens are read, too


def test_dropout_is_on_tokens_and_in_training_alone(autonat):
    row = make_row(autonat.cfg, PLANS[:1], batch=1)
    graphdef, params = nnx.split(changed(autonat, dropout=0.5))

    @jax.jit
    def both(key):
        model = nnx.merge(graphdef, params)
        return model.train_logits(**row, plans=PLANS[:1], key=key)

    ours = train_logits(graphdef, params, PLANS[:1], row)
    np.testing.assert_array_equal(ours, train_logits(*nnx.split(autonat), PLANS[:1], row))
    one, other = both(jax.random.key(0)), both(jax.random.key(1))
    assert jnp.all(jnp.any(one != other, axis=-1))


def test_the_head_gives_the_word_matrix_no_gradient(autonat):
    graphdef, params = nnx.split(autonat)
    features = jax.random.normal(jax.random.key(0), (1, 4, autonat.cfg.width))

    def total(params):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params).logits(features)))

    grads = jax.jit(jax.grad(total))(params)
    assert not np.any(grads["embedding"]["word"][...])
    assert np.flatnonzero(grads["head"]["bias"][...] == 0).tolist() == [autonat.cfg.mask_id]


# How it computes.


def changed(model, **changes):
    """The same weights under another config."""
    graphdef, _ = abstract_params(dataclasses.replace(model.cfg, **changes))
    return nnx.merge(graphdef, nnx.state(model))


def test_remat_recomputes_more_and_changes_no_gradient(autonat):
    plans = PLANS[:1]
    row = make_row(autonat.cfg, plans, batch=1)
    grads, products = {}, {}
    for remat in ("none", "dots", "block"):
        graphdef, params = nnx.split(changed(autonat, remat=remat))

        def loss(params, graphdef=graphdef):
            return jnp.mean(jnp.square(train_logits.__wrapped__(graphdef, params, plans, row)))

        traced = jax.jit(jax.grad(loss)).trace(params)
        products[remat] = str(traced.jaxpr).count("dot_general")
        if remat != "dots":
            grads[remat] = traced.lower().compile()(params)
    assert products["none"] < products["dots"] < products["block"]
    for ours, expected in zip(*map(jax.tree.leaves, grads.values()), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


def test_bfloat16_stays_within_its_rounding(autonat, packed):
    # as for ENAT: some 25 roundings in a row add up to 1% of the logits' size, here doubled
    row, logits = packed
    ours = train_logits(*nnx.split(changed(autonat, dtype="bfloat16")), PLANS, row)
    assert ours.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(ours - logits)) / np.mean(np.square(logits)))
    assert 1e-4 < error < 0.03


def test_every_product_in_bfloat16_takes_16_bits_and_sums_in_32(autonat):
    row = make_row(autonat.cfg, PLANS[:1])
    graphdef, params = nnx.split(changed(autonat, dtype="bfloat16"))
    text = train_logits.lower(graphdef, params, PLANS[:1], row).as_text()
    types = re.findall(
        r"dot_general.*: \(tensor<.*x(\w+)>, tensor<.*x(\w+)>\) -> tensor<.*x(\w+)>", text
    )
    assert len(types) > 10
    assert set(types) == {("bf16", "bf16", "f32")}


# Sizes and first weights.


def parameters(cfg):
    """How many numbers a network holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(cfg)[1]))


def test_autonat_l_has_as_many_parameters_as_the_reference():
    assert parameters(load_config(str(CONFIG)).model) == 193_655_297


def test_no_parameter_beside_the_references():
    total = sum(w.size for w in recorded_weights().values())
    assert parameters(recorded_config()) == total


def test_first_weights_are_normal_and_biases_0(autonat):
    model = type(autonat)(recorded_config(), rngs=nnx.Rngs(0))
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        name, values = path[-1], np.asarray(leaf[...])
        if name == "bias":
            assert not values.any()
        elif name == "scale":
            assert (values == 1).all()
        else:  # kernels and embeddings
            spread = 0.02 / (2 * values.size) ** 0.5
            assert abs(values.std() - 0.02) < 5 * spread, path
            assert abs(values.mean()) < 5 * 0.02 / values.size**0.5, path
