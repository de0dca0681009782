import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from enat_jax.checkpoints.digests import weights_digest
from enat_jax.checkpoints.store import CheckpointError, Checkpoints
from enat_jax.checkpoints.tokenizer import load_tokenizer, load_vqgan
from enat_jax.config import TokenizerConfig
from enat_jax.errors import UserError
from enat_jax.parallel.placement import MeshConfig, Placement
from enat_jax.tokenizers.pixels import Pixels
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig, VQGANTokenizer, abstract_vqgan

CFG = VQGANConfig(
    channels=4, channel_multipliers=(1, 2), num_res_blocks=1, latent_channels=3, codebook_size=7
)


def write(folder, params, metadata):
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(0, {"ema": params}, metadata=metadata)
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture(scope="module")
def params():
    return nnx.split(jax.jit(lambda: VQGAN(CFG, rngs=nnx.Rngs(3)))(), nnx.Param)[1]


@pytest.fixture(scope="module")
def workdir(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqgan")
    write(folder, params, {"kind": "vqgan", "vqgan": dataclasses.asdict(CFG)})
    return folder


def config(workdir, **fields):
    return TokenizerConfig(name="vqgan", grid=(4, 4), weights=str(workdir), **fields)


def test_a_vqgan_encodes_and_decodes_as_its_network(workdir, params):
    tokenizer = load_tokenizer(config(workdir), 7)
    assert (tokenizer.name, tokenizer.patch, tokenizer.codebook_size) == ("vqgan", 2, 7)
    network = nnx.merge(abstract_vqgan(CFG)[0], params)
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    token_ids = jax.jit(tokenizer.encode)(tokenizer.params, images)
    np.testing.assert_array_equal(token_ids, jax.jit(network.encode)(images))
    decoded = jax.jit(tokenizer.decode, static_argnums=2)(tokenizer.params, token_ids, (4, 4))
    raw = jax.jit(network.decode, static_argnums=1)(token_ids, (4, 4))
    np.testing.assert_allclose(decoded, np.clip(raw, 0, 1), atol=1e-6)


def test_images_stay_in_range_whatever_the_network_says(params):
    loud = jax.tree.map(lambda x: 50 * x, params)
    decode = jax.jit(VQGANTokenizer(CFG, loud, "").decode, static_argnums=2)
    images = decode(loud, jnp.arange(16)[None] % 7, (4, 4))
    assert (images.min(), images.max()) == (0, 1)


def test_weights_are_replicated_and_of_the_configs_type(workdir):
    placement = Placement.of(MeshConfig())
    tokenizer = load_tokenizer(config(workdir, dtype="bfloat16"), 0, placement)  # any codebook
    assert tokenizer.cfg == dataclasses.replace(CFG, dtype="bfloat16")
    assert {leaf.sharding for leaf in jax.tree.leaves(tokenizer.params)} == {placement.replicated}


def test_the_digest_is_that_of_the_weights(workdir, params):
    assert load_tokenizer(config(workdir), 7).digest == weights_digest(params)
    changed = jax.tree.map(lambda x: x, params)
    changed["codebook"][...] = changed["codebook"][...].at[0, 0].add(1e-6)
    assert weights_digest(changed) != weights_digest(params)
    swapped = jax.tree.map(lambda x: x, params)
    norm = swapped["encoder"]["norm_out"]
    norm["scale"][...], norm["bias"][...] = norm["bias"][...], norm["scale"][...]
    assert weights_digest(swapped) != weights_digest(params)


def test_the_digest_is_the_same_on_every_version_and_machine():
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract_vqgan(CFG)[1])
    assert weights_digest(ones)[:16] == "d44854b950e0caf8"


def test_what_is_no_fitting_vqgan_is_refused(workdir, params, tmp_path):
    with pytest.raises(UserError, match=r"model\.codebook_size = 9, the VQGAN .* has 7"):
        load_tokenizer(config(workdir), 9)
    with pytest.raises(CheckpointError, match=r"tokenizer\.weights = .* is no workdir of a V"):
        load_vqgan(tmp_path)
    write(tmp_path, params, {"config": {}})
    with pytest.raises(CheckpointError, match="holds another model than a VQGAN"):
        load_vqgan(tmp_path)


def test_pixels_and_none_have_no_weights():
    assert load_tokenizer(TokenizerConfig(name="pixels", grid=(2, 3)), 17) == Pixels(17)
    assert load_tokenizer(TokenizerConfig(name="none"), 17) is None
