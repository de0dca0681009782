"""The network against recordings of the reference, and what may flow from where to where."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from enat_jax.config import load_config
from enat_jax.convert.verify import verify
from enat_jax.core.plans import Plan
from enat_jax.models.enat.network import BLOCK_EPSILON, ENAT
from enat_jax.models.layers import layer_norm
from tests.support.golden import enat_from

pytestmark = pytest.mark.usefixtures("quick_compilation")

PLANS = (Plan(20, 12, 32), Plan(0, 10, 54), Plan(9, 0, 55))
CONFIGS = sorted((pathlib.Path(__file__).parents[3] / "configs").glob("enat_*.py"))
PARAMETERS = {  # with the MLP that the reference builds and never calls; millions in its paper
    "enat_s_256": (50_384_219, None),
    "enat_b_256": (219_646_721, 219),
    "enat_l_256": (574_298_113, 574),
    "enat_l_512": (575_084_545, None),
}


# Parity with the reference.


def test_forward_passes_and_chains_equal_the_references(enat, golden):
    recorded = golden("enat/forward.npz")
    found = verify(enat, recorded)
    outputs = {name for name in recorded if re.search(r"/(logits|feat|masking)$", name)}
    assert {comparison.name for comparison in found} == outputs
    assert [comparison for comparison in found if comparison.fails(5e-5)] == []


def test_every_epsilon_is_the_references(enat_weights, golden):
    # activations so small that any wrong epsilon moves a logit by 5e-4 or more
    exponents = {
        r"(word|position)_embeddings\.weight$": -8,
        r"x_embedder\.LayerNorm\.": -9,
        r"\.(attn\.proj|mlp\.fc2)\.(weight|bias)$": -9,
        r"^mlm_layer\.fc\.": -9,
    }
    tiny = {
        name: np.ldexp(w, next((e for rule, e in exponents.items() if re.search(rule, name)), 0))
        for name, w in enat_weights.items()
    }
    recorded = golden("enat/eps_probe.npz")
    found = verify(enat_from(tiny), recorded)
    outputs = {name for name in recorded if re.search(r"/(logits|feat)$", name)}
    assert {comparison.name for comparison in found} == outputs
    assert [comparison for comparison in found if comparison.fails(1e-5)] == []


def test_every_recorded_submodule_equals_the_references(enat, golden):
    recorded = golden("enat/submodules.npz")
    graphdef, params = nnx.split(enat)
    compared = 0
    for name in ("noreuse", "reuse"):
        arrays = {k.removeprefix(f"{name}/"): v for k, v in recorded.items() if k.startswith(name)}
        if not arrays:
            continue
        ours = jax.jit(submodules, static_argnums=0)(graphdef, params, arrays)
        theirs = {key for key in arrays if key.endswith("/out")}
        assert set(ours) == theirs
        for key in theirs:
            np.testing.assert_allclose(ours[key], arrays[key], rtol=0, atol=5e-5, err_msg=key)
        compared += len(theirs)
    assert compared >= 10


def submodules(graphdef, params, arrays):
    """Each submodule's output on the reference's inputs, for the outputs recorded."""
    model = nnx.merge(graphdef, params).unstacked()
    blocks = [*model.encoder, *model.decoder]
    outputs = {}
    for key in arrays:
        module, _, what = key.rpartition("/")
        if what != "out":
            continue
        own = arrays.get(f"{module}/in0")
        numbered = re.match(r"blocks\.(\d)\.?(.*)", module)
        if numbered:
            name = f"blocks.{numbered[1]}"
            block, part = blocks[int(numbered[1])], numbered[2]
            outputs[key] = block_part(block, part, name, arrays)
        elif module == "x_embedder":
            outputs[key] = model.embed(own, jnp.broadcast_to(jnp.arange(own.shape[1]), own.shape))
        elif module == "y_embedder":
            outputs[key] = model.class_embedding[...][own]
        elif module == "prev_proj":
            outputs[key] = model.reuse_projection(own)
        elif module == "prev_proj.norm":
            outputs[key] = model.reuse_projection.norm(arrays["prev_proj/in0"])
        elif module == "norm":
            outputs[key] = model.head.norm_in(own)
        elif module == "mlm_layer.fc":
            outputs[key] = model.head.linear(arrays["norm/out"])
        elif module == "mlm_layer.ln":
            before = jax.nn.gelu(arrays["mlm_layer.fc/out"], approximate=False)
            outputs[key] = model.head.norm_out(before)
        elif module == "mlm_layer":  # its last column, the mask's, is never used
            logits = model.logits(arrays["norm/in0"])
            outputs[key] = jnp.concatenate([logits, arrays[key][..., -1:]], axis=-1)
    return outputs


def block_part(block, part, name, arrays):
    """The output of a block or of one of its parts."""
    x = arrays[f"{name}/in0"]
    count = x.shape[1]
    modulation = block.modulation(jax.nn.silu(arrays[f"{name}/in1"]))
    gate = jnp.split(modulation, 8, axis=-1)[4][:, None]
    if part == "adaLN_modulation":
        return modulation
    if part == "":
        context = arrays.get(f"{name}/prev")
        if f"{name}/y" in arrays:  # a decoder's: visible tokens, then its own
            context = arrays[f"{name}/y"][:, :-count]
        return block(
            x,
            None if context is None else layer_norm(context, epsilon=BLOCK_EPSILON),
            modulation[:, None],
            own_counts=[count],
            context_blocks=[] if context is None else [[context.shape[1]]],
        )
    if part == "mlp":
        return block.mlp(arrays[f"{name}.mlp/in0"])
    if part == "norm2":
        return layer_norm(x + gate * arrays[f"{name}.attn/out"], epsilon=BLOCK_EPSILON)
    together = arrays[f"{name}.attn.kv/in0"]
    context, own = together[:, :-count], together[:, -count:]
    attention = block.attention
    if part == "attn.q":
        return attention.query(own)
    if part == "attn.kv":
        both = [attention.context_key_value(context), attention.own_key_value(own)]
        return rearrange(jnp.concatenate(both, axis=1), "b n k d -> b n (k d)")
    assert part in ("attn", "attn.proj")
    return attention(
        own,
        context if context.shape[1] else None,
        own_counts=[count],
        context_blocks=[[context.shape[1]]],
    )


# Rows of several images.


@functools.partial(jax.jit, static_argnums=(0, 2))
def forward(graphdef, params, plans, row):
    """Features and logits of a row."""
    model = nnx.merge(graphdef, params)
    out = model(
        model.modulate(row["class_ids"]),
        row["token_ids"],
        row["positions"],
        row["masked_positions"],
        plans,
        features=row["features"],
    )
    return out, model.logits(out.masked)


def make_row(model, plans, *, batch=2, seed=0, orders=None):
    """A row of random images; `orders` holds each image's positions in reveal order."""
    rng = np.random.default_rng(seed)
    if orders is None:
        orders = [
            np.stack([rng.permutation(model.cfg.length) for _ in range(batch)]) for _ in plans
        ]
    parts = {"features": [], "token_ids": [], "positions": [], "masked_positions": []}
    for order, plan in zip(orders, plans, strict=True):
        previous, new, masked = np.split(order, np.cumsum(plan)[:-1], axis=1)
        parts["features"].append(rng.standard_normal((*previous.shape, model.cfg.width)))
        parts["token_ids"].append(rng.integers(model.cfg.codebook_size, size=new.shape))
        parts["positions"].append(new)
        parts["masked_positions"].append(masked)
    row = {name: jnp.asarray(np.concatenate(value, axis=1)) for name, value in parts.items()}
    row["class_ids"] = jnp.asarray(rng.integers(model.cfg.num_classes, size=(batch, len(plans))))
    return row


