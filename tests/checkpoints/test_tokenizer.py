import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.checkpoints.tokenizer import (
    abstract_tokenizer,
    abstract_vqgan,
    load_tokenizer,
    load_vqgan,
)
from enat_jax.config import TokenizerConfig
from enat_jax.config_file import ConfigError
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.tokenizers.pixels import Pixels
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig

CFG = VQGANConfig(
    channels=4, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, codebook_size=7
)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def write(folder, params, metadata):
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(0, {"ema": params}, metadata=metadata)
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture(scope="module")
def vqgan():
    return VQGAN(CFG, rngs=nnx.Rngs(3))


@pytest.fixture(scope="module")
def params(vqgan):
    return nnx.split(vqgan, nnx.Param)[1]


@pytest.fixture(scope="module")
def workdir(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    write(folder, params, {"kind": "vqgan", "vqgan": dataclasses.asdict(CFG)})
    return folder


def config(workdir, **fields):
    return TokenizerConfig(name="vqgan", grid=(4, 4), weights=str(workdir), **fields)


class TestVQGAN:
    def test_it_encodes_and_decodes_as_the_network_itself(self, workdir, vqgan):
        tokenizer = load_tokenizer(config(workdir), 7)
        assert (tokenizer.name, tokenizer.patch, tokenizer.codebook_size) == ("vqgan", 2, 7)
        images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
        token_ids = tokenizer.encode(tokenizer.params, images)
        np.testing.assert_array_equal(token_ids, vqgan.encode(images))
        decoded = tokenizer.decode(tokenizer.params, token_ids, (4, 4))
        np.testing.assert_allclose(
            decoded, np.clip(vqgan.decode(token_ids, (4, 4)), 0, 1), atol=1e-6
        )

    def test_images_stay_in_range_whatever_the_network_says(self, tmp_path, params):
        loud = jax.tree.map(lambda x: 50 * x, params)
        write(tmp_path, loud, {"vqgan": dataclasses.asdict(CFG)})
        tokenizer = load_tokenizer(config(tmp_path), 7)
        images = tokenizer.decode(tokenizer.params, jnp.arange(16)[None] % 7, (4, 4))
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1

    def test_the_type_is_the_configs(self, workdir):
        cfg, _ = load_vqgan(workdir, dtype="bfloat16")
        assert cfg == dataclasses.replace(CFG, dtype="bfloat16")

    def test_weights_lie_on_every_device_of_the_mesh(self, workdir):
        placement = Placement.of(MeshConfig())
        tokenizer = load_tokenizer(config(workdir), 7, placement)
        for leaf in jax.tree.leaves(tokenizer.params):
            assert leaf.sharding.is_fully_replicated
            assert leaf.sharding.mesh == placement.mesh

    def test_any_codebook_is_taken_where_the_network_has_none_yet(self, workdir):
        assert load_tokenizer(config(workdir), 0).codebook_size == 7


class TestDigest:
    def test_it_is_the_same_for_the_same_weights_and_another_for_others(self, workdir, params):
        digest = load_tokenizer(config(workdir), 7).digest
        assert len(digest) == 64
        assert digest == weights_digest(params)
        changed = jax.tree.map(lambda x: x, params)
        changed["codebook"][...] = changed["codebook"][...].at[0, 0].add(1e-6)
        assert weights_digest(changed) != digest

    def test_it_knows_which_value_belongs_where(self, params):
        swapped = jax.tree.map(lambda x: x, params)
        level = swapped["encoder"]["norm_out"]
        level["scale"][...], level["bias"][...] = level["bias"][...], level["scale"][...]
        assert weights_digest(swapped) != weights_digest(params)

    def test_it_is_the_same_on_every_version_and_machine(self):
        _, abstract = abstract_vqgan(CFG)
        ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract)
        assert weights_digest(ones)[:16] == "d44854b950e0caf8"


class TestShapes:
    def test_a_workdir_tells_the_shapes_of_its_weights(self, workdir):
        described = abstract_tokenizer(config(workdir, dtype="bfloat16"), 7)
        assert described.cfg == dataclasses.replace(CFG, dtype="bfloat16")
        loaded = load_tokenizer(config(workdir), 7)
        assert jax.tree.map(jnp.shape, described.params) == jax.tree.map(jnp.shape, loaded.params)
        assert isinstance(jax.tree.leaves(described.params)[0], jax.ShapeDtypeStruct)

    def test_where_nothing_is_there_yet_they_are_maskgits(self, tmp_path):
        described = abstract_tokenizer(config(tmp_path / "none"), 9)
        assert described.cfg == VQGANConfig(codebook_size=9)

    def test_another_codebook_size_is_named(self, workdir):
        with pytest.raises(ConfigError, match=r"model\.codebook_size = 9, the VQGAN .* has 7"):
            abstract_tokenizer(config(workdir), 9)

    def test_pixels_and_none_have_no_weights(self):
        pixels = abstract_tokenizer(TokenizerConfig(name="pixels", grid=(2, 2)), 17)
        assert jax.tree.leaves(pixels.params) == []
        assert abstract_tokenizer(TokenizerConfig(name="none"), 17) is None


class TestRefusals:
    def test_another_codebook_size_is_named(self, workdir):
        with pytest.raises(ConfigError, match=r"model\.codebook_size = 9, the VQGAN .* has 7"):
            load_tokenizer(config(workdir), 9)

    def test_a_folder_without_checkpoints_is_named(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"tokenizer\.weights = .* is no workdir of a V"):
            load_tokenizer(config(tmp_path / "none"), 7)

    def test_a_run_of_another_model_is_no_vqgan(self, trained):
        with pytest.raises(CheckpointError, match="holds another model than a VQGAN"):
            load_tokenizer(config(trained), 17)


def test_pixels_decode_to_the_greys_of_the_digits():
    tokenizer = load_tokenizer(TokenizerConfig(name="pixels", grid=(2, 3)), 17)
    token_ids = jnp.array([[0, 3, 16, 8, 1, 5]])
    images = tokenizer.decode(tokenizer.params, token_ids, (2, 3))
    expected = Pixels(17, (2, 3)).decode(token_ids)
    np.testing.assert_array_equal(np.rint(np.asarray(images) * 255), expected)
    np.testing.assert_array_equal(tokenizer.encode((), images), token_ids)


def test_no_tokenizer_is_none():
    assert load_tokenizer(TokenizerConfig(name="none"), 17) is None
