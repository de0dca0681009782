"""The network against recordings of the reference's: its modules, its stages and the whole."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.models.import_table import apply_rules
from enat_jax.tokenizers import vqgan
from enat_jax.tokenizers.vqgan import (
    VQGAN,
    Conv,
    GroupNorm,
    Level,
    ResBlock,
    VQGANConfig,
    abstract_vqgan,
)
from enat_jax.tokenizers.vqgan_weights import rules, sizes_from_weights
from tests.golden.vqgan.load_state import load_state
from tests.support.golden import GOLDEN

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    """The recorded network; tests leave it as it is."""
    weights = load_state(GOLDEN / "vqgan")
    cfg = sizes_from_weights(weights)
    graphdef, abstract = abstract_vqgan(cfg)
    return nnx.merge(graphdef, apply_rules(rules(cfg, "torch"), weights, abstract))


@pytest.fixture(scope="module")
def recorded():
    """Every recorded array by key, channels last."""
    arrays = dict(np.load(GOLDEN / "vqgan/io.npz"))
    last = {k: x.transpose(0, 2, 3, 1) if x.ndim == 4 else x for k, x in arrays.items()}
    return {k: jnp.asarray(x) for k, x in last.items()}


@pytest.fixture(scope="module")
def latents(model, recorded):
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.encoder)(recorded["image"])


@pytest.fixture(scope="module")
def pictures(model, recorded):
    with jax.default_matmul_precision("highest"):
        decode = jax.jit(model.decode, static_argnums=1)
        return decode(recorded["indices"].reshape(2, 16), (4, 4))


def close(ours, theirs, tolerance=TOLERANCE):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def spied(monkeypatch, kinds, run):
    """What goes into and comes out of every module of these kinds, by the module's id."""
    passed = {}

    def spy(call):
        def called(self, x):
            passed[id(self)] = x, call(self, x)
            return passed[id(self)][1]

        return called

    for kind in kinds:
        monkeypatch.setattr(kind, "__call__", spy(kind.__call__))

    def observed():
        run()
        return passed

    return jax.jit(observed)()


MODULES = {
    "down0.block0": lambda model: model.encoder.levels[0].blocks[0],
    "down2.block0": lambda model: model.encoder.levels[2].blocks[0],
    "up1.block0": lambda model: model.decoder.levels[3].blocks[0],
    "decoder.norm_out": lambda model: model.decoder.norm_out,
    "decoder.norm_out_small": lambda model: model.decoder.norm_out,
}

STAGES = {
    "encoder.mid.block_2": lambda model: model.encoder.middle[1],
    "encoder.norm_out": lambda model: model.encoder.norm_out,
    "decoder.conv_in": lambda model: model.decoder.conv_in,
    "decoder.mid.block_2": lambda model: model.decoder.middle[1],
    "decoder.up.4.block.1": lambda model: model.decoder.levels[0].blocks[1],
    "decoder.up.3.block.1": lambda model: model.decoder.levels[1].blocks[1],
}

WHOLE = {
    "image", "encoder_out", "indices", "indices_flat", "quant", "codebook_quant", "quant_loss",
    "dist_margin", "decode", "random_ids", "random_decode",
}  # fmt: skip
RESIZING = {"encoder.down0.downsample", "decoder.up3.upsample"}


def test_every_recorded_array_is_compared(recorded):
    modules = {f"module/{name}/{end}" for name in {*MODULES, *RESIZING} for end in ("in", "out")}
    assert set(recorded) == WHOLE | modules | {f"stage/{name}/out" for name in STAGES}


class TestModules:
    @pytest.mark.parametrize("name", MODULES)
    def test_a_module_gives_what_was_recorded(self, model, recorded, name):
        ours = jax.jit(MODULES[name](model))(recorded[f"module/{name}/in"])
        close(ours, recorded[f"module/{name}/out"], 1e-5)

    def test_the_norms_epsilon_shows_in_the_small_input(self, model, recorded, monkeypatch):
        monkeypatch.setattr(vqgan, "EPSILON", 1e-5)
        ours = model.decoder.norm_out(recorded["module/decoder.norm_out_small/in"])
        assert abs(ours - recorded["module/decoder.norm_out_small/out"]).max() > 0.1

    def test_the_way_up_repeats_pixels_and_convolves(self, model, recorded):
        level = nnx.clone(model.decoder.levels[1])
        level.blocks = nnx.List([])
        ours = level(recorded["module/decoder.up3.upsample/in"])
        close(ours, recorded["module/decoder.up3.upsample/out"], 1e-5)

    def test_the_way_down_is_the_mean_of_four_pixels(self, model, recorded, monkeypatch):
        def halved(x):
            return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

        name = "module/encoder.down0.downsample"
        close(halved(recorded[f"{name}/in"]), recorded[f"{name}/out"], 1e-6)
        passed = spied(monkeypatch, [Level], lambda: model.encoder(recorded["image"][:1]))
        levels = [passed[id(level)] for level in model.encoder.levels]
        for (_, before), (after, _) in itertools.pairwise(levels):
            close(after, halved(before), 1e-6)


