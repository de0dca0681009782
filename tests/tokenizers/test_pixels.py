import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from enat_jax.tokenizers.pixels import Pixels
from enat_jax.tokenizers.protocol import Tokenizer, as_uint8


def in_colour(greys):
    """Grey levels [b y x] out of 255 as images in [0, 1]."""
    return jnp.repeat(jnp.asarray(greys, jnp.float32)[..., None] / 255, 3, axis=-1)


@pytest.mark.parametrize("levels", [2, 3, 7, 17, 255, 256])
def test_every_token_survives_decoding_and_encoding_compiled_or_not(levels):
    pixels = Pixels(levels)
    assert isinstance(pixels, Tokenizer)
    token_ids = jnp.arange(levels, dtype=jnp.int32)[None]
    images = pixels.decode((), token_ids, (1, levels))
    np.testing.assert_array_equal(pixels.encode((), images), token_ids)
    compiled = jax.jit(lambda ids: pixels.decode((), ids, (1, levels)))(token_ids)
    np.testing.assert_array_equal(as_uint8(compiled), as_uint8(images))
    np.testing.assert_array_equal(jax.jit(pixels.encode)((), compiled), token_ids)


def test_a_token_is_the_nearest_grey_in_all_channels_and_stands_for_the_greys_next_to_it():
    images = as_uint8(Pixels(17).decode((), jnp.arange(17)[None], (1, 17)))
    expected = np.round(255 * np.arange(17) / 16)
    np.testing.assert_array_equal(images[0, 0], np.repeat(expected[:, None], 3, axis=1))
    greys = np.arange(256).reshape(1, 16, 16)
    token_ids = Pixels(17).encode((), in_colour(greys))
    np.testing.assert_array_equal(token_ids[0], np.round(greys.ravel() / 255 * 16))


def test_tokens_run_row_by_row():
    token_ids = jnp.array([[0, 0, 0, 1, 0, 0]])
    images = Pixels(2).decode((), token_ids, (2, 3))
    assert images[0, 1, 0, 0] == 1
    np.testing.assert_array_equal(Pixels(2).encode((), images), token_ids)


def test_the_digits_are_encoded_without_loss():
    greys = load_digits().images[:20]
    token_ids = Pixels(17).encode((), in_colour(np.round(greys * 255 / 16)))
    np.testing.assert_array_equal(token_ids, greys.reshape(20, 64))
