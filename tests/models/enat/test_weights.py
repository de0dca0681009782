import dataclasses

import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from enat_jax.models.enat.network import ENATConfig
from enat_jax.models.enat.weights import grid_of, never_read, rules, sizes_from_weights
from enat_jax.models.import_table import ConvertError, apply_rules
from enat_jax.models.networks import abstract_params
from tests.support.golden import enat_from, golden_enat_config


@pytest.fixture
def weights(enat_weights):
    return dict(enat_weights)


def refusal(weights, cfg=None):
    with pytest.raises(ConvertError) as caught:
        enat_from(weights, cfg)
    return str(caught.value)


@pytest.mark.parametrize(
    "cfg",
    [golden_enat_config(), ENATConfig(), ENATConfig(width=64, encoder_depth=1, decoder_depth=1)],
    ids=["recorded", "published", "shallow"],
)
def test_there_is_one_rule_per_parameter(cfg):
    _, abstract = abstract_params(cfg)
    paths = sorted(".".join(map(str, path)) for path in dict(nnx.to_flat_state(abstract)))
    assert sorted(rule.target for rule in rules(cfg)) == paths


def test_every_tensor_of_the_file_is_read_once(weights):
    read = [name for rule in rules(golden_enat_config()) for name in rule.names]
    assert len(read) == len(set(read))
    assert sorted(read) == sorted(name for name in weights if not never_read(name))


def test_the_first_blocks_are_the_encoder_and_the_others_the_decoder(enat, weights):
    for block in range(5):
        stack, index = (enat.encoder, block) if block < 3 else (enat.decoder, block - 3)
        np.testing.assert_array_equal(
            stack.mlp.up.kernel[...][index], weights[f"blocks.{block}.mlp.fc1.weight"].T
        )


def test_b_is_the_tokens_own_projection_and_a_the_contexts(enat, weights):
    np.testing.assert_array_equal(
        rearrange(enat.encoder.attention.own_key_value.kernel[...][1], "i k o -> i (k o)"),
        weights["blocks.1.attn.kv.B.weight"].T,
    )
    np.testing.assert_array_equal(
        enat.encoder.attention.context_key_value.bias[...][1].reshape(-1),
        weights["blocks.1.attn.kv.A.bias"],
    )


def test_the_mlp_that_is_never_called_may_be_there_or_not(weights):
    unread = [name for name in weights if never_read(name)]
    assert unread
    assert all(name.startswith("prev_embedder.") for name in unread)
    for name in unread:
        del weights[name]
    enat_from(weights)
    enat_from(weights | {"prev_embedder.mlp.fc3.weight": np.zeros(3)})


def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(weights):
    del weights["blocks.2.attn.q.weight"], weights["norm.bias"]
    weights["blocks.5.attn.q.weight"] = weights["extra"] = np.zeros((64, 64), np.float32)
    weights["mlm_layer.fc.bias"] = np.zeros(65, np.float32)
    message = refusal(weights)
    assert "2 missing: blocks.2.attn.q.weight, norm.bias;" in message
    assert "2 extra: blocks.5.attn.q.weight, extra;" in message
    assert "1 misshapen: mlm_layer.fc.bias (65,) for head.linear.bias (64,)" in message


def test_a_network_of_other_depth_is_refused(weights):
    deeper = dataclasses.replace(golden_enat_config(), decoder_depth=3)
    message = refusal(weights, deeper)
    assert "missing: blocks.5." in message
    assert message.count("blocks.5.") == 14


def test_a_network_of_other_width_is_refused(weights):
    assert "misshapen: " in refusal(weights, dataclasses.replace(golden_enat_config(), width=32))


def test_parameters_are_float32(weights):
    cfg = dataclasses.replace(golden_enat_config(), dtype="bfloat16")
    _, abstract = abstract_params(cfg)
    state = apply_rules(rules(cfg), weights, abstract, unused=never_read)
    assert {str(leaf[...].dtype) for leaf in dict(nnx.to_flat_state(state)).values()} == {"float32"}


class TestSizes:
    def test_the_weights_tell_every_size_but_heads_and_encoder_depth(self, weights):
        cfg = golden_enat_config()
        assert sizes_from_weights(weights) == {
            "length": cfg.length,
            "codebook_size": cfg.codebook_size,
            "num_classes": cfg.num_classes,
            "width": cfg.width,
            "mlp_ratio": 4.0,
            "depth": 5,
        }

    def test_other_weights_are_refused_with_what_they_lack(self, weights):
        del weights["x_embedder.word_embeddings.weight"]
        weights["y_embedder.embedding_table.weight"] = np.zeros(3)
        with pytest.raises(ConvertError, match="these are not ENAT's weights") as caught:
            sizes_from_weights(weights)
        assert str(caught.value).endswith(
            "no matrix x_embedder.word_embeddings.weight, y_embedder.embedding_table.weight"
        )

    @pytest.mark.parametrize(("length", "side"), [(64, 8), (256, 16), (1024, 32)])
    def test_a_grid_is_square(self, length, side):
        assert grid_of(length) == (side, side)

    def test_positions_that_are_no_square_are_refused(self):
        with pytest.raises(ConvertError, match="250 positions are no square grid"):
            grid_of(250)