def one_image(row, plans, image):
    """The part of a row that belongs to one image."""
    part = {"class_ids": row["class_ids"][:, image : image + 1]}
    counts = {"features": 0, "token_ids": 1, "positions": 1, "masked_positions": 2}
    for name, group in counts.items():
        ends = np.cumsum([0, *(plan[group] for plan in plans)])
        part[name] = row[name][:, ends[image] : ends[image + 1]]
    return part


@pytest.fixture(scope="module")
def packed(enat):
    """A row of three images and what the network makes of it."""
    row = make_row(enat, PLANS)
    return row, forward(*nnx.split(enat), PLANS, row)


def test_a_packed_row_equals_separate_calls(enat, packed):
    row, (features, logits) = packed
    ends = {group: np.cumsum([0, *(p[group] for p in PLANS)]) for group in range(3)}
    for image, plan in enumerate(PLANS):
        alone, own_logits = forward(*nnx.split(enat), (plan,), one_image(row, PLANS, image))
        for group, (ours, expected) in enumerate(zip(features, alone, strict=True)):
            if plan[group]:
                part = ours[:, ends[group][image] : ends[group][image + 1]]
                np.testing.assert_allclose(part, expected, rtol=0, atol=2e-5)
        part = logits[:, ends[2][image] : ends[2][image + 1]]
        np.testing.assert_allclose(part, own_logits, rtol=0, atol=2e-5)


