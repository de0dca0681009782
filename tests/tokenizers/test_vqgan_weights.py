"""Both published layouts of a VQGAN's weights, at their full size and in every refusal."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from flax import nnx

from enat_jax.checkpoints.tokenizer import abstract_vqgan
from enat_jax.models.import_table import ConvertError, apply_rules
from enat_jax.tokenizers.vqgan import VQGANConfig
from enat_jax.tokenizers.vqgan_weights import (
    layout_of,
    never_read,
    rules,
    sizes_from_weights,
    window_first,
)
from tests.golden.vqgan.load_state import load_state
from tests.support.golden import GOLDEN

RECORDED = VQGANConfig(channels=32, latent_channels=32, codebook_size=64)
SMALL = VQGANConfig(
    channels=8,
    channel_multipliers=(1, 3),
    num_res_blocks=3,
    latent_channels=5,
    codebook_size=7,
)
CONFIGS = {"recorded": RECORDED, "published": VQGANConfig(), "small": SMALL}


@functools.cache
def abstract(cfg):
    return abstract_vqgan(cfg)[1]


def imported(weights, cfg=None):
    cfg = cfg or sizes_from_weights(weights)
    table = rules(cfg, layout_of(weights))
    return apply_rules(table, weights, abstract(cfg), unused=never_read)


def named(state):
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def made(cfg, layout, dtype=np.float32):
    """Weights of a config by the layout's names: zeros that take no memory."""
    shapes = {name: leaf.shape for name, leaf in named(abstract(cfg)).items()}
    weights = {}
    for rule in rules(cfg, layout):
        shape = shapes[rule.target]
        if layout == "torch" and len(shape) == 4:
            shape = (shape[3], shape[2], shape[0], shape[1])
        weights[rule.source] = np.broadcast_to(dtype(0), shape)
    return weights


def flax_names(torch_weights, cfg):
    """The same weights as MaskGIT's file would have them."""
    theirs = {rule.target: rule for rule in rules(cfg, "torch")}
    return {
        rule.source: theirs[rule.target].transform(torch_weights[theirs[rule.target].source])
        for rule in rules(cfg, "flax")
    }


@pytest.fixture(scope="module")
def weights():
    return load_state(GOLDEN / "vqgan")


@pytest.fixture(params=["torch", "flax"])
def either(request, weights):
    """The recorded weights, to be changed, in each layout."""
    return dict(weights) if request.param == "torch" else flax_names(weights, RECORDED)


def refusal(weights, cfg=RECORDED):
    with pytest.raises(ConvertError) as caught:
        imported(weights, cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestTables:
    @pytest.mark.parametrize("layout", ["torch", "flax"])
    @pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
    def test_there_is_one_rule_per_parameter(self, cfg, layout):
        table = rules(cfg, layout)
        assert sorted(rule.target for rule in table) == sorted(named(abstract(cfg)))
        assert len({rule.source for rule in table}) == len(table)

    def test_the_reference_has_these_names_and_shapes(self, weights):
        shapes = json.loads((GOLDEN / "vqgan/shapes.json").read_text())
        assert {name: list(x.shape) for name, x in weights.items()} == shapes
        assert {rule.source for rule in rules(RECORDED, "torch")} == set(shapes)

    def test_flax_numbers_modules_in_the_order_in_which_maskgit_calls_them(self):
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

    def test_widening_blocks_alone_have_a_shortcut(self):
        table = {rule.source for rule in rules(VQGANConfig(), "flax")}
        assert sorted(name for name in table if "ResBlock" in name and "Conv_2" in name) == [
            "decoder.ResBlock_4.Conv_2.kernel",  # 512 to 256 channels
            "decoder.ResBlock_8.Conv_2.kernel",  # 256 to 128
            "encoder.ResBlock_4.Conv_2.kernel",  # 128 to 256
            "encoder.ResBlock_8.Conv_2.kernel",  # 256 to 512
        ]

    def test_a_kernel_gets_its_window_first(self):
        kernel = window_first(np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7))
        assert kernel.shape == (5, 7, 3, 2)
        assert kernel[4, 6, 2, 1] == 2 * 3 * 5 * 7 - 1
        assert kernel[0, 1, 0, 0] == 1


