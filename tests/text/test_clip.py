"""CLIP's text tower against recorded towers of OpenAI's kind (clip_l) and of LAION's (bigg)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.config import load_config
from enat_jax.models.flops import training_flops
from enat_jax.text.clip import CLIPEncoder, CLIPText, CLIPTextConfig, abstract_clip, caption_flops
from enat_jax.text.protocol import TextEncoder
from enat_jax.training.strata import training_strata
from tests.support.imports import clip_text

# absolute, though the largest features are 3.8 normalised and 10 not: float32 leaves them 6e-6
TOLERANCE = 1e-5
towers = pytest.mark.parametrize("tower", ["clip_l", "bigg"])


def model(tower, **changes):
    return clip_text(f"{tower}/state_dict.safetensors", **changes).model()


def run(model, ids):
    return jax.jit(lambda model, ids: model(ids))(model, ids)


def same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


@towers
@pytest.mark.parametrize("captions", ["pad_eos", "pad_zero", "short"])
def test_the_last_features_are_the_recorded_ones_whatever_the_padding(golden, tower, captions):
    recorded = golden(f"clip_text/{tower}/io.npz")
    ours = run(model(tower), recorded[f"ids/{captions}"])
    same(ours, recorded[f"{captions}/last_hidden_state"])


@towers
def test_features_of_the_block_before_the_last_are_given_normalised_or_not(golden, tower):
    recorded = golden(f"clip_text/{tower}/io.npz")
    ids = recorded["ids/pad_zero"]
    same(run(model(tower, output="penultimate"), ids), recorded["pad_zero/hidden_states"][-2])
    normed = run(model(tower, output="penultimate_normed"), ids)
    same(normed, recorded["pad_zero/penultimate_final_ln"])


@towers
def test_each_block_gives_what_is_recorded(golden, tower):
    recorded = golden(f"clip_text/{tower}/io.npz")
    ours = jax.jit(CLIPText.states)(model(tower), recorded["ids/pad_zero"])
    same(ours, recorded["pad_zero/hidden_states"])


@pytest.mark.parametrize("captions", ["pad_eos", "pad_zero", "added_tokens"])
def test_a_caption_is_projected_where_its_largest_id_is(golden, captions):
    recorded = golden("clip_text/bigg/io.npz")
    ours = jax.jit(CLIPText.project)(model("bigg"), recorded[f"ids/{captions}"])
    same(ours, recorded[f"{captions}/text_embeds"])


@towers
def test_norms_have_the_recorded_epsilon(golden, tower):
    case, recorded = (
        clip_text(f"{tower}/state_dict.safetensors"),
        golden(f"clip_text/{tower}/io.npz"),
    )
    small = {name: x * np.float32(2**-9) for name, x in case.weights.items()
             if "embedding" in name or "out_proj" in name or "fc2" in name}  # fmt: skip
    ours = run(case.model(**small), recorded["ids/pad_zero"])
    same(ours, recorded["eps_probe/last_hidden_state"])


def test_a_token_reads_none_behind_it():
    network = model("clip_l")
    words = jax.random.normal(jax.random.key(0), (1, 9, 32))

    def of(x, token):
        return network._run(network.blocks, x)[0, token].sum()

    gradient = jax.jit(jax.grad(of), static_argnums=1)(words, 4)
    assert jnp.all(gradient[0, 5:] == 0)
    assert jnp.all(jnp.any(gradient[0, :5] != 0, axis=-1))


def test_in_bfloat16_features_are_float32_and_nearly_the_same(golden):
    ids = golden("clip_text/clip_l/io.npz")["ids/pad_zero"]
    ours, theirs = run(model("clip_l", dtype="bfloat16"), ids), run(model("clip_l"), ids)
    assert ours.dtype == jnp.float32
    assert 1e-4 < jnp.abs(ours - theirs).max() / jnp.abs(theirs).max() < 0.03


def test_an_encoder_is_the_tower_with_its_weights_passed_along(golden):
    network = model("clip_l")
    params = nnx.state(network, nnx.Param)
    encoder = CLIPEncoder(network.cfg, params, "ab")
    assert isinstance(encoder, TextEncoder)
    assert (encoder.name, encoder.digest, encoder.width) == ("clip", "ab", 32)
    ids = golden("clip_text/clip_l/io.npz")["ids/short"]
    features = jax.jit(encoder.encode)(encoder.params, ids)
    np.testing.assert_array_equal(features, run(network, ids))
    louder = jax.jit(encoder.encode)(jax.tree.map(lambda x: 2 * x, params), ids)
    assert jnp.abs(louder - features).max() > 1


@pytest.mark.parametrize("output", ["last", "penultimate"])
def test_a_caption_costs_what_the_formula_says(output):
    # wide, so that norms, activations and the softmax are few beside the products
    cfg = CLIPTextConfig(64, 32, 256, 3, 4, 1024, "gelu", output=output)
    graphdef, params = abstract_clip(dataclasses.replace(cfg, depth=1, output="last"))
    ids = jax.ShapeDtypeStruct((1, 32), jnp.int32)
    compiled = jax.jit(lambda p, ids: nnx.merge(graphdef, p)(ids)).lower(params, ids).compile()
    blocks = 3 if output == "last" else 2  # the compiler counts a loop's body once
    counted = blocks * compiled.cost_analysis()["flops"]
    assert caption_flops(cfg, 32) <= counted <= 1.06 * caption_flops(cfg, 32)


def test_clip_l_adds_at_most_a_fifth_to_a_training_step_of_enat_b(record_property):
    model = load_config("configs/enat_b_256.py").model
    rows = training_strata(model.length, lambda plan: training_flops(model, [plan]), programs=1,
                           images_per_row=8)  # fmt: skip
    step = training_flops(model, [stratum.shape for stratum in rows[0]])
    share = caption_flops(CLIPTextConfig(), 77) / step
    record_property("share", f"{share:.3f}")
    assert 0.03 < share < 0.2
