"""Both published layouts of a VQGAN's weights: which tensor goes where, and what they tell."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from enat_jax.errors import UserError
from enat_jax.tokenizers.vqgan import VQGANConfig
from enat_jax.tokenizers.vqgan_weights import layout_of, rules, sizes_from_weights
from tests.support.golden import GOLDEN
from tests.support.imports import RECORDED_VQGAN, SMALL_VQGAN, published_vqgan, recorded

CONFIGS = {"recorded": RECORDED_VQGAN, "published": VQGANConfig(), "small": SMALL_VQGAN}


def test_the_reference_has_these_names_and_shapes():
    shapes = json.loads((GOLDEN / "vqgan/shapes.json").read_text())
    assert {name: list(x.shape) for name, x in recorded("vqgan").weights.items()} == shapes
    assert {rule.source for rule in rules(RECORDED_VQGAN, "torch")} == set(shapes)


def test_flax_numbers_modules_in_the_order_in_which_maskgit_calls_them():
    table = {rule.target: rule.source for rule in rules(VQGANConfig(), "flax")}

    def where(*paths):
        return [table[path].split(".")[1] for path in paths]

    levels, inner = range(5), "conv_in.kernel"
    encoder = [f"encoder.levels.{n}.blocks.{b}.{inner}" for n in levels for b in range(2)]
    encoder += [f"encoder.middle.{b}.{inner}" for b in range(2)]
    assert where(*encoder) == [f"ResBlock_{n}" for n in range(12)]
    decoder = [f"decoder.middle.{b}.{inner}" for b in range(2)]
    decoder += [f"decoder.levels.{n}.blocks.{b}.{inner}" for n in levels for b in range(2)]
    assert where(*decoder) == [f"ResBlock_{n}" for n in range(12)]
    ups = [f"decoder.levels.{n}.upsample.bias" for n in range(4)]
    convolutions = where("decoder.conv_in.bias", *ups, "decoder.conv_out.bias")
    assert convolutions == [f"Conv_{n}" for n in range(6)]


def test_widening_blocks_alone_have_a_shortcut():
    table = {rule.source for rule in rules(VQGANConfig(), "flax")}
    assert sorted(name for name in table if "ResBlock" in name and "Conv_2" in name) == [
        "decoder.ResBlock_4.Conv_2.kernel",  # 512 to 256 channels
        "decoder.ResBlock_8.Conv_2.kernel",  # 256 to 128
        "encoder.ResBlock_4.Conv_2.kernel",  # 128 to 256
        "encoder.ResBlock_8.Conv_2.kernel",  # 256 to 512
    ]


def test_both_layouts_give_the_same_network():
    torch, flax = (nnx.state(recorded(name).model()) for name in ("vqgan", "vqgan_flax"))
    jax.tree.map(np.testing.assert_array_equal, torch, flax)


@pytest.mark.parametrize("layout", ["torch", "flax"])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_weights_tell_the_sizes(cfg, layout):
    weights = published_vqgan(cfg, layout)
    assert layout_of(weights) == layout
    assert sizes_from_weights(weights) == cfg


def test_a_widths_common_divisor_counts_as_channels():
    doubled = dataclasses.replace(SMALL_VQGAN, channel_multipliers=(2, 6))
    same = dataclasses.replace(SMALL_VQGAN, channels=16, channel_multipliers=(1, 3))
    assert sizes_from_weights(published_vqgan(doubled, "torch")) == same


def test_what_training_keeps_beside_may_be_there_but_no_attention():
    case = recorded("vqgan")
    case.model(**{"loss.discriminator.main.0.weight": np.zeros((64, 3, 4, 4))})
    # taming's own VQGANs have it; without it they would decode to something else
    with pytest.raises(UserError, match=r"1 extra: encoder.mid.attn_1.q.weight$"):
        case.model(**{"encoder.mid.attn_1.q.weight": np.zeros((128, 128, 1, 1))})


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"quantize.embedding.weight": None}, "0 of quantize.embedding.weight, quantizer.codebook"),
        ({"quantizer.codebook": np.zeros((4, 4))}, "2 of quantize.embedding.weight, quantizer"),
        ({"quantize.embedding.weight": np.zeros(64)}, "codebook (64,), 5 levels, and 10"),
        ({"quantize.embedding.weight": np.zeros((0, 4))}, "codebook (0, 4), 5 levels"),
        ({"encoder.down.5.block.0.conv1.weight": np.zeros(1)}, "6 levels, and 11 residual"),
        ({"encoder.down.4.block.0.norm2.weight": None},
         "no vector encoder.down.4.block.0.norm2.weight"),
        ({"encoder.down.0.block.0.norm2.weight": np.zeros(0)},
         "no vector encoder.down.0.block.0.norm2.weight"),
    ],
)  # fmt: skip
def test_what_is_no_vqgan_is_said_to_be_none(change, part):
    weights = {**recorded("vqgan").weights, **change}
    with pytest.raises(UserError, match=r"^these are not a VQGAN's weights: ") as caught:
        sizes_from_weights({name: x for name, x in weights.items() if x is not None})
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
