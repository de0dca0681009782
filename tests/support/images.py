"""Small pictures, sources of them, and tokenizers without weights."""

import io
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from einops import reduce
from PIL import Image

from enat_jax.data.images import ImageSource

LEVELS = 50


def noise(width, height, seed=0):
    """A picture of random colours."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def encoded(image, form="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png(seed, width=18, height=20):
    """The bytes of a picture of random colours."""
    return encoded(noise(width, height, seed))


def numbered(count, broken=()):
    """8 x 8 images that show their number, but 200 in the right half; some are broken."""

    def data(index):
        values = np.full((8, 8, 3), index, np.uint8)
        values[:, 4:] = 200
        return encoded(Image.fromarray(values))[: 45 if index in broken else None]

    return ImageSource("numbers", "", ("even", "odd"), count, lambda i: i % 2, str, data)


@dataclass(frozen=True)
class Patches:
    """One token per 4 x 4 pixels: their mean red, in 50 levels."""

    name: str = "patches"
    digest: str = "abcd"
    codebook_size: int = LEVELS
    patch: int = 4
    params: tuple = ()

    def encode(self, params, images):
        means = reduce(images[..., 0], "b (y u) (x v) -> b (y x)", "mean", u=4, v=4)
        return jnp.minimum(means * LEVELS, LEVELS - 1).astype(jnp.int32)

    def decode(self, params, token_ids, grid):
        raise NotImplementedError


@dataclass(frozen=True)
class Letters:
    """Of captions: the number of their letters, then padding."""

    name: str = "clip"
    digest: str = "ffee"
    length: int = 3
    vocabulary: int = 100

    def __call__(self, captions):
        return np.array([[len(each), 0, 0] for each in captions], np.int32).reshape(-1, 3)


@dataclass(frozen=True)
class LetterEncoder:
    """Has a digest, and reads nothing."""

    digest: str
    name: str = "clip"
    width: int = 4
    params: tuple = ()

    def encode(self, params, ids):
        raise NotImplementedError