class TestImport:
    @pytest.mark.parametrize("layout", ["torch", "flax"])
    @pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
    def test_weights_tell_the_sizes(self, cfg, layout):
        weights = made(cfg, layout)
        assert layout_of(weights) == layout
        assert sizes_from_weights(weights) == cfg

    def test_both_layouts_give_the_same_network(self, weights):
        torch = named(imported(weights))
        flax = named(imported(flax_names(weights, RECORDED)))
        assert torch.keys() == flax.keys()
        for name, leaf in torch.items():
            np.testing.assert_array_equal(leaf, flax[name])

    def test_parameters_are_float32(self):
        state = imported(made(SMALL, "flax", np.float16))
        assert {str(leaf.dtype) for leaf in named(state).values()} == {"float32"}

    def test_a_widths_common_divisor_counts_as_channels(self):
        doubled = dataclasses.replace(SMALL, channel_multipliers=(2, 6))
        same = dataclasses.replace(SMALL, channels=16, channel_multipliers=(1, 3))
        assert sizes_from_weights(made(doubled, "torch")) == same

    def test_what_training_keeps_beside_the_network_may_be_there(self, weights):
        beside = {"loss.discriminator.main.0.weight": np.zeros((64, 3, 4, 4))}
        imported({**weights, **beside})
        assert "1 extra: lossy" in refusal({**weights, "lossy": np.zeros(1)})


class TestRefusal:
    def test_missing_extra_and_misshapen_tensors_are_all_named_at_once(self, either):
        names = sorted(either)
        missing, misshapen = names[5], names[-9]
        del either[missing]
        either[misshapen] = np.zeros((2, 3))
        either["quant_conv.weight"] = either["extra"] = np.zeros((32, 32, 1, 1))
        message = refusal(either)
        assert f"1 missing: {missing};" in message
        assert "2 extra: extra, quant_conv.weight;" in message
        assert f"1 misshapen: {misshapen} (2, 3) for " in message

    def test_attention_is_refused(self, weights):
        # taming's own VQGANs have it; without it they would decode to something else
        assert "1 extra: encoder.mid.attn_1.q.weight" in refusal(
            {**weights, "encoder.mid.attn_1.q.weight": np.zeros((128, 128, 1, 1))}
        )

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            ({"quantize.embedding.weight": None}, "0 of quantize.embedding.weight, quantizer.code"),
            ({"quantizer.codebook": np.zeros((4, 4))}, "2 of quantize.embedding.weight, quantizer"),
            ({"quantize.embedding.weight": np.zeros(64)}, "codebook (64,), 5 levels, and 10"),
            ({"quantize.embedding.weight": np.zeros((0, 4))}, "codebook (0, 4), 5 levels"),
            ({"encoder.down.5.block.0.conv1.weight": np.zeros(1)}, "6 levels, and 11 residual"),
            ({"encoder.down.4.block.0.conv1.weight": np.zeros(9)},
             "no kernel encoder.down.4.block.0.conv1.weight"),
            ({"encoder.down.0.block.0.conv1.weight": np.zeros((0, 32, 3, 3))},
             "no kernel encoder.down.0.block.0.conv1.weight"),
        ],
    )  # fmt: skip
    def test_what_is_no_vqgan_is_said_to_be_none(self, weights, change, part):
        changed = {name: x for name, x in {**weights, **change}.items() if x is not None}
        with pytest.raises(ConvertError, match=r"^these are not a VQGAN's weights: ") as caught:
            sizes_from_weights(changed)
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_other_networks_are_said_to_be_no_vqgan(self):
        for other in ({}, {"w": np.zeros(3)}, {"quantizer.codebook": np.zeros((3, 3))}):
            with pytest.raises(ConvertError, match="not a VQGAN's weights"):
                sizes_from_weights(other)
