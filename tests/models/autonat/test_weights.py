import dataclasses

import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from enat_jax.models.autonat.network import AutoNATConfig
from enat_jax.models.autonat.weights import rules, sizes_from_weights
from enat_jax.models.import_table import ConvertError
from enat_jax.models.networks import abstract_params
from tests.support.recorded_autonat import (
    autonat_from,
    recorded_autonat,
    recorded_config,
    recorded_weights,
)


@pytest.fixture
def weights():
    return dict(recorded_weights())


def refusal(weights, cfg=None):
    with pytest.raises(ConvertError) as caught:
        autonat_from(weights, cfg)
    return str(caught.value)


@pytest.mark.parametrize(
    "cfg",
    [recorded_config(), AutoNATConfig(), AutoNATConfig(width=64, depth=2)],
    ids=["recorded", "published", "shallow"],
)
def test_there_is_one_rule_per_parameter(cfg):
    _, abstract = abstract_params(cfg)
    paths = sorted(".".join(map(str, path)) for path in dict(nnx.to_flat_state(abstract)))
    assert sorted(rule.target for rule in rules(cfg)) == paths


def test_every_tensor_of_the_file_is_read_once(weights):
    read = [name for rule in rules(recorded_config()) for name in rule.names]
    assert len(read) == len(set(read))
    assert sorted(read) == sorted(weights)


def test_blocks_lie_in_their_order_and_only_outer_ones_read_skips(weights):
    model = recorded_autonat()
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


def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(weights):
    del weights["mid_block.norm1.bias"], weights["out_blocks.1.skip_linear.weight"]
    weights["in_blocks.0.attn.qkv.bias"] = np.zeros(192, np.float32)
    weights["extra"] = np.zeros((64, 64), np.float32)
    weights["mlm_layer.fc.bias"] = np.zeros(65, np.float32)
    message = refusal(weights)
    assert "2 missing: mid_block.norm1.bias, out_blocks.1.skip_linear.weight;" in message
    assert "2 extra: extra, in_blocks.0.attn.qkv.bias;" in message
    assert "1 misshapen: mlm_layer.fc.bias (65,) for head.linear.bias (64,)" in message


def test_a_network_of_other_depth_or_width_is_refused(weights):
    cfg = recorded_config()
    message = refusal(weights, dataclasses.replace(cfg, depth=6))
    assert "missing: in_blocks.2." in message
    assert message.count("in_blocks.2.") == 11
    assert message.count("out_blocks.2.") == 13
    assert "misshapen: " in refusal(weights, dataclasses.replace(cfg, width=32))


class TestSizes:
    def test_the_weights_tell_every_size_but_heads(self, weights):
        cfg = recorded_config()
        assert sizes_from_weights(weights) == {
            "length": cfg.length,
            "codebook_size": cfg.codebook_size,
            "num_classes": cfg.num_classes,
            "width": cfg.width,
            "mlp_ratio": 4.0,
            "depth": cfg.depth,
        }

    def test_other_weights_are_refused_with_what_they_lack(self, weights):
        del weights["token_emb.word_embeddings.weight"]
        weights["context_embed.word_embeddings.weight"] = np.zeros(3)
        with pytest.raises(ConvertError, match="these are not AutoNAT's weights") as caught:
            sizes_from_weights(weights)
        assert str(caught.value).endswith(
            "no matrix token_emb.word_embeddings.weight, context_embed.word_embeddings.weight"
        )

    def test_blocks_must_be_as_many_inward_as_outward(self, weights):
        fewer = {n: w for n, w in weights.items() if not n.startswith("out_blocks.1.")}
        with pytest.raises(ConvertError, match="3 blocks in in_blocks and out_blocks, must be as"):
            sizes_from_weights(fewer)