def test_unstacked_equals_stacked(enat, packed):
    row, expected = packed
    ours = forward(*nnx.split(enat.unstacked()), PLANS, row)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_information_flows_as_the_paper_says(enat):
    # two images in a row on positions of their own, so that position embeddings tell who is read
    plans = (Plan(6, 5, 21), Plan(4, 8, 20))
    rng = np.random.default_rng(1)
    orders = [rng.permutation(32)[None], 32 + rng.permutation(32)[None]]
    row = make_row(enat, plans, batch=1, orders=orders) | {"class_ids": jnp.array([[3, 7]])}
    direction = jnp.asarray(rng.standard_normal(enat.cfg.width), jnp.float32)
    embeddings = ("embedding", "class_embedding")
    graphdef, params, others = nnx.split(enat, lambda path, _: path[0] in embeddings, ...)

    def outputs(params, features):
        everything = nnx.split(nnx.merge(graphdef, params, others))
        out, logits = forward.__wrapped__(*everything, plans, row | {"features": features})
        # of the first image: one previous, one new and one masked token
        return jnp.stack([out.previous[0, 2], out.new[0, 1], logits[0, 3]]) @ direction

    by_params, features = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(params, row["features"])
    embedding = by_params["embedding"]
    read = (embedding["position"][...], embedding["word"][...], by_params["class_embedding"][...])
    position, word, classes, features = (np.abs(x).max(axis=-1) for x in (*read, features))
    features = features[:, 0]
    for values in (position, word, classes, features):  # nothing between not at all and clearly
        assert values[values > 0].min() > 1e-4

    new, masked = (set(part) for part in np.split(orders[0][0], [6, 11])[1:])
    new_ids = set(np.asarray(row["token_ids"])[0, :5])
    reads = [
        {"positions": set(), "words": set(), "classes": set(), "features": {2}},
        {"positions": new, "words": new_ids, "classes": {3}, "features": set(range(6))},
        {
            "positions": new | masked,
            "words": new_ids | {enat.cfg.mask_id},
            "classes": {3},
            "features": set(range(6)),
        },
    ]
    for output, expected in enumerate(reads):
        assert expected == {
            "positions": set(np.flatnonzero(position[output])),
            "words": set(np.flatnonzero(word[output])),
            "classes": set(np.flatnonzero(classes[output])),
            "features": set(np.flatnonzero(features[output])),
        }


def test_the_head_gives_the_word_matrix_no_gradient(enat):
    graphdef, params = nnx.split(enat)
    features = jax.random.normal(jax.random.key(0), (1, 4, enat.cfg.width))

    def total(params, features):
        return jnp.sum(jnp.square(nnx.merge(graphdef, params).logits(features)))

    grads, into_features = jax.jit(jax.grad(total, argnums=(0, 1)))(params, features)
    assert not np.any(grads["embedding"]["word"][...])
    assert np.all(np.any(into_features, axis=-1))
    assert np.flatnonzero(grads["head"]["bias"][...] == 0).tolist() == [enat.cfg.mask_id]


# How it computes.


def changed(model, **changes):
    """The same weights under another config."""
    cfg = dataclasses.replace(model.cfg, **changes)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: ENAT(cfg, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.state(model))


def test_remat_recomputes_more_and_changes_no_gradient(enat):
    plans = PLANS[:1]
    row = make_row(enat, plans, batch=1)
    grads, products = {}, {}
    for remat in ("none", "dots", "block"):
        graphdef, params = nnx.split(changed(enat, remat=remat))

        def loss(params, graphdef=graphdef):
            return jnp.mean(jnp.square(forward.__wrapped__(graphdef, params, plans, row)[1]))

        traced = jax.jit(jax.grad(loss)).trace(params)
        products[remat] = str(traced.jaxpr).count("dot_general")
        if remat != "dots":
            grads[remat] = traced.lower().compile()(params)
    assert products["none"] < products["dots"] < products["block"]
    for ours, expected in zip(*map(jax.tree.leaves, grads.values()), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.max(np.abs(expected)))


def test_bfloat16_stays_within_its_rounding(enat, packed):
    # One rounding is 2**-9 of a value at most; some 25 in a row through five blocks add up like a
    # random walk, 25**0.5 * 2**-9 = 1% of the logits' size, and the weights double that here.
    row, (_, logits) = packed
    features, ours = forward(*nnx.split(changed(enat, dtype="bfloat16")), PLANS, row)
    assert features.masked.dtype == jnp.bfloat16
    assert ours.dtype == jnp.float32
    error = np.sqrt(np.mean(np.square(ours - logits)) / np.mean(np.square(logits)))
    assert 1e-4 < error < 0.03


def test_every_product_in_bfloat16_takes_16_bits_and_sums_in_32(enat):
    row = make_row(enat, PLANS[:1])
    graphdef, params = nnx.split(changed(enat, dtype="bfloat16"))
    text = forward.lower(graphdef, params, PLANS[:1], row).as_text()
    types = re.findall(
        r"dot_general.*: \(tensor<.*x(\w+)>, tensor<.*x(\w+)>\) -> tensor<.*x(\w+)>", text
    )
    assert len(types) > 10
    assert set(types) == {("bf16", "bf16", "f32")}


# Sizes.


def parameters(cfg):
    """How many numbers a network holds."""
    _, abstract = nnx.split(nnx.eval_shape(lambda: ENAT(cfg, rngs=nnx.Rngs(0))))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract))


def unused_mlp(width):
    """Parameters of the MLP (`prev_embedder`) that the reference builds and never calls."""
    return 2 * 4 * width * width + 4 * width + width


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameter_counts_are_the_published_ones(path):
    cfg = load_config(str(path)).model
    total, published_millions = PARAMETERS[path.stem]
    assert parameters(cfg) + unused_mlp(cfg.width) == total
    assert published_millions in (None, total // 10**6)


def test_every_published_size_has_a_config():
    assert {path.stem for path in CONFIGS} == set(PARAMETERS)


def test_no_parameter_beside_the_references(enat, enat_weights):
    total = sum(w.size for w in enat_weights.values())
    assert parameters(enat.cfg) + unused_mlp(enat.cfg.width) == total