def test_every_stage_of_a_reconstruction_gives_what_was_recorded(model, recorded, monkeypatch):
    def reconstruct():
        model.decode(model.encode(recorded["image"][:1]), (4, 4))

    passed = spied(monkeypatch, [Conv, GroupNorm, ResBlock], reconstruct)
    for name, find in STAGES.items():
        _, out = passed[id(find(model))]
        close(out, recorded[f"stage/{name}/out"])


class TestEncode:
    def test_latents_are_the_recorded_ones(self, latents, recorded):
        close(latents, recorded["encoder_out"])

    def test_token_ids_are_exactly_the_recorded_ones(self, model, recorded):
        token_ids = np.asarray(jax.jit(model.encode)(recorded["image"]))
        assert token_ids.dtype == np.int32
        np.testing.assert_array_equal(token_ids, recorded["indices"].reshape(2, 16))
        np.testing.assert_array_equal(token_ids.ravel(), recorded["indices_flat"])

    def test_codes_distances_and_loss_are_the_recorded_ones(self, model, latents, recorded):
        codebook = model.codebook[...]
        codes = codebook[model.nearest(latents)]
        np.testing.assert_array_equal(codes, recorded["codebook_quant"])
        close(latents + (codes - latents), recorded["quant"], 1e-6)
        close(1.25 * jnp.mean((codes - latents) ** 2), recorded["quant_loss"], 1e-6)
        distances = jnp.sum((latents[..., None, :] - codebook) ** 2, axis=-1).reshape(32, -1)
        two_least = jnp.sort(distances, axis=1)[:, :2]
        close(two_least[:, 1] - two_least[:, 0], recorded["dist_margin"])

    def test_of_equally_near_entries_the_first_is_taken(self, model, recorded):
        twins = nnx.clone(model)
        twins.codebook[...] = jnp.tile(model.codebook[...][:32], (2, 1))
        assert jax.jit(twins.encode)(recorded["image"]).max() < 32


class TestDecode:
    def test_pictures_are_the_recorded_ones(self, pictures, recorded):
        close(pictures, recorded["decode"])

    def test_so_are_those_of_random_token_ids_at_twice_the_size(self, model, recorded):
        token_ids = recorded["random_ids"].reshape(1, 64)
        ours = jax.jit(model.decode, static_argnums=1)(token_ids, (8, 8))
        assert ours.shape == (1, 128, 128, 3)
        close(ours, recorded["random_decode"])


class TestResolutions:
    @pytest.mark.parametrize(("y", "x"), [(16, 16), (32, 48), (80, 16), (512, 512)])
    def test_any_multiple_of_16_pixels_is_a_grid_of_tokens(self, model, y, x):
        tokens = y * x // 256
        images = jax.ShapeDtypeStruct((2, y, x, 3), jnp.float32)
        assert jax.eval_shape(model.encode, images).shape == (2, tokens)
        token_ids = jax.ShapeDtypeStruct((2, tokens), jnp.int32)
        decoded = jax.eval_shape(lambda ids: model.decode(ids, (y // 16, x // 16)), token_ids)
        assert decoded.shape == images.shape

    @pytest.mark.parametrize(("y", "x", "wrong"), [(40, 32, 40), (32, 8, 8), (32, 250, 250)])
    def test_others_are_refused_in_one_line(self, model, y, x, wrong):
        with pytest.raises(ValueError, match=rf"^image side {wrong} must be a multiple of 16$"):
            model.encode(jnp.zeros((1, y, x, 3)))


@pytest.fixture(scope="module")
def half(model):
    """The recorded network with activations in bfloat16."""
    graphdef, _ = abstract_vqgan(dataclasses.replace(model.cfg, dtype="bfloat16"))
    return nnx.merge(graphdef, nnx.state(model))


class TestBfloat16:
    def test_pictures_stay_near_float32_and_are_float32(self, half, pictures, recorded):
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(half))} == {"float32"}
        ours = jax.jit(half.decode, static_argnums=1)(recorded["indices"].reshape(2, 16), (4, 4))
        assert ours.dtype == jnp.float32
        error = jnp.sqrt(jnp.mean((ours - pictures) ** 2)) / pictures.std()
        assert error < 0.05, "it was 0.036"

    def test_most_token_ids_stay_the_same(self, half, recorded):
        same = jax.jit(half.encode)(recorded["image"]) == recorded["indices"].reshape(2, 16)
        assert same.mean() >= 0.8, "it was 30 of 32"


def test_the_defaults_are_the_published_sizes():
    cfg = VQGANConfig()
    assert (cfg.patch, cfg.widths) == (16, [128, 128, 256, 256, 512])
    _, abstract = abstract_vqgan(cfg)
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in abstract.items()}
    assert sizes == {"encoder": 23775104, "decoder": 30478339, "codebook": 1024 * 256}


def test_a_new_network_tells_images_apart():
    cfg = VQGANConfig(channels=4, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=4,
                      codebook_size=16)  # fmt: skip

    @jax.jit
    def encode(key):
        return VQGAN(cfg, rngs=nnx.Rngs(key)).encode(jax.random.uniform(key, (1, 8, 8, 3)))

    assert len(set(encode(jax.random.key(0)).ravel().tolist())) > 1
