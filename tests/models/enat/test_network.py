"""The network against recordings of the reference, and what may flow from where to where."""

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
from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from enat_jax.models.attention import Segments
from enat_jax.models.enat.block import BLOCK_EPSILON
from enat_jax.models.layers import layer_norm
from tests.support.golden import enat_from
from tests.support.networks import parameter_count

CONFIGS = sorted((pathlib.Path(__file__).parents[3] / "configs").glob("enat_[sbl]_*[0-9].py"))
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
            positions = jnp.broadcast_to(jnp.arange(own.shape[1]), own.shape)
            outputs[key] = model.embed(own, positions, None)
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
            Segments([count], [] if context is None else [[context.shape[1]]]),
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
        Segments([count], [[context.shape[1]]]),
    )


# Rows of several images.


def forward(graphdef, params, plans, row, recalled):
    """Features and logits of a row."""
    model = nnx.merge(graphdef, params)
    condition = model.embed_condition(row["class_ids"])
    out = model(condition, row["tokens"], RowPlan(plans), recalled=recalled)
    return out, model.logits(out.masked)


def make_row(model, plans, orders, rng):
    """A row of random images; `orders` holds each image's positions in reveal order."""
    parts = [np.split(order, np.cumsum(plan)[:-1], axis=1)
             for order, plan in zip(orders, plans, strict=True)]  # fmt: skip
    previous, new, masked = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    ids = jnp.asarray(rng.integers(model.cfg.codebook_size, size=new.shape))
    features = jnp.asarray(rng.standard_normal((*previous.shape, model.cfg.width)), jnp.float32)
    return Tokens(ids, jnp.asarray(new), jnp.asarray(masked)), features


def test_information_flows_as_the_paper_says(enat):
    # two images in a row on positions of their own, so that position embeddings tell who is read
    plans = (Plan(6, 5, 21), Plan(4, 8, 20))
    rng = np.random.default_rng(1)
    orders = [rng.permutation(32)[None], 32 + rng.permutation(32)[None]]
    tokens, features = make_row(enat, plans, orders, rng)
    row = {"tokens": tokens, "class_ids": jnp.array([[3, 7]])}
    direction = jnp.asarray(rng.standard_normal(enat.cfg.width), jnp.float32)
    embeddings = ("embedding", "class_embedding")
    graphdef, params, others = nnx.split(enat, lambda path, _: path[0] in embeddings, ...)

    def outputs(params, features):
        everything = nnx.split(nnx.merge(graphdef, params, others))
        out, logits = forward(*everything, plans, row, features)
        # of the first image: one previous, one new and one masked token
        return jnp.stack([out.previous[0, 2], out.new[0, 1], logits[0, 3]]) @ direction

    by_params, features = jax.jit(jax.jacrev(outputs, argnums=(0, 1)))(params, features)
    embedding = by_params["embedding"]
    read = (embedding["position"][...], embedding["word"][...], by_params["class_embedding"][...])
    position, word, classes, features = (np.abs(x).max(axis=-1) for x in (*read, features))
    features = features[:, 0]
    for values in (position, word, classes, features):  # nothing between not at all and clearly
        assert values[values > 0].min() > 1e-4

    new, masked = (set(part) for part in np.split(orders[0][0], [6, 11])[1:])
    new_ids = set(np.asarray(tokens.ids)[0, :5])
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


# Sizes.


def unused_mlp(width):
    """Parameters of the MLP (`prev_embedder`) that the reference builds and never calls."""
    return 2 * 4 * width * width + 4 * width + width


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parameter_counts_are_the_published_ones(path):
    cfg = load_config(str(path)).model
    total, published_millions = PARAMETERS[path.stem]
    assert parameter_count(cfg) + unused_mlp(cfg.width) == total
    assert published_millions in (None, total // 10**6)


def test_every_published_size_has_a_config():
    assert {path.stem for path in CONFIGS} == set(PARAMETERS)


def test_no_parameter_beside_the_references(enat, enat_weights):
    total = sum(w.size for w in enat_weights.values())
    assert parameter_count(enat.cfg) + unused_mlp(enat.cfg.width) == total
