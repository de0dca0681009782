"""AutoNAT's network against recordings of the reference, and what may flow from where to where."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.config import load_config
from enat_jax.convert.verify import replay, verify
from enat_jax.core.network import RowPlan, Tokens
from enat_jax.core.plans import Plan
from tests.support.networks import parameter_count
from tests.support.recorded_autonat import (
    autonat_from,
    recorded_autonat,
    recorded_config,
    recorded_weights,
)

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
            outputs[key] = model.embed_condition(own)
        elif module == "norm":
            outputs[key] = model.head.norm_in(own)
        elif module == "mlm_layer.ln":
            outputs[key] = model.head.norm_out(own)
        elif module == "mlm_layer":  # its last column, the mask's, is never used
            logits = model.logits(arrays["norm/in0"])
            outputs[key] = jnp.concatenate([logits, arrays[key][..., -1:]], axis=-1)
    return outputs


def test_a_token_reads_its_own_image_and_class_and_nothing_of_its_neighbours(autonat):
    # every image's class and codes are its own, so that embeddings tell who is read
    plans = (Plan(0, 24, 40), Plan(0, 8, 56))
    rng = np.random.default_rng(0)
    orders = [rng.permutation(64)[None] for _ in plans]
    parts = [np.split(order, [p.new], axis=1) for order, p in zip(orders, plans, strict=True)]
    visible, masked = (jnp.asarray(np.concatenate(x, axis=1)) for x in zip(*parts, strict=True))
    tokens = Tokens(jnp.arange(32)[None], visible, masked)
    direction = jax.random.normal(jax.random.key(0), (autonat.cfg.codebook_size,))
    graphdef, params = nnx.split(autonat)

    def outputs(params):
        model = nnx.merge(graphdef, params)
        condition = model.embed_condition(jnp.array([[3, 7]]))
        logits = model.logits(model(condition, tokens, RowPlan(plans)).masked)
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


# Sizes and first weights.


def test_autonat_l_has_as_many_parameters_as_the_reference():
    assert parameter_count(load_config(str(CONFIG)).model) == 193_655_297


def test_no_parameter_beside_the_references():
    total = sum(w.size for w in recorded_weights().values())
    assert parameter_count(recorded_config()) == total


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
