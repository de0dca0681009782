"""Which of AutoNAT's published tensors goes where, and which sizes they tell."""

import dataclasses

import numpy as np
import pytest
from einops import rearrange

from enat_jax.errors import UserError
from enat_jax.models.autonat.weights import sizes_from_weights
from tests.support.recorded_autonat import (
    autonat_from,
    recorded_autonat,
    recorded_config,
    recorded_weights,
)


def test_blocks_lie_in_their_order_and_only_outer_ones_read_skips():
    model, weights = recorded_autonat(), recorded_weights()
    for stack, name in ((model.inward, "in_blocks"), (model.outward, "out_blocks")):
        for block in range(2):
            np.testing.assert_array_equal(
                rearrange(stack.query_key_value.kernel[...][block], "i r o -> i (r o)"),
                weights[f"{name}.{block}.attn.qkv.weight"].T,
            )
    np.testing.assert_array_equal(
        model.outward.skip.kernel[...][1], weights["out_blocks.1.skip_linear.weight"].T
    )
    assert model.inward.skip is None
    assert model.middle.skip is None


def test_a_network_of_other_depth_is_refused():
    deeper = dataclasses.replace(recorded_config(), depth=6)
    with pytest.raises(UserError, match=r"24 missing: in_blocks\.2\.attn") as caught:
        autonat_from(recorded_weights(), deeper)
    assert str(caught.value).count("in_blocks.2.") == 11
    assert str(caught.value).count("out_blocks.2.") == 13


def test_the_weights_tell_every_size_but_heads():
    cfg = recorded_config()
    sizes = sizes_from_weights(recorded_weights())
    assert sizes.keys() == {
        "length", "codebook_size", "num_classes", "width", "mlp_ratio", "depth",
    }  # fmt: skip
    assert sizes == {name: getattr(cfg, name) for name in sizes}


def test_other_weights_are_refused_with_what_they_lack():
    weights = {**recorded_weights(), "context_embed.word_embeddings.weight": np.zeros((0, 3))}
    del weights["token_emb.word_embeddings.weight"]
    with pytest.raises(UserError, match="these are not AutoNAT's weights: no matrix") as caught:
        sizes_from_weights(weights)
    assert str(caught.value).endswith(
        "no matrix token_emb.word_embeddings.weight, context_embed.word_embeddings.weight"
    )
