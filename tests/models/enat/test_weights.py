"""Which of ENAT's published tensors goes where, and which sizes they tell."""

import dataclasses

import numpy as np
import pytest
from einops import rearrange

from enat_jax.errors import UserError
from enat_jax.models.enat.weights import sizes_from_weights
from tests.support.golden import enat_from, golden_enat_config


def test_the_first_blocks_are_the_encoder_and_the_others_the_decoder(enat, enat_weights):
    for block in range(5):
        stack, index = (enat.encoder, block) if block < 3 else (enat.decoder, block - 3)
        np.testing.assert_array_equal(
            stack.mlp.up.kernel[...][index], enat_weights[f"blocks.{block}.mlp.fc1.weight"].T
        )


def test_b_is_the_tokens_own_projection_and_a_the_contexts(enat, enat_weights):
    np.testing.assert_array_equal(
        rearrange(enat.encoder.attention.own_key_value.kernel[...][1], "i k o -> i (k o)"),
        enat_weights["blocks.1.attn.kv.B.weight"].T,
    )
    np.testing.assert_array_equal(
        enat.encoder.attention.context_key_value.bias[...][1].reshape(-1),
        enat_weights["blocks.1.attn.kv.A.bias"],
    )


def test_a_network_of_other_depth_is_refused(enat_weights):
    deeper = dataclasses.replace(golden_enat_config(), decoder_depth=3)
    with pytest.raises(UserError, match=r"14 missing: blocks.5.adaLN") as caught:
        enat_from(enat_weights, deeper)
    assert str(caught.value).count("blocks.5.") == 14


def test_the_weights_tell_every_size_but_heads_and_encoder_depth(enat_weights):
    cfg = golden_enat_config()
    assert sizes_from_weights(enat_weights) == {
        "length": cfg.length,
        "codebook_size": cfg.codebook_size,
        "num_classes": cfg.num_classes,
        "width": cfg.width,
        "mlp_ratio": 4.0,
        "encoder_depth + decoder_depth": 5,
    }


def test_other_weights_are_refused_with_what_they_lack(enat_weights):
    weights = {**enat_weights, "y_embedder.embedding_table.weight": np.zeros(3)}
    del weights["x_embedder.word_embeddings.weight"]
    with pytest.raises(UserError, match="these are not ENAT's weights: no matrix x_emb") as caught:
        sizes_from_weights(weights)
    assert str(caught.value).endswith("word_embeddings.weight, y_embedder.embedding_table.weight")
