"""Both layouts of CLIP's text weights: which tensor goes where, and what they tell."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from enat_jax.errors import UserError
from enat_jax.models.import_table import apply_rules
from enat_jax.text.clip import CLIPTextConfig, abstract_clip
from enat_jax.text.clip_weights import config_of, layout_of, never_read, rules
from tests.support.golden import GOLDEN
from tests.support.imports import clip_text

FOLDER = GOLDEN / "clip_text"
# of open_clip's and transformers' own code: each tensor's name, shape and origin in both
MODELS = json.loads((FOLDER / "open_clip_mapping.json").read_text())["models"]
SIZES = {
    "ViT-L-14": CLIPTextConfig(projection=768),
    "ViT-H-14": CLIPTextConfig(49408, 77, 1024, 24, 16, 4096, "gelu", 1024),
    "ViT-bigG-14": CLIPTextConfig(49408, 77, 1280, 32, 20, 5120, "gelu", 1280),
}


def mapping(model):
    """The rows of a model's mapping, those of its first block for every block."""
    table = {}
    for row in MODELS[model]["mapping"]:
        for block in range(MODELS[model]["layers"] if ".0." in row["hf"] else 1):
            names = {n: row[n].replace(".0.", f".{block}.") for n in ("open_clip", "hf")}
            table[names["hf"]] = {**row, **names}
    return table.values()


def beside(model):
    cfg = SIZES[model]
    return {"num_attention_heads": cfg.num_heads, "hidden_act": cfg.activation}


def full_size(model, layout):
    """Zeros that take no memory under the layout's names."""
    theirs = {"hugging_face": "hf", "open_clip": "open_clip"}[layout]
    return {row[theirs]: np.broadcast_to(np.float32(0), row[f"{theirs}_shape"])
            for row in mapping(model)}  # fmt: skip


@pytest.mark.parametrize("layout", ["hugging_face", "open_clip"])
@pytest.mark.parametrize("model", MODELS)
def test_the_published_sizes_fit_in_both_layouts(model, layout):
    weights = full_size(model, layout)
    cfg = config_of(weights, beside(model))
    assert cfg == SIZES[model]
    leaves = {".".join(map(str, path)): leaf.shape
              for path, leaf in nnx.to_flat_state(abstract_clip(cfg)[1])}  # fmt: skip
    table = rules(cfg, layout)
    assert {name for rule in table for name in rule.names} == set(weights)
    assert {rule.target for rule in table} == set(leaves)
    for rule in table:
        shape = leaves[rule.target][0 if isinstance(rule.source, str) else 1 :]
        assert {rule.transform(weights[name]).shape for name in rule.names} == {shape}
    assert sum(map(np.prod, leaves.values())) == MODELS[model]["text_parameters"]


def as_open_clip(weights, rows):
    """Weights under Hugging Face's names as the mapping says that open_clip holds them."""
    fused, ours = {}, {}
    for row in rows:
        if row["hf"] in weights:
            x = weights[row["hf"]]
            fused.setdefault(row["open_clip"], []).append(x.T if row["op"] == "transpose" else x)
            assert row["op"] in ("copy", "transpose") or row["op"].startswith("rows ")
    for name, parts in fused.items():
        ours[name] = np.concatenate(parts)
    return ours


def filled(weights, cfg):
    return apply_rules(rules(cfg, layout_of(weights)), weights, abstract_clip(cfg)[1],
                       unused=never_read)  # fmt: skip


def test_both_layouts_give_the_same_network():
    ours = clip_text("clip_l/state_dict.safetensors").model()
    theirs = clip_text("clip_l/open_clip_text.safetensors").model()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(theirs))
    # and with a projection that is no square, by open_clip's own table of names
    weights = load_file(FOLDER / "bigg/state_dict.safetensors")
    cfg = clip_text("bigg/state_dict.safetensors").model().cfg
    renamed = as_open_clip(weights, mapping("ViT-bigG-14"))
    assert renamed["text_projection"].shape == (40, 24)
    assert len(renamed) == 53
    jax.tree.map(np.testing.assert_array_equal, filled(weights, cfg), filled(renamed, cfg))


@pytest.mark.parametrize("file", ["state_dict", "open_clip_text"])
def test_clips_other_half_may_be_there_but_nothing_else(file):
    case = clip_text(f"clip_l/{file}.safetensors")
    other = ["text_model.embeddings.position_ids", "vision_model.post_layernorm.weight",
             "visual_projection.weight", "visual.proj", "logit_scale", "attn_mask"]  # fmt: skip
    case.model(**dict.fromkeys(other, np.zeros((2, 2))))
    with pytest.raises(UserError, match=r"1 extra: text_model\.pooler.weight"):
        case.model(**{"text_model.pooler.weight": np.zeros((2, 2))})


class TestConfig:
    def of(self, changes=(), **beside):
        weights = dict(clip_text("clip_l/state_dict.safetensors").weights) | dict(changes)
        weights = {name: x for name, x in weights.items() if x is not None}
        return config_of(weights, beside)

    def test_the_whole_of_clip_says_it_within(self):
        inner = {"num_attention_heads": 8, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
        cfg = self.of(text_config=inner, projection_dim=7, output="penultimate")
        assert (cfg.num_heads, cfg.activation, cfg.norm_epsilon) == (8, "gelu", 1e-6)
        assert (cfg.projection, cfg.output) == (0, "penultimate")

    @pytest.mark.parametrize(
        ("beside", "part"),
        [
            ({}, "neither weights nor config.json tell num_attention_heads and hidden_act"),
            ({"num_attention_heads": 5}, "num_heads = 5"),
            ({"num_attention_heads": "4"}, "num_heads = '4' must be of type int"),
            ({"hidden_act": "relu"}, "activation = 'relu' must be one of 'quick_gelu', 'gelu'"),
            ({"output": "first"}, "output = 'first' must be one of"),
            ({"hidden_size": 768, "num_hidden_layers": 12},
             "another tower: hidden_size = 768, the weights have 32; num_hidden_layers = 12, the"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_named(self, beside, part):
        usual = {"num_attention_heads": 4, "hidden_act": "quick_gelu"} if beside else {}
        with pytest.raises(UserError, match=re.escape(part)) as caught:
            self.of(**usual | beside)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"text_model.embeddings.token_embedding.weight": None}, ": 0 of text_model."),
            ({"token_embedding.weight": np.zeros((3, 3))}, ": 2 of text_model."),
            ({"text_model.encoder.layers.0.mlp.fc1.weight": np.zeros(3)},
             "no matrix text_model.encoder.layers.0.mlp.fc1.weight"),
        ],
    )  # fmt: skip
    def test_what_is_no_text_tower_is_said_to_be_none(self, changes, part):
        with pytest.raises(UserError, match=r"^these are not CLIP's text weights") as caught:
            self.of(changes, num_attention_heads=4, hidden_act="gelu")
        assert part in str(caught.value)
