"""The FLOP formula against the published sizes and the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from enat_jax.tokenizers.flops import decode_flops, encode_flops
from enat_jax.tokenizers.vqgan import VQGAN, VQGANConfig

# Of a side at which the zeros around the image hardly count (the compiler leaves out products
# with them), and wide enough that norms and activations stay a few percent.
CFG = VQGANConfig(
    channels=64,
    channel_multipliers=(1, 2, 3),
    num_res_blocks=1,
    latent_channels=256,
    codebook_size=512,
)
SIDE = 512


def counted(method, *shapes):
    """FLOPs that the compiler counts in a method of the network."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: VQGAN(CFG, rngs=nnx.Rngs(0))))
    run = jax.jit(lambda params, *arrays: method(nnx.merge(graphdef, params), *arrays))
    return run.lower(params, *shapes).cost_analysis()["flops"]


def test_encoding_costs_what_the_formula_says():
    images = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    assert counted(VQGAN.encode, images) == pytest.approx(encode_flops(CFG, SIDE), rel=0.005)


def test_decoding_costs_what_the_formula_says():
    grid = (SIDE // CFG.patch, SIDE // CFG.patch)
    token_ids = jax.ShapeDtypeStruct((1, grid[0] * grid[1]), jnp.int32)
    count = counted(lambda model, token_ids: model.decode(token_ids, grid), token_ids)
    assert count == pytest.approx(decode_flops(CFG, SIDE), rel=0.005)


def test_the_published_decoder_costs_187_gflop_at_256_pixels():
    assert decode_flops(VQGANConfig(), 256) == pytest.approx(187e9, rel=0.02)


def test_convolutions_cost_as_much_per_pixel_at_every_resolution():
    for flops in (encode_flops, decode_flops):
        assert flops(VQGANConfig(), 512) == 4 * flops(VQGANConfig(), 256)
