import jax
import jax.numpy as jnp
import numpy as np
import pytest

from enat_jax.tokenizers.config import PatchesConfig
from enat_jax.tokenizers.patches import PatchesTokenizer, abstract_patches, cut, patches_params
from enat_jax.tokenizers.protocol import Tokenizer

CFG = PatchesConfig(patch=2, codebook_size=5)
CODEBOOK = np.random.default_rng(0).random((5, 12), np.float32)


@pytest.fixture
def tokenizer():
    return PatchesTokenizer(CFG, patches_params(jnp.asarray(CODEBOOK)), "ab")


def test_it_is_a_tokenizer_whose_weights_are_its_codebook(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.name, tokenizer.patch, tokenizer.codebook_size) == ("patches", 2, 5)
    shapes = [jax.tree.map(jnp.shape, each) for each in (tokenizer.params, abstract_patches(CFG))]
    assert shapes[0] == shapes[1]


def test_a_token_is_the_nearest_patch_row_by_row(tokenizer):
    images = np.random.default_rng(1).random((3, 4, 6, 3), np.float32)
    token_ids = np.asarray(jax.jit(tokenizer.encode)(tokenizer.params, images))
    for image, row in zip(images, token_ids, strict=True):
        squares = [image[y : y + 2, x : x + 2].ravel() for y in (0, 2) for x in (0, 2, 4)]
        distances = [np.square(CODEBOOK - square).sum(axis=1) for square in squares]
        assert row.tolist() == np.argmin(distances, axis=1).tolist()


def test_what_is_decoded_is_patches_side_by_side_and_is_encoded_as_it_was(tokenizer):
    token_ids = jnp.asarray([[0, 1, 2, 3, 4, 0]])
    images = tokenizer.decode(tokenizer.params, token_ids, (2, 3))
    assert images.shape == (1, 4, 6, 3)
    np.testing.assert_array_equal(images[0, 2:4, 0:2].ravel(), CODEBOOK[3])
    np.testing.assert_array_equal(cut(images, 2)[0], CODEBOOK[token_ids[0]])
    np.testing.assert_array_equal(tokenizer.encode(tokenizer.params, images), token_ids)
