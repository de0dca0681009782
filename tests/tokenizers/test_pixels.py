import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from enat_jax.tokenizers.pixels import Pixels


@pytest.mark.parametrize("levels", [2, 3, 7, 17, 255, 256])
def test_every_token_survives_decoding_and_encoding(levels):
    pixels = Pixels(levels=levels, grid=(levels, 1))
    token_ids = np.arange(levels, dtype=np.int32)[None]
    np.testing.assert_array_equal(pixels.encode(pixels.decode(token_ids)[..., :1]), token_ids)


def test_a_token_is_drawn_in_the_nearest_grey_in_all_channels():
    images = Pixels(levels=17, grid=(1, 17)).decode(np.arange(17)[None])
    greys = [round(255 * level / 16) for level in range(17)]
    np.testing.assert_array_equal(images[0, 0], np.repeat(np.array(greys)[:, None], 3, axis=1))


def test_a_pixel_gets_the_token_of_the_nearest_grey():
    greys = np.arange(256, dtype=np.uint8)
    token_ids = Pixels(levels=17, grid=(16, 16)).encode(greys.reshape(1, 16, 16, 1))
    np.testing.assert_array_equal(token_ids[0], np.round(greys / 255 * 16))


def test_tokens_run_row_by_row():
    image = np.zeros((1, 2, 3, 1), np.uint8)
    image[0, 1, 0] = 255
    np.testing.assert_array_equal(Pixels(levels=2, grid=(2, 3)).encode(image), [[0, 0, 0, 1, 0, 0]])
    assert Pixels(levels=2, grid=(2, 3)).decode(np.array([[0, 0, 0, 1, 0, 0]]))[0, 1, 0, 0] == 255


def test_a_compiled_tokenizer_gives_the_same():
    pixels = Pixels()
    token_ids = jax.random.randint(jax.random.key(0), (5, 64), 0, pixels.codebook_size)
    images = jax.jit(pixels.decode)(token_ids)
    np.testing.assert_array_equal(images, pixels.decode(token_ids))
    np.testing.assert_array_equal(jax.jit(pixels.encode)(images[..., :1]), token_ids)


def test_the_digits_are_encoded_without_loss():
    greys = load_digits().images[:20]
    images = np.round(greys * 255 / 16).astype(np.uint8)[..., None]
    np.testing.assert_array_equal(Pixels().encode(images), greys.reshape(20, 64))


@pytest.mark.parametrize("levels", [1, 257])
def test_a_number_of_greys_that_bytes_cannot_tell_apart_is_refused(levels):
    with pytest.raises(ValueError, match=rf"levels = {levels}, must lie in \[2, 256\]"):
        Pixels(levels=levels)
